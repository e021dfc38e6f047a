"""Size of the base install, alone or with extras, and seconds of `fastnnunet --help` in it.

The base install is made of what is installed here (`tests/slim.py`): the distributions that `pip install .` needs, in a
virtual environment without pip. What pip compiles is counted by compiling it, since it may not have been here.
Seconds are those of a new process from start to end, and of the processor in it; the first process is not counted.

    python -m pipelines.measure.predict.slim_install -o record.json
    python -m pipelines.measure.predict.slim_install --extra serve -o record.json
"""

import marshal
import resource
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.measure.head import arguments, header, put
from tests.slim import base_install, make_environment

_PYC_HEADER = 16  # bytes


def measure(rounds: int = 11, extras: Sequence[str] = (), *, count_compiled: bool = True) -> dict[str, Any]:
    """The record; counting what is compiled takes most of the time."""
    installed = base_install(*extras)
    with tempfile.TemporaryDirectory() as work:
        python = make_environment(Path(work) / "slim", installed)
        seconds, cpu_seconds = [], []
        for _ in range(rounds + 1):
            begin, cpu_begin = time.perf_counter(), _cpu_s()
            subprocess.run([python, "-I", "-m", "fastnnunet", "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(_cpu_s() - cpu_begin)
    files = {place: file for d in installed for place, file in d.files.items() if place.suffix != ".pyc"}
    size_bytes_of = {d.name: sum(f.stat().st_size for p, f in d.files.items() if p in files) for d in installed}
    python_files = [file for file in files.values() if file.suffix == ".py" and count_compiled]
    compiled_bytes = sum(map(size_compiled, python_files))
    return {
        **header("the base install: bytes on disk by distribution, seconds of `fastnnunet --help`"),
        "extras": list(extras),
        "size_bytes": sum(size_bytes_of.values()) + compiled_bytes,
        "size_bytes_of": size_bytes_of,
        "compiled_bytes": compiled_bytes,
        "help_median_s": statistics.median(seconds[1:]),
        "help_s": seconds[1:],
        "help_cpu_median_s": statistics.median(cpu_seconds[1:]),
    }


def size_compiled(file: Path) -> int:
    """Bytes of its .pyc; 0 for templates and the like, which pip cannot compile either."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return _PYC_HEADER + len(marshal.dumps(compile(file.read_bytes(), file, "exec")))
    except (SyntaxError, ValueError):
        return 0


def _cpu_s() -> float:
    """Processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--extra", action="append", default=[])
    args = parser.parse_args()
    record = measure(args.rounds, args.extra)
    put(record, args.o)
    help_s, cpu_s = record["help_median_s"], record["help_cpu_median_s"]
    print(f"{record['size_bytes'] / 1e6:.0f} MB; --help {help_s:.3f} s, of the processor {cpu_s:.3f} s, medians")
