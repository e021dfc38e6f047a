"""Locate, then look: a tiny network finds a box in the image at a coarse spacing, the fine network sees that alone.

The box is found and cut in preprocessed space, so normalisation is that of the whole image, and whatever comes after
the logits is the same code: outside the box they say background. `native/core/locate.hpp` decides.
Axes: C channel, H head, Z Y X nnU-Net's internal order.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.events import Listener, ignore
from fastnnunet.geometry.blocks import block_means
from fastnnunet.geometry.chunked_window import Index
from fastnnunet.runtime.arithmetic import Array, HalfArray
from fastnnunet.runtime.one_pass import TileChunks, cut_out
from fastnnunet.runtime.sliding_window import Network
from fastnnunet.runtime.ways import Chunks, Finished, Way
from fastnnunet.specs.locator import Locator

CERTAIN = 16.0  # logits outside the box: of 10 million voxels there one would be foreground


@dataclass(frozen=True, slots=True)
class Box:
    """Voxels of a preprocessed image, half open."""

    begin: tuple[int, ...]
    end: tuple[int, ...]


def foreground_box(mask_ZYX: npt.NDArray[np.bool_]) -> Box | None:
    """The smallest box around what is true; None where nothing is."""
    axes = range(mask_ZYX.ndim)
    along = [np.flatnonzero(mask_ZYX.any(axis=tuple(a for a in axes if a != axis))) for axis in axes]
    if len(along[0]) == 0:
        return None
    return Box(tuple(int(places[0]) for places in along), tuple(int(places[-1]) + 1 for places in along))


def seen_box(
    data_CZYX: Array, locator: Locator, logits: Callable[[Array], HalfArray], threads: int | None = None
) -> Box | None:
    """What the locator sees, in voxels of the preprocessed image and without margin. `logits`: of its network."""
    seen = logits(block_means(data_CZYX, locator.factor, threads=threads))
    found = native.seen_box(seen, locator.threshold, locator.factor, data_CZYX.shape[1:])
    return None if found is None else Box(*map(tuple, found))


def with_margin(box: Box, margin_mm: float, spacing_mm: Sequence[float], shape_zyx: Sequence[int]) -> Box:
    """So much more on every side, as far as the image goes."""
    return Box(*map(tuple, native.with_margin((box.begin, box.end), margin_mm, spacing_mm, shape_zyx)))


@dataclass(frozen=True, slots=True, kw_only=True)
class InBox:
    """A way to predict a part of an image, the rest being background; itself a `Way`."""

    way: Way
    origin: tuple[int, ...]  # of the part in the image; below 0 where it begins in the zeros before it
    size: tuple[int, ...]
    background: tuple[float, ...]  # logits outside, of each head

    def crop(self, shape_zyx: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> list[tuple[int, int]]:
        """See `Way`."""
        return self.way.crop(shape_zyx, begin, end)

    def smaller(self, shape_zyx: Sequence[int]) -> "InBox | None":
        """See `Way`."""
        way = self.way.smaller(self.size)
        return None if way is None else replace(self, way=way)

    def begin(
        self,
        data_CZYX: Array,
        network: Network,
        *,
        whole: bool,
        margin: int = 0,
        progress: Listener = ignore,
        threads: int | None = None,
    ) -> tuple[TileChunks, Finished]:
        """See `Way`. Chunks of the image are those of the part and, where they end before it does, others."""
        cut = cut_out(data_CZYX, self.origin, np.empty((len(data_CZYX), *self.size), np.float32))
        inner, finished = self.way.begin(cut, network, whole=whole, margin=margin, progress=progress, threads=threads)
        shape, part = data_CZYX.shape[1:], native.ImagePart(self.origin, self.size)
        z, y, x = ([0, n] for n in shape) if whole else part.bounds(inner.bounds, shape)
        chunks = TileChunks(bounds=(tuple(z), tuple(y), tuple(x)))
        return chunks, self._finished(chunks, self._parts(inner, part, finished, shape, margin), margin)

    def _finished(
        self, chunks: TileChunks, parts: Iterator[tuple[tuple[slice, ...], HalfArray]], margin: int
    ) -> Iterator[tuple[Index, HalfArray]]:
        """Each chunk after those before it along z and y, as its receiver needs; a window's are not in C order."""
        left: dict[Index, None] = dict.fromkeys((z, y, 0) for z in range(chunks.grid[0]) for y in range(chunks.grid[1]))
        for place, values in parts:
            z, y, _ = (bisect_right(b, p.start) - 1 for b, p in zip(chunks.bounds, place, strict=True))
            del left[z, y, 0]
            for number in [n for n in left if n[0] <= z and n[1] <= y]:
                del left[number]
                yield number, self._nothing(chunks.chunk_slices(number), margin)
            within = chunks.chunk_slices((z, y, 0))
            logits = self._nothing(within, margin)
            target = (slice(p.start - s.start, p.stop - s.start) for p, s in zip(place, within, strict=True))
            logits[:, margin:, margin:][:, *target] = values
            del values
            yield (z, y, 0), logits
            del logits  # it is the caller's
        for number in left:
            yield number, self._nothing(chunks.chunk_slices(number), margin)

    def _nothing(self, within: Sequence[slice], margin: int) -> HalfArray:
        """Background for a chunk, and room for the margin before it."""
        depth, height, width = (s.stop - s.start for s in within)
        logits = np.empty((len(self.background), depth + margin, height + margin, width), np.float16)
        logits[...] = np.asarray(self.background, np.float16)[:, None, None, None]
        return logits

    def _parts(
        self, inner: Chunks, part: native.ImagePart, finished: Finished, shape: tuple[int, ...], margin: int
    ) -> Iterator[tuple[tuple[slice, ...], HalfArray]]:
        """What of each chunk of the part lies in the image, and where; nothing of chunks that do not."""
        for number, logits_HZYX in finished:
            found = part.shared(_corners(inner.chunk_slices(number)), shape)
            if found is not None:
                in_image, in_chunk = (tuple(map(slice, *corners)) for corners in found)
                yield in_image, logits_HZYX[:, margin:, margin:][:, *in_chunk]


def _corners(box: Sequence[slice]) -> tuple[list[int], list[int]]:
    return [s.start for s in box], [s.stop for s in box]


def in_box(way: Way, box: Box, shape_zyx: Sequence[int], background: tuple[float, ...]) -> InBox:
    """A way to predict what `way.crop` says for a box of an image of that shape."""
    origin, size = zip(*way.crop(shape_zyx, box.begin, box.end), strict=True)
    return InBox(way=way, origin=origin, size=size, background=background)
