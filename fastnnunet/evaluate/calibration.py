"""How well a student's probabilities agree with its teacher's, or with labels, as probabilities and not only as labels.

Per voxel q is the student's distribution over the C classes and p the target: the teacher's distribution, or 1 at the
label's class and 0 elsewhere. Means over voxels of

- Brier score, sum_c (q_c - p_c)^2, from 0 to 2 (G. W. Brier, Monthly Weather Review 78, 1950; here with a soft target);
- cross entropy (negative log-likelihood), -sum_c p_c ln q_c in nats, q clipped from below at `LEAST`: against labels
  -ln q at the label's class; against the teacher never below `target_entropy`, the teacher's own uncertainty;
- KL divergence p || q, which is cross entropy less target entropy;

and the expected calibration error in B equal bins of the confidence max_c q (M. P. Naeini et al., AAAI 2015; C. Guo et
al., arXiv:1706.04599, 2017): sum_b n_b / n |mean confidence in b - mean p at the student's class in b|. Against labels
the last is the accuracy in the bin, as they define it; against a teacher it is the probability which the teacher gives
to what the student says, so that a student equal to its teacher has an error of 0.

A teacher of regions (sigmoid) decides each region by itself: each of its C channels counts as a problem of two classes,
so a voxel counts C times.

Most voxels of a volume are certain background, so everything is given once more for the voxels near the borders of the
teacher's labels: those whose centre is at most `border_mm` from the centre of a voxel with a neighbour (across a face)
of another label. Without a spacing the unit is the voxel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnnunet.errors import MismatchError, SpecError

BINS = 15
BORDER_MM = 2.0
LEAST = 1e-7  # about what float32 tells from 1; a probability of exactly 0 would make a mean infinite
_SIMPLEX = 0.05  # by how much stored probabilities may miss a sum of 1; caches keep them in a few bits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationSums:
    """Sums over voxels that add over cases: `a + b`. The bins are of the student's confidence."""

    voxels: int
    brier: float
    cross_entropy: float
    target_entropy: float
    bin_voxels: NDArray[np.float64]  # (B,)
    bin_confidence: NDArray[np.float64]  # (B,) sum of max q
    bin_target: NDArray[np.float64]  # (B,) sum of p at the student's class

    def __add__(self, other: "CalibrationSums") -> "CalibrationSums":
        return CalibrationSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationScores:
    """Means over voxels as the module defines them; NaN where there are no voxels. Plain JSON by `write_json`."""

    voxels: int
    brier: float
    nll: float  # cross entropy, nats
    target_entropy: float  # nats, the least that `nll` can be
    kl: float  # nats
    ece: float
    bins: tuple[tuple[int, float, float], ...]  # voxels, mean confidence, mean target of every bin; NaN of an empty one


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Of one case, or of many added up: `a + b`; None where there were no labels."""

    border_mm: float
    teacher: CalibrationSums
    teacher_border: CalibrationSums
    labels: CalibrationSums | None = None
    labels_border: CalibrationSums | None = None

    def __add__(self, other: "Calibration") -> "Calibration":
        """Cases with labels and without may be added: the labels' sums are over those that have some."""
        if self.border_mm != other.border_mm:
            raise MismatchError(f"borders of {self.border_mm:g} and {other.border_mm:g} do not add; use one width")
        return Calibration(
            border_mm=self.border_mm,
            teacher=self.teacher + other.teacher,
            teacher_border=self.teacher_border + other.teacher_border,
            labels=_both(self.labels, other.labels),
            labels_border=_both(self.labels_border, other.labels_border),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSummary:
    """A student's calibration for records and reports: against its teacher, and against labels where there are some."""

    border_mm: float
    teacher: CalibrationScores
    teacher_border: CalibrationScores
    labels: CalibrationScores | None
    labels_border: CalibrationScores | None


def read_summary(record: Mapping[str, Any]) -> CalibrationSummary:
    """What `write_json` made of a summary. Raises KeyError, TypeError or ValueError where it did not make it."""
    return CalibrationSummary(
        border_mm=float(record["border_mm"]),
        teacher=_read_scores(record["teacher"]),
        teacher_border=_read_scores(record["teacher_border"]),
        labels=None if record["labels"] is None else _read_scores(record["labels"]),
        labels_border=None if record["labels_border"] is None else _read_scores(record["labels_border"]),
    )


def _read_scores(record: Mapping[str, Any]) -> CalibrationScores:
    means = {name: _number(record[name]) for name in ("brier", "nll", "target_entropy", "kl", "ece")}
    bins = tuple((int(voxels), _number(q), _number(p)) for voxels, q, p in record["bins"])
    return CalibrationScores(voxels=int(record["voxels"]), bins=bins, **means)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def case_calibration(
    student_CZYX: NDArray[np.floating],
    teacher_CZYX: NDArray[np.floating],
    label_ZYX: NDArray[np.integer] | None = None,
    *,
    spacing_mm: Sequence[float] | None = None,
    border_mm: float = BORDER_MM,
    regions: Sequence[Sequence[int]] | None = None,
    ignore_label: int | None = None,
) -> Calibration:
    """One case, slice by slice in float64.

    `student_CZYX`, `teacher_CZYX`: probabilities of one shape (C, z, y, x), softmax with channel c for label value c,
    or, with `regions`, sigmoid with channel c for the label values `regions[c]`. `label_ZYX`: true labels; voxels of
    `ignore_label`, or of a value above all classes, count nowhere against them. `spacing_mm` (z, y, x): without it
    `border_mm` counts voxels.
    Raises MismatchError when the shapes do not fit or probabilities are none, SpecError for a negative border.
    """
    shape = student_CZYX.shape
    if len(shape) != 4 or teacher_CZYX.shape != shape or (label_ZYX is not None and label_ZYX.shape != shape[1:]):
        raise MismatchError(
            f"probabilities and labels do not fit: student {shape}, teacher {teacher_CZYX.shape}, "
            f"label {None if label_ZYX is None else label_ZYX.shape}; expected (C, z, y, x) twice and (z, y, x)"
        )
    if not border_mm >= 0:
        raise SpecError(f"border: got {border_mm}, expected 0 mm or more")
    if regions is not None and len(regions) != shape[0]:
        raise MismatchError(f"got {len(regions)} regions for {shape[0]} channels, expected one for each")
    near_ZYX = near_borders(label_codes(teacher_CZYX, regions is not None), spacing_mm or (1.0, 1.0, 1.0), border_mm)
    found = [_no_sums() for _ in range(4)]
    for z, near_YX in enumerate(near_ZYX):
        student_CN, teacher_CN = (_probabilities(p[:, z], regions is not None) for p in (student_CZYX, teacher_CZYX))
        targets: list[tuple[NDArray[np.float64], NDArray[np.bool_]]] = [(teacher_CN, np.ones(near_YX.size, bool))]
        if label_ZYX is not None:
            targets.append(_of_labels(label_ZYX[z].ravel(), shape[0], regions, ignore_label))
        for number, (target_CN, known_N) in enumerate(targets):
            for place, chosen_N in enumerate((known_N, known_N & near_YX.ravel())):
                sums = _sums(student_CN[:, chosen_N], target_CN[:, chosen_N], regions is not None)
                found[2 * number + place] += sums
    teacher, teacher_border, labels, labels_border = found
    if label_ZYX is None:
        return Calibration(border_mm=border_mm, teacher=teacher, teacher_border=teacher_border)
    return Calibration(
        border_mm=border_mm,
        teacher=teacher,
        teacher_border=teacher_border,
        labels=labels,
        labels_border=labels_border,
    )


def summarise(calibration: Calibration) -> CalibrationSummary:
    """Means of the sums."""
    c = calibration
    return CalibrationSummary(
        border_mm=c.border_mm,
        teacher=scores(c.teacher),
        teacher_border=scores(c.teacher_border),
        labels=None if c.labels is None else scores(c.labels),
        labels_border=None if c.labels_border is None else scores(c.labels_border),
    )


def scores(sums: CalibrationSums) -> CalibrationScores:
    """Means of the sums of some voxels; all NaN where there are none."""
    n = sums.voxels

    def mean(value: float, voxels: float = n) -> float:
        return float(value / voxels) if voxels else float("nan")

    gaps = np.abs(sums.bin_confidence - sums.bin_target)  # of the sums in a bin: |mean - mean| weighted by its voxels
    return CalibrationScores(
        voxels=n,
        brier=mean(sums.brier),
        nll=mean(sums.cross_entropy),
        target_entropy=mean(sums.target_entropy),
        kl=mean(sums.cross_entropy - sums.target_entropy),
        ece=mean(float(gaps.sum())),
        bins=tuple(
            (int(v), mean(c, v), mean(t, v))
            for v, c, t in zip(sums.bin_voxels, sums.bin_confidence, sums.bin_target, strict=True)
        ),
    )


def label_codes(probabilities_CZYX: NDArray[np.floating], regions: bool) -> NDArray[np.integer]:
    """A number (z, y, x) for what is most probable: the class, or for `regions` (at most 63) the set of those above a
    half."""
    if not regions:
        return np.argmax(probabilities_CZYX, axis=0)
    codes = np.zeros(probabilities_CZYX.shape[1:], np.int64)
    for bit, channel_ZYX in enumerate(probabilities_CZYX):
        codes |= (channel_ZYX > 0.5).astype(np.int64) << bit
    return codes


def near_borders(labels_ZYX: NDArray[np.integer], spacing_mm: Sequence[float], border_mm: float) -> NDArray[np.bool_]:
    """Voxels whose centre is at most `border_mm` from that of a voxel with a face to another label."""
    from scipy.ndimage import distance_transform_edt

    at_border = np.zeros(labels_ZYX.shape, bool)
    for axis in range(labels_ZYX.ndim):
        low, high = ([slice(None)] * labels_ZYX.ndim for _ in range(2))
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        differ = labels_ZYX[tuple(low)] != labels_ZYX[tuple(high)]
        at_border[tuple(low)] |= differ
        at_border[tuple(high)] |= differ
    if not at_border.any() or border_mm == 0:
        return at_border
    box = []  # distances are needed only around the borders, in few of the voxels of most volumes
    for axis, spacing in enumerate(spacing_mm):
        along = np.flatnonzero(at_border.any(axis=tuple(a for a in range(at_border.ndim) if a != axis)))
        margin = int(np.ceil(border_mm / spacing))
        box.append(slice(max(0, int(along[0]) - margin), int(along[-1]) + margin + 1))
    near = np.zeros_like(at_border)
    near[tuple(box)] = distance_transform_edt(~at_border[tuple(box)], sampling=tuple(spacing_mm)) <= border_mm
    return near


def _probabilities(channels_CYX: NDArray[np.floating], regions: bool) -> NDArray[np.float64]:
    """As (C, n) float64 that sum to 1 exactly. Raises MismatchError for what cannot be probabilities."""
    values_CN = np.asarray(channels_CYX, np.float64).reshape(len(channels_CYX), -1)
    sums_N = values_CN.sum(axis=0)
    wrong = not np.isfinite(sums_N).all() or values_CN.min(initial=0) < 0 or values_CN.max(initial=0) > 1 + _SIMPLEX
    if wrong or (not regions and np.abs(sums_N - 1).max(initial=0) > _SIMPLEX):
        raise MismatchError(
            f"not probabilities: values from {values_CN.min():g} to {values_CN.max():g}, sums over channels from "
            f"{sums_N.min():g} to {sums_N.max():g}; expected values from 0 to 1"
            + ("" if regions else " that sum to 1; give softmax, not logits")
        )
    return values_CN.clip(0, 1) if regions else values_CN / sums_N


def _of_labels(
    labels_N: NDArray[np.integer], channels: int, regions: Sequence[Sequence[int]] | None, ignore_label: int | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Labels as a target (C, n) of zeros and ones, and which voxels have one."""
    values = range(channels) if regions is None else regions
    target_CN = np.array([np.isin(labels_N, value) for value in values], np.float64)
    known_N = labels_N != ignore_label if ignore_label is not None else np.ones(labels_N.shape, bool)
    return target_CN, known_N if regions is not None else known_N & (target_CN.sum(axis=0) == 1)


def _sums(student_CN: NDArray[np.float64], target_CN: NDArray[np.float64], regions: bool) -> CalibrationSums:
    if regions:  # each channel by itself: is, is not
        pairs = zip(student_CN, target_CN, strict=True)
        return sum((_sums(np.stack((q, 1 - q)), np.stack((p, 1 - p)), False) for q, p in pairs), _no_sums())
    chosen_N = student_CN.argmax(axis=0)
    confidence_N, target_N = (np.take_along_axis(p, chosen_N[None], axis=0)[0] for p in (student_CN, target_CN))
    bins_N = np.minimum((confidence_N * BINS).astype(np.intp), BINS - 1)
    positive = target_CN > 0
    return CalibrationSums(
        voxels=student_CN.shape[1],
        brier=float(((student_CN - target_CN) ** 2).sum()),
        cross_entropy=-float((target_CN * np.log(np.maximum(student_CN, LEAST))).sum()),
        target_entropy=-float((target_CN[positive] * np.log(target_CN[positive])).sum()),
        bin_voxels=np.bincount(bins_N, minlength=BINS).astype(np.float64),
        bin_confidence=np.bincount(bins_N, confidence_N, BINS).astype(np.float64),
        bin_target=np.bincount(bins_N, target_N, BINS).astype(np.float64),
    )


def _no_sums() -> CalibrationSums:
    none = np.zeros(BINS)
    return CalibrationSums(
        voxels=0,
        brier=0.0,
        cross_entropy=0.0,
        target_entropy=0.0,
        bin_voxels=none,
        bin_confidence=none,
        bin_target=none,
    )


def _both(a: CalibrationSums | None, b: CalibrationSums | None) -> CalibrationSums | None:
    return a + b if a is not None and b is not None else a or b
