"""logit_gap_u8: one stored array, the right soft labels at every temperature of its range."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax as scipy_softmax

from fastnnunet.cache.codecs import LogitGapU8, encode_block, make_codec
from fastnnunet.errors import BuildError, SpecError

RANGES = [(1.0, 4.0), (3.0, 3.0), (0.5, 2.0), (1.0, 16.0)]


@st.composite
def hard_logits(draw):
    """(C, 60) logits with ties, gaps near the clipping, huge gaps, and every class on top somewhere."""
    classes = draw(st.integers(2, 20) | st.just(105))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = rng.normal(size=(classes, 60)) * draw(st.sampled_from([0.01, 1.0, 5.0, 30.0]))
    z[:, :15] = np.round(z[:, :15])
    z[:, 15:25] -= 1e4 * (rng.random((classes, 10)) < 0.5)
    z[:, 25:35] = -draw(st.floats(5, 60))  # all but one class at the same gap
    z[rng.integers(0, classes, 10), np.arange(25, 35)] = 0
    z += rng.normal(size=60) * draw(st.sampled_from([0.0, 1.0, 1e3]))
    return z.astype(np.float32)


@given(hard_logits(), st.sampled_from(RANGES), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_the_bound_holds_at_any_temperature_of_the_range(z, low_high, where):
    low, high = low_high
    codec = LogitGapU8(len(z), low, high)
    stored, measured = encode_block(codec, z, None)
    assert stored.dtype == np.uint8
    assert stored.shape == z.shape
    assert codec.problem(stored) is None
    assert measured <= codec.eps
    for temperature in {low, low + where * (high - low), high}:
        decoded = codec.at(temperature).decode(stored)
        exact = scipy_softmax(z.astype(np.float64) / temperature, axis=0)
        assert np.abs(decoded - exact).max() <= codec.eps_at(temperature) <= codec.eps
        np.testing.assert_allclose(decoded.sum(axis=0), 1, atol=2e-5)


@pytest.mark.parametrize("classes", [2, 3, 20, 105])
def test_the_bound_is_approached(classes):
    """Gaps half-way between two steps, with equal log-odds, are where rounding costs most; the bound is no excuse."""
    codec = LogitGapU8(classes, 1.0, 4.0).at(1.0)
    s = codec.step
    z = np.full((classes, 1), -1e4)
    z[0], z[1] = 0, -0.499 * s  # rounded to 0: log-odds move by half a step, the most two classes can do
    stored, measured = encode_block(codec, z.astype(np.float32), None)
    np.testing.assert_allclose(codec.decode(stored)[:2, 0], 0.5)
    assert math.tanh(s / 8.1) < measured < codec.eps_at(1.0)


def test_hand_computed():
    codec = LogitGapU8(3, 1.0, 4.0)
    # G = 4 ln(1020 * 2) = 30.48, up to eighths
    assert codec.largest_gap == 30.5
    s = 30.5 / 255
    z = np.array([[5, 2, 0], [5 - 10 * s, 2 + 3.4 * s, 40], [5 - 254 * s, 2 - 300, 0]], np.float32)
    stored, _ = encode_block(codec, z, None)
    # background: its own gap in steps; the others: 255 minus theirs
    np.testing.assert_array_equal(stored, [[0, 3, 255], [245, 255, 255], [1, 0, 0]])
    decoded = codec.at(2.0).decode(stored)
    odds = math.exp(-10 * s / 2)
    np.testing.assert_allclose(decoded[:2, 0], [1 / (1 + odds), odds / (1 + odds)], atol=1e-6)
    np.testing.assert_array_equal(decoded[:, 2], [0, 1, 0])  # clipped gaps are certain, not nearly so


@pytest.mark.parametrize("classes", [2, 7, 105])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_zero_is_background(classes, temperature):
    codec = LogitGapU8(classes, 1.0, 4.0, temperature)
    decoded = codec.decode(np.zeros((classes, 2, 2, 2), np.uint8))
    np.testing.assert_array_equal(decoded[0], 1)
    assert not decoded[1:].any()
    z = np.full((classes, 4), -100, np.float32)
    z[0] = 0
    assert not encode_block(codec, z, None)[0].any()


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("classes", [2, 3, 105])
def test_bound_as_a_function_of_temperature(classes, low, high):
    codec = LogitGapU8(classes, low, high)
    between = [codec.eps_at(t) for t in np.linspace(low, high, 50)]
    assert max(between) <= codec.eps <= max(between) + 1e-12
    # the gradient of the loss, T (q - p), is off by a quarter of a step at every T, plus clipping that stays below
    # a sixth of it
    clipping = (classes - 1) * math.exp(-254.5 * codec.step / high)
    assert high * clipping < codec.step / 4 / 6
    assert high * codec.eps_at(high) <= codec.step / 4 * (1 + 1 / 6) + 1e-3


def test_what_is_refused():
    with pytest.raises(SpecError, match="at least 2"):
        LogitGapU8(1, 1.0, 4.0)
    for low, high in ((4.0, 1.0), (0.0, 1.0), (1.0, 17.0)):
        with pytest.raises(SpecError, match="temperature_range"):
            LogitGapU8(3, low, high)
    codec = LogitGapU8(3, 1.0, 4.0)
    for temperature in (0.9, 4.1):
        with pytest.raises(SpecError, match="the range of this cache"):
            codec.at(temperature)
    with pytest.raises(SpecError, match="serves temperatures from 1 to 4"):
        codec.decode(np.zeros((3, 1), np.uint8))
    with pytest.raises(SpecError, match="needs the temperatures"):
        make_codec("logit_gap_u8", 3)
    with pytest.raises(SpecError, match="pooling: logits"):
        encode_block(codec, np.full((3, 4), 1 / 3, np.float32), None, from_probabilities=True)
    with pytest.raises(ValueError, match="smallest gap"):
        codec.encode(np.ones((3, 2), np.float32))
    assert "2 voxels have no largest channel" in codec.problem(np.array([[9, 9, 0], [9, 9, 0], [9, 9, 0]], np.uint8))


def test_a_step_that_breaks_the_bound_is_an_error(monkeypatch):
    monkeypatch.setattr(LogitGapU8, "eps_at", lambda self, temperature: 1e-3)
    z = np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32)
    with pytest.raises(BuildError, match="logit_gap_u8 at T = 1 broke its bound"):
        encode_block(LogitGapU8(3, 1.0, 4.0), z, None)
