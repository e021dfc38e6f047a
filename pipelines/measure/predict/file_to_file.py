"""From image file to label file: a new process, a loaded model, and the reading and writing of a whole CT.

    python -m pipelines.measure.predict.file_to_file --bundle STUDENT --images FOLDER --volume CT.nii.gz -o record.json

cold    `fastnnunet predict` of the first image: a process from its start to its end, files in the system's cache, byte
        code of all modules there as in an installed package
warm    every image `--repeats` times by one loaded bundle, stage by stage
volume  a CT brought to 512 x 512 x 300 voxels and made a .nii.gz by ITK (not timed) is read, and thresholds of it
        (three labels) are written, by the bundle's own reader

Seconds on the clock and of the processor: on a machine that others use, only the latter can be compared with those of
another hour. `labels_crc32` is of all label maps of an engine, so it is the same where their voxels are.
For figures before and after a change see `beside.py`.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.images.cases import Case, find_cases
from fastnnunet.images.io import image_io
from fastnnunet.runtime.predict import CaseResult, Predictor
from fastnnunet.runtime.times import STAGES
from pipelines.measure.head import CHECKOUT, arguments, header, put
from pipelines.measure.predict.pre_post_speed import SHAPE, SPACING_MM, load_image
from tests.bundles import write_image

ENGINES = (("openvino", "bf16"), ("openvino", "fp32"), ("onnxruntime", "fp32"))


def clocked(work: Callable[[], object], whose: int = resource.RUSAGE_SELF) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    before, start = resource.getrusage(whose), time.perf_counter()
    work()
    elapsed, after = time.perf_counter() - start, resource.getrusage(whose)
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def figures(runs: Sequence[tuple[float, float]]) -> dict[str, float]:
    clock, processor = zip(*runs, strict=True)
    return {"median_s": statistics.median(clock), "least_s": min(clock), "processor_s": statistics.median(processor)}


def cold(bundle: Path, image: Path, engine: str, precision: str, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": f"{folder}/code", "FASTNNUNET_CACHE_HOME": f"{folder}/home"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        words = ["predict", "-i", image, "-o", f"{folder}/out", "-m", bundle, "--disable_tta"]
        words += ["--backend", engine, "--precision", precision]

        def run() -> None:
            command = [sys.executable, "-m", "fastnnunet", *map(str, words)]
            subprocess.run(command, env=environment, cwd=CHECKOUT, check=True, capture_output=True)

        return figures([clocked(run, resource.RUSAGE_CHILDREN) for _ in range(rounds + 1)][1:])


def warm(bundle: Path, images: Path, engine: str, precision: Any, repeats: int) -> dict[str, Any]:
    predictor = Predictor.load(bundle, engine, precision=precision, mirroring=False)
    cases = find_cases(images, predictor.spec)
    runs, stages, crc = [], {stage: [] for stage in STAGES}, 0
    reader = image_io(predictor.spec.reader_writer)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):
            for case in cases:
                output = Path(folder) / f"{case.case_id}_{repeat}.nii.gz"
                results: list[CaseResult] = []
                run = clocked(partial(_predict, predictor, case, output, results))
                if repeat == 0:  # not warm yet
                    crc = zlib.crc32(np.ascontiguousarray(reader.read_segmentation(output)[0]).tobytes(), crc)
                    continue
                runs.append(run)
                for stage in STAGES:
                    stages[stage].append(getattr(results[0].times, f"{stage}_s"))
    medians = {stage: statistics.median(seconds) for stage, seconds in stages.items()}
    least = {stage: min(seconds) for stage, seconds in stages.items()}
    return {**figures(runs), "stage_medians_s": medians, "stage_least_s": least, "labels_crc32": crc}


def _predict(predictor: Predictor, case: Case, output: Path, results: list[CaseResult]) -> None:
    results.append(predictor.predict_case(case, output))


def volume(file: Path | None, reader_writer: str, repeats: int, shape: Sequence[int]) -> dict[str, Any]:
    reader = image_io(reader_writer)
    with tempfile.TemporaryDirectory() as folder:
        values = np.rint(load_image(file, shape)[0][0]).astype(np.int16)
        ct = write_image(values, Path(folder) / "ct_0000.nii.gz", SPACING_MM[::-1])
        labels = (values > -300).astype(np.uint8) + (values > 150)
        read, properties = reader.read([ct])
        crc = zlib.crc32(np.ascontiguousarray(read).data)
        out = Path(folder) / "labels.nii.gz"
        return {
            "read": figures([clocked(lambda: reader.read([ct])) for _ in range(repeats)]),
            "write": figures([clocked(lambda: reader.write(labels, out, properties)) for _ in range(repeats)]),
            "image_bytes": ct.stat().st_size,
            "label_bytes": out.stat().st_size,
            "voxels_crc32": crc,
        }


def measure(
    bundle: Path,
    images: Path,
    volume_file: Path | None,
    rounds: int,
    repeats: int,
    shape: Sequence[int] = SHAPE,
) -> dict[str, Any]:
    spec = Predictor.load(bundle, "onnxruntime").spec
    first = find_cases(images, spec)[0].files[0]
    return {
        **header("seconds from file to file: a new process, a loaded model, and a CT of 512 x 512 x 300 voxels"),
        "bundle": spec.name,
        "cold": {f"{e} {p}": cold(bundle, first, e, p, rounds) for e, p in ENGINES},
        "warm": {f"{e} {p}": warm(bundle, images, e, p, repeats) for e, p in ENGINES},
        "volume": volume(volume_file, spec.reader_writer, rounds, shape),
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of images for the bundle")
    parser.add_argument("--volume", type=Path, help="a CT in any format SimpleITK reads; default: generated")
    parser.add_argument("--rounds", type=int, default=5, help="of cold starts, and of the volume")
    parser.add_argument("--repeats", type=int, default=10, help="of every warm image")
    args = parser.parse_args()
    put(measure(args.bundle, args.images, args.volume, args.rounds, args.repeats), args.o)
