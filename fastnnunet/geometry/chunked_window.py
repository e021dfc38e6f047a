"""Where tiles and chunks of an image lie, so that a sliding window's result can leave chunk by chunk.

Tiles are visited in C order. A chunk is complete once the last tile that reaches it has been added, so memory need hold
only the chunks that are begun and not complete: about half a tile's depth of the image, whatever the image's size.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fastnnunet.geometry.grid import tile_starts
from fastnnunet.geometry.padding import centre_padding

Index = tuple[int, int, int]
Slices = tuple[slice, slice, slice]
Bounds = tuple[int, ...]


@dataclass(frozen=True)
class ChunkedWindow:
    """Tiles and chunks of one image, each axis cut by itself.

    `starts` are those of the tiles in voxels of the image; negative where tiles hang over. `bounds` are where chunks
    begin and end: increasing, from 0 to the size of the image.
    """

    shape: Index
    tile: Index
    starts: tuple[Bounds, Bounds, Bounds]
    bounds: tuple[Bounds, Bounds, Bounds]

    @cached_property
    def tiles(self) -> tuple[Index, ...]:
        """The first voxel of every tile, in the order in which they are to be added."""
        return tuple(itertools.product(*self.starts))

    @cached_property
    def grid(self) -> Index:
        """Number of chunks per axis."""
        z, y, x = (len(bounds) - 1 for bounds in self.bounds)
        return z, y, x

    def chunk_slices(self, number: Index) -> Slices:
        """The voxels of a chunk (number along z, y, x)."""
        z, y, x = (slice(bounds[k], bounds[k + 1]) for bounds, k in zip(self.bounds, number, strict=True))
        return z, y, x

    def overlap(self, tile_number: int, number: Index) -> tuple[Slices, Slices]:
        """What a tile and a chunk share, counted from the first voxel of the chunk and from that of the tile."""
        lower, upper = [], []
        start, chunk = self.tiles[tile_number], self.chunk_slices(number)
        for s, t, c in zip(start, self.tile, chunk, strict=True):
            lower.append(max(s, c.start))
            upper.append(min(s + t, c.stop))

        def within(origin: Sequence[int]) -> Slices:
            z, y, x = (slice(a - o, b - o) for a, b, o in zip(lower, upper, origin, strict=True))
            return z, y, x

        return within([c.start for c in chunk]), within(start)

    @cached_property
    def _reach(self) -> list[list[range]]:
        """Per axis and tile position: the numbers of the chunks it touches."""
        return [
            [
                range(
                    int(np.searchsorted(bounds, max(0, s), side="right")) - 1,
                    int(np.searchsorted(bounds, min(bounds[-1], s + t), side="left")),
                )
                for s in starts
            ]
            for t, starts, bounds in zip(self.tile, self.starts, self.bounds, strict=True)
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

    def peak_voxels(self, margin: int = 0) -> int:
        """The most voxels that ever wait at once; each chunk with `margin` planes and rows more."""
        positions = [len(axis) for axis in self.starts]
        depth, height, width = (np.diff(bounds) for bounds in self.bounds)
        voxels = ((depth + margin)[:, None, None] * (height + margin)[:, None] * width).ravel()
        first, last = [], []  # per axis and chunk: the first and the last tile position that touches it
        for axis, count in zip(self._reach, self.grid, strict=True):
            touching = [[i for i, reach in enumerate(axis) if chunk in reach] for chunk in range(count)]
            first.append([t[0] for t in touching])
            last.append([t[-1] for t in touching])
        begun, done = (
            np.bincount(
                np.ravel_multi_index(np.ix_(*map(np.array, ends)), positions).ravel(), voxels, minlength=len(self.tiles)
            )
            for ends in (first, last)
        )
        waiting = np.cumsum(begun) - np.cumsum(done) + done  # while a tile is added, what it completes is still there
        return int(waiting.max())


def chunked_window(
    shape_zyx: Sequence[int], patch_size: Sequence[int], step_size: float, chunk_zyx: Sequence[int]
) -> ChunkedWindow:
    """The window over an image in chunks of one size (smaller at its end); see `image_tiles`."""
    tile, starts = image_tiles(shape_zyx, patch_size, step_size)
    z, y, x = ((*range(0, n, c), n) for n, c in zip(shape_zyx, chunk_zyx, strict=True))
    return ChunkedWindow(_index(shape_zyx), tile, starts, (z, y, x))


def streamed_window(shape_zyx: Sequence[int], patch_size: Sequence[int], step_size: float) -> ChunkedWindow:
    """The window in chunks that begin and end where tiles do along z and y, and are whole along x.

    So each tile reaches all planes and rows of a chunk or none, and no part of a chunk is held for the sake of another.
    """
    tile, starts = image_tiles(shape_zyx, patch_size, step_size)
    z, y = (
        tuple(sorted({0, n, *(edge for s in axis for edge in (s, s + t) if 0 < edge < n)}))
        for n, t, axis in zip(shape_zyx[:2], tile[:2], starts[:2], strict=True)
    )
    return ChunkedWindow(_index(shape_zyx), tile, starts, (z, y, (0, shape_zyx[2])))


def image_tiles(
    shape_zyx: Sequence[int], patch_size: Sequence[int], step_size: float
) -> tuple[Index, tuple[Bounds, Bounds, Bounds]]:
    """Size of the tiles and where they start per axis, as nnU-Net places them; a patch of two axes visits every slice.

    An image smaller than the patch is thought to lie in the middle of a padded one. Raises SpecError for a bad step.
    """
    tile = _index((1, *patch_size) if len(patch_size) == 2 else patch_size)
    padding = centre_padding(shape_zyx, tile)
    padded = [n + below + above for n, (below, above) in zip(shape_zyx, padding, strict=True)]
    starts = tile_starts(padded[-len(patch_size) :], patch_size, step_size)
    if len(patch_size) == 2:
        starts = [list(range(shape_zyx[0])), *starts]
    z, y, x = (tuple(s - below for s in axis) for axis, (below, _) in zip(starts, padding, strict=True))
    return tile, (z, y, x)


def _index(values: Sequence[int]) -> Index:
    z, y, x = (int(v) for v in values)
    return z, y, x
