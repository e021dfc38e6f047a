"""Training one student: from names to a finished nnU-Net model folder. Never runs a teacher."""

import functools
import logging
import random
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet.cache.store.storage import Place
from fastnnunet.distill.memory import keep_freed_memory
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.distill.unlabelled import unlabelled_for_training
from fastnnunet.engines.labelling import resolve_precision
from fastnnunet.errors import CorruptError, FastnnUNetError, MismatchError, NotFoundError, SpecError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.nnunet.files.advice import preprocess_command
from fastnnunet.nnunet.files.cascade import previous_folder
from fastnnunet.nnunet.files.cases import open_cases
from fastnnunet.nnunet.files.checkpoint import (
    Weights,
    check_same_run,
    load_checkpoint,
    load_pretrained,
    weights_digest,
)
from fastnnunet.nnunet.files.checkpoint_digest import require_undamaged
from fastnnunet.nnunet.files.model import ModelFolder, build_network, model_folder_of, model_of
from fastnnunet.nnunet.files.named import check_loadable
from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset
from fastnnunet.nnunet.files.plans import STOCK_TRAINER, architecture_of, configuration_of, label_manager_of
from fastnnunet.nnunet.files.splits import split_of
from fastnnunet.nnunet.student.fit import check_fit, check_network
from fastnnunet.nnunet.student.plans import check_plans_name, publish_plans, student_folder, student_plans
from fastnnunet.nnunet.student.primus import stock_trainer_of
from fastnnunet.nnunet.versions import TRAINING, require_versions
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import differences, to_plain
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import cache_for_training
from fastnnunet.version import __version__

if TYPE_CHECKING:
    from fastnnunet.nnunet.trainer.mixing import Unlabelled
    from fastnnunet.nnunet.trainer.trainer import StudentTrainer

log = logging.getLogger(__name__)
FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
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
    pretrained: Path | None = None  # nnU-Net checkpoint the student's weights start from

    def __post_init__(self) -> None:
        if self.augment_on not in AUGMENT_ON:
            raise SpecError(f"--augment-on: got {self.augment_on!r}, expected {', '.join(AUGMENT_ON)}")


@dataclass(frozen=True, kw_only=True)
class TrainingState(Progress):
    """One iteration of one student is done; `done` and `total` count those of the whole training."""

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
    progress: Listener = ignore,
) -> list[Path]:
    """Train students on the same batches; returns fold folders (checkpoints, progress.png, validation/summary.json).

    Every student becomes what it would have become alone; loading and augmentation are paid once. The jobs differ in
    their students only; device and threads are those of the first. Everything that can be refused is refused before
    anything is written. Raises NotFoundError (data, teacher, cache), MismatchError (cache or plans do not fit; a run
    exists and neither `resume` nor `overwrite` was given), SpecError (r leaves no channels; the students' batches
    differ), BuildError (the loss became NaN; the last good checkpoint stays).
    """
    from fastnnunet.nnunet.trainer.distributed import process_group

    require_versions(TRAINING)
    device = resolve_device(jobs[0].device)
    with process_group(device):
        return _train_students(jobs, device, resume, overwrite, validate, progress)


def _train_students(
    jobs: Sequence[TrainingJob], device: str, resume: bool, overwrite: bool, validate: bool, progress: Listener
) -> list[Path]:
    import torch

    from fastnnunet.nnunet.trainer.distributed import is_first, wait_for_all

    first = jobs[0]
    start = start_fold(first)
    files = model_folder_of(first.teacher, keep=(start,) if first.distill.start == "teacher" else ())
    start_weights = functools.cache(partial(files.take_weights, start))
    checked = [check_job(job, resume=resume, overwrite=overwrite, files=files) for job in jobs]
    folders = [fold_folder for _, _, fold_folder in checked]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise SpecError(f"several students would be trained into one folder: {', '.join(map(str, twice))}")
    if validate:
        _check_truth(checked[0][0], first)
    soft_labels = None
    if first.distill.alpha > 0:
        cache = cache_for_training(first.teacher, first.cache, first.cache_root, first.cache_spec_file, files)
        soft_labels = CachedSoftLabels(cache, first.distill.temperature)
    unlabelled = None
    if first.distill.unlabelled is not None and soft_labels is not None:
        unlabelled = unlabelled_for_training(
            first.teacher,
            first.cache,
            first.distill.unlabelled,
            first.distill.unlabelled_share,
            soft_labels,
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
                _beside(job, fold_folder),
            )
        trainer = _configure(
            job, plans, dataset_json, soft_labels, reached is not None, device, start_weights, unlabelled
        )
        trainers.append(trainer)
        finished = reached is not None and _resume(trainer, reached)
        if not finished:
            unfinished.append(trainer)
    del files, start_weights
    wait_for_all()  # before the first process changes what the others look at
    if overwrite and is_first():  # only now that nothing refuses any more
        for trainer, (_, _, fold_folder) in zip(trainers, checked, strict=True):
            _clear(fold_folder, keep=Path(trainer.log_file))
    wait_for_all()
    if unfinished:
        _run_epochs(unfinished, [jobs[trainers.index(t)] for t in unfinished], progress)
    if is_first():
        for job, (plans, _, _) in zip(jobs, checked, strict=True):
            publish_plans(resolve_dataset(job.teacher.dataset), plans)
    for trainer, (_, _, fold_folder) in zip(trainers, checked, strict=True):
        if validate and not (fold_folder / "validation" / "summary.json").is_file():
            _validate(trainer)
    return [fold_folder for _, _, fold_folder in checked]


def _clear(folder: Path, keep: Path) -> None:
    """Remove what an earlier run left. `keep`, the log that this run has begun, stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


def resolve_device(requested: str) -> str:
    """`auto` -> cuda where there is one, else cpu. Raises MismatchError when a device is asked for and absent."""
    import torch

    device = requested if requested != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return device
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if named is None:
        raise SpecError(f"--device: got {device!r}, expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise MismatchError(f"--device {device}: no CUDA device is available here\nuse --device cpu")
    if named[1] and int(named[1]) >= torch.cuda.device_count():
        raise MismatchError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def reached_checkpoint(fold_folder: Path) -> Path | None:
    """The checkpoint a run goes on from: the final, else the latest, else the best; None where there is none."""
    return next((fold_folder / name for name in (FINAL, LATEST, BEST) if (fold_folder / name).is_file()), None)


def _resume(trainer: "StudentTrainer", path: Path) -> bool:
    """Load what was reached; returns whether that is the end."""
    trainer.resume(path)
    if path.name != FINAL:
        log.info("continuing from %s at epoch %d", path.name, trainer.current_epoch)
    return path.name == FINAL


def check_job(
    job: TrainingJob, *, resume: bool, overwrite: bool, files: ModelFolder | None = None
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Refuse what can be refused without the cache; returns (student plans, dataset.json, fold folder).

    `files`: the teacher's model folder where it is open already.
    """
    files = files or model_folder_of(job.teacher)
    dataset_json, teacher_plans = files.dataset_json, files.plans
    check_loadable(teacher_plans, job.teacher.configuration)
    plans = student_plans(
        teacher_plans,
        job.teacher.configuration,
        job.student,
        job.distill,
        dataset_json,
        files.facts(job.teacher.folds[0]).trainer,
    )
    if job.student.plans_name is not None:
        check_plans_name(resolve_dataset(job.teacher.dataset), job.student.plans_name)
    check_fit(teacher_plans, plans, dataset_json, job.teacher.configuration)
    if job.student.is_explicit:
        check_network(model_of(plans, job.teacher.configuration, dataset_json))
    _check_split(job, plans)
    fold_folder = run_folder(job)
    _check_run_folder(job, fold_folder, resume, overwrite)
    if job.pretrained is not None and not (resume and reached_checkpoint(fold_folder)):
        trainer = stock_trainer_of(architecture_of(plans, job.teacher.configuration)) or STOCK_TRAINER
        model = model_of(plans, job.teacher.configuration, dataset_json)
        load_pretrained(build_network(model, trainer=trainer), job.pretrained)
    return plans, dataset_json, fold_folder


def _check_split(job: TrainingJob, plans: dict[str, Any]) -> None:
    """Refuse a fold with nothing to train on or to validate on, or with cases that are not there."""
    cases = open_cases(plans, job.teacher.configuration).case_ids
    base = nnunet_folder("nnUNet_preprocessed") / configuration_of(plans, job.teacher.configuration)[0].dataset_name
    split = split_of(base, cases, job.fold)
    if split is None:
        if isinstance(job.fold, int):
            log.warning("there is no fold %d in %s: nnU-Net draws 80 %% of the cases at random", job.fold, base)
        return
    empty = [words for part, words in (("train", "training"), ("val", "validation")) if not split[part]]
    if empty:
        raise MismatchError(
            f"fold {job.fold} of {base / 'splits_final.json'} has no {' and no '.join(empty)} cases\n"
            "correct that file, or train on every case with -f all"
        )
    missing = sorted({*split["train"], *split["val"]} - set(cases))
    if missing:
        raise MismatchError(
            f"fold {job.fold} of {base / 'splits_final.json'} names {len(missing)} case(s) that are not preprocessed, "
            f"first {missing[0]!r}\ncorrect that file, or run: "
            + preprocess_command(base.name, job.teacher.plans, job.teacher.configuration)
        )


def _check_truth(plans: dict[str, Any], job: TrainingJob) -> None:
    """Refuse a validation whose label maps are gone, before the training that comes first. Raises NotFoundError."""
    base = nnunet_folder("nnUNet_preprocessed") / configuration_of(plans, job.teacher.configuration)[0].dataset_name
    if not (truth := base / "gt_segmentations").is_dir():
        raise NotFoundError(
            f"{truth} is missing, which a validation compares with\ncopy labelsTr there, leave the validation out with "
            "--no-validate, or run: " + preprocess_command(base.name, job.teacher.plans, job.teacher.configuration)
        )


def run_folder(job: TrainingJob) -> Path:
    """The fold folder a job trains into."""
    name = resolve_dataset(job.teacher.dataset)
    folder = student_folder(name, job.teacher.plans, job.teacher.configuration, job.student, job.distill)
    return folder / f"fold_{job.fold}"


def _check_run_folder(job: TrainingJob, fold_folder: Path, resume: bool, overwrite: bool) -> None:
    existing = [n for n in (FINAL, LATEST, BEST) if (fold_folder / n).is_file()]
    if existing and not (resume or overwrite):
        state = "finished" if FINAL in existing else "unfinished"
        raise MismatchError(
            f"{fold_folder} holds a {state} run\n"
            "continue or validate it with --continue, replace it with --overwrite, or name this one with -spl"
        )
    if resume and existing:  # before a cache is asked for, which another teacher would need
        path = fold_folder / existing[0]
        now, stored = _provenance(job, None), _reached(path).get("fastnnunet", {})
        there = {name: value for name, value in stored.items() if name in {*now, "pretrained_sha256"}}
        check_same_run(path, {**there, "cache_key": None}, now)  # caches and the rest are compared on loading


def _reached(path: Path) -> dict[str, Any]:
    """The checkpoint to go on from. Raises CorruptError with what there is to go on from without it."""
    try:
        checkpoint = load_checkpoint(path)
        require_undamaged(checkpoint, path)
        return checkpoint
    except CorruptError as e:
        kept = [name for name in (LATEST, BEST) if name != path.name and (path.parent / name).is_file()]
        raise CorruptError(
            f"{str(e).splitlines()[0]}\n"
            f"remove it with: rm {shlex.quote(str(path))}\n"
            f"and give the same command again: with --continue it goes on from {kept[0] if kept else 'the beginning'}"
        ) from e


def _beside(job: TrainingJob, fold_folder: Path) -> str:
    """Words on runs of the same student with other hyper-parameters; '' where there are none."""
    others = _runs_beside(job, fold_folder)
    shown = "\n".join(f"  - {name}: {', '.join(changed)}" for name, changed in others.items())
    return f"; with other hyper-parameters (there -> now) there is\n{shown}" if others else ""


def _runs_beside(job: TrainingJob, fold_folder: Path) -> dict[str, list[str]]:
    """Runs of the same student and fold: name of their plans -> what differs."""
    stem = f"*__{job.teacher.plans}_{job.student.tag}_"
    pattern = f"{stem}*__{job.teacher.configuration}/{fold_folder.name}/{LATEST[:11]}*.pth"
    runs = {path.parent: path for path in sorted(fold_folder.parent.parent.glob(pattern))}
    now = _provenance(job, None)
    beside = {}
    for folder, path in runs.items():
        try:
            changed = differences(load_checkpoint(path).get("fastnnunet", {}), now)
        except FastnnUNetError as e:  # it is not the run that is asked for
            changed = [str(e).splitlines()[0]]
        others = ("version", "cache_key", "unlabelled_cache_key", "augmented_on")
        beside[folder.parent.name.split("__")[1]] = [line for line in changed if not line.startswith(others)]
    return beside


def _provenance(job: TrainingJob, cache_key: str | None) -> dict[str, Any]:
    """What made a student; stored in its checkpoints."""
    start = {}
    if job.pretrained is not None:
        start["pretrained_sha256"] = weights_digest(load_checkpoint(job.pretrained)["network_weights"])
    return {
        **start,
        "version": __version__,
        "teacher": to_plain(replace(job.teacher, dataset=resolve_dataset(job.teacher.dataset))),
        "student": to_plain(job.student),
        "distill": to_plain(job.distill),
        "cache_key": cache_key,
    }


def start_fold(job: TrainingJob) -> int | str:
    """The teacher's fold whose weights a student starts from: its own where there is one."""
    return job.fold if job.fold in job.teacher.folds else job.teacher.folds[0]


def _configure(
    job: TrainingJob,
    plans: dict[str, Any],
    dataset_json: dict[str, Any],
    soft_labels: CachedSoftLabels | None,
    resume: bool,
    device: str,
    start_weights: Callable[[], Weights],
    unlabelled: "Unlabelled | None" = None,
) -> "StudentTrainer":
    from fastnnunet.distill.losses import DistillationObjective
    from fastnnunet.nnunet.trainer.trainer import make_trainer, nnunet_quiet

    spec = job.distill
    trainer = make_trainer(plans, job.teacher.configuration, job.fold, dataset_json, device, resume)
    plans_manager, _ = configuration_of(plans, job.teacher.configuration)
    if (previous := previous_folder(job.teacher, plans)) is not None:
        trainer.folder_with_segs_from_previous_stage = str(previous)
    trainer.num_epochs = spec.epochs
    trainer.num_iterations_per_epoch = spec.iterations_per_epoch
    trainer.num_val_iterations_per_epoch = spec.val_iterations_per_epoch
    trainer.initial_lr = spec.lr if spec.initial_lr is not None or trainer.network_lr is None else trainer.network_lr
    trainer.optimizer_name = spec.optimizer
    trainer.seed = spec.seed
    trainer.save_every = 1  # students are small; a kill costs one epoch at most
    trainer.store_mirroring = spec.mirroring
    trainer.augmentation = spec.augmentation
    trainer.mirror_augmentation = spec.mirror_augmentation
    on_device = {"auto": device.startswith("cuda"), "device": True, "loader": False}
    trainer.augment_on_device = on_device[job.augment_on]
    trainer.bf16 = device == "cpu" and resolve_precision(spec.precision) == "bf16"
    trainer.soft_labels = soft_labels
    trainer.unlabelled = unlabelled
    trainer.soft_on_ignored = spec.soft_on_ignored
    if soft_labels is not None:
        regions = bool(label_manager_of(plans_manager, dataset_json).has_regions)
        trainer.objective = DistillationObjective.of(spec, regions=regions)
    trainer.provenance = _provenance(job, soft_labels.key if soft_labels is not None else None)
    if unlabelled is not None:
        trainer.provenance["unlabelled_cache_key"] = unlabelled.key
    with nnunet_quiet():
        trainer.initialize()
    if trainer.device_augmentation is not None:  # as a setting it may be `auto`, and other bits come of it
        trainer.provenance["augmented_on"] = "device"
    if job.pretrained is not None and not resume:
        load_pretrained(trainer.plain_network, job.pretrained)
    elif spec.start == "teacher" and not resume:
        _start_from_teacher(trainer, job, start_weights())
    return trainer


def _start_from_teacher(trainer: "StudentTrainer", job: TrainingJob, weights: Weights) -> None:
    """First weights from the teacher's model of the student's own fold, or its first."""
    from fastnnunet.nnunet.student.inherit import inherit_weights

    share = inherit_weights(trainer.plain_network, weights)
    if share == 0:
        log.info("student %s starts from random weights: its network has no layers of the teacher's", job.student.tag)
    elif share < 1:
        log.info("student %s takes %.0f %% of its first weights from the teacher", job.student.tag, 100 * share)


def _run_epochs(trainers: "list[StudentTrainer]", jobs: list[TrainingJob], progress: Listener) -> None:
    from fastnnunet.nnunet.trainer.epochs import run_epochs

    def report(number: int, iteration: int, step: dict[str, float], pseudo_dice: list[float]) -> None:
        trainer = trainers[number]
        iterations = trainer.num_iterations_per_epoch
        progress(
            TrainingState(
                what=f"{' '.join(job.student.tag for job in jobs)} fold {jobs[0].fold}",
                done=trainer.current_epoch * iterations + iteration,
                total=trainer.num_epochs * iterations,
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
    from fastnnunet.nnunet.trainer.trainer import nnunet_quiet

    with nnunet_quiet():
        trainer.perform_actual_validation()


def _seed_everything(seed: int) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
