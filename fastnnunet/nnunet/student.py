"""Students are ordinary nnU-Net models: the teacher's plans with narrower stages, under a name of their own."""

import json
import logging
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

from fastnnunet.errors import MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.paths import model_folder, nnunet_folder
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec, student_plans_name

STOCK_TRAINER = "nnUNetTrainer"
log = logging.getLogger(__name__)


def reduce_features(features_per_stage: list[int], student: StudentSpec) -> list[int]:
    """f // r per stage, at least `min_features`. Raises SpecError when f // r leaves no channel somewhere."""
    if min(features_per_stage) // student.r < 1:
        raise SpecError(
            f"-r {student.r} leaves no channels: the narrowest stage has {min(features_per_stage)} features\n"
            f"expected r of at most {min(features_per_stage)}"
        )
    return [min(f, max(student.min_features, f // student.r)) for f in features_per_stage]


def student_plans(
    plans: dict[str, Any], configuration: str, student: StudentSpec, distill: DistillSpec
) -> dict[str, Any]:
    """The student's plans: `features_per_stage` reduced in `configuration`, everything else as the teacher's.

    The preprocessed data are shared with the teacher because `data_identifier` stays.
    Raises MismatchError for an architecture without `features_per_stage`.
    """
    out = deepcopy(plans)
    out["plans_name"] = student_plans_name(plans["plans_name"], student, distill)
    config = out["configurations"].get(configuration, {})
    kwargs = config.get("architecture", {}).get("arch_kwargs", {})
    features = kwargs.get("features_per_stage")
    if not isinstance(features, list):
        raise MismatchError(
            f"configuration {configuration!r} of {plans['plans_name']} has no list features_per_stage to divide by r\n"
            f"got architecture {config.get('architecture', {}).get('network_class_name')}; expected a U-Net"
        )
    kwargs["features_per_stage"] = reduce_features(features, student)
    return out


def publish_plans(dataset_name: str, plans: dict[str, Any]) -> None:
    """Write `<plans name>.json` beside the preprocessed data, where nnUNetv2_find_best_configuration looks for it.

    Training does not need it, so a folder that cannot be written to is a warning.
    """
    path = nnunet_folder("nnUNet_preprocessed") / dataset_name / f"{plans['plans_name']}.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(plans, indent=4))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("%s was not written (%s): nnUNetv2_find_best_configuration will not find it", path, error)


def student_folder(
    dataset_name: str, teacher_plans: str, configuration: str, student: StudentSpec, distill: DistillSpec
) -> Path:
    """The student's model folder in nnUNet_results, where stock nnU-Net looks for it."""
    return model_folder(dataset_name, STOCK_TRAINER, student_plans_name(teacher_plans, student, distill), configuration)


def find_student(
    dataset_name: str, teacher_plans: str, configuration: str, student: StudentSpec, distill: DistillSpec
) -> Path:
    """The one student of this size, weight of the soft loss and temperature, however else it was trained.

    Raises NotFoundError with the students that exist, MismatchError with the names when several fit.
    """
    exact = student_folder(dataset_name, teacher_plans, configuration, student, distill)
    stem = f"{teacher_plans}_{student.tag}_{distill.soft_tag}"
    named = {p.name.split("__")[1]: p for p in sorted(exact.parent.glob(f"{STOCK_TRAINER}__*__{configuration}"))}
    fitting = [name for name in named if name == stem or name.startswith(f"{stem}_")]
    if not fitting:
        there = [name for name in named if name.startswith(f"{teacher_plans}_")]
        raise NotFoundError(
            f"no student {stem} in {exact.parent} for {configuration}\n"
            f"students that exist: {', '.join(there) or '(none)'}"
        )
    if len(fitting) > 1 and not exact.is_dir():
        raise MismatchError(f"several students {stem}: {', '.join(fitting)}\nname one of them with -spl")
    return exact if exact.is_dir() else named[fitting[0]]
