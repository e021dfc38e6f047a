"""Tiles in, logits out: nnU-Net's sliding window with Gaussian weights, its float16 roundings included.

nnU-Net adds `logits * gaussian` (float32) to a float16 array, sums the weights in float16 and divides in float16.
Axes: C channel, H head, N tile in a batch, Z Y X space; 2d patches are tiles of single planes Z.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.errors import BackendError
from fastnnunet.geometry.gaussian import gaussian_weights
from fastnnunet.geometry.grid import tile_slices
from fastnnunet.geometry.half import check_half_limits
from fastnnunet.geometry.padding import centre_padding, inner_slices, pad_spatial

Array = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
Tile = tuple[int | slice, ...]
Network = Callable[[Array], Array]
# Small (2d) patches go through the network several at a time; a 3d patch fills the machine by itself.
_BATCH_VOXELS = 2**17
_MAX_BATCH = 16


def sliding_window_logits(
    data_CZYX: Array,
    network: Network,
    *,
    num_heads: int,
    patch_size: Sequence[int],
    step_size: float,
    mirror_axes: Sequence[int] | None,
    use_gaussian: bool = True,
    on_tiles: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> HalfArray:
    """Logits (H, Z, Y, X) of the data's shape.

    `network` maps (N, C, *patch) to (N, H, *patch), float32; what it returns is used before it is called again.
    `on_tiles(done, total)` reports progress. Raises BackendError when the logits leave the range of float16.
    """
    shape = data_CZYX.shape[1:]
    padding = centre_padding(shape, patch_size)
    padded = pad_spatial(data_CZYX, padding)
    inner = inner_slices(shape, padding)
    tiles = tile_slices(padded.shape[1:], patch_size, step_size)
    weights = _tile_weights(tuple(patch_size), use_gaussian)
    tile_logits = _predict_tiles(padded, tiles, network, num_heads, tuple(patch_size), mirror_axes)

    if len(tiles) == 1:
        # nothing overlaps: work only on the voxels that are kept
        logits = next(tile_logits)[0]
        kept = inner[-len(patch_size) :]
        summed = np.empty((num_heads, *shape), np.float16)
        total = _half_weights(tuple(patch_size), use_gaussian)[kept].reshape(shape)
        native.add_weighted(
            _volumes(logits[:, *kept]), weights[kept].reshape(shape), summed, is_first=True, threads=threads
        )
        if on_tiles:
            on_tiles(1, 1)
    else:
        accumulated = np.zeros((num_heads, *padded.shape[1:]), np.float16)
        weights_ZYX = weights.reshape((1,) * (3 - weights.ndim) + weights.shape)
        for done, (tile, logits) in enumerate(zip(tiles, _each(tile_logits), strict=True), 1):
            native.add_weighted(_volumes(logits), weights_ZYX, _volumes(accumulated[:, *tile]), threads=threads)
            if on_tiles:
                on_tiles(done, len(tiles))
        summed = accumulated[:, *inner]
        total = _summed_weights(padded.shape[1:], tuple(patch_size), step_size, use_gaussian)[inner]
    sum_limits, quotient_limits = native.divide(summed, total, threads=threads)
    check_half_limits(sum_limits, "the weighted logits")
    check_half_limits(quotient_limits, "the logits")
    return summed


def _volumes(values_HX: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, Z, Y, X) of a tile of two or three axes."""
    return values_HX[:, None] if values_HX.ndim == 3 else values_HX


def _each(batches: Iterator[Array]) -> Iterator[Array]:
    for batch in batches:
        yield from batch


def _predict_tiles(
    padded_CZYX: Array,
    tiles: Sequence[Tile],
    network: Network,
    num_heads: int,
    patch_size: tuple[int, ...],
    mirror_axes: Sequence[int] | None,
) -> Iterator[Array]:
    """Logits (N, H, *patch) of successive batches of tiles, averaged over mirrors."""
    size = max(1, min(_MAX_BATCH, _BATCH_VOXELS // int(np.prod(patch_size)), len(tiles)))
    batch = np.empty((size, padded_CZYX.shape[0], *patch_size), np.float32)
    for first in range(0, len(tiles), size):
        chosen = tiles[first : first + size]
        for row, tile in zip(batch, chosen, strict=False):
            row[...] = padded_CZYX[:, *tile]
        inputs = batch[: len(chosen)]
        logits = mirrored(network, inputs, mirror_axes)
        if logits.shape != (expected := (len(chosen), num_heads, *patch_size)):
            raise BackendError(f"the network returned logits of shape {logits.shape}, expected {expected}")
        yield logits


def mirrored(network: Network, batch_NCX: Array, mirror_axes: Sequence[int] | None) -> Array:
    """Mean of the logits over every subset of the mirrored axes (spatial axes counted from 0), as nnU-Net sums them."""
    if not mirror_axes:
        return network(batch_NCX)
    total = network(batch_NCX).copy()
    subsets = [s for n in range(len(mirror_axes)) for s in combinations([m + 2 for m in mirror_axes], n + 1)]
    for axes in subsets:
        total += np.flip(network(np.ascontiguousarray(np.flip(batch_NCX, axes))), axes)
    total /= len(subsets) + 1
    return total


def _tile_weights(patch_size: tuple[int, ...], use_gaussian: bool) -> Array:
    return gaussian_weights(patch_size) if use_gaussian else np.ones(patch_size, np.float32)


@lru_cache(maxsize=2)
def _half_weights(patch_size: tuple[int, ...], use_gaussian: bool) -> HalfArray:
    weights = _tile_weights(patch_size, use_gaussian).astype(np.float16)  # exact
    weights.setflags(write=False)
    return weights


@lru_cache(maxsize=2)
def _summed_weights(
    image_shape: tuple[int, ...], patch_size: tuple[int, ...], step_size: float, use_gaussian: bool
) -> HalfArray:
    """The sum of the weights of all tiles at every voxel, rounded after each one."""
    weights = _half_weights(patch_size, use_gaussian)
    total = np.zeros((1, *image_shape), np.float16)
    for tile in tile_slices(image_shape, patch_size, step_size):
        native.add_halves(_volumes(weights[None]), _volumes(total[:, *tile]))
    total.setflags(write=False)
    return total[0]
