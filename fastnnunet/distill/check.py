"""What can be refused before a training begins."""

import logging
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastnnunet.distill.job import BEST, FINAL, LATEST, TrainingJob, provenance, reached_checkpoint, run_folder
from fastnnunet.errors import CorruptError, FastnnUNetError, MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.files.advice import preprocess_command
from fastnnunet.nnunet.files.cases import open_cases
from fastnnunet.nnunet.files.checkpoint import changed_settings, check_same_run, load_checkpoint, load_pretrained
from fastnnunet.nnunet.files.checkpoint_digest import require_undamaged
from fastnnunet.nnunet.files.model import ModelFolder, PlannedModel, build_network, model_folder_of, model_of
from fastnnunet.nnunet.files.named import check_loadable
from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset
from fastnnunet.nnunet.files.plans import (
    STOCK_TRAINER,
    architecture_of,
    configuration_of,
    without_previous_stage,
)
from fastnnunet.nnunet.files.splits import split_of
from fastnnunet.nnunet.student.coarse import coarse_dataset_json, coarse_plans
from fastnnunet.nnunet.student.fit import check_fit, check_last_patch, check_network
from fastnnunet.nnunet.student.plans import check_plans_name, student_plans
from fastnnunet.nnunet.student.primus import stock_trainer_of
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.teachers.maps.jobs import preprocessed_model

log = logging.getLogger(__name__)


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


def described(job: TrainingJob, keep: Collection[int | str] = ()) -> ModelFolder | PlannedModel:
    """What a student is made from: the teacher's model folder, or with soft labels by name and random first weights
    the plans beside the preprocessed cases; of a locator, these at a coarse spacing.

    `keep` as of ModelFolder. Raises NotFoundError, MismatchError.
    """
    if job.coarser is not None:
        model = preprocessed_model(job.teacher)
        coarse, dataset_json = coarse_plans(model, job.coarser), coarse_dataset_json(model.dataset_json)
        return PlannedModel(plans=coarse, dataset_json=dataset_json, trainer=STOCK_TRAINER)
    if job.soft_labels is None:
        return model_folder_of(job.teacher, keep)
    if job.distill.start == "teacher" and job.pretrained is None:
        try:
            return model_folder_of(job.teacher, keep)
        except NotFoundError as e:
            raise NotFoundError(f"{e}\nor train without a teacher's model, with --start random") from e
    model = preprocessed_model(job.teacher)
    return PlannedModel(plans=model.plans, dataset_json=model.dataset_json, trainer=job.teacher.trainer)


def check_job(
    job: TrainingJob, *, resume: bool, overwrite: bool, files: ModelFolder | PlannedModel | None = None
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Refuse what can be refused without the cache; returns (student plans, dataset.json, fold folder).

    `files`: the teacher's model folder where it is open already.
    """
    files = files or described(job)
    dataset_json, plans = files.dataset_json, check_student(job, files)
    _check_split(job, plans)
    fold_folder = run_folder(job)
    _check_run_folder(job, fold_folder, resume, overwrite)
    if job.pretrained is not None and not (resume and reached_checkpoint(fold_folder)):
        trainer = stock_trainer_of(architecture_of(plans, job.teacher.configuration)) or STOCK_TRAINER
        model = model_of(plans, job.teacher.configuration, dataset_json)
        load_pretrained(build_network(model, trainer=trainer), job.pretrained)
    return plans, dataset_json, fold_folder


def check_student(job: TrainingJob, files: ModelFolder | PlannedModel) -> dict[str, Any]:
    """Refuse what can be refused without any case: options, and what they mean for the teacher's network.

    `files`: the teacher's model folder. Returns the student's plans.
    """
    dataset_json, teacher_plans = files.dataset_json, files.plans
    check_loadable(teacher_plans, job.teacher.configuration)
    plans = student_plans(
        without_previous_stage(teacher_plans, job.teacher.configuration) if job.alone else teacher_plans,
        job.teacher.configuration,
        job.student,
        job.distill,
        dataset_json,
        files.facts(job.teacher.folds[0]).trainer,
    )
    if job.student.plans_name is not None:
        check_plans_name(resolve_dataset(job.teacher.dataset), job.student.plans_name)
    if job.coarser is None:  # else its plans are made of those of its data
        check_fit(teacher_plans, plans, dataset_json, job.teacher.configuration)
    if job.distill.last_patch is not None:
        check_last_patch(plans, job.teacher.configuration, job.distill.last_patch)
    if job.distill.norm_statistics != DistillSpec().norm_statistics and job.student.norm != "batch":
        raise MismatchError(
            f"norm_statistics: got {job.distill.norm_statistics}, which is of batch norms, and a student without them\n"
            "give --norm batch too, or leave out --norm-statistics"
        )
    if job.student.is_explicit:
        check_network(model_of(plans, job.teacher.configuration, dataset_json))
    return plans


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


def check_truth(plans: dict[str, Any], job: TrainingJob) -> None:
    """Refuse a validation whose label maps are gone, before the training that comes first. Raises NotFoundError."""
    base = nnunet_folder("nnUNet_preprocessed") / configuration_of(plans, job.teacher.configuration)[0].dataset_name
    if not (truth := base / "gt_segmentations").is_dir():
        raise NotFoundError(
            f"{truth} is missing, which a validation compares with\ncopy labelsTr there, leave the validation out with "
            "--no-validate, or run: " + preprocess_command(base.name, job.teacher.plans, job.teacher.configuration)
        )


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
        now, stored = provenance(job, None), _reached(path).get("fastnnunet", {})
        there = {name: value for name, value in stored.items() if name in {*now, "pretrained_sha256"}}
        check_same_run(path, {**there, "cache_key": None}, now)  # caches and the rest are compared on loading
    if resume and not existing and job.student.plans_name is None:
        same = [name for name, changed in _changed_beside(job, fold_folder).items() if not changed]
        if same:
            raise MismatchError(
                f"--continue: {fold_folder} holds no checkpoint; the run with these settings is there under another "
                f"name\ncontinue it with -spl {same[0]}, or train anew without --continue"
            )


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


def runs_beside(job: TrainingJob, fold_folder: Path) -> str:
    """Words on runs of the same student with other hyper-parameters; '' where there are none."""
    others = _changed_beside(job, fold_folder)
    shown = "\n".join(f"  - {name}: {', '.join(changed)}" for name, changed in others.items())
    return f"; with other hyper-parameters (there -> now) there is\n{shown}" if others else ""


def _changed_beside(job: TrainingJob, fold_folder: Path) -> dict[str, list[str]]:
    """Runs of the same student and fold: name of their plans -> what differs."""
    stem = f"*__{job.teacher.plans}_{job.student.tag}_"
    pattern = f"{stem}*__{job.teacher.configuration}/{fold_folder.name}/{LATEST[:11]}*.pth"
    runs = {path.parent: path for path in sorted(fold_folder.parent.parent.glob(pattern))}
    now = provenance(job, None)
    beside = {}
    for folder, path in runs.items():
        try:
            changed = changed_settings(load_checkpoint(path).get("fastnnunet", {}), now)
        except FastnnUNetError as e:  # it is not the run that is asked for
            changed = [str(e).splitlines()[0]]
        others = ("cache_key", "unlabelled_cache_key", "augmented_on", "planned_epochs")
        beside[folder.parent.name.split("__")[1]] = [line for line in changed if not line.startswith(others)]
    return beside
