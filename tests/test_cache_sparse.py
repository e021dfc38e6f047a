"""sparse_u8: simplex_u8's units as planes of their own, and a tail of unlikely classes stored as one sum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.cache.codecs import SimplexU8, SparseU8, encode_block, softmax
from fastnnunet.errors import SpecError

CLASSES = st.integers(2, 20) | st.sampled_from([105, 256, 300])
BOUNDS = st.sampled_from([(0.004, 255), (0.008, 255), (0.016, 255), (0.1, 255), (0.016, 63), (0.033, 31), (0.07, 15)])


@st.composite
def soft_labels(draw):
    """(C, 50) distributions: peaked, flat, tied, one-hot, and with tails just below and above usual tolerances."""
    classes = draw(CLASSES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = rng.normal(size=(classes, 50)) * draw(st.sampled_from([0.01, 1.0, 4.0, 30.0]))
    z[:, :10] = np.round(z[:, :10])
    z[0, 10:20] += draw(st.floats(0, 12))
    z[rng.integers(0, classes, 10), np.arange(20, 30)] += draw(st.floats(0, 100))
    return softmax(z.astype(np.float32), draw(st.sampled_from([1.0, 2.0, 4.0])))


@given(soft_labels(), st.sampled_from([255, 63, 31, 15]))
@settings(max_examples=80, deadline=None)
def test_without_tolerance_it_is_simplex_to_the_bit(p, levels):
    sparse, simplex = SparseU8(len(p), levels=levels), SimplexU8(len(p), levels)
    stored = sparse.encode(p)
    np.testing.assert_array_equal(stored[1:], simplex.encode(p))
    assert not stored[0].any()
    assert sparse.decode(stored).tobytes() == simplex.decode(simplex.encode(p)).tobytes()
    assert sparse.eps == simplex.eps


@given(soft_labels(), BOUNDS)
@settings(max_examples=150, deadline=None)
def test_with_tolerance_it_keeps_its_bound_and_sums_to_one(p, bound):
    tolerance, levels = bound
    codec = SparseU8(len(p), tolerance, levels)
    stored = codec.encode(p)
    assert stored.dtype == np.uint8
    assert stored.shape == p.shape
    assert codec.problem(stored) is None
    decoded = codec.decode(stored)
    assert decoded.dtype == np.float32
    assert np.abs(decoded.astype(np.float64) - p).max() <= codec.eps == tolerance
    np.testing.assert_allclose(decoded.sum(axis=0, dtype=np.float64), 1, atol=2e-6)
    assert decoded.min() >= 0
    # classes within the tolerance have no units, all others have
    np.testing.assert_array_equal(stored[1:] > 0, p[1:] > np.float32(tolerance))
    # the tail as a whole and background err by less than one unit, whatever the tolerance
    in_tail = stored[1:] == 0
    tail_error = np.abs((decoded[1:] * in_tail).sum(axis=0) - (p[1:] * in_tail).sum(axis=0))
    assert tail_error.max() <= 1 / levels + 1e-5
    assert np.abs(decoded[0] - p[0]).max() <= 1 / levels + 1e-5


def test_hand_computed():
    # units: background 200.6, class 1 50.2, then 1.3, 1.6, 1.3 of classes 2 to 4, which t = 0.008 (2.04 units) lets go;
    # the floors of 200.6, 50.2 and 4.2 leave one unit, for the largest remainder
    p = (np.array([[200.6], [50.2], [1.3], [1.6], [1.3]]) / 255).astype(np.float32)
    codec = SparseU8(5, 0.008)
    stored = codec.encode(p)
    np.testing.assert_array_equal(stored[:, 0], [4, 50, 0, 0, 0])
    np.testing.assert_allclose(codec.decode(stored)[:, 0] * 255, [201, 50, 4 / 3, 4 / 3, 4 / 3], rtol=1e-6)


def test_a_flat_tail_costs_one_channel_instead_of_noise():
    """A hundred classes of half a unit each: largest remainders would light up every other channel."""
    p = np.full((105, 1), 0.5 / 255, np.float32)
    p[0] = 1 - 52 / 255
    simplex, tail = SimplexU8(105), SparseU8(105, 0.004)
    assert np.count_nonzero(simplex.encode(p)) == 52
    stored = tail.encode(p)
    assert stored[0, 0] == 52
    assert not stored[1:].any()
    assert np.abs(tail.decode(stored) - p).max() < 1e-6  # and it is exact, not merely within the bound


@pytest.mark.parametrize("tolerance", [0.0, 0.004])
def test_zero_is_background(tolerance):
    codec = SparseU8(105, tolerance)
    decoded = codec.decode(np.zeros((105, 2, 2, 2), np.uint8))
    np.testing.assert_array_equal(decoded[0], 1)
    assert not decoded[1:].any()
    certain = np.zeros((105, 4), np.float32)
    certain[0] = 1
    assert not codec.encode(certain).any()


def test_what_cannot_be():
    with pytest.raises(SpecError, match="at least 2"):
        SparseU8(1)
    for bad in (0.003, 0.2, -1):
        with pytest.raises(SpecError, match="tolerance"):
            SparseU8(5, bad)
    with pytest.raises(SpecError, match=r"more than 1/levels \(0.01587\)"):
        SparseU8(5, 0.008, 63)
    with pytest.raises(SpecError, match="256 levels"):
        SparseU8(5, levels=256)
    for bad in (np.full((3, 4), 0.5), np.full((3, 4), np.nan)):
        with pytest.raises(ValueError, match="sum to one"):
            SparseU8(3, 0.004).encode(bad.astype(np.float32))
    assert "sum to 300" in SparseU8(3).problem(np.full((3, 1), 100, np.uint8))
    tail = np.array([[9], [0], [3]], np.uint8)
    assert SparseU8(3, 0.004).problem(tail) is None
    assert "tolerance 0" in SparseU8(3).problem(tail)
    assert "every class has units" in SparseU8(3, 0.004).problem(np.array([[9], [1], [3]], np.uint8))


@pytest.mark.parametrize("codec", [SimplexU8(4), SparseU8(4), SparseU8(4, 0.008)])
def test_logits_and_their_soft_labels_are_stored_alike(codec):
    z = np.random.default_rng(0).normal(size=(4, 5, 6, 7)).astype(np.float32) * 4
    stored, error = encode_block(codec, z, 2.0)
    pooled, pooled_error = encode_block(codec, softmax(z, 2.0), None, from_probabilities=True)
    np.testing.assert_array_equal(stored, pooled)
    assert error == pooled_error
