"""Fidelity: Dice of a student's label maps against its teacher's own, for scans that nobody has labelled.

Means and empty labels are as everywhere here: a label that neither teacher nor student sees in a case has no Dice there
(NaN) and means leave it out, one that only one of them sees is a failure (Dice 0). The mean fidelity is the mean over
labels of their means over cases; the fidelity of a case is the mean of its labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnnunet.errors import MismatchError
from fastnnunet.evaluate.bootstrap import Interval, mean_intervals
from fastnnunet.evaluate.metrics import dice_of_labels, nanmean
from fastnnunet.evaluate.segmentations import (
    LabelSet,
    pair_cases,
    read_segmentation,
    require_complete,
    require_same_geometry,
)
from fastnnunet.events import Listener, Progress, ignore

POINTS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """A student against its teacher; all Dice are 0..1. A plain record by `specs.canonical.to_plain`."""

    student: str
    mean: Interval  # of the labels' means; NaN where no label occurs in any case
    labels: dict[str, Interval]  # name of label or region -> its mean over the cases that have it
    label_cases: dict[str, int]  # name -> cases in which teacher or student sees it
    dice: dict[str, dict[str, float]]  # case -> name -> Dice, NaN where neither sees it

    def of_cases(self) -> dict[str, float]:
        """Mean of the labels of every case; NaN for a case in which neither teacher nor student sees anything."""
        return {case: nanmean(of_label.values()) for case, of_label in self.dice.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityGap:
    """How much more faithful `first` is than `second` on the same cases, in points (Dice x 100)."""

    first: str
    second: str
    mean: Interval
    labels: dict[str, Interval]


def measure_fidelity(
    teacher_folder: Path,
    student_folder: Path,
    labels: LabelSet,
    student: str,
    *,
    cases: Sequence[str] | None = None,
    seed: int = 0,
    progress: Listener = ignore,
) -> Fidelity:
    """Compare label maps CASE.ending of a student with those of its teacher, on the same grid.

    `cases`: those to compare, which both folders must have; without it all, and then neither may have one that the
    other lacks. `labels`: see `segmentations.make_label_set`. Intervals are 95 % of `RESAMPLES` draws of cases.
    Raises NotFoundError for a missing folder, MismatchError for missing files or another grid, ImageError.
    """
    pairing = pair_cases(student_folder, teacher_folder, labels.file_ending)
    if cases is None:
        require_complete(pairing)
        cases = pairing.cases
    elif missing := sorted(set(cases) - set(pairing.cases)):
        raise MismatchError(
            f"no label map of teacher or student for {', '.join(missing)}\n"
            f"expected CASE{labels.file_ending} in {teacher_folder} and in {student_folder}"
        )
    dice = {}
    for done, case in enumerate(cases, start=1):
        name = f"{case}{labels.file_ending}"
        teacher, guess = read_segmentation(teacher_folder / name), read_segmentation(student_folder / name)
        require_same_geometry(case, teacher, guess)
        dice[case] = dice_of_labels(teacher.labels_zyx, guess.labels_zyx, labels.names, labels.ignore)
        progress(Progress(what=f"comparing {student} with its teacher", done=done, total=len(cases), unit="cases"))
    return fidelity_of(student, dice, seed=seed)


def fidelity_of(student: str, dice: dict[str, dict[str, float]], *, seed: int = 0) -> Fidelity:
    """Means and intervals of Dice of case -> label -> Dice; every case must have the same labels.

    Raises MismatchError where there are no cases.
    """
    names = list(next(iter(dice.values()), {}))
    values_NK = np.array([[of_label[name] for name in names] for of_label in dice.values()], np.float64)
    found = mean_intervals(values_NK, seed=seed)
    return Fidelity(
        student=student,
        mean=found.mean,
        labels=dict(zip(names, found.columns, strict=True)),
        label_cases={name: int(np.isfinite(values_NK[:, k]).sum()) for k, name in enumerate(names)},
        dice=dice,
    )


def fidelity_gap(first: Fidelity, second: Fidelity, *, seed: int = 0) -> FidelityGap:
    """Paired bootstrap of two students of one teacher over the cases they share, per label and of the mean.

    A label counts in the cases where both have a Dice. Raises MismatchError when the cases differ.
    """
    if first.dice.keys() != second.dice.keys() or first.labels.keys() != second.labels.keys():
        alone = sorted((first.dice.keys() ^ second.dice.keys()) | (first.labels.keys() ^ second.labels.keys()))
        raise MismatchError(
            f"{first.student} and {second.student} were compared with their teacher on other cases or labels than "
            f"each other: {', '.join(alone)}"
        )
    names = list(first.labels)
    gaps_NK = [[POINTS * (first.dice[c][name] - second.dice[c][name]) for name in names] for c in first.dice]
    found = mean_intervals(np.array(gaps_NK, np.float64), seed=seed)
    labels = dict(zip(names, found.columns, strict=True))
    return FidelityGap(first=first.student, second=second.student, mean=found.mean, labels=labels)
