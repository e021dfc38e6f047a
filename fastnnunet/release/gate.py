"""The gate of lower precisions: Dice of a network in bf16 or int8 beside that of the same network in fp32.

Both predict the same cases on the same backend, in one pass, without mirroring, which would average errors out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isnan

import numpy as np
from numpy.typing import NDArray

from fastnnunet.engines.base import Precision
from fastnnunet.errors import MismatchError, ParityError
from fastnnunet.evaluate.metrics import dice_of_labels, nanmean
from fastnnunet.evaluate.segmentations import LabelSet, make_label_set
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.release.gate_cases import GateCases
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.runtime.times import StageTimes

POINTS = 100.0  # of Dice, as they are spoken of


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A precision on a backend beside fp32; Dice are means over cases per label, then over foreground labels."""

    precision: Precision
    backend: str
    against: str  # "labels", or "fp32": the prediction in fp32 stands for the truth, its own Dice is 1
    dice_fp32: float
    dice: float
    label_agreement: float  # share of voxels with the same label as in fp32
    cases: tuple[str, ...]

    @property
    def loss_points(self) -> float:
        """Points of Dice lost; negative where there is a gain."""
        return POINTS * (self.dice_fp32 - self.dice)


class CaseDice:
    """Dice of every case and label."""

    def __init__(self, labels: LabelSet) -> None:
        self._labels = labels
        self._values: dict[str, list[float]] = {name: [] for name in labels.names}

    def add(self, truth_ZYX: NDArray[np.integer], prediction_ZYX: NDArray[np.integer]) -> None:
        if truth_ZYX.shape != prediction_ZYX.shape:
            raise MismatchError(
                f"label and image differ in shape: label {truth_ZYX.shape}, prediction {prediction_ZYX.shape}"
            )
        for name, dice in dice_of_labels(truth_ZYX, prediction_ZYX, self._labels.names, self._labels.ignore).items():
            self._values[name].append(dice)

    def of_labels(self) -> dict[str, float]:
        """Name -> mean over the cases that have it; without those that no case has."""
        means = {name: nanmean(values) for name, values in self._values.items()}
        return {name: mean for name, mean in means.items() if not isnan(mean)}

    def mean(self) -> float:
        """Over labels of their means over cases; NaN where there is nothing to judge."""
        return nanmean(nanmean(of_label) for of_label in self._values.values())


def compare(
    source: GateCases,
    fp32: Mapping[str, LoadedBundle],
    others: Sequence[LoadedBundle],
    progress: Listener = ignore,
) -> list[Comparison]:
    """Predict the cases to judge on with `others` and with the network in fp32 on the same backend (by its name).

    Raises MismatchError where there is no foreground to judge, or a label of another shape.
    """
    used = {name: fp32[name] for name in dict.fromkeys(other.backend.name for other in others)}
    labels = make_label_set(next(iter(used.values())).spec.labels, "")
    dice_fp32 = {name: CaseDice(labels) for name in used}
    dice = [CaseDice(labels) for _ in others]
    same, voxels = [0] * len(others), 0
    cases = source.choice.judge
    for number, case_id in enumerate(cases, start=1):
        case = source.preprocessed(case_id)

        exact = {name: _predict(model, case) for name, model in used.items()}
        truth = source.labels_ZYX(case_id) if source.has_labels else None
        for name, prediction in exact.items():
            dice_fp32[name].add(prediction if truth is None else truth, prediction)
        for index, model in enumerate(others):
            prediction, reference = _predict(model, case), exact[model.backend.name]
            dice[index].add(reference if truth is None else truth, prediction)
            same[index] += int((prediction == reference).sum())
        voxels += next(iter(exact.values())).size
        progress(Progress(what="comparing with fp32", done=number, total=len(cases), unit="cases"))
    found = [
        Comparison(
            precision=model.backend.precision,
            backend=model.backend.name,
            against="labels" if source.has_labels else "fp32",
            dice_fp32=dice_fp32[model.backend.name].mean(),
            dice=dice[index].mean(),
            label_agreement=same[index] / voxels,
            cases=cases,
        )
        for index, model in enumerate(others)
    ]
    if any(isnan(c.dice) or isnan(c.dice_fp32) for c in found):
        raise MismatchError(
            f"there is no foreground to judge in {', '.join(cases)}, neither in labels nor in predictions\n"
            "name other cases with --case"
        )
    return found


def _predict(model: LoadedBundle, case: Preprocessed) -> NDArray[np.integer]:
    return model.postprocess(model.infer(case, StageTimes()), case)[0]


def describe(comparison: Comparison) -> str:
    """One line: both figures and the difference."""
    c = comparison
    return (
        f"{c.precision} {c.backend}: Dice {POINTS * c.dice:.2f}, fp32 {POINTS * c.dice_fp32:.2f} "
        f"({-c.loss_points:+.2f} points), same label on {c.label_agreement:.3%} of voxels"
    )


def require(comparisons: Sequence[Comparison], max_loss_points: float, judged_on: str) -> None:
    """Raise ParityError with all figures when one of them loses more than allowed."""
    worst = max(c.loss_points for c in comparisons)
    if worst <= max_loss_points:
        return
    allow = ceil(10 * worst) / 10
    raise ParityError(
        f"lower precision loses more than {max_loss_points:g} points of Dice ({judged_on}):\n"
        + "\n".join(f"  {describe(c)}" for c in comparisons)
        + "\nnothing was written; calibrate on more patches (--patches) or images, leave a backend out (--backend),\n"
        + f"or allow it with --max-dice-loss {allow:g}"
        + (
            "\n(without labels the loss is 100 less the Dice with the prediction in fp32; give labels with -g)"
            if comparisons[0].against == "fp32"
            else ""
        )
    )
