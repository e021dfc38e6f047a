"""One pass over an image: few large tiles, each voxel kept from one of them, no weights.

For networks whose output at a voxel depends on a halo around it alone (`specs/one_pass.py`). Logits are rounded to
float16 as those of the window, so that whatever comes after is the same code.
Axes: C channel, H head, N tile or plane in a batch, Z Y X space; 2d networks see whole planes Z, several in a batch.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastnnunet.engines.mirrors import mirrored
from fastnnunet.errors import BackendError, SpecError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.geometry.chunked_window import Bounds, Index
from fastnnunet.geometry.tiles import Axis, Cost, Tiling, fewest_tiles, least_cost, smaller_limit
from fastnnunet.runtime.arithmetic import Arithmetic, Array, HalfArray, HostArithmetic
from fastnnunet.runtime.sliding_window import BATCH_VOXELS, MAX_BATCH, Network, Predict
from fastnnunet.specs.one_pass import DEFAULT_MEMORY_LIMIT, OnePass, memory_words


@dataclass(frozen=True, slots=True, kw_only=True)
class TileChunks:
    """Chunks that hold what is kept of the tiles of a band, or all tiles; see `Chunks`."""

    bounds: tuple[Bounds, Bounds, Bounds]

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = (along[-1] for along in self.bounds)
        return z, y, x

    @property
    def grid(self) -> tuple[int, int, int]:
        z, y, x = (len(along) - 1 for along in self.bounds)
        return z, y, x

    def chunk_slices(self, number: Index) -> tuple[slice, slice, slice]:
        z, y, x = (slice(along[n], along[n + 1]) for along, n in zip(self.bounds, number, strict=True))
        return z, y, x


@dataclass(frozen=True, slots=True, kw_only=True)
class OnePassTiles:
    """How an image is cut, whatever the image and the network."""

    num_heads: int
    patch_size: tuple[int, ...]  # zyx; yx for 2d. Smaller images are padded to it, as they were in training
    rules: OnePass
    mirror_axes: tuple[int, ...] | None = None  # spatial axes counted from 0
    passes: int = 1  # averaged; the k-th lies k / passes of the strides further on in the frame of zeros
    # bytes of a tile in the network, its logits and what is kept of them; None: DEFAULT_MEMORY_LIMIT, or what the
    # smallest tile takes where that is more
    memory_limit: int | None = None
    overhead: float = 1.0  # of the engine, see `Engine`
    largest_tile: tuple[int, ...] | None = None  # that the engine takes; None: any

    def describe(self) -> dict[str, Any]:
        """For records."""
        return {
            "way": "one pass" if self.passes == 1 else f"{self.passes} passes",
            "passes": self.passes,
            "halo": list(self.rules.halo),
            "halo_is": self.rules.halo_is,
            "memory_limit_bytes": self.memory_limit,
        }

    def check(self) -> None:
        """Raises SpecError where no image at all could be predicted."""
        most = max(self.rules.multiples)
        if not 1 <= self.passes <= most:
            raise SpecError(f"passes: got {self.passes}, expected 1 to {most}, the largest product of the strides")
        patch = self._axes([1] * (3 - len(self.patch_size)) + list(self.patch_size))
        self._refuse(patch, self._tile_bytes, "this model")

    def tiling(self, shape_zyx: Sequence[int]) -> Tiling:
        """The fewest tiles for an image of that shape. Raises SpecError when one is larger than memory allows."""
        axes, cost, limit = self._limited(shape_zyx)
        found = fewest_tiles(axes, cost, limit)
        if found is None:
            self._refuse(axes, cost, f"an image of {' x '.join(map(str, shape_zyx))} voxels")
            raise AssertionError("a tile that fits was not found")
        return found

    def smaller(self, shape_zyx: Sequence[int]) -> "OnePassTiles | None":
        """See `Way`."""
        limit = smaller_limit(*self._limited(shape_zyx))
        return None if limit is None else replace(self, memory_limit=limit)

    def _limited(self, shape_zyx: Sequence[int]) -> tuple[list[Axis], Cost, int]:
        """The axes of an image of that shape, what a tile of it costs, and what it may cost."""
        axes = self._axes(shape_zyx)

        def cost(tile: Sequence[int]) -> int:
            kept = 2 * self.num_heads * tile[0] * tile[1] * shape_zyx[2]  # float16, of a whole band
            return self._tile_bytes(tile) + kept

        if self.memory_limit is not None:
            return axes, cost, self.memory_limit
        return axes, cost, max(DEFAULT_MEMORY_LIMIT, least_cost(axes, cost) or 0)

    def crop(self, shape_zyx: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> list[tuple[int, int]]:
        """See `Way`: at least a patch, against the strides as in the whole image."""
        return [axis.crop(b, e) for axis, b, e in zip(self._axes(shape_zyx), begin, end, strict=True)]

    def begin(
        self,
        data_CZYX: Array,
        network: Network,
        *,
        whole: bool,
        margin: int = 0,
        progress: Listener = ignore,
        threads: int | None = None,
    ) -> tuple[TileChunks, Iterator[tuple[Index, HalfArray]]]:
        """See `Way`."""
        is_2d = len(self.patch_size) == 2
        cut: Array | None = None

        def predict(origins: Sequence[Sequence[int]], tile: Sequence[int]) -> Array:
            nonlocal cut
            shape = (len(origins), *tile[1:]) if is_2d else tuple(tile)
            if cut is None or cut.shape[1:] != shape:
                cut = np.empty((len(data_CZYX), *shape), np.float32)
            logits = self._predict(cut_out(data_CZYX, origins[0], cut), network)
            return logits.swapaxes(0, 1)[:, :, None] if is_2d else logits[None]

        return self.begin_tiles(
            data_CZYX.shape[1:],
            predict,
            whole=whole,
            margin=margin,
            progress=progress,
            arithmetic=HostArithmetic(threads),
        )

    def begin_tiles(
        self,
        shape: tuple[int, ...],
        predict: Predict,
        *,
        whole: bool,
        margin: int = 0,
        progress: Listener = ignore,
        arithmetic: Arithmetic,
    ) -> tuple[TileChunks, Iterator[tuple[Index, Any]]]:
        """See `Way`."""
        tiling = self.tiling(shape)
        z, y, x = (cut.kept for cut in tiling.cuts)
        ends = [(along[0], along[-1]) for along in (z, y, x)]
        chunks = TileChunks(bounds=(ends[0], ends[1], ends[2]) if whole else (z, y, ends[2]))
        return chunks, self._finished(predict, tiling, chunks, margin, progress, arithmetic)

    def _finished(
        self,
        predict: Predict,
        tiling: Tiling,
        chunks: TileChunks,
        margin: int,
        progress: Listener,
        arithmetic: Arithmetic,
    ) -> Iterator[tuple[Index, Any]]:
        is_whole = chunks.grid == (1, 1, 1)
        total, done = math.prod(tiling.grid) * tiling.shifts, 0
        sums: Any = None
        for number in itertools.product(*map(range, tiling.grid)):
            chunk: Index = (0, 0, 0) if is_whole else (number[0], number[1], 0)
            begin, end = _first_and_last(tiling.grid, number, is_whole=is_whole)
            within = chunks.chunk_slices(chunk)
            if begin:
                depth, height, width = (s.stop - s.start for s in within)
                sums = arithmetic.empty((self.num_heads, depth + margin, height + margin, width))
            kept = tiling.kept(number)
            target = sums[:, margin:, margin:][
                :, *(slice(k.start - w.start, k.stop - w.start) for k, w in zip(kept, within, strict=True))
            ]
            for shift in range(tiling.shifts):
                origin = tiling.origin(number, shift)
                logits = self._tile_logits(origin, tiling.tile, predict)
                inner = tuple(slice(k.start - o, k.stop - o) for k, o in zip(kept, origin, strict=True))
                arithmetic.add_weighted(logits[:, *inner], None, target, is_first=shift == 0)
                done += 1
                progress(Progress(what="tiles", done=done, total=total, unit="tiles"))
            if end:
                arithmetic.divide(sums[:, margin:, margin:], tiling.shifts)
                yield chunk, sums
                sums = None  # it is the caller's

    def _tile_logits(self, origin: Sequence[int], tile: Sequence[int], predict: Predict) -> Any:
        """Logits (H, *tile); of 2d networks plane by plane."""
        if len(self.patch_size) == 3:
            return predict([origin], tile)[0]
        planes = [(origin[0] + plane, *origin[1:]) for plane in range(tile[0])]
        return predict(planes, (1, *tile[1:]))[:, :, 0].transpose(1, 0, 2, 3)

    def _predict(self, tile_CZYX: Array, network: Network) -> Array:
        """Logits (H, *tile), averaged over mirrors."""
        is_2d = len(self.patch_size) == 2
        batch = np.ascontiguousarray(tile_CZYX.swapaxes(0, 1)) if is_2d else tile_CZYX[None]
        logits = mirrored(network, batch, self.mirror_axes)
        if logits.shape != (expected := (len(batch), self.num_heads, *batch.shape[2:])):
            raise BackendError(f"the network returned logits of shape {logits.shape}, expected {expected}")
        return logits.swapaxes(0, 1) if is_2d else logits[0]

    def _axes(self, shape_zyx: Sequence[int]) -> list[Axis]:
        rules, first = self.rules, 3 - len(self.patch_size)  # 2d: planes have no neighbours
        axes = [
            Axis(
                size=shape_zyx[first + n],
                least=self.patch_size[n],
                multiple=rules.multiples[n],
                halo=rules.halo[n],
                shifts=self.passes,
                most=None if self.largest_tile is None else self.largest_tile[n],
            )
            for n in range(len(self.patch_size))
        ]
        if first:
            planes = max(1, min(MAX_BATCH, BATCH_VOXELS // math.prod(axis.frame for axis in axes)))
            return [Axis(size=shape_zyx[0], least=1, multiple=1, halo=0, shifts=self.passes, most=planes), *axes]
        return axes

    def _tile_bytes(self, tile: Sequence[int]) -> int:
        return math.ceil(math.prod(tile) * self.rules.bytes_per_voxel * self.overhead)

    def _refuse(self, axes: Sequence[Axis], cost: Cost, what: str) -> None:
        """Raises SpecError where the smallest tile is too large."""
        least = least_cost(axes, cost)
        if least is None:
            need = [2 * axis.halo + 1 for axis in axes]
            raise SpecError(
                f"{what} needs tiles of at least {need} voxels, in multiples of {list(self.rules.multiples)}; the "
                f"engine takes up to {list(self.largest_tile or ())}\nbuild it for larger tiles, or give a -step_size"
            )
        if self.memory_limit is not None and least > self.memory_limit:
            raise SpecError(
                f"memory limit: got {memory_words(self.memory_limit)}, {what} needs at least {memory_words(least)} for "
                f"one tile\ngive --memory-limit {memory_words(least)} or more, or a -step_size for nnU-Net's window"
            )


def _first_and_last(grid: Sequence[int], number: Sequence[int], *, is_whole: bool) -> tuple[bool, bool]:
    """Whether a tile is the first, and the last, of its chunk."""
    axes = range(3) if is_whole else (2,)
    return all(number[axis] == 0 for axis in axes), all(number[axis] == grid[axis] - 1 for axis in axes)


def cut_out(data_CZYX: Array, origin: Sequence[int], out_CZYX: Array) -> Array:
    """The part of an image that begins at `origin`, which may lie before the image, zeros around the image."""
    source, target = [], []
    for size, start, length in zip(data_CZYX.shape[1:], origin, out_CZYX.shape[1:], strict=True):
        lower, upper = max(start, 0), min(start + length, size)
        source.append(slice(lower, upper))
        target.append(slice(lower - start, upper - start))
    if any(t.stop - t.start < n for t, n in zip(target, out_CZYX.shape[1:], strict=True)):
        out_CZYX[...] = 0
    out_CZYX[:, *target] = data_CZYX[:, *source]
    return out_CZYX
