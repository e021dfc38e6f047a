"""nnU-Net's own commands, as messages print them: ready to run, with the data set by its number where it wants that."""

import re
import shlex
from collections.abc import Sequence

from fastnnunet.specs.teacher import TeacherSpec


def preprocess_command(dataset_name: str, plans_name: str, configuration: str) -> str:
    """`nnUNetv2_preprocess` of one configuration; its `-d` takes a number only. Coarse cases, which a locator learns
    from, are made anew by training it.
    """
    if coarse := re.fullmatch(r"(.+)_coarse\d+(x\d+)*", plans_name):
        folder = _command("rm", "-r", f"{dataset_name}/{plans_name}_{configuration}")
        names = ("-d", _number(dataset_name), "-c", configuration, "-p", coarse[1])
        return (
            f"cd $nnUNet_preprocessed && {folder} && " + _command("fastnnunet", "train", "--locator", *names) + " ..."
        )
    return _command("nnUNetv2_preprocess", "-d", _number(dataset_name), "-plans_name", plans_name, "-c", configuration)


def validate_command(teacher: TeacherSpec, configuration: str, folds: Sequence[int | str]) -> str:
    """`nnUNetv2_train --val` of trained folds, one after the other, in a shell."""
    names = ("-p", teacher.plans, "-tr", teacher.trainer)
    one = _command("nnUNetv2_train", teacher.dataset, configuration, "FOLD", *names, "--val").replace("FOLD", "$fold")
    return f"for fold in {' '.join(map(str, folds))}; do {one}; done"


def _number(dataset_name: str) -> str:
    """`Dataset004_Hippocampus` -> `4`."""
    digits = dataset_name.removeprefix("Dataset").split("_")[0]
    return str(int(digits)) if digits.isdigit() else dataset_name


def _command(*words: str) -> str:
    return shlex.join(words)
