"""The C++ engine beside the Python runtime, from file to file, each prediction a process of its own.

    make engine
    python -m pipelines.measure.predict.engine --bundle STUDENT --images FOLDER -o record.json
    python -m pipelines.measure.predict.engine --bundle STUDENT --images FOLDER --volume CT.nii.gz -o record.json

cold    the first image of FOLDER: a process from its start to its end, files and compiled models in the system's cache;
        engine and Python in turn, `--rounds` pairs
load    of it, what the engine waits for its backend: the maker's library opened, the model loaded
volume  a CT brought to `--shape` voxels, likewise, with the most memory that each process ever had

Seconds on the clock and of the processor. `labels_equal` is of the voxels in the files of the same run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from fastnnunet.errors import NotFoundError
from fastnnunet.images.cases import find_cases
from fastnnunet.specs.bundle import load_bundle_spec
from pipelines.measure.head import CHECKOUT, arguments, header, put
from pipelines.measure.predict.pre_post_speed import SHAPE, SPACING_MM, load_image
from tests.bundles import write_image
from tests.engine import environment

BACKENDS = ("openvino", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Spent:
    """By one process."""

    clock_s: float
    processor_s: float
    peak_bytes: int


def spend(command: Sequence[object], variables: Mapping[str, str]) -> Spent:
    """Run a command. Raises CalledProcessError with what it said."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(list(map(str, command)), env=dict(variables), cwd=CHECKOUT, stdout=said, stderr=said)
        peak = 0
        while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            peak = max(peak, high_water(process.pid))
            time.sleep(0.002)
        elapsed = time.perf_counter() - start
        if os.waitstatus_to_exitcode(found[1]) != 0:
            said.seek(0)
            raise subprocess.CalledProcessError(found[1], command, said.read().decode())  # type: ignore[arg-type]
    return Spent(elapsed, found[2].ru_utime + found[2].ru_stime, peak)


def high_water(pid: int) -> int:
    """The most memory a process had so far; what `wait4` tells of a young process is its parent's."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def figures(runs: Sequence[Spent]) -> dict[str, float]:
    return {
        "median_s": statistics.median(run.clock_s for run in runs),
        "least_s": min(run.clock_s for run in runs),
        "processor_s": statistics.median(run.processor_s for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
    }


def labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def pairs(program: Path, bundle: Path, image: Path, backend: str, rounds: int) -> dict[str, Any]:
    """Engine and Python in turn; the first pair, which compiles models and byte code, does not count."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            **environment(),
            "PYTHONPYCACHEPREFIX": f"{folder}/code",
            "FASTNNUNET_CACHE_HOME": f"{folder}/home",
        }
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        programs: dict[str, list[object]] = {
            "engine": [program, "predict"],
            "python": [sys.executable, "-m", "fastnnunet", "predict"],
        }
        words = ["-i", image, "-m", bundle, "--disable_tta", "--backend", backend]
        runs: dict[str, list[Spent]] = {name: [] for name in programs}
        for number in range(rounds + 1):
            for name, command in programs.items():
                spent = spend([*command, *words, "-o", f"{folder}/{name}.nii.gz"], variables)
                if number:
                    runs[name].append(spent)
        bench = [program, "bench", "-m", bundle, "--backend", backend, "--runs", 1]
        loads = [
            json.loads(subprocess.run(list(map(str, bench)), env=variables, check=True, capture_output=True).stdout)[
                "load_s"
            ]
            for _ in range(rounds)
        ]
        engine, python = (labels(Path(folder) / f"{name}.nii.gz") for name in programs)
        ratios = [a.clock_s / b.clock_s for a, b in zip(runs["engine"], runs["python"], strict=True)]
        return {
            **{name: figures(spent) for name, spent in runs.items()},
            "engine_load_s": statistics.median(loads),
            "median_ratio": statistics.median(ratios),
            "labels_equal": bool(np.array_equal(engine, python)),
            "labels": [int(label) for label in np.unique(engine)],
        }


def measure(
    program: Path, bundle: Path, images: Path, volume: Path | None, rounds: int, shape: Sequence[int] | None
) -> dict[str, Any]:
    if not program.is_file():
        raise NotFoundError(f"no engine at {program}\nbuild it: make engine")
    spec = load_bundle_spec(bundle)
    first = find_cases(images, spec)[0].files[0]
    files = [program, *sorted((program.parents[1] / "lib").glob("libfastnnunet*"))]
    record = {
        **header("the C++ engine beside the Python runtime, from file to file"),
        "bundle": spec.name,
        "sizes_bytes": {file.name: file.stat().st_size for file in files},
        "cold": {backend: pairs(program, bundle, first, backend, rounds) for backend in BACKENDS},
    }
    if shape is not None:
        with tempfile.TemporaryDirectory() as folder:
            values = np.rint(load_image(volume, shape)[0][0]).astype(np.int16)
            ct = write_image(values, Path(folder) / "ct_0000.nii.gz", SPACING_MM[::-1])
            record["volume"] = {"shape": list(shape), **pairs(program, bundle, ct, "openvino", 1)}
    return record


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of images for the bundle")
    parser.add_argument("--engine", type=Path, default=CHECKOUT / "build" / "engine" / "bin" / "fastnnunet-engine")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of cold starts")
    parser.add_argument("--volume", type=Path, help="a CT in any format SimpleITK reads; default: generated")
    parser.add_argument(
        "--shape", type=int, nargs=3, help=f"of the CT, such as {' '.join(map(str, SHAPE))}; default: no CT"
    )
    args = parser.parse_args()
    put(measure(args.engine, args.bundle, args.images, args.volume, args.rounds, args.shape), args.o)
