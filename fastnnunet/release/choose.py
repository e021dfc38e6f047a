"""Which student is small enough and good enough: paired bootstrap over cases, and the choice made from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastnnunet.errors import MismatchError, SpecError

RESAMPLES, CONFIDENCE = 10_000, 0.95
PREFERENCES = ("smallest", "fastest")
ROUNDING = 1e-9  # points; a mean that misses the budget by less than this is within it


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Mean of paired differences and its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A student against the reference; `points` is its Dice less the reference's, x 100."""

    name: str
    parameters: int
    ms_per_patch: float
    points: Interval

    def within(self, budget: float) -> bool:
        """The mean loses at most `budget` points."""
        return self.points.mean >= -budget - ROUNDING

    def surely_within(self, budget: float) -> bool:
        """The whole interval loses at most `budget` points."""
        return self.points.low >= -budget - ROUNDING


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`candidate` is the preferred one within the budget, or, where `found` is false, the one with the best mean."""

    candidate: Candidate
    found: bool
    certain: bool  # the whole interval lies within the budget, not the mean alone


def paired_points(
    student: Mapping[str, float], reference: Mapping[str, float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Dice per case of student and reference -> difference of means in points (Dice x 100) with a 95 % interval.

    Whole cases are drawn with replacement, so student and reference are always compared on the same cases; those
    where either Dice is NaN (no label in truth or prediction) are left out. Raises MismatchError when the cases
    differ or none can be compared, SpecError for a wrong number of resamples.
    """
    if resamples < 1:
        raise SpecError(f"resamples: got {resamples}, expected at least 1")
    if student.keys() != reference.keys():
        alone = sorted(student.keys() ^ reference.keys())
        raise MismatchError(f"student and reference were scored on other cases than each other: {', '.join(alone)}")
    points = np.array([100 * (student[case] - reference[case]) for case in sorted(student)])
    points = points[np.isfinite(points)]
    if not len(points):
        raise MismatchError("no case with a Dice of both student and reference; expected at least one")
    drawn = np.random.default_rng(seed).integers(len(points), size=(resamples, len(points)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(points[drawn].mean(1), (tail, 1 - tail))
    return Interval(mean=float(points.mean()), low=float(low), high=float(high))


def choose(candidates: Sequence[Candidate], within: float, prefer: str = "smallest") -> Choice:
    """The candidate whose mean is within `within` points of the reference and that is smallest (parameters) or fastest
    (milliseconds a patch), as `prefer` says; else the best.

    Raises SpecError for a negative budget, another preference or no candidates.
    """
    if not candidates:
        raise SpecError("no student to choose from: give at least one size with -r")
    if not within >= 0:
        raise SpecError(f"within: got {within}, expected 0 or more Dice points (Dice x 100)")
    if prefer not in PREFERENCES:
        raise SpecError(f"prefer: got {prefer!r}, expected {' or '.join(PREFERENCES)}")
    fitting = [c for c in candidates if c.within(within)]
    if not fitting:
        return Choice(candidate=max(candidates, key=lambda c: c.points.mean), found=False, certain=False)
    best = min(
        fitting, key=lambda c: (c.parameters if prefer == "smallest" else c.ms_per_patch, c.parameters, -c.points.mean)
    )
    return Choice(candidate=best, found=True, certain=best.surely_within(within))
