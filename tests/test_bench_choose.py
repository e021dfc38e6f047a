"""Choosing a student: the bootstrap against SciPy and hand-made cases, the choice on made-up scores."""

import numpy as np
import pytest
from scipy import stats

from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.evaluate.bootstrap import Interval, paired_points
from fastnnunet.release.choose import Candidate, choose


def test_agrees_with_scipy():
    rng = np.random.default_rng(3)
    student, reference = rng.uniform(0.7, 0.95, 30), rng.uniform(0.7, 0.95, 30)
    got = paired_points(*({str(i): float(v) for i, v in enumerate(a)} for a in (student, reference)), seed=5)
    oracle = stats.bootstrap(
        (100 * student, 100 * reference),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=100_000,
        rng=np.random.default_rng(11),
    ).confidence_interval
    assert got.mean == pytest.approx(100 * (student.mean() - reference.mean()))
    width = oracle.high - oracle.low
    assert got.low == pytest.approx(oracle.low, abs=0.03 * width)
    assert got.high == pytest.approx(oracle.high, abs=0.03 * width)


def test_hand_made_cases():
    reference = {"a": 0.5, "b": 0.9, "c": 0.7}
    shifted = {case: dice - 0.01 for case, dice in reference.items()}
    constant = paired_points(shifted, reference)  # cases differ a lot, differences do not: pairing leaves no spread
    assert (constant.mean, constant.low, constant.high) == pytest.approx((-1, -1, -1))
    two = paired_points({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 0.0})  # means 0, 50, 100 with chances 1/4, 1/2, 1/4
    assert (two.mean, two.low, two.high) == pytest.approx((50, 0, 100))
    assert paired_points({**shifted, "d": np.nan}, {**reference, "d": 0.5}).mean == pytest.approx(-1)
    varied = {"a": 0.4, "b": 0.95, "c": 0.6}
    assert paired_points(varied, reference, seed=1) == paired_points(varied, reference, seed=1)


def test_refusals():
    with pytest.raises(MismatchError, match="other cases than each other: b"):
        paired_points({"a": 1.0}, {"a": 1.0, "b": 1.0})
    with pytest.raises(MismatchError, match="no case"):
        paired_points({"a": np.nan}, {"a": 1.0})
    with pytest.raises(SpecError, match="at least one size"):
        choose([], 0.5)
    for budget in (-0.1, np.nan):
        with pytest.raises(SpecError, match="within"):
            choose([candidate("r2", 9, 0)], budget)


def candidate(name, parameters, mean, half=0.3, ms=1.0):
    points = Interval(mean=mean, low=mean - half, high=mean + half)
    return Candidate(name=name, parameters=parameters, ms_per_patch=ms, points=points)


def test_smallest_within_the_budget():
    students = [
        candidate("r2", 900, 0.1),
        candidate("r4", 200, -0.1),
        candidate("r6", 90, -0.4),
        candidate("r8", 50, -2),
    ]
    chosen = choose(students, 0.5)
    assert (chosen.candidate.name, chosen.found, chosen.certain) == ("r6", True, False)  # the mean only
    chosen = choose(students, 0.4)
    assert (chosen.candidate.name, chosen.certain) == ("r6", False)  # exactly on the edge
    chosen = choose(students, 0.39)
    assert (chosen.candidate.name, chosen.found, chosen.certain) == ("r4", True, False)
    assert choose(students, 3).candidate.name == "r8"
    assert choose(students, 3).certain


def test_fastest_within_the_budget():
    students = [candidate("r4", 200, -0.1, ms=7), candidate("r4_lite", 210, -0.2, ms=5), candidate("r6", 90, -2, ms=4)]
    assert choose(students, 0.5).candidate.name == "r4"
    assert choose(students, 0.5, "fastest").candidate.name == "r4_lite"
    assert choose(students, 3, "fastest").candidate.name == "r6"
    with pytest.raises(SpecError, match="'best', expected smallest or fastest"):
        choose(students, 0.5, "best")


def test_none_within_the_budget():
    chosen = choose([candidate("r2", 900, -1), candidate("r8", 50, -2)], 0.5)
    assert (chosen.candidate.name, chosen.found, chosen.certain) == ("r2", False, False)
