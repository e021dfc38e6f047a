"""SIGKILL at random moments of a build: what is left, and whether running it again gives the same cache.

    python -m pipelines.measure.cache.kills --kills 50 -o record.json

Each round builds a small cache in a process group of its own (every fifth with two dask workers), kills the whole group
after a random share of the time a build takes, checks that every case is either whole or not there, runs the build
again to its end, and compares the content digest of every case with that of a build nobody interrupted.
"""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.verify import verify_cache
from fastnnunet.specs.cache import CacheSpec
from pipelines.measure.head import arguments, header, put
from tests.cache_fakes import FakeCases, FakeFactory, digests, make_job

SHAPES = {f"case{i:02d}": (20 + i, 24, 26) for i in range(8)}
DASK_EVERY = 5
READY = "ready"


def job_at(root: Path):
    factory = FakeFactory(unseen=dict.fromkeys(SHAPES, (0,)), delay_s=0.02)
    return make_job(root, cases=FakeCases(shapes=dict(SHAPES)), factory=factory, spec=CacheSpec(level=9))


def start(root: Path, workers: int) -> subprocess.Popen[str]:
    """A build in a process group of its own, which has imported everything and is about to begin."""
    child = "import sys; from pipelines.measure.cache import kills; kills.build(sys.argv[1], int(sys.argv[2]))"
    command = [sys.executable, "-c", child, str(root), str(workers)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    if process.stdout.readline().strip() != READY:
        raise RuntimeError(f"the build did not start: {' '.join(command)}")
    return process


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def uninterrupted_seconds(root: Path, workers: int) -> float:
    process = start(root, workers)
    begin(process)
    started = time.perf_counter()
    if process.wait() != 0:
        raise RuntimeError(f"a build nobody interrupted failed with {process.returncode}")
    return time.perf_counter() - started


def measure(kills: int, seed: int = 0) -> dict[str, Any]:
    """The record of so many kills."""
    rng = np.random.default_rng(seed)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        expected = digests(build_cache(job_at(Path(folder) / "reference")))
        seconds: dict[int, float] = {}
        for number in itertools.count():
            if sum(not r["finished_before_the_kill"] for r in rounds) == kills:
                break
            workers = 2 if number % DASK_EVERY == DASK_EVERY - 1 else 0
            if workers not in seconds:
                seconds[workers] = uninterrupted_seconds(Path(folder) / f"timed{workers}", workers)
            root = Path(folder) / f"root{number}"
            delay = float(rng.uniform(0, seconds[workers]))
            process = start(root, workers)
            begin(process)
            time.sleep(delay)
            finished_before = process.poll() is not None
            if not finished_before:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            job = job_at(root)
            left = job.open()
            problems = {} if left is None else {case: left.problem(case, deep=True) for case in left.cases}
            stored = [case for case, problem in problems.items() if problem is None]
            half = [case for case, p in problems.items() if p is not None and (job.path / case).exists()]
            cache = build_cache(job)
            rounds.append(
                {
                    "workers": workers,
                    "delay_s": round(delay, 3),
                    "finished_before_the_kill": finished_before,
                    "stored_at_the_kill": len(stored),
                    "half_written_cases": half,
                    "leftovers_after_the_rerun": sum(1 for _ in (root / ".partial").glob("*")),
                    "same_digests": digests(cache) == expected,
                    "verified": {report.status for report in verify_cache(cache)} == {"ok"},
                }
            )
    return {
        **header("SIGKILL of a building process group at a random moment, then the same build again"),
        "seed": seed,
        "cases": len(SHAPES),
        "uninterrupted_s": {str(workers): round(s, 3) for workers, s in seconds.items()},
        "kills": sum(not r["finished_before_the_kill"] for r in rounds),
        "rounds": len(rounds),
        "identical": sum(r["same_digests"] and r["verified"] and not r["half_written_cases"] for r in rounds),
        "without_leftovers": sum(r["leftovers_after_the_rerun"] == 0 for r in rounds),
        "each": rounds,
    }


def build(root: str | Path, workers: int) -> None:
    if workers:
        import distributed  # noqa: F401  (imported before the clock starts)
    job = job_at(Path(root))
    print(READY, flush=True)
    sys.stdin.readline()
    build_cache(job, workers=workers)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    args = parser.parse_args()
    result = measure(args.kills)
    put(result, args.o)
    print(
        f"{result['kills']} kills in {result['rounds']} rounds, {result['identical']} identical, "
        f"{result['without_leftovers']} without leftovers"
    )
