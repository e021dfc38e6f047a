"""Cold start: a new process per prediction, from its start until the file is there and the process has ended.

Files are in the operating system's cache, since the arms have read them before.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnnunet.bench.arms import BundleArm, ReferenceArm
from fastnnunet.errors import BuildError
from fastnnunet.evaluate.segmentations import read_segmentation
from fastnnunet.events import Listener, Progress
from fastnnunet.images.cases import Case
from fastnnunet.nnunet.reference import predict_command
from fastnnunet.specs.teacher import TeacherSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """A command that predicts one case, the file it leaves, and what it finds in its environment."""

    command: tuple[str, ...]
    output: Path
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ColdTimes:
    """Seconds of every round, and the share of voxels labelled as in a file of the warm arm."""

    elapsed_s: list[float]
    agreement_with_warm: float


def cold_start(
    arm: ReferenceArm | BundleArm, teacher: TeacherSpec, case: Case, file_ending: str, place: Path
) -> ColdStart:
    """`fastnnunet predict` of a bundle, or `nnUNetv2_predict` of the teacher, on one case; `place` is an empty folder.

    nnU-Net takes a folder of images, so it gets one with links to the files of the case.
    """
    output = place / f"{case.case_id}{file_ending}"
    if isinstance(arm, BundleArm):
        engine = ("--backend", arm.backend, "--precision", arm.precision, "-device", arm.device)
        options = (*engine, "--threads", str(arm.threads))
        names = ("-i", str(case.files[0]), "-o", str(output), "-m", str(arm.bundle))
        program = (sys.executable, "-m", "fastnnunet", "predict")
        return ColdStart(command=(*program, *names, *options), output=output, environment={})
    images = place / "images"
    images.mkdir()
    for file in case.files:
        (images / file.name).symlink_to(file.absolute())
    command = predict_command(teacher, arm.folds, images, place, mirroring=arm.mirroring, device=arm.device)
    return ColdStart(command=tuple(command), output=output, environment={"nnUNet_def_n_proc": str(arm.threads)})


def time_once(start: ColdStart) -> float:
    """Wall seconds of one new process. Raises BuildError when it fails or leaves no file."""
    start.output.unlink(missing_ok=True)
    begin = time.perf_counter()
    done = subprocess.run(start.command, env={**os.environ, **start.environment}, capture_output=True, text=True)
    elapsed_s = time.perf_counter() - begin
    if done.returncode != 0 or not start.output.is_file():
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise BuildError(
            f"a prediction in a new process failed with exit code {done.returncode}; it said:\n{said}\n"
            f"the command was: {' '.join(start.command)}\nleave this out with --cold-rounds 0"
        )
    return elapsed_s


def measure_cold(
    arms: Sequence[ReferenceArm | BundleArm],
    teacher: TeacherSpec,
    case: Case,
    file_ending: str,
    rounds: int,
    warm_output_of: Callable[[str], Path],
    progress: Listener,
) -> dict[str, ColdTimes]:
    """Every arm `rounds` times, in turn. Raises BuildError."""
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    with tempfile.TemporaryDirectory() as work:
        starts = {}
        for number, arm in enumerate(arms):
            place = Path(work) / str(number)
            place.mkdir()
            starts[arm.name] = cold_start(arm, teacher, case, file_ending, place)
        for number in range(rounds):
            for position, (name, start) in enumerate(starts.items()):
                done, total = number * len(starts) + position, rounds * len(starts)
                progress(Progress(what=f"cold start of {name}", done=done, total=total, unit="starts"))
                times[name].append(time_once(start))
        agreement = {
            name: float(
                np.mean(
                    read_segmentation(start.output).labels_zyx == read_segmentation(warm_output_of(name)).labels_zyx
                )
            )
            for name, start in starts.items()
        }
    return {name: ColdTimes(times[name], agreement[name]) for name in times}
