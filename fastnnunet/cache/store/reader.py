"""Random patches from a cache: memory-mapped shards, every checksum verified, only the chunks of the patch decoded.

Needs neither zarr nor a network. A reader holds no file until it is asked for a patch, so it can be pickled to spawned
loader workers and inherited by forked ones.
"""

import hashlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.cache.codecs import Codec
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.cache.store.fetch import drop_damaged_copy, shard_file
from fastnnunet.cache.store.folder import ARRAY_NAME, CacheFolder, open_cache
from fastnnunet.cache.store.manifest import Manifest
from fastnnunet.cache.store.shard import (
    ABSENT,
    ShardLayout,
    decode_chunk,
    index_crc32c,
    layout_of_document,
    parse_index,
)
from fastnnunet.cache.store.storage import Place, place_at
from fastnnunet.errors import CorruptError, FastnnUNetError, NotFoundError
from fastnnunet.specs.checks.json_text import parse_json

MAX_OPEN_CASES = 256  # mapped shards kept per process


@dataclass(frozen=True, slots=True)
class OpenCase:
    """One shard, mapped and its index checked."""

    layout: ShardLayout
    index: npt.NDArray[np.uint64]  # (*grid, 2): offset and length of every inner chunk
    shard: npt.NDArray[np.uint8]  # the mapped file: slices of it are not copies


class SoftLabelReader:
    """Reads stored soft labels of one cache; see `read_patch`."""

    def __init__(self, cache_dir: str | Place, temperature: float | None = None, fetched: Path | None = None) -> None:
        """Open the cache's metadata. Raises NotFoundError, CorruptError (see `open_cache`) or StorageError.

        `temperature` is what `to_probabilities` decodes at: None for the cache's own, one of its range for
        logit_gap_u8. Raises MismatchError when the cache cannot serve it. Shards of a remote cache are kept in
        `fetched` (None: see `fetch.py`).
        """
        self.cache: CacheFolder = open_cache(place_at(cache_dir))
        self.temperature = temperature
        self._fetched = fetched
        self.codec: Codec = self.cache.codec_at(temperature)
        self._open = lru_cache(maxsize=MAX_OPEN_CASES)(self._open_case)

    def __reduce__(self) -> tuple[Any, ...]:
        return SoftLabelReader, (
            self.cache.path,
            self.temperature,
            self._fetched,
        )  # the other process opens and maps anew

    @property
    def key(self) -> str:
        return self.cache.key

    @property
    def case_ids(self) -> tuple[str, ...]:
        """All cases of the cache, stored or not."""
        return tuple(self.cache.cases)

    def shape_zyx(self, case_id: str) -> tuple[int, int, int]:
        _, z, y, x = self._open(case_id).layout.shape
        return z, y, x

    def read_patch(
        self, case_id: str, lower_zyx: Sequence[int], upper_zyx: Sequence[int], out: StoredArray | None = None
    ) -> StoredArray:
        """Stored values (S, z, y, x) of the box [lower, upper), in the codec's dtype; 0 (background) outside.

        The box may lie partly or wholly outside. `out`, when given, is filled and returned. Raises NotFoundError when
        the case is not stored, CorruptError when anything read for this patch was damaged, ValueError for a box with a
        negative extent.
        """
        lower = tuple(int(v) for v in lower_zyx)
        size = tuple(int(u) - lo for u, lo in zip(upper_zyx, lower, strict=True))
        if len(size) != 3 or min(size) < 0:
            raise ValueError(f"box from {tuple(lower_zyx)} to {tuple(upper_zyx)}: expected 3 axes, lower <= upper")
        case = self._open(case_id)
        shape = (case.layout.shape[0], *size)
        if out is None:
            out = np.empty(shape, self.codec.dtype)
        elif out.shape != shape or out.dtype != self.codec.dtype:
            raise ValueError(f"out: got {out.dtype} {out.shape}, expected {self.codec.dtype} {shape}")
        try:
            fill_patch(case, lower, out)
        except CorruptError as e:
            raise self._corrupt(case_id, str(e)) from e
        return out

    def read_case(self, case_id: str) -> StoredArray:
        """All stored values (S, Z, Y, X) of a case."""
        return self.read_patch(case_id, (0, 0, 0), self.shape_zyx(case_id))

    def to_probabilities(self, stored: StoredArray) -> Float32Array:
        """Stored values (S, ...) -> soft labels (C, ...) float32; C counts the background for exclusive classes.

        Raises SpecError for a cache of a range of temperatures when the reader was not given one.
        """
        return self.codec.decode(stored)

    def _open_case(self, case_id: str) -> OpenCase:
        if case_id not in self.cache.cases:
            raise NotFoundError(f"case {case_id} is not part of cache {self.cache.path}")
        try:
            manifest = self.cache.manifest(case_id)
            if manifest is None:
                raise NotFoundError(
                    f"case {case_id} is not built in cache {self.cache.path}\n"
                    f"build it with: {self.cache.rebuild_command(case_id)}"
                )
            return self._map(case_id, manifest)
        except CorruptError as e:
            raise self._corrupt(case_id, str(e)) from e

    def _map(self, case_id: str, manifest: Manifest) -> OpenCase:
        folder = self.cache.case_dir(case_id)
        try:
            document = (folder / ARRAY_NAME).read_bytes()
            with shard_file(folder, manifest, self._fetched).open("rb") as f:
                shard = np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except FastnnUNetError:
            raise
        except (OSError, ValueError) as e:  # ValueError: an empty file cannot be mapped
            raise CorruptError(f"{folder} cannot be read ({e})") from e
        if hashlib.sha256(document).hexdigest() != manifest.array_sha256:
            raise CorruptError(f"{ARRAY_NAME} was changed (its digest does not match the manifest)")
        layout = layout_of_document(parse_json(document, folder / ARRAY_NAME))
        if len(shard) != manifest.stored_bytes or len(shard) < layout.index_bytes:
            raise CorruptError(f"the shard has {len(shard)} bytes, expected {manifest.stored_bytes}")
        if layout.shape != manifest.shape:
            raise CorruptError(f"the array has shape {layout.shape}, expected {manifest.shape} as in the manifest")
        if layout.dtype != self.codec.dtype:
            raise CorruptError(f"the array holds {layout.dtype}, expected {self.codec.dtype}")
        tail = shard[-layout.index_bytes :].tobytes()
        index = parse_index(tail, layout, len(shard) - layout.index_bytes)
        if index_crc32c(tail) != manifest.index_crc32c:
            raise CorruptError("the shard belongs to another case (its index is not the one in the manifest)")
        return OpenCase(layout, index.reshape(*layout.grid, 2), shard)

    def _corrupt(self, case_id: str, reason: str) -> CorruptError:
        if copy_problem := drop_damaged_copy(self.cache, case_id, self._fetched):
            self._open.cache_clear()  # it maps the removed copy
            return CorruptError(f"soft labels of case {case_id} in {self.cache.path}: {copy_problem}")
        return CorruptError(
            f"soft labels of case {case_id} in {self.cache.path} are damaged: {reason}\n"
            f"rebuild this case with: {self.cache.rebuild_command(case_id)}"
        )


def fill_patch(case: OpenCase, lower_zyx: Sequence[int], out: StoredArray) -> None:
    """Copy the box that starts at `lower_zyx` into `out` (S, z, y, x); zero where the volume or a chunk is absent."""
    layout = case.layout
    lower = (0, *lower_zyx)
    # the box in the volume, and the chunks it meets
    start = [max(low, 0) for low in lower]
    stop = [min(low + extent, n) for low, extent, n in zip(lower, out.shape, layout.shape, strict=True)]
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        out[...] = 0
        return
    first = [a // edge for a, edge in zip(start, layout.chunk, strict=True)]
    last = [-(-b // edge) for b, edge in zip(stop, layout.chunk, strict=True)]
    entries = case.index[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
    present = np.argwhere(entries[..., 0] != ABSENT)  # absence is certified by the manifest: it repeats the index's CRC
    covered = all(low >= 0 and low + n <= size for low, n, size in zip(lower, out.shape, layout.shape, strict=True))
    if not covered or len(present) < entries[..., 0].size:
        out[...] = 0
    scratch = np.empty(layout.chunk, layout.stored_dtype)
    overlaps = [
        [_overlap(number, edge, low, a, b) for number in range(i, j)]
        for edge, low, a, b, i, j in zip(layout.chunk, lower, start, stop, first, last, strict=True)
    ]
    axis_s, axis_z, axis_y, axis_x = overlaps
    columns = [_as_rows(scratch[..., source], out[..., target]) for source, target in axis_x]
    places = entries[tuple(present.T)].tolist()
    for (s, z, y, x), (offset, length) in zip(present.tolist(), places, strict=True):
        (from_s, to_s), (from_z, to_z), (from_y, to_y) = axis_s[s], axis_z[z], axis_y[y]
        source, target = columns[x]
        decode_chunk(case.shard[offset : offset + length], layout, scratch)
        target[to_s, to_z, to_y] = source[from_s, from_z, from_y]


def _as_rows(source: StoredArray, target: StoredArray) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Both arrays with each row along x as one item, where they allow it: NumPy copies those twice as fast as bytes."""
    if target.strides[-1] != target.itemsize or source.dtype != target.dtype:
        return source, target
    row = np.dtype((np.void, source.shape[-1] * source.itemsize))
    return source.view(row), target.view(row)


def _overlap(number: int, edge: int, lower: int, start: int, stop: int) -> tuple[slice, slice]:
    """Where chunk `number` of an axis meets [start, stop): as a slice of the chunk and one of the patch at `lower`."""
    begin, end = max(start, number * edge), min(stop, (number + 1) * edge)
    return slice(begin - number * edge, end - number * edge), slice(begin - lower, end - lower)
