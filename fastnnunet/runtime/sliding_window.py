"""Tiles in, logits out: nnU-Net's sliding window with Gaussian weights, its float16 roundings included.

nnU-Net adds `logits * gaussian` (float32) to a float16 array, sums the weights in float16 and divides in float16. Here
the array may be in chunks, each of which is handed out when its last tile has come: sums of a voxel are of the same
numbers in the same order, so its logits do not depend on the chunks.
Axes: C channel, H head, N tile in a batch, Z Y X space; 2d patches are tiles of single planes Z.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastnnunet import native
from fastnnunet.engines.mirrors import mirrored
from fastnnunet.errors import BackendError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.geometry.chunked_window import ChunkedWindow, Index, chunked_window, streamed_window
from fastnnunet.geometry.grid import tile_slices
from fastnnunet.geometry.padding import centre_padding, pad_spatial
from fastnnunet.runtime.arithmetic import Arithmetic, Array, HalfArray, HostArithmetic, Weighting

Tile = tuple[int | slice, ...]
Network = Callable[[Array], Array]
# Logits (N, H, Z, Y, X) of tiles of one shape that begin at these voxels of the image in hand, zeros around it. They
# are used before it is called again.
Predict = Callable[[Sequence[Sequence[int]], Sequence[int]], Any]
# Small (2d) patches go through the network several at a time; a 3d patch fills the machine by itself.
BATCH_VOXELS = 2**17
MAX_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """What the window is, whatever the image and the network."""

    num_heads: int
    patch_size: tuple[int, ...]  # zyx; yx for 2d
    step_size: float  # largest step between tiles as a fraction of the patch
    mirror_axes: tuple[int, ...] | None  # spatial axes counted from 0
    use_gaussian: bool = True

    def describe(self) -> dict[str, Any]:
        """For records."""
        return {"way": "window", "step_size": self.step_size, "use_gaussian": self.use_gaussian}

    def crop(self, shape_zyx: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> list[tuple[int, int]]:
        """See `Way`: at least a patch, or the axis where that is shorter."""
        part = native.window_part(shape_zyx, self.patch_size, (begin, end))
        return list(zip(part.origin, part.size, strict=True))

    def smaller(self, shape_zyx: Sequence[int]) -> None:
        """See `Way`: tiles are patches."""

    def begin(
        self,
        data_CZYX: Array,
        network: Network,
        *,
        whole: bool,
        margin: int = 0,
        progress: Listener = ignore,
        threads: int | None = None,
    ) -> tuple[ChunkedWindow, Iterator[tuple[Index, HalfArray]]]:
        """See `Way`."""
        shape = data_CZYX.shape[1:]
        if whole:
            chunks = chunked_window(shape, self.patch_size, self.step_size, shape)
        else:
            chunks = streamed_window(shape, self.patch_size, self.step_size)
        sums = TileSums(chunks, self, margin=margin, threads=threads)
        return chunks, finished_chunks(data_CZYX, network, self, sums, progress)

    def batch_size(self, tiles: int) -> int:
        """How many tiles of so many go through the network at once."""
        return max(1, min(MAX_BATCH, BATCH_VOXELS // int(np.prod(self.patch_size)), tiles))

    def begin_tiles(
        self,
        shape: tuple[int, ...],
        predict: Predict,
        *,
        whole: bool,
        margin: int = 0,
        progress: Listener = ignore,
        arithmetic: Arithmetic,
    ) -> tuple[ChunkedWindow, Iterator[tuple[Index, Any]]]:
        """See `Way`."""
        if whole:
            chunks = chunked_window(shape, self.patch_size, self.step_size, shape)
        else:
            chunks = streamed_window(shape, self.patch_size, self.step_size)
        return chunks, self._finished(predict, TileSums(chunks, self, margin=margin, arithmetic=arithmetic), progress)

    def _finished(self, predict: Predict, sums: "TileSums", progress: Listener) -> Iterator[tuple[Index, Any]]:
        tiles = sums.chunks.tiles
        size = self.batch_size(len(tiles))
        for first in range(0, len(tiles), size):
            batch = predict(tiles[first : first + size], sums.chunks.tile)
            for number, logits in enumerate(batch, first):
                yield from sums.add(number, logits)
                progress(Progress(what="tiles", done=number + 1, total=len(tiles), unit="tiles"))


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
        self,
        chunks: ChunkedWindow,
        window: SlidingWindow,
        *,
        margin: int = 0,
        threads: int | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """`margin`: planes and rows before each chunk that are allocated with it and left to its receiver.

        `arithmetic`: of the arrays that are added; None: NumPy's, with so many `threads`.
        """
        self.chunks = chunks
        self.margin = margin
        self.peak_bytes = 0  # of all sums held at once so far
        self._held_bytes = 0
        self._arithmetic = arithmetic or HostArithmetic(threads)
        self._num_heads = window.num_heads
        weighting = Weighting(
            patch_size=window.patch_size, step_size=window.step_size, use_gaussian=window.use_gaussian
        )
        weights_ZYX, total_ZYX = self._arithmetic.weights(chunks, weighting)
        self._weights_ZYX: Any = weights_ZYX
        self._total_ZYX: Any = total_ZYX
        self._left = chunks.tiles_per_chunk
        self._sums: dict[Index, Any] = {}

    def add(self, tile_number: int, logits_HX: Any) -> Iterator[tuple[Index, Any]]:
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
                self._sums[number] = self._allocate(number, zero=not is_first)
            self._arithmetic.add_weighted(
                logits_HZYX[:, *in_tile], weights, self._inside(self._sums[number])[:, *in_chunk], is_first=is_first
            )
            self._left[number] -= 1
            if self._left[number] == 0:
                yield number, self._finish(number)

    def _shape_of(self, number: Index) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.chunks.chunk_slices(number))

    def _allocate(self, number: Index, *, zero: bool) -> Any:
        depth, height, width = self._shape_of(number)
        sums = self._arithmetic.empty((self._num_heads, depth + self.margin, height + self.margin, width), zero=zero)
        self._held_bytes += sums.nbytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        return sums

    def _inside(self, sums_HZYX: Any) -> Any:
        return sums_HZYX[:, self.margin :, self.margin :]

    def _finish(self, number: Index) -> Any:
        sums = self._sums.pop(number)
        self._held_bytes -= sums.nbytes
        self._arithmetic.divide(self._inside(sums), self._total_ZYX[self.chunks.chunk_slices(number)])
        return sums


def _volumes(values_HX: Any) -> Any:
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
    size = window.batch_size(len(tiles))
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
