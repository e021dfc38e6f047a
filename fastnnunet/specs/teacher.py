"""Which trained nnU-Net ensemble is the teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastnnunet.errors import SpecError
from fastnnunet.specs.option import Option

Fold = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec:
    """Names as nnU-Net uses them: dataset id or name, configuration, plans, trainer, folds, checkpoint file."""

    dataset: Annotated[str, Option("-d --dataset", "Data set id or name.", first=True)]
    configuration: Annotated[str, Option("-c --configuration", "nnU-Net configuration.", first=True)] = "3d_fullres"
    plans: Annotated[str, Option("-p --plans", "The teacher's plans.")] = "nnUNetPlans"
    trainer: Annotated[str, Option("-tr --trainer", "The teacher's trainer.")] = "nnUNetTrainer"
    folds: Annotated[tuple[Fold, ...], Option("-f --fold", "Teacher folds (default: 0 1 2 3 4).")] = (0, 1, 2, 3, 4)
    checkpoint: Annotated[str, Option("-chk --checkpoint", "The teacher's checkpoint, of every fold.")] = (
        "checkpoint_final.pth"
    )
    previous: Annotated[
        str | None,
        Option("--previous", "Cascades: `teacher`, or a folder of the previous stage's predicted_next_stage."),
    ] = None

    def __post_init__(self) -> None:
        if not self.folds:
            raise SpecError("folds: got none, expected at least one of 0 1 2 3 4 or 'all'")
        if len(set(self.folds)) != len(self.folds):
            raise SpecError(f"folds: got {self.folds}, expected each fold once")
        in_order = sorted(self.folds, key=lambda fold: (isinstance(fold, str), fold))  # their mean has no order
        object.__setattr__(self, "folds", tuple(in_order))


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSpec:
    """An nnU-Net model that came without its data set: a model folder, or a zip or folder of one or several.

    Of several the one is meant whose folder TRAINER__PLANS__CONFIGURATION has the names that are given.
    """

    path: Path
    configuration: str | None = None  # None: the only one there is
    folds: tuple[Fold, ...] | None = None  # None: all numbered folds that are there, else `all`
    checkpoint: str | None = None  # None: checkpoint_final.pth, or the only one there is
    trainer: str | None = None  # None: the only one there is
    plans: str | None = None  # None: the only ones there are
