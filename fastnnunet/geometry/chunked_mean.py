"""A sliding window whose result leaves in chunks, so that memory holds only what still waits for tiles.

Tiles are visited in C order. A chunk is complete once the last tile that reaches it has been added; its mean is then
handed out and its sums are dropped. What waits is about half a tile's depth of the image, whatever the image's size.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.geometry.gaussian import gaussian_weights
from fastnnunet.geometry.grid import tile_starts
from fastnnunet.geometry.padding import centre_padding

Index = tuple[int, int, int]
Float32Array = npt.NDArray[np.float32]
Block = tuple[Index, Float32Array]  # chunk number (z, y, x) and its values (C, z, y, x)


@dataclass(frozen=True)
class ChunkedWindow:
    """Where tiles and chunks of one image lie. `starts` are in voxels of the image; negative where tiles hang over."""

    shape: Index
    tile: Index
    chunk: Index
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @cached_property
    def tiles(self) -> tuple[Index, ...]:
        """The first voxel of every tile, in the order in which they are to be added."""
        return tuple(itertools.product(*self.starts))

    @cached_property
    def grid(self) -> Index:
        """Number of chunks per axis."""
        z, y, x = (-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))
        return z, y, x

    @cached_property
    def _reach(self) -> list[list[range]]:
        """Per axis and tile position: the numbers of the chunks it touches."""
        return [
            [range(max(0, s) // c, -(-min(n, s + t) // c)) for s in starts]
            for n, t, c, starts in zip(self.shape, self.tile, self.chunk, self.starts, strict=True)
        ]

    def chunks_of(self, tile_number: int) -> Iterator[Index]:
        """Numbers of the chunks a tile touches."""
        positions = np.unravel_index(tile_number, [len(s) for s in self.starts])
        z, y, x = (reach[int(p)] for reach, p in zip(self._reach, positions, strict=True))
        return itertools.product(z, y, x)

    @cached_property
    def tiles_per_chunk(self) -> npt.NDArray[np.int32]:
        """(grid) how many tiles touch each chunk."""
        z, y, x = (
            np.bincount([n for reach in axis for n in reach], minlength=count).astype(np.int32)
            for axis, count in zip(self._reach, self.grid, strict=True)
        )
        return z[:, None, None] * y[:, None] * x

    @cached_property
    def peak_voxels(self) -> int:
        """The most voxels that ever wait at once, counted in whole chunks."""
        positions = [len(axis) for axis in self.starts]
        first, last = [], []  # per axis and chunk: the first and the last tile position that touches it
        for axis, count in zip(self._reach, self.grid, strict=True):
            touching = [[i for i, reach in enumerate(axis) if chunk in reach] for chunk in range(count)]
            first.append([t[0] for t in touching])
            last.append([t[-1] for t in touching])
        begun, done = (
            np.bincount(
                np.ravel_multi_index(np.ix_(*map(np.array, ends)), positions).ravel(), minlength=len(self.tiles)
            )
            for ends in (first, last)
        )
        waiting = np.cumsum(begun) - np.cumsum(done) + done  # while a tile is added, what it completes is still there
        return int(waiting.max() * np.prod(self.chunk))


def chunked_window(
    shape_zyx: Sequence[int], patch_size: Sequence[int], step_size: float, chunk_zyx: Sequence[int]
) -> ChunkedWindow:
    """The window over an image as nnU-Net places its tiles; a patch of two axes visits every slice.

    An image smaller than the patch is thought to lie in the middle of a padded one. Raises SpecError for a bad step.
    """
    tile = (1, *patch_size) if len(patch_size) == 2 else tuple(patch_size)
    padding = centre_padding(shape_zyx, tile)
    padded = [n + below + above for n, (below, above) in zip(shape_zyx, padding, strict=True)]
    starts = tile_starts(padded[-len(patch_size) :], patch_size, step_size)
    if len(patch_size) == 2:
        starts = [list(range(shape_zyx[0])), *starts]
    z, y, x = (tuple(s - below for s in axis) for axis, (below, _) in zip(starts, padding, strict=True))
    return ChunkedWindow(_index(shape_zyx), _index(tile), _index(chunk_zyx), (z, y, x))


class ChunkedMean:
    """Gaussian-weighted means of overlapping tiles, kept per chunk.

    A running mean rather than a sum: at the corners of a tile the weight is 1e-8 of its peak, and a product that small
    keeps no digits in half precision, in which large images are averaged.
    """

    def __init__(self, window: ChunkedWindow, dtype: npt.DTypeLike = np.float32) -> None:
        """`dtype` is that of the means while they wait."""
        self.window = window
        self.dtype = np.dtype(dtype)
        tile = window.tile[1:] if window.tile[0] == 1 else window.tile  # a slice has the weights of its two axes
        self._weights = gaussian_weights(tile).reshape(window.tile)
        self._left = window.tiles_per_chunk.copy()
        self._means: dict[Index, tuple[npt.NDArray[Any], Float32Array]] = {}

    def add(self, tile_number: int, values_CZYX: Float32Array) -> Iterator[Block]:
        """Add a tile's values (C, tile); yields the chunks it completes, as float32.

        Every tile must be added once, in order. The yielded arrays are the caller's.
        """
        window = self.window
        start = window.tiles[tile_number]
        for number in window.chunks_of(tile_number):
            in_chunk, in_tile, extent = [], [], []
            for n, c, t, s, k in zip(window.shape, window.chunk, window.tile, start, number, strict=True):
                lower, upper = max(s, k * c), min(s + t, (k + 1) * c, n)
                in_chunk.append(slice(lower - k * c, upper - k * c))
                in_tile.append(slice(lower - s, upper - s))
                extent.append(min(c, n - k * c))
            if number not in self._means:
                self._means[number] = np.zeros((len(values_CZYX), *extent), self.dtype), np.zeros(extent, np.float32)
            mean, weight = self._means[number]
            mean, weight = mean[(slice(None), *in_chunk)], weight[tuple(in_chunk)]
            tile_weights = self._weights[tuple(in_tile)]
            weight += tile_weights
            step = values_CZYX[(slice(None), *in_tile)] - mean
            step *= tile_weights / weight
            step += mean
            mean[...] = step
            self._left[number] -= 1
            if self._left[number] == 0:
                yield number, self._means.pop(number)[0].astype(np.float32, copy=False)


def _index(values: Sequence[int]) -> Index:
    z, y, x = (int(v) for v in values)
    return z, y, x
