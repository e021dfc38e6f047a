"""Chunked sliding window against one over whole arrays."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.geometry.chunked_mean import ChunkedMean
from fastnnunet.geometry.chunked_window import chunked_window
from fastnnunet.geometry.gaussian import gaussian_weights
from fastnnunet.geometry.grid import tile_slices
from fastnnunet.geometry.padding import centre_padding, inner_slices

SIDES = st.tuples(*[st.integers(1, 24)] * 3)


def run(shape, patch, step, chunk, values_of, dtype=np.float32):
    """All chunks put together and the most voxels that waited at once."""
    window = chunked_window(shape, patch, step, chunk)
    means = ChunkedMean(window, dtype)
    out = np.full((2, *shape), np.nan)
    most = 0
    for number in range(len(window.tiles)):
        done = list(means.add(number, values_of(number, window.tile)))
        most = max(most, sum(s.size // 2 for s, _ in means._means.values()) + sum(b.size // 2 for _, b in done))
        for chunk_number, block in done:
            inside = tuple(slice(n * c, (n + 1) * c) for n, c in zip(chunk_number, chunk, strict=True))
            assert np.isnan(out[(slice(None), *inside)]).all()
            out[(slice(None), *inside)] = block
    assert not np.isnan(out).any()
    assert most == window.peak_voxels()
    return out


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shape=SIDES, patch=SIDES, chunk=SIDES, flat=st.booleans(), step=st.sampled_from([0.25, 0.5, 1.0]))
def test_equals_the_window_over_the_whole_image(shape, patch, chunk, flat, step):
    patch = patch[1:] if flat else patch

    def values_of(number, tile):
        return np.random.default_rng(number).normal(size=(2, *tile)).astype(np.float32)

    padding = centre_padding(shape, patch)
    padded = [n + below + above for n, (below, above) in zip(shape, padding, strict=True)]
    sums, weight = np.zeros((2, *padded)), np.zeros(padded)
    tile = (1, *patch) if flat else patch
    for number, inside in enumerate(tile_slices(padded, patch, step)):
        values = values_of(number, tile).reshape(2, *patch)
        sums[(slice(None), *inside)] += values * gaussian_weights(patch)
        weight[inside] += gaussian_weights(patch)
    expected = (sums / weight)[(slice(None), *inner_slices(shape, padding))]
    np.testing.assert_allclose(run(shape, patch, step, chunk, values_of), expected, rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_a_layer_not_of_the_volume():
    shape, patch, chunk = (160, 48, 48), (16, 16, 16), (8, 8, 8)
    window = chunked_window(shape, patch, 0.5, chunk)
    assert window.peak_voxels() < 2 * 16 * 48 * 48 < np.prod(shape) / 4
    run(shape, patch, 0.5, chunk, lambda number, tile: np.ones((2, *tile), np.float32))


def test_constant_tiles_give_the_constant_in_half_precision_too():
    out = run((20, 9, 30), (8, 8, 8), 0.5, (7, 7, 7), lambda n, tile: np.full((2, *tile), 3.0, np.float32), np.float16)
    np.testing.assert_allclose(out, 3.0, rtol=2**-11)


def test_every_tile_reaches_the_chunks_it_should():
    window = chunked_window((10, 10, 10), (4, 4, 4), 0.5, (3, 5, 10))
    counted = np.zeros(window.grid, int)
    for number, start in enumerate(window.tiles):
        touched = {
            (z // 3, y // 5, x // 10) for z, y, x in itertools.product(*(range(s, min(s + 4, 10)) for s in start))
        }
        assert set(window.chunks_of(number)) == touched
        for chunk in touched:
            counted[chunk] += 1
    np.testing.assert_array_equal(window.tiles_per_chunk, counted)


def test_slices_of_a_2d_patch():
    window = chunked_window((3, 4, 4), (4, 4), 0.5, (3, 4, 4))
    assert [z for z, _, _ in window.tiles] == [0, 1, 2]
