"""Size of the base install and seconds of `fastnnunet --help` in it.

The base install is made of what is installed here (`tests/slim.py`): the distributions that `pip install .` needs, with
the compiled files pip leaves beside them, in a virtual environment without pip. Seconds are those of a new process from
start to end, and of the processor in it; the first process is not counted.

    python -m pipelines.measure.predict.slim_install -o record.json
"""

import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.measure.head import arguments, header, put
from tests.slim import base_install, make_environment


def measure(rounds: int = 11) -> dict[str, Any]:
    """The record."""
    installed = base_install()
    with tempfile.TemporaryDirectory() as work:
        python = make_environment(Path(work) / "slim", installed)
        seconds, cpu_seconds = [], []
        for _ in range(rounds + 1):
            begin, cpu_begin = time.perf_counter(), _cpu_s()
            subprocess.run([python, "-I", "-m", "fastnnunet", "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(_cpu_s() - cpu_begin)
    return {
        **header("the base install: bytes on disk by distribution, seconds of `fastnnunet --help`"),
        "size_bytes": sum(d.size_bytes for d in installed),
        "size_bytes_of": {d.name: d.size_bytes for d in installed},
        "help_median_s": statistics.median(seconds[1:]),
        "help_s": seconds[1:],
        "help_cpu_median_s": statistics.median(cpu_seconds[1:]),
    }


def _cpu_s() -> float:
    """Processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    record = measure(args.rounds)
    put(record, args.o)
    help_s, cpu_s = record["help_median_s"], record["help_cpu_median_s"]
    print(f"{record['size_bytes'] / 1e6:.0f} MB; --help {help_s:.3f} s, of the processor {cpu_s:.3f} s, medians")
