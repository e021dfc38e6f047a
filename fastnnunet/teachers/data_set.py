"""Joining names to things: a TeacherSpec to its cases, its model and the place of its caches."""

from pathlib import Path

from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.files.cascade import open_cascade, previous_folder
from fastnnunet.nnunet.files.cases import PreprocessedCases, open_cases
from fastnnunet.nnunet.files.model import ModelFolder, model_folder_of
from fastnnunet.nnunet.files.named import check_loadable, warn_once
from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset
from fastnnunet.nnunet.files.splits import load_splits
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import Fold, TeacherSpec
from fastnnunet.teachers.nnunet import NnUNetTeacher, make_teacher, unknown_trainer


def cache_root(dataset_name: str, plans: str, configuration: str) -> Path:
    """Where caches of a configuration live: beside the preprocessed data."""
    return nnunet_folder("nnUNet_preprocessed") / dataset_name / f"fastnnunet_{plans}_{configuration}"


def open_teacher(
    spec: TeacherSpec, cache_spec: CacheSpec, files: ModelFolder | None = None
) -> tuple[PreprocessedCases, NnUNetTeacher, Path]:
    """Cases, teacher and cache root of `spec`. `files`: its model folder where it is open already.

    Loads no weights. Raises NotFoundError, SpecError, MismatchError.
    """
    dataset_name = resolve_dataset(spec.dataset)
    files = files or model_folder_of(spec)
    check_loadable(files.plans, spec.configuration)
    previous = previous_folder(spec, files.plans)
    cases = open_cases(files.plans, spec.configuration)
    if previous is not None:
        cases = open_cascade(cases, previous, spec, files.plans, files.dataset_json)
    base = nnunet_folder("nnUNet_preprocessed") / dataset_name
    splits = load_splits(base, cases.case_ids)
    unseen: dict[str, tuple[Fold, ...]] = {}
    for case in sorted({c for s in splits for part in s.values() for c in part}):
        unseen[case] = tuple(
            f for f in spec.folds if isinstance(f, int) and f < len(splits) and case not in splits[f]["train"]
        )
    if (said := unknown_trainer(files, spec.folds[0])) is not None:
        warn_once(said)
    teacher = make_teacher(files, spec.folds, cache_spec, unseen)
    if cache_spec.policy == "out_of_fold":
        orphans = [c for c in cases.case_ids if not teacher.unseen_folds(c)]
        if orphans:
            raise MismatchError(
                f"policy out_of_fold: {len(orphans)} case(s) were seen by every given fold, first {orphans[0]!r}\n"
                "give all folds with -f, or use policy: ensemble"
            )
    return cases, teacher, cache_root(dataset_name, spec.plans, spec.configuration)
