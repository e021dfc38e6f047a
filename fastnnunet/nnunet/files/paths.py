"""Where nnU-Net keeps things: environment variables, data set names, model folders."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.specs.teacher import TeacherSpec

FolderName = Literal["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"]


def nnunet_folder(name: FolderName) -> Path:
    """The folder an nnU-Net environment variable names. Raises NotFoundError when it is unset or no folder."""
    value = os.environ.get(name)
    if not value:
        raise NotFoundError(
            f"the environment variable {name} is not set\nset it as for nnU-Net itself: export {name}=/path/to/{name}"
        )
    path = Path(value)
    if not path.is_dir():
        raise NotFoundError(f"{name}={value} is not a folder\ncreate it or correct the variable")
    return path


def resolve_dataset(dataset: str) -> str:
    """`4`, `004` or `Dataset004_Hippocampus` -> `Dataset004_Hippocampus`, looked up as nnU-Net does.

    What begins with `Dataset` is a name, whatever follows. A number stands for the folder whose name begins with it,
    written with at least three digits.
    Raises NotFoundError with the names that exist, SpecError when a number stands for two names.
    """
    names = _dataset_names()
    found = [dataset] if dataset in names else []
    if not dataset.startswith("Dataset"):
        found = _names_of(dataset, names)
    if len(found) > 1:
        raise SpecError(f"data set id {dataset} stands for several names: {', '.join(found)}\ngive the full name")
    if not found:
        short = [n for n in names if re.fullmatch(rf"Dataset{re.escape(dataset)}(\D.*)?", n)]
        hint = f"\n{short[0]} has too few digits for an id: give the full name" if short else ""
        raise NotFoundError(
            f"unknown data set {dataset!r}\nexpected an id or name among: {', '.join(names) or '(none found)'}\n"
            f"looked in: {', '.join(map(str, _dataset_roots()))}{hint}"
        )
    return found[0]


def dataset_number(dataset_name: str) -> int | None:
    """The id that stands for a data set, for those of nnU-Net's commands that take nothing else; None: none does."""
    match = re.match(r"Dataset(\d+)", dataset_name)
    found = _names_of(match[1], _dataset_names()) if match else []
    return int(match[1]) if match and found == [dataset_name] else None


def _names_of(number: str, names: Sequence[str]) -> list[str]:
    """What nnU-Net finds for a number: by the beginning of the name only, so 123 finds Dataset1234_X as well."""
    try:
        beginning = f"Dataset{int(number):03d}"
    except ValueError:
        return []
    return [name for name in names if name.startswith(beginning)]


def _dataset_names() -> list[str]:
    return sorted({p.name for root in _dataset_roots() if root.is_dir() for p in root.glob("Dataset*") if p.is_dir()})


def _dataset_roots() -> list[Path]:
    roots = [Path(v) for n in ("nnUNet_preprocessed", "nnUNet_raw", "nnUNet_results") if (v := os.environ.get(n))]
    return roots or [nnunet_folder("nnUNet_preprocessed")]


def model_folder(dataset_name: str, trainer: str, plans: str, configuration: str) -> Path:
    """`$nnUNet_results/<dataset>/<trainer>__<plans>__<configuration>` (not checked for existence)."""
    return nnunet_folder("nnUNet_results") / dataset_name / f"{trainer}__{plans}__{configuration}"


def trained_model_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """The folder of a trained model. Raises NotFoundError with those that exist when it is missing."""
    nnunet_folder("nnUNet_results")  # or, with no variable set, another would be asked for
    folder = model_folder(resolve_dataset(dataset), trainer, plans, configuration)
    if not folder.is_dir():
        there = sorted(p.name for p in folder.parent.glob("*__*__*")) if folder.parent.is_dir() else []
        raise NotFoundError(
            f"no trained model at {folder}\nthere is: {', '.join(there) or '(nothing)'}\n"
            f"train it with nnUNetv2_train, or correct -d, -c, -p or -tr"
        )
    return folder


def teacher_folder(spec: TeacherSpec) -> Path:
    """The teacher's model folder. Raises NotFoundError when it, or a fold of it, is missing."""
    folder = trained_model_folder(spec.dataset, spec.trainer, spec.plans, spec.configuration)
    check_model_folder(folder, spec.folds, spec.checkpoint)
    return folder


def trained_folds(model_folder: Path, checkpoint: str) -> tuple[int, ...]:
    """The numbered folds that have a checkpoint, as nnU-Net detects them. Raises NotFoundError when there are none."""
    names = (path.parent.name.removeprefix("fold_") for path in model_folder.glob(f"fold_*/{checkpoint}"))
    folds = tuple(sorted(int(name) for name in names if name.isdigit()))
    if not folds:
        raise NotFoundError(f"no fold of {model_folder} has a {checkpoint}")
    return folds


def check_model_folder(folder: Path, folds: Sequence[int | str], checkpoint: str) -> None:
    """Raise NotFoundError unless these folds of a model folder are trained and its descriptions are there."""
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise NotFoundError(f"{folder / name} is missing; nnU-Net writes it when training starts")
    missing = [f for f in folds if not (folder / f"fold_{f}" / checkpoint).is_file()]
    if missing:
        there = sorted(p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}"))
        unfinished = [f for f in missing if (folder / f"fold_{f}" / "checkpoint_latest.pth").is_file()]
        training = f"still training, or stopped early: {', '.join(map(str, unfinished))}\n" if unfinished else ""
        raise NotFoundError(
            f"fold(s) {', '.join(map(str, missing))} have no {checkpoint} in {folder}\n{training}"
            f"folds that have one: {', '.join(there) or '(none)'}\n"
            "finish their training, or name the teacher's folds to use (-f; where students are trained, -tf)"
        )
