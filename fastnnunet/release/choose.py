"""Which student is small enough and good enough, by the paired bootstrap of its Dice over cases."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastnnunet.errors import SpecError
from fastnnunet.evaluate.bootstrap import Interval

PREFERENCES = ("smallest", "fastest")
ROUNDING = 1e-9  # points; a mean that misses the budget by less than this is within it


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
