"""How sure a mean over cases is: percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13).

Whole cases are drawn with replacement, so whatever is compared is always compared on the same cases.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastnnunet.errors import MismatchError, SpecError

RESAMPLES, CONFIDENCE = 10_000, 0.95
_AT_ONCE = 2**22  # drawn case numbers held in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over cases and its percentile bootstrap interval; all NaN where no case has a value."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """Of every column of a table of cases, and of the mean of the columns' means."""

    columns: tuple[Interval, ...]
    mean: Interval


def mean_intervals(values_NK: NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES) -> Intervals:
    """95 % intervals of the means of K columns over N cases, from the same draws for all of them.

    NaN says that a case has no such value: means leave it out, and so does the mean of the means with a column that has
    no value at all, in the table or in a draw. Raises SpecError for a wrong number of resamples, MismatchError for a
    table without cases.
    """
    if resamples < 1:
        raise SpecError(f"resamples: got {resamples}, expected at least 1")
    cases = len(values_NK)
    if not cases:
        raise MismatchError("there are no cases to take a mean of; expected at least one")
    rng = np.random.default_rng(seed)
    rows, drawn = max(1, _AT_ONCE // cases), []
    for start in range(0, resamples, rows):
        many = min(rows, resamples - start)
        numbers_RN = rng.integers(cases, size=(many, cases)) + np.arange(many)[:, None] * cases
        drawn.append(_means(np.bincount(numbers_RN.ravel(), minlength=many * cases).reshape(many, cases), values_NK))
    means_RK, mean_K = np.concatenate(drawn), _means(np.ones((1, cases)), values_NK)[0]
    return Intervals(
        columns=tuple(_interval(mean, means_R) for mean, means_R in zip(mean_K, means_RK.T, strict=True)),
        mean=_interval(_over_columns(mean_K[None])[0], _over_columns(means_RK)),
    )


def paired_points(
    student: Mapping[str, float], reference: Mapping[str, float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Dice per case of student and reference -> difference of means in points (Dice x 100) with a 95 % interval.

    Cases where either Dice is NaN (no label in truth or prediction) are left out. Raises MismatchError when the cases
    differ or none can be compared, SpecError for a wrong number of resamples.
    """
    if student.keys() != reference.keys():
        alone = sorted(student.keys() ^ reference.keys())
        raise MismatchError(f"student and reference were scored on other cases than each other: {', '.join(alone)}")
    points = np.array([100 * (student[case] - reference[case]) for case in sorted(student)])
    points = points[np.isfinite(points)]
    if not len(points):
        raise MismatchError("no case with a Dice of both student and reference; expected at least one")
    return mean_intervals(points[:, None], seed=seed, resamples=resamples).columns[0]


def _means(times_RN: NDArray[np.generic], values_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means (R, K) of the values that are there, every case counted as often as it was drawn; NaN where none is."""
    known_NK = np.isfinite(values_NK)
    times = times_RN.astype(np.float64)
    sums, counts = times @ np.where(known_NK, values_NK, 0.0), times @ known_NK.astype(np.float64)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _over_columns(means_RK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the columns that have one (R,)."""
    return _means(np.ones((1, means_RK.shape[1])), means_RK.T)[0]


def _interval(mean: float, means_R: NDArray[np.float64]) -> Interval:
    known = means_R[np.isfinite(means_R)]
    if not len(known):
        return Interval(mean=float(mean), low=float("nan"), high=float("nan"))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, (tail, 1 - tail))
    return Interval(mean=float(mean), low=float(low), high=float(high))
