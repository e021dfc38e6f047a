"""Encodings: properties that must hold for any input, and hand-computed values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit
from scipy.special import softmax as scipy_softmax

from fastnnunet.cache.codecs import (
    Float16,
    SigmoidU8,
    SimplexU8,
    codec_for_teacher,
    encode_block,
    make_codec,
    sigmoid,
    softmax,
)
from fastnnunet.cache.codecs.apportion import largest_mask
from fastnnunet.errors import BuildError, SpecError

CLASSES = st.integers(2, 20) | st.just(105)


@st.composite
def logits(draw, scale=20.0):
    classes = draw(CLASSES)
    seed = draw(st.integers(0, 2**32 - 1))
    spread = draw(st.floats(0.01, scale))
    return (np.random.default_rng(seed).normal(size=(classes, 40)) * spread).astype(np.float32)


def reference_largest_remainder(p):
    """One voxel, in exact integer-like float64 arithmetic, written as a textbook would."""
    scaled = p.astype(np.float64) * 255
    units = np.floor(scaled)
    left = round(255 - units.sum())
    order = sorted(range(len(p)), key=lambda c: (-(scaled[c] - units[c]), c))
    for c in order[:left]:
        units[c] += 1
    return units.astype(int)


LEVELS = st.sampled_from([255, 63, 31, 15])


@given(logits(), st.sampled_from([1.0, 2.0, 3.0, 4.0]), LEVELS)
@settings(max_examples=100, deadline=None)
def test_simplex_sums_to_its_levels_and_keeps_its_bound(logits, temperature, levels):
    codec = SimplexU8(len(logits), levels)
    p = codec.target(logits, temperature)
    stored = codec.encode(p)
    total = stored.sum(axis=0, dtype=int)
    assert stored.dtype == np.uint8
    assert stored.shape == (len(logits) - 1, 40)
    assert total.max() <= levels
    decoded = codec.decode(stored)
    np.testing.assert_allclose(decoded.sum(axis=0), 1, atol=2e-6)
    error = np.abs(decoded - p).max()
    assert error < codec.eps == 1 / levels
    assert error <= (1 - 1 / len(logits)) / levels + 2e-7  # the sharper bound derived in the module
    assert codec.problem(stored) is None


@given(st.integers(2, 12), st.integers(0, 2**32 - 1), LEVELS)
@settings(max_examples=60, deadline=None)
def test_round_trip_of_stored_values(classes, seed, levels):
    """Whatever can be stored is decoded to probabilities that are stored as the same values."""
    units = np.random.default_rng(seed).multinomial(levels, np.full(classes, 1 / classes), 50).T
    codec = SimplexU8(classes, levels)
    stored = units[1:].astype(np.uint8)
    decoded = codec.decode(stored)
    np.testing.assert_allclose(decoded, units / levels, atol=1e-7)
    np.testing.assert_array_equal(codec.encode(decoded), stored)


@given(st.integers(2, 105), st.integers(0, 2**32 - 1), LEVELS)
@settings(max_examples=60, deadline=None)
def test_one_hot_is_exact(classes, seed, levels):
    label = np.random.default_rng(seed).integers(0, classes, 50)
    p = np.eye(classes, dtype=np.float32)[label].T
    codec = SimplexU8(classes, levels)
    stored = codec.encode(p)
    np.testing.assert_array_equal(codec.decode(stored), p)
    assert not stored[:, label == 0].any()  # background is all zero: zero padding is background


@given(st.integers(3, 12) | st.just(40), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_renaming_the_classes_renames_the_result(classes, seed):
    rng = np.random.default_rng(seed)
    p = softmax(rng.normal(size=(classes, 30)).astype(np.float32), 3.0)
    remainders = p * np.float32(255) % 1
    distinct = np.array([len(np.unique(column)) == classes for column in remainders.T])
    order = rng.permutation(classes)
    codec = SimplexU8(classes)
    units = np.rint(codec.decode(codec.encode(p)) * 255)
    permuted = np.rint(codec.decode(codec.encode(p[order])) * 255)
    np.testing.assert_array_equal(permuted[:, distinct], units[order][:, distinct])


@pytest.mark.parametrize("classes", [2, 3, 5, 8, 9, 30])
def test_matches_a_textbook_apportionment(classes):
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.full(classes, 0.5), 200).T.astype(np.float32)
    codec = SimplexU8(classes)
    expected = np.stack([reference_largest_remainder(column) for column in p.T], axis=1)
    got = np.rint(codec.decode(codec.encode(p)) * 255).astype(int)
    # float32 and float64 may order two nearly equal remainders differently; never more than a few voxels
    assert (got == expected).all(axis=0).mean() > 0.98


@pytest.mark.parametrize("classes", [3, 5, 15])  # 255 / C is whole: nothing to hand out
def test_uniform(classes):
    stored = SimplexU8(classes).encode(np.full((classes, 4), 1 / classes, np.float32))
    np.testing.assert_array_equal(stored, 255 // classes)


@pytest.mark.parametrize("classes", [2, 4, 7, 10, 60])
def test_equal_remainders_go_to_the_first_channels(classes):
    codec = SimplexU8(classes)
    units = np.rint(codec.decode(codec.encode(np.full((classes, 3), 1 / classes, np.float32))) * 255).astype(int)
    low, left = divmod(255, classes)
    np.testing.assert_array_equal(units[:, 0], [low + 1] * left + [low] * (classes - left))


def test_hand_computed_voxel():
    # the floors of 100.5, 100.8 and 53.7 sum to 253; the two units left go to the remainders .8 and .7
    p = (np.array([[100.5], [100.8], [53.7]]) / 255).astype(np.float32)
    np.testing.assert_array_equal(SimplexU8(3).encode(p)[:, 0], [101, 54])


def test_what_is_not_a_distribution_is_refused():
    for bad in (np.full((3, 4), 0.5), np.full((3, 4), 0.1), np.full((3, 4), np.nan)):
        with pytest.raises(ValueError, match="sum to one"):
            SimplexU8(3).encode(bad.astype(np.float32))
    assert "sum to 300" in SimplexU8(3).problem(np.full((2, 1), 150, np.uint8))
    assert "expected at most 31" in SimplexU8(3, 31).problem(np.full((2, 1), 16, np.uint8))
    with pytest.raises(SpecError, match="at least 2"):
        SimplexU8(1)
    with pytest.raises(SpecError, match="256 levels, expected 1 to 255"):
        SimplexU8(3, 256)


@given(logits(scale=60), st.sampled_from([1.0, 3.0]))
@settings(max_examples=150, deadline=None)
def test_float16_sums_to_one_exactly_and_keeps_its_bound(logits, temperature):
    codec = Float16(len(logits))
    p = codec.target(logits, temperature)
    stored = codec.encode(p)
    assert stored.dtype == np.float16
    assert stored.shape == (len(logits) - 1, 40)
    assert codec.problem(stored) is None
    decoded = codec.decode(stored)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded.astype(np.float64).sum(axis=0), 1)
    assert decoded.min() >= 0
    np.testing.assert_array_equal(decoded[1:], stored)
    error = np.abs(decoded.astype(np.float64) - p)
    assert error[0].max() <= codec.eps
    assert error[1:].max() <= 2**-11 + 2**-20
    np.testing.assert_array_equal(codec.encode(decoded), stored)  # round trip


@pytest.mark.parametrize(
    "foreground",
    [
        [1 / 3] * 3,  # nearest is 0.33325: below
        [1 / 6] * 6,  # 0.16663
        [0.2] * 5,  # 0.19995
        [0.3] * 3 + [0.1],  # 0.30005 and 0.09998: above one in sum
        [0.7, 0.3],
        [0.50024, 0.49976],
        [0.0999] * 10 + [0.001],
        [1 - 2**-24, 2**-24],
        [1.0, 5e-8],  # float32 softmax may sum to a little more than one
        [0.5, 0.5, 1e-7],
        [1 / 104] * 104,
    ],
)
def test_float16_without_background(foreground):
    """No background at all is where rounding up would make it negative."""
    p = np.array([[0.0], *([v] for v in foreground)], np.float32)
    codec = Float16(len(p))
    decoded = codec.decode(codec.encode(p))
    assert decoded.min() >= 0
    assert decoded.astype(np.float64).sum() == 1
    assert np.abs(decoded - p).max() <= codec.eps


def test_float16_certain_voxels_are_exact():
    """Traces of other classes do not move a certain voxel off 1."""
    codec = Float16(4)
    stored = codec.encode(softmax(np.array([[0], [17], [0.5], [0]], np.float32), 1.0))
    assert stored[0, 0] == 1
    assert not stored[1:].any()


def test_float16_refuses_what_cannot_be():
    for bad in (np.full((3, 4), 0.5), np.full((3, 4), np.nan)):
        with pytest.raises(ValueError, match="sum to one"):
            Float16(3).encode(bad.astype(np.float32))
    assert "expected at most 1" in Float16(3).problem(np.full((2, 1), 0.51, np.float16))
    for bad in (np.nan, -0.1):
        assert "negative or NaN" in Float16(2).problem(np.full((1, 1), bad, np.float16))
    with pytest.raises(SpecError, match="at least 2"):
        Float16(1)


@given(logits(scale=200))
@settings(max_examples=30, deadline=None)
def test_sigmoid_bound(logits):
    codec = SigmoidU8(len(logits))
    p = codec.target(logits, 2.0)
    assert np.abs(codec.decode(codec.encode(p)) - p).max() <= codec.eps


@given(hnp.arrays(np.float32, (4, 6), elements=st.floats(-3e4, 3e4, width=32)), st.sampled_from([0.5, 1.0, 3.0, 7.0]))
@settings(max_examples=60, deadline=None)
def test_soft_labels_match_scipy(logits, temperature):
    exact = logits.astype(np.float64) / temperature
    np.testing.assert_allclose(softmax(logits, temperature), scipy_softmax(exact, axis=0), atol=2e-6)
    np.testing.assert_allclose(sigmoid(logits, temperature), expit(exact), atol=2e-6)


def test_a_case_is_encoded_in_blocks_like_at_once(monkeypatch):
    logits = np.random.default_rng(0).normal(size=(4, 6, 7, 9)).astype(np.float32) * 5
    whole, error = encode_block(SimplexU8(4), logits, 3.0)
    monkeypatch.setattr("fastnnunet.cache.codecs.block.BLOCK_VALUES", 100)
    blocks, block_error = encode_block(SimplexU8(4), logits, 3.0)
    np.testing.assert_array_equal(whole, blocks)
    assert error == block_error
    np.testing.assert_array_equal(whole, SimplexU8(4).encode(softmax(logits, 3.0)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = np.zeros((3, 4, 4, 4), np.float32)
    logits[1, 2, 3, 0] = bad
    with pytest.raises(BuildError, match="NaN or infinity"):
        encode_block(SimplexU8(3), logits, 3.0)


def test_encoding_must_fit_the_teacher():
    assert codec_for_teacher("simplex_u8", 3, has_regions=False).num_stored == 2
    assert codec_for_teacher("sigmoid_u8", 3, has_regions=True).num_stored == 3
    with pytest.raises(SpecError, match="use encoding: sigmoid_u8"):
        codec_for_teacher("simplex_u8", 3, has_regions=True)
    with pytest.raises(SpecError, match="use encoding: simplex_u8"):
        codec_for_teacher("sigmoid_u8", 3, has_regions=False)
    with pytest.raises(SpecError, match="expected one of simplex_u8, sparse_u8, logit_gap_u8, sigmoid_u8"):
        codec_for_teacher("float8", 3, has_regions=False)


@pytest.mark.parametrize("name", ["simplex_u8", "sparse_u8", "sigmoid_u8", "float16"])
@pytest.mark.parametrize("shape", [(5, 6, 7), (30,), (0, 4, 4)])
def test_blocks_of_soft_labels(name, shape):
    """Probabilities that were pooled elsewhere, in any trailing shape."""
    codec = make_codec(name, 4)
    p = np.random.default_rng(0).dirichlet(np.full(4, 0.3), shape).astype(np.float32)
    p = np.moveaxis(p, -1, 0)
    stored, error = encode_block(codec, p, None, from_probabilities=True)
    assert stored.shape == (codec.num_stored, *shape)
    assert stored.dtype == codec.dtype
    assert np.abs(codec.decode(stored) - p).max(initial=0) == pytest.approx(error, abs=1e-9)
    assert error <= codec.eps


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((3, 8), 0.25), "do not sum to one"),
        (np.array([[1.5], [-0.25], [-0.25]]), "from -0.25 to 1.5, expected 0 to 1"),
        (np.array([[np.nan], [0], [1]]), "soft labels hold NaN or infinity"),
        (np.full((4, 8), 0.25), "4 channels, expected 3"),
    ],
)
@pytest.mark.parametrize("name", ["simplex_u8", "sparse_u8", "float16"])
def test_soft_labels_that_are_none_are_refused(name, bad, message):
    with pytest.raises(BuildError, match=message):
        encode_block(make_codec(name, 3), bad.astype(np.float32), None, from_probabilities=True)


@pytest.mark.parametrize("name", ["simplex_u8", "sparse_u8", "sigmoid_u8", "float16"])
def test_logits_need_a_temperature(name):
    with pytest.raises(ValueError, match="need a temperature"):
        encode_block(make_codec(name, 3), np.zeros((3, 8), np.float32), None)


@pytest.mark.parametrize("classes", [9, 40, 105])
def test_the_largest_remainders_with_ties(classes):
    """Against a stable sort, on remainders that repeat, for every number of units left."""
    rng = np.random.default_rng(classes)
    remainders = (rng.integers(0, 6, (classes, 3000)) / 6).astype(np.float32)
    count = rng.integers(0, classes, 3000).astype(np.int32)
    order = np.argsort(-remainders, axis=0, kind="stable")
    expected = np.zeros(remainders.shape, bool)
    np.put_along_axis(expected, order, np.arange(classes)[:, None] < count, axis=0)
    np.testing.assert_array_equal(largest_mask(remainders, count), expected)
