"""What of a training is still alive after its main process was ended by a signal.

    python -m pipelines.measure.train.orphans --trials 20 -o record.json

Each trial starts `fastnnunet train` with loader processes on a tiny data set, sends one signal to its main process
alone (SIGINT: to the whole group, as a terminal does) at one of the moments below, and counts the processes it had
started that still run five seconds after it has ended. Linux only.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.measure.head import arguments, header, put
from tests.tiny import make_world, world_environment

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
MOMENTS = ("the first process is started", "all processes are started", "in the second epoch")
LOADERS = 2
GONE_WITHIN_S = 5.0
PATIENCE_S = 300.0
MARK = "FASTNNUNET_ORPHANS_TRIAL"
TRAIN = (
    "-d 998 -f 0 -tf 0 1 -r 2 -a 0 -e 500 --iterations 2 --val-iterations 1 --no-validate --threads 1 --device cpu "
    "--overwrite"
)


def alive(mark: str) -> list[int]:
    """Processes that run with a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0] if folder.name.isdigit() else "X"
            if state not in "ZX" and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def until(condition: Callable[[], bool], within_s: float) -> float | None:
    """Seconds until the condition holds, None when it does not in time."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > within_s:
            return None
        time.sleep(0.02)
    return time.monotonic() - begin


def default_signals() -> None:
    """Of a process that is started: what runs in the background, or by nohup, ignores some of them."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def trial(number: int, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """One training and its end."""
    ended_by, moment = SIGNALS[number % len(SIGNALS)], MOMENTS[number // len(SIGNALS) % len(MOMENTS)]
    mark, log = f"{os.getpid()}-{number}", folder / f"log{number}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastnnunet", "train", *TRAIN.split()],
            env={**os.environ, **environment, MARK: mark, "nnUNet_n_proc_DA": str(LOADERS)},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=default_signals,
        )  # fmt: skip
    counts = [0]  # of its processes, when it was looked for them; some live for an instant

    def count() -> int:
        counts.append(len(alive(mark)))
        return counts[-1]

    reached = {
        MOMENTS[0]: lambda: count() > 1,
        MOMENTS[1]: lambda: count() > LOADERS,
        MOMENTS[2]: lambda: "epoch 2/" in log.read_text(),
    }[moment]
    if until(lambda: reached() or process.poll() is not None, PATIENCE_S) is None or process.poll() is not None:
        raise RuntimeError(f"the training did not get as far as this: {moment}\n{log.read_text()[-2000:]}")
    processes = max(count(), counts[-2])
    (os.killpg if ended_by == signal.SIGINT else os.kill)(process.pid, ended_by)
    process.wait(PATIENCE_S)
    seconds = until(lambda: not alive(mark), GONE_WITHIN_S)
    left = alive(mark)
    for orphan in left:
        os.kill(orphan, signal.SIGKILL)
    return {
        "signal": ended_by.name,
        "moment": moment,
        "processes": processes,
        "exit_code": process.returncode,
        "alive_after_5_s": len(left),
        "all_gone_after_s": None if seconds is None else round(seconds, 2),
        "traceback": "Traceback" in log.read_text(),
    }


def measure(trials: int, world: Path) -> dict[str, Any]:
    """The record of so many trials in a tiny world of nnU-Net (`tests/tiny.py`)."""
    environment = {key: str(value) for key, value in world_environment(world).items()}
    with tempfile.TemporaryDirectory() as logs:
        each = [trial(number, Path(logs), environment) for number in range(trials)]
    return {
        **header("a training's main process ended by a signal: which of its processes live on"),
        "loaders": LOADERS,
        "trials": trials,
        "nothing_alive_after_5_s": sum(t["alive_after_5_s"] == 0 for t in each),
        "each": each,
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for key, value in world_environment(Path(folder)).items():
            patch.setenv(key, str(value))
        make_world(Path(folder))
        result = measure(args.trials, Path(folder))
    put(result, args.o)
    print(f"{result['nothing_alive_after_5_s']} of {result['trials']}: nothing alive after {GONE_WITHIN_S:g} s")
