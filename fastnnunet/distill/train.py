"""Training one student: from names to a finished nnU-Net model folder.

Never runs a teacher: where one takes part in a training, whoever calls for it hands it in.
"""

import functools
import logging
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet.cache.store.storage import Place
from fastnnunet.distill.check import check_job, check_truth, described, resolve_device, runs_beside
from fastnnunet.distill.configure import configure
from fastnnunet.distill.job import FINAL, TrainingJob, reached_checkpoint, start_fold
from fastnnunet.distill.memory import keep_freed_memory
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.distill.unlabelled import unlabelled_for_training
from fastnnunet.engines.devices import parse_device
from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.nnunet.files.model import ModelFolder, PlannedModel, model_of
from fastnnunet.nnunet.files.paths import resolve_dataset
from fastnnunet.nnunet.student.plans import publish_plans
from fastnnunet.nnunet.versions import TRAINING, require_versions
from fastnnunet.teachers.jobs import cache_for_training
from fastnnunet.teachers.maps.jobs import named_cache

if TYPE_CHECKING:
    from fastnnunet.nnunet.files.checkpoint import Weights
    from fastnnunet.nnunet.trainer.online import PatchTeacher
    from fastnnunet.nnunet.trainer.trainer import StudentTrainer

# loads the teacher beside a training: `teachers.online.online_teacher`
OpenTeacher = Callable[..., "PatchTeacher"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingState(Progress):
    """One iteration of one student is done; `done` and `total` count those of the whole training.

    In the first epoch of a training for some hours `total` is None, and `epochs` says nothing yet.
    """

    student: str
    epoch: int
    epochs: int
    iteration: int
    iterations: int
    hard: float
    soft: float
    pseudo_dice: list[float] = field(default_factory=list)
    unit: str = "iterations"


def train_student(job: TrainingJob, **options: Any) -> Path:
    """Train one student and return its fold folder; options and errors as in `train_students`."""
    return train_students([job], **options)[0]


def train_students(
    jobs: Sequence[TrainingJob],
    *,
    resume: bool = False,
    overwrite: bool = False,
    validate: bool = True,
    online: OpenTeacher | None = None,
    progress: Listener = ignore,
) -> list[Path]:
    """Train students on the same batches; returns fold folders (checkpoints, progress.png, validation/summary.json).

    Every student becomes what it would have become alone; loading and augmentation are paid once. The jobs differ in
    their students only; device and threads are those of the first. `online` loads the teacher of jobs that ask for
    it in their last epochs. Everything that can be refused is refused before anything is written. Raises NotFoundError
    (data, teacher, cache), MismatchError (cache or plans do not fit; a run exists and neither `resume` nor `overwrite`
    was given), SpecError (r leaves no channels; the students' batches differ), BuildError (the loss became NaN; the
    last good checkpoint stays).
    """
    from fastnnunet.nnunet.trainer.distributed import process_group

    require_versions(TRAINING)
    device = resolve_device(jobs[0].device)
    with process_group(device):
        return _train_students(jobs, device, resume, overwrite, validate, online, progress)


def _train_students(
    jobs: Sequence[TrainingJob],
    device: str,
    resume: bool,
    overwrite: bool,
    validate: bool,
    online: OpenTeacher | None,
    progress: Listener,
) -> list[Path]:
    import torch

    from fastnnunet.nnunet.trainer.distributed import is_first, wait_for_all

    first = jobs[0]
    validate = validate and first.coarser is None  # nnU-Net's compares with the labels of the data set
    start = start_fold(first)
    files = described(first, keep=(start,) if first.distill.start == "teacher" else ())
    start_weights = functools.cache(partial(_start_weights, files, start))
    checked = [check_job(job, resume=resume, overwrite=overwrite, files=files) for job in jobs]
    folders = [fold_folder for _, _, fold_folder in checked]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise SpecError(f"several students would be trained into one folder: {', '.join(map(str, twice))}")
    if validate:
        check_truth(checked[0][0], first)
    soft_labels = None
    if first.distill.alpha > 0:
        cache = _cache(first, files)
        soft_labels = CachedSoftLabels(cache, first.distill.temperature)
    unlabelled = None
    if first.distill.unlabelled is not None and isinstance(files, ModelFolder):
        unlabelled = unlabelled_for_training(
            first.teacher,
            first.cache,
            first.distill,
            None if soft_labels is None else soft_labels.image_digests,
            first.cache_root,
            first.cache_spec_file,
            files,
        )
    if first.threads:
        torch.set_num_threads(first.threads)
    if device == "cpu":
        keep_freed_memory()
    trainers, unfinished = [], []
    for job, (plans, dataset_json, fold_folder) in zip(jobs, checked, strict=True):
        _seed_everything(job.distill.seed)
        reached = reached_checkpoint(fold_folder) if resume else None
        if resume and reached is None and is_first():
            log.warning(
                "--continue: %s holds no checkpoint, the run starts from the beginning%s",
                fold_folder,
                runs_beside(job, fold_folder),
            )
        trainer = configure(
            job, plans, dataset_json, soft_labels, reached is not None, device, start_weights, unlabelled
        )
        trainers.append(trainer)
        finished = reached is not None and _resume(trainer, reached)
        if not finished:
            unfinished.append(trainer)
    if unfinished and first.distill.online_teacher:
        _ask_online(unfinished, first, files, online)
    del files, start_weights
    wait_for_all()  # before the first process changes what the others look at
    if overwrite and is_first():  # only now that nothing refuses any more
        for trainer, (_, _, fold_folder) in zip(trainers, checked, strict=True):
            _clear(fold_folder, keep=Path(trainer.log_file))
    wait_for_all()
    if unfinished:
        _run_epochs(unfinished, [jobs[trainers.index(t)] for t in unfinished], progress)
    if is_first() and first.coarser is None:  # nnU-Net compares those of one data set
        for job, (plans, _, _) in zip(jobs, checked, strict=True):
            publish_plans(resolve_dataset(job.teacher.dataset), plans)
    for trainer, (_, _, fold_folder) in zip(trainers, checked, strict=True):
        if validate and not (fold_folder / "validation" / "summary.json").is_file():
            _validate(trainer)
    return [fold_folder for _, _, fold_folder in checked]


def _start_weights(files: ModelFolder | PlannedModel, fold: int | str) -> "Weights":
    if isinstance(files, PlannedModel):
        raise SpecError("first weights: got a model that was never trained, expected --start random")
    return files.take_weights(fold)


def _cache(job: TrainingJob, files: ModelFolder | PlannedModel) -> Place:
    """The cache that a job names, else its teacher's. Raises as `cache_for_training` and `named_cache` do."""
    if job.soft_labels is None and isinstance(files, ModelFolder):
        return cache_for_training(job.teacher, job.cache, job.cache_root, job.cache_spec_file, files)
    model = model_of(files.plans, job.teacher.configuration, files.dataset_json)
    return named_cache(
        job.soft_labels or "",
        job.teacher,
        job.cache,
        model,
        job.fold,
        root=job.cache_root,
        spec_file=job.cache_spec_file,
    )


def _ask_online(
    trainers: "Sequence[StudentTrainer]",
    job: TrainingJob,
    files: ModelFolder | PlannedModel,
    online: OpenTeacher | None,
) -> None:
    """Put the teacher beside trainings. Raises SpecError where there is none, MismatchError for other patches."""
    import torch

    from fastnnunet.nnunet.trainer.online import LastEpochs

    share = job.distill.online_teacher
    if online is None:
        raise SpecError(f"online_teacher: got {share}, and no teacher was handed in\ntrain with fastnnunet.api.distil")
    teacher = online(
        job.teacher,
        job.cache,
        files,
        temperature=job.distill.temperature,
        threads=torch.get_num_threads(),
        device=parse_device(str(trainers[0].device)),
    )
    for trainer in trainers:
        if (patch := trainer.training_patch) != teacher.patch_size:
            raise MismatchError(
                f"--online-teacher: the student's patches are {list(patch)}, its teacher's {list(teacher.patch_size)}\n"
                "leave it out"
            )
        trainer.online = LastEpochs(teacher, share)


def _clear(folder: Path, keep: Path) -> None:
    """Remove what an earlier run left. `keep`, the log that this run has begun, stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


def _resume(trainer: "StudentTrainer", path: Path) -> bool:
    """Load what was reached; returns whether that is the end."""
    trainer.resume(path)
    if path.name != FINAL:
        log.info("continuing from %s at epoch %d", path.name, trainer.current_epoch)
    return path.name == FINAL


def _run_epochs(trainers: "list[StudentTrainer]", jobs: list[TrainingJob], progress: Listener) -> None:
    from fastnnunet.nnunet.trainer.epochs import run_epochs

    def report(number: int, iteration: int, step: dict[str, float], pseudo_dice: list[float]) -> None:
        trainer = trainers[number]
        iterations = trainer.num_iterations_per_epoch
        progress(
            TrainingState(
                what=f"{' '.join(job.student.tag for job in jobs)} fold {jobs[0].fold}",
                done=trainer.current_epoch * iterations + iteration,
                total=trainer.num_epochs * iterations if trainer.is_planned else None,
                student=jobs[number].student.tag,
                epoch=trainer.current_epoch,
                epochs=trainer.num_epochs,
                iteration=iteration,
                iterations=iterations,
                hard=step["hard"],
                soft=step["soft"],
                pseudo_dice=pseudo_dice,
            )
        )

    run_epochs(trainers, report)


def _validate(trainer: "StudentTrainer") -> None:
    from fastnnunet.nnunet.quiet import nnunet_quiet

    with nnunet_quiet():
        trainer.perform_actual_validation()


def _seed_everything(seed: int) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
