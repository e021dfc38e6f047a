"""Tiles in, logits out: nnU-Net's sliding window with Gaussian weights, its float16 roundings included.

nnU-Net adds `logits * gaussian` (float32) to a float16 array, sums the weights in float16 and divides in float16. Here
the array may be in chunks, each of which is handed out when its last tile has come: sums of a voxel are of the same
numbers in the same order, so its logits do not depend on the chunks.
Axes: C channel, H head, N tile in a batch, Z Y X space; 2d patches are tiles of single planes Z.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.engines.mirrors import mirrored
from fastnnunet.errors import BackendError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.geometry.chunked_window import ChunkedWindow, Index, chunked_window
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """What the window is, whatever the image and the network."""

    num_heads: int
    patch_size: tuple[int, ...]  # zyx; yx for 2d
    step_size: float  # largest step between tiles as a fraction of the patch
    mirror_axes: tuple[int, ...] | None  # spatial axes counted from 0
    use_gaussian: bool = True


def sliding_window_logits(
    data_CZYX: Array,
    network: Network,
    window: SlidingWindow,
    *,
    progress: Listener = ignore,
    threads: int | None = None,
) -> HalfArray:
    """Logits (H, Z, Y, X) of the data's shape, in one piece; see `finished_chunks`."""
    shape = data_CZYX.shape[1:]
    whole = chunked_window(shape, window.patch_size, window.step_size, shape)
    ((_, logits),) = finished_chunks(data_CZYX, network, window, TileSums(whole, window, threads=threads), progress)
    return logits


def finished_chunks(
    data_CZYX: Array,
    network: Network,
    window: SlidingWindow,
    sums: "TileSums",
    progress: Listener = ignore,
) -> Iterator[tuple[Index, HalfArray]]:
    """Number and logits (H, its voxels and `sums.margin` before them) of each chunk of `sums` when it is finished.

    `network` maps (N, C, *patch) to (N, H, *patch), float32; what it returns is used before it is called again.
    `progress` hears of every tile. Raises BackendError when the logits leave the range of float16.
    """
    padded = pad_spatial(data_CZYX, centre_padding(data_CZYX.shape[1:], window.patch_size))
    tiles = tile_slices(padded.shape[1:], window.patch_size, window.step_size)
    for number, logits in enumerate(_each(_predict_tiles(padded, tiles, network, window))):
        yield from sums.add(number, logits)
        progress(Progress(what="tiles", done=number + 1, total=len(tiles), unit="tiles"))


class TileSums:
    """float16 sums of weighted tiles, each chunk from its first tile to its last."""

    def __init__(
        self, chunks: ChunkedWindow, window: SlidingWindow, *, margin: int = 0, threads: int | None = None
    ) -> None:
        """`margin`: planes and rows before each chunk that are allocated with it and left to its receiver."""
        self.chunks = chunks
        self.margin = margin
        self.peak_bytes = 0  # of all sums held at once so far
        self._held_bytes = 0
        self._threads = threads
        self._num_heads = window.num_heads
        self._weights_ZYX = _tile_weights(window.patch_size, window.use_gaussian).reshape(chunks.tile)
        padding = centre_padding(chunks.shape, chunks.tile)
        padded_shape = tuple(n + below + above for n, (below, above) in zip(chunks.shape, padding, strict=True))
        total = _summed_weights(padded_shape, window.patch_size, window.step_size, window.use_gaussian)
        self._total_ZYX = total[inner_slices(chunks.shape, padding)]
        self._left = chunks.tiles_per_chunk
        self._sums: dict[Index, HalfArray] = {}

    def add(self, tile_number: int, logits_HX: Array) -> Iterator[tuple[Index, HalfArray]]:
        """Add a tile's logits (H, *patch); yields the chunks it completes, which are then the caller's.

        Every tile must be added once, in order. Raises BackendError when the logits leave the range of float16.
        """
        logits_HZYX = _volumes(logits_HX)
        for number in self.chunks.chunks_of(tile_number):
            in_chunk, in_tile = self.chunks.overlap(tile_number, number)
            weights = self._weights_ZYX[in_tile]
            # a chunk of which every voxel is written need not be zero before
            is_first = number not in self._sums and weights.shape == self._shape_of(number)
            if number not in self._sums:
                self._sums[number] = self._allocate(number, np.empty if is_first else np.zeros)
            native.add_weighted(
                logits_HZYX[:, *in_tile],
                weights,
                self._inside(self._sums[number])[:, *in_chunk],
                is_first=is_first,
                threads=self._threads,
            )
            self._left[number] -= 1
            if self._left[number] == 0:
                yield number, self._finish(number)

    def _shape_of(self, number: Index) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.chunks.chunk_slices(number))

    def _allocate(self, number: Index, new: Callable[[tuple[int, ...], type[np.float16]], HalfArray]) -> HalfArray:
        depth, height, width = self._shape_of(number)
        sums = new((self._num_heads, depth + self.margin, height + self.margin, width), np.float16)
        self._held_bytes += sums.nbytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        return sums

    def _inside(self, sums_HZYX: HalfArray) -> HalfArray:
        return sums_HZYX[:, self.margin :, self.margin :]

    def _finish(self, number: Index) -> HalfArray:
        sums = self._sums.pop(number)
        self._held_bytes -= sums.nbytes
        total = self._total_ZYX[self.chunks.chunk_slices(number)]
        sum_limits, quotient_limits = native.divide(self._inside(sums), total, threads=self._threads)
        check_half_limits(sum_limits, "the weighted logits")
        check_half_limits(quotient_limits, "the logits")
        return sums


def _volumes(values_HX: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, Z, Y, X) of a tile of two or three axes."""
    return values_HX[:, None] if values_HX.ndim == 3 else values_HX


def _each(batches: Iterator[Array]) -> Iterator[Array]:
    for batch in batches:
        yield from batch


def _predict_tiles(
    padded_CZYX: Array, tiles: Sequence[Tile], network: Network, window: SlidingWindow
) -> Iterator[Array]:
    """Logits (N, H, *patch) of successive batches of tiles, averaged over mirrors."""
    patch_size = window.patch_size
    size = max(1, min(_MAX_BATCH, _BATCH_VOXELS // int(np.prod(patch_size)), len(tiles)))
    batch = np.empty((size, padded_CZYX.shape[0], *patch_size), np.float32)
    for first in range(0, len(tiles), size):
        chosen = tiles[first : first + size]
        for row, tile in zip(batch, chosen, strict=False):
            row[...] = padded_CZYX[:, *tile]
        inputs = batch[: len(chosen)]
        logits = mirrored(network, inputs, window.mirror_axes)
        if logits.shape != (expected := (len(chosen), window.num_heads, *patch_size)):
            raise BackendError(f"the network returned logits of shape {logits.shape}, expected {expected}")
        yield logits


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
