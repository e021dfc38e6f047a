"""One student to train: what it is made of, and where its run is kept."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastnnunet.cache.store.storage import Place
from fastnnunet.errors import SpecError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint, weights_digest
from fastnnunet.nnunet.files.paths import resolve_dataset
from fastnnunet.nnunet.student.plans import student_folder
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import to_plain
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.version import __version__

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
COARSER = "coarser"  # of the provenance of a locator
AUGMENT_ON = ("auto", "device", "loader")


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One student to train. `fold` is the student's own fold; the teacher's folds are in `teacher`."""

    teacher: TeacherSpec
    student: StudentSpec
    distill: DistillSpec
    cache: CacheSpec
    fold: int | str
    device: str = "auto"
    augment_on: str = "auto"  # auto: on CUDA devices, else in the loader processes
    threads: int | None = None
    cache_spec_file: Path | None = None  # only to quote it in messages
    cache_root: Place | None = None  # where to look for the cache; None = beside the preprocessed data
    soft_labels: str | None = None  # folder, URL or first digits of the key of a cache to take; None: the teacher's
    pretrained: Path | None = None  # nnU-Net checkpoint the student's weights start from
    alone: bool = False  # of a cascade's second stage: the student sees the image alone, without the previous stage
    coarser: tuple[int, ...] | None = None  # of a locator: voxels of the preprocessed cases that become one, z y x

    def __post_init__(self) -> None:
        if self.augment_on not in AUGMENT_ON:
            raise SpecError(f"--augment-on: got {self.augment_on!r}, expected {', '.join(AUGMENT_ON)}")
        if self.soft_labels is not None:
            if self.distill.alpha == 0:
                raise SpecError(f"--soft-labels {self.soft_labels}: none are read with -a 0; leave one of them out")
            if self.distill.unlabelled is not None:
                raise SpecError(
                    f"--soft-labels {self.soft_labels}: leave out --unlabelled, whose images the teacher labels"
                )
            if self.distill.online_teacher:
                raise SpecError(
                    f"--soft-labels {self.soft_labels}: leave out --online-teacher; who made them cannot be asked again"
                )
        if self.alone and self.distill.online_teacher:
            raise SpecError(
                f"--online-teacher: {self.teacher.configuration} needs labels of the stage before it, which "
                "patches of a student that sees the scan alone do not have\n"
                "leave it out, or use a configuration without a previous stage"
            )


def run_folder(job: TrainingJob) -> Path:
    """The fold folder a job trains into."""
    name = resolve_dataset(job.teacher.dataset)
    folder = student_folder(name, job.teacher.plans, job.teacher.configuration, job.student, job.distill)
    return folder / f"fold_{job.fold}"


def start_fold(job: TrainingJob) -> int | str:
    """The teacher's fold whose weights a student starts from: its own where there is one."""
    return job.fold if job.fold in job.teacher.folds else job.teacher.folds[0]


def reached_checkpoint(fold_folder: Path) -> Path | None:
    """The checkpoint a run goes on from: the final, else the latest, else the best; None where there is none."""
    return next((fold_folder / name for name in (FINAL, LATEST, BEST) if (fold_folder / name).is_file()), None)


def provenance(job: TrainingJob, cache_key: str | None) -> dict[str, Any]:
    """What made a student; stored in its checkpoints."""
    start: dict[str, Any] = {}
    if job.pretrained is not None:
        start["pretrained_sha256"] = weights_digest(load_checkpoint(job.pretrained)["network_weights"])
    if job.coarser is not None:
        start[COARSER] = list(job.coarser)
    if job.alone:  # then the previous stage is in the soft labels only, and the cache's key says which it was
        start["alone"] = True
    previous = None if job.alone else job.teacher.previous
    return {
        **start,
        "version": __version__,
        "teacher": to_plain(replace(job.teacher, dataset=resolve_dataset(job.teacher.dataset), previous=previous)),
        "student": to_plain(job.student),
        "distill": to_plain(job.distill),
        "cache_key": cache_key,
    }
