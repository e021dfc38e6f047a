"""Tile grid, Gaussian weights, padding and float16 rounding against nnU-Net, acvl_utils and NumPy."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.errors import BackendError, SpecError
from fastnnunet.geometry.gaussian import gaussian_weights
from fastnnunet.geometry.grid import tile_slices, tile_starts
from fastnnunet.geometry.half import check_half_range, round_to_half
from fastnnunet.geometry.padding import centre_padding, inner_slices, pad_spatial

SIZES = st.tuples(*[st.tuples(st.integers(1, 60), st.integers(0, 150))] * 3)  # tile, how much larger the image is


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes=SIZES, step=st.sampled_from([0.25, 0.3, 0.5, 0.7, 1.0]))
def test_tile_starts_equal_nnunet(sizes: Any, step: float) -> None:
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    tile = tuple(t for t, _ in sizes)
    image = tuple(t + more for t, more in sizes)
    assert tile_starts(image, tile, step) == compute_steps_for_sliding_window(image, tile, step)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.tuples(*[st.tuples(st.integers(1, 8), st.integers(0, 12))] * 3))
def test_tiles_cover_every_voxel(sizes: Any) -> None:
    image = tuple(t + more for t, more in sizes)
    covered = np.zeros(image, bool)
    for tile in tile_slices(image, [t for t, _ in sizes], 0.5):
        assert covered[tile].shape == tuple(t for t, _ in sizes)
        covered[tile] = True
    assert covered.all()


def test_a_2d_tile_visits_every_plane() -> None:
    tiles = tile_slices((3, 6, 4), (4, 4), 0.5)
    assert [t[0] for t in tiles] == [0, 0, 1, 1, 2, 2]
    assert tiles[1][1:] == (slice(2, 6), slice(0, 4))


@pytest.mark.parametrize("step", [0, -0.5, 1.5])
def test_step_out_of_range(step: float) -> None:
    with pytest.raises(SpecError, match="step_size"):
        tile_starts((8,), (4,), step)


def test_tile_larger_than_the_image() -> None:
    with pytest.raises(SpecError, match="pad the image"):
        tile_starts((8, 3), (4, 4), 0.5)


@pytest.mark.parametrize(
    "shape", [(40, 56, 40), (16, 20, 24), (5, 6, 7), (1, 8, 8), (3, 4, 9), (33, 17), (64, 64, 64), (24, 32), (2, 2, 61)]
)
def test_gaussian_is_nnunets_bit_for_bit(shape: tuple[int, ...]) -> None:
    import torch
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    expected = compute_gaussian(shape, sigma_scale=1 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    got = gaussian_weights(shape)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.float().numpy())
    assert not got.flags.writeable


def test_gaussian_of_every_length_is_nnunets_bit_for_bit() -> None:
    """The core's exp and order of sums are not NumPy's: float16 must not show it."""
    import torch
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    for shape in [*((n,) for n in range(1, 513)), *((n, 24 + n % 7, 40) for n in range(7, 300, 60))]:
        expected = compute_gaussian(shape, sigma_scale=1 / 8, value_scaling_factor=10, device=torch.device("cpu"))
        np.testing.assert_array_equal(gaussian_weights(shape), expected.float().numpy(), str(shape))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 30)] * 3), minimum=st.tuples(*[st.integers(1, 30)] * 3))
def test_padding_equals_acvl_utils(shape: tuple[int, ...], minimum: tuple[int, ...]) -> None:
    from acvl_utils.cropping_and_padding.padding import pad_nd_image

    array = np.random.default_rng(0).random((2, *shape), np.float32)
    expected, slicer = pad_nd_image(array, minimum, "constant", {"constant_values": 0}, True)
    padding = centre_padding(shape, minimum)
    got = pad_spatial(array, padding)
    np.testing.assert_array_equal(got, expected)
    assert inner_slices(shape, padding) == slicer[1:]


def test_padding_of_the_last_axes_only() -> None:
    assert centre_padding((3, 5, 9), (8, 8)) == [(0, 0), (1, 2), (0, 0)]


def test_rounding_equals_numpys_float16() -> None:
    with np.errstate(all="ignore"):
        values = np.arange(0, 2**32, 65_537, dtype=np.uint64).astype(np.uint32).view(np.float32)
        values = values[np.abs(values) < 65520]  # drops NaN too
        every_half = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
        every_half = every_half[np.isfinite(every_half)]
        ties = ((every_half[:-1].astype(np.float64) + every_half[1:]) / 2).astype(np.float32)
        subnormal = np.random.default_rng(0).normal(0, 1e-5, 10_000).astype(np.float32)
        for array in (values, every_half, ties, subnormal):
            np.testing.assert_array_equal(round_to_half(array), array.astype(np.float16).astype(np.float32))


def test_rounding_in_place() -> None:
    values = np.array([1.0001, -3.14159, 1e-9], np.float32)
    expected = values.astype(np.float16).astype(np.float32)
    assert round_to_half(values, out=values) is values
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("bad", [65520.0, -1e6, np.inf, -np.inf, np.nan])
def test_what_float16_cannot_hold_is_an_error(bad: float) -> None:
    with pytest.raises(BackendError, match="logits left the range of float16"):
        check_half_range(np.array([0.0, bad, 1.0], np.float32), "the logits")
    check_half_range(np.array([65519.0, -65519.0], np.float32), "the logits")
