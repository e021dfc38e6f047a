"""`distil`: students trained from one cache."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.api.names import check_name, name_run
from fastnnunet.errors import SpecError
from fastnnunet.events import Event, Listener, Remaining, ignore

if TYPE_CHECKING:
    from fastnnunet.distill.job import TrainingJob
    from fastnnunet.specs.teacher import TeacherSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A trained student: an ordinary nnU-Net model."""

    tag: str  # such as r4
    folder: Path  # of its fold: checkpoints, progress.png, validation/
    mean_dice: float | None  # of the foreground, None where nothing was validated
    judged_on: str  # the cases of that Dice, in words


def distil(
    jobs: "Sequence[TrainingJob]",
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    validate: bool = True,
    name: str | None = None,
    progress: Listener = ignore,
) -> list[Student]:
    """Train students on the same batches, which are made only once. Runs a teacher for `online_teacher` alone.

    `resume` None: go on with what is there. `validate`: predict and score the validation fold at the end. In a run of
    several processes only the first tells what it does. `name`: of one student, for `export_named` and `find_bundle`.
    Raises what `fastnnunet.distill.train.train_students` raises, before anything is trained.
    """
    from fastnnunet.distill.job import run_folder
    from fastnnunet.distill.train import train_students
    from fastnnunet.teachers.online import online_teacher

    if name is not None:
        if len(jobs) != 1:
            raise SpecError(f"name {name!r}: got {len(jobs)} students, expected one")
        check_name(name, run_folder(jobs[0]).parent)
    if resume is None:
        resume = any(run_folder(job).is_dir() for job in jobs)
    told = _in_words(jobs, progress) if is_first_process() else ignore
    if name is not None and is_first_process():
        told = _naming(name, run_folder(jobs[0]).parent, told)
    folders = train_students(
        jobs, resume=resume, overwrite=overwrite, validate=validate, online=online_teacher, progress=told
    )
    if name is not None and is_first_process():
        name_run(name, folders[0].parent, [jobs[0].fold])
    return [_student(job, folder) for job, folder in zip(jobs, folders, strict=True)]


def train_locator(
    teacher: "TeacherSpec",
    fold: int | str,
    training: dict[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Listener = ignore,
    **options: Any,
) -> Student:
    """Train the locator of a data set, for `export(..., locator=)`; see `fastnnunet.distill.locator.locator_job`.

    Raises what that raises, and what `distil` raises.
    """
    from fastnnunet.distill.locator import locator_job

    told = progress if is_first_process() else ignore
    job = locator_job(teacher, fold, training or {}, told, **options)
    return distil([job], resume=resume, overwrite=overwrite, validate=False, progress=progress)[0]


def _naming(name: str, model: Path, progress: Listener) -> Listener:
    """A listener that takes the name when the training has begun: another that wants it is refused from then on."""
    taken = False

    def told(event: Event) -> None:
        nonlocal taken
        if not taken:
            name_run(name, model, [])
            taken = True
        progress(event)

    return told


def is_first_process() -> bool:
    """Of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _student(job: "TrainingJob", folder: Path) -> Student:
    from fastnnunet.specs.checks.json_text import read_json_object

    summary = folder / "validation" / "summary.json"
    return Student(
        tag=job.student.tag,
        folder=folder,
        mean_dice=read_json_object(summary)["foreground_mean"]["Dice"] if summary.is_file() else None,
        judged_on="training cases, fold all has no others" if job.fold == "all" else "validation fold",
    )


def _in_words(jobs: "Sequence[TrainingJob]", progress: Listener) -> Listener:
    """A listener that adds losses in words, a line an epoch, and the remaining time to what a training says."""
    from fastnnunet.distill.train import TrainingState

    latest: dict[str, str] = {}
    remaining: list[Remaining] = []

    def told(event: Event) -> None:
        if isinstance(event, TrainingState) and event.total is not None:
            remaining[:] = remaining or [Remaining(event.epoch * event.iterations)]  # an earlier run did those
            dice = f" pseudo Dice {' '.join(f'{d:.3f}' for d in event.pseudo_dice)}" if event.pseudo_dice else ""
            own = f"{event.student} " if len(jobs) > 1 else ""
            latest[event.student] = f"{own}hard {event.hard:+.3f} soft {event.soft:.3f}{dice}"
            event = replace(
                event,
                note=f"epoch {event.epoch + 1}/{event.epochs} {'; '.join(latest.values())}",
                logged=event.iteration == event.iterations and event.student == jobs[-1].student.tag,
                remaining_s=remaining[0].seconds(event.done, event.total),
            )
        progress(event)

    return told
