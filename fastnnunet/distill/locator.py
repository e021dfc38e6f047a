"""Training a locator: a tiny network that finds the foreground at a coarse spacing, on nnU-Net's own labels."""

from typing import Any

from fastnnunet.distill.job import TrainingJob
from fastnnunet.errors import SpecError
from fastnnunet.events import Listener, ignore
from fastnnunet.nnunet.student.coarse import check_locatable, coarse_factor, locator_network, make_coarse_cases
from fastnnunet.nnunet.student.plans import PLAIN
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.load import build_spec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.maps.jobs import preprocessed_model

# what a locator is trained with unless told otherwise
LOCATOR_TRAINING: dict[str, Any] = {
    "optimizer": "adamw",
    "epochs": 10,
    "iterations_per_epoch": 100,
    "val_iterations_per_epoch": 5,
}
_DECIDED: dict[str, Any] = {"alpha": 0.0, "start": "random"}  # there are no soft labels, and no teacher of its kind


def locator_job(
    teacher: TeacherSpec, fold: int | str, training: dict[str, Any], progress: Listener = ignore, **options: Any
) -> TrainingJob:
    """The job that trains a locator for the students of a teacher, whose cases are made coarse now where they are not.

    Of `teacher` data set, configuration and plans count. `training`: fields of a DistillSpec that are not to be
    LOCATOR_TRAINING's. `options`: of the TrainingJob, how it runs.
    Raises SpecError for models for which a locator makes no sense, NotFoundError without preprocessed cases.
    """
    if wrong := [f"{name}: got {training[name]}" for name, v in _DECIDED.items() if training.get(name, v) != v]:
        raise SpecError(f"--locator: {', '.join(wrong)}; a locator learns from labels alone, leave that out")
    defaults = dict(LOCATOR_TRAINING)
    if training.get("steps") is not None or training.get("hours") is not None:
        defaults = {name: defaults[name] for name in ("optimizer",)}
    distill = build_spec(DistillSpec, {**defaults, **training, **_DECIDED}, where="options")
    if distill.unlabelled is not None:
        raise SpecError("--locator: leave out --unlabelled; a locator learns from labels alone")
    teacher = TeacherSpec(dataset=teacher.dataset, configuration=teacher.configuration, plans=teacher.plans)
    model = preprocessed_model(teacher)
    check_locatable(model)
    factor = coarse_factor(model)
    make_coarse_cases(model, factor, progress)
    student = StudentSpec(network_class_name=PLAIN, arch_kwargs=locator_network(model, factor), name="locator")
    return TrainingJob(
        teacher=teacher,
        student=student,
        distill=distill,
        cache=CacheSpec(),
        fold=fold,
        coarser=factor,
        **options,
    )
