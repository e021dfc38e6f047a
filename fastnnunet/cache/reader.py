"""Random patches from a cache: memory-mapped shards, every checksum verified, only the chunks of the patch decoded.

Needs neither zarr nor a network. A reader holds no file until it is asked for a patch, so it can be pickled to spawned
loader workers and inherited by forked ones.
"""

import hashlib
import itertools
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.cache.codec import Codec
from fastnnunet.cache.fetch import drop_damaged_copy, shard_file
from fastnnunet.cache.folder import ARRAY_NAME, CacheFolder, open_cache
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.cache.manifest import Manifest
from fastnnunet.cache.shard import (
    ABSENT,
    ShardLayout,
    decode_chunk,
    index_crc32c,
    layout_of_document,
    parse_index,
)
from fastnnunet.cache.storage import Place, place_at
from fastnnunet.errors import CorruptError, FastnnUNetError, NotFoundError

MAX_OPEN_CASES = 256  # mapped shards kept per process


@dataclass(frozen=True, slots=True)
class _OpenCase:
    layout: ShardLayout
    index: npt.NDArray[np.uint64]
    shard: mmap.mmap


class SoftLabelReader:
    """Reads stored soft labels of one cache; see `read_patch`."""

    def __init__(self, cache_dir: str | Place, fetched: Path | None = None) -> None:
        """Open the cache's metadata; shards of a remote cache are kept in `fetched` (None: see `fetch.py`).

        Raises NotFoundError, CorruptError (see `open_cache`) or StorageError.
        """
        self.cache: CacheFolder = open_cache(place_at(cache_dir))
        self._fetched = fetched
        self.codec: Codec = self.cache.codec
        self._open = lru_cache(maxsize=MAX_OPEN_CASES)(self._open_case)

    def __reduce__(self) -> tuple[Any, ...]:
        return SoftLabelReader, (
            self.cache.path,
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
            out = np.zeros(shape, self.codec.dtype)
        elif out.shape != shape or out.dtype != self.codec.dtype:
            raise ValueError(f"out: got {out.dtype} {out.shape}, expected {self.codec.dtype} {shape}")
        else:
            out[...] = 0
        try:
            self._fill(case, lower, out)
        except CorruptError as e:
            raise self._corrupt(case_id, str(e)) from e
        return out

    def read_case(self, case_id: str) -> StoredArray:
        """All stored values (S, Z, Y, X) of a case."""
        return self.read_patch(case_id, (0, 0, 0), self.shape_zyx(case_id))

    def to_probabilities(self, stored: StoredArray) -> Float32Array:
        """Stored values (S, ...) -> soft labels (C, ...) float32; C counts the background for exclusive classes."""
        return self.codec.decode(stored)

    @staticmethod
    def _fill(case: _OpenCase, lower: Sequence[int], out: StoredArray) -> None:
        layout = case.layout
        # per axis: the overlap of each chunk with the box, as (chunk number, slice in the chunk, slice in the patch)
        overlaps: list[list[tuple[int, slice, slice]]] = []
        for n, edge, low, extent in zip(layout.shape[1:], layout.chunk[1:], lower, out.shape[1:], strict=True):
            first, last = max(low, 0), min(low + extent, n)
            axis = []
            for number in range(first // edge, -(-last // edge)):
                start, stop = max(first, number * edge), min(last, (number + 1) * edge)
                if start < stop:
                    axis.append(
                        (number, slice(start - number * edge, stop - number * edge), slice(start - low, stop - low))
                    )
            overlaps.append(axis)
        _, _, grid_y, grid_x = layout.grid
        for (z, from_z, to_z), (y, from_y, to_y), (x, from_x, to_x) in itertools.product(*overlaps):
            offset, length = case.index[(z * grid_y + y) * grid_x + x]
            if offset == ABSENT:
                continue  # certified by the manifest, which repeats the checksum of the index
            chunk = decode_chunk(case.shard[int(offset) : int(offset + length)], layout)
            out[:, to_z, to_y, to_x] = chunk[:, from_z, from_y, from_x]

    def _open_case(self, case_id: str) -> _OpenCase:
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

    def _map(self, case_id: str, manifest: Manifest) -> _OpenCase:
        folder = self.cache.case_dir(case_id)
        try:
            document = (folder / ARRAY_NAME).read_bytes()
            with shard_file(folder, manifest, self._fetched).open("rb") as f:
                shard = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FastnnUNetError:
            raise
        except (OSError, ValueError) as e:  # ValueError: an empty file cannot be mapped
            raise CorruptError(f"{folder} cannot be read ({e})") from e
        if hashlib.sha256(document).hexdigest() != manifest.array_sha256:
            raise CorruptError(f"{ARRAY_NAME} was changed (its digest does not match the manifest)")
        layout = layout_of_document(json.loads(document))
        if len(shard) != manifest.stored_bytes or len(shard) < layout.index_bytes:
            raise CorruptError(f"the shard has {len(shard)} bytes, expected {manifest.stored_bytes}")
        if layout.shape != manifest.shape:
            raise CorruptError(f"the array has shape {layout.shape}, expected {manifest.shape} as in the manifest")
        if layout.dtype != self.codec.dtype:
            raise CorruptError(f"the array holds {layout.dtype}, expected {self.codec.dtype}")
        tail = shard[-layout.index_bytes :]
        index = parse_index(tail, layout, len(shard) - layout.index_bytes)
        if index_crc32c(tail) != manifest.index_crc32c:
            raise CorruptError("the shard belongs to another case (its index is not the one in the manifest)")
        return _OpenCase(layout, index, shard)

    def _corrupt(self, case_id: str, reason: str) -> CorruptError:
        if copy_problem := drop_damaged_copy(self.cache, case_id, self._fetched):
            self._open.cache_clear()  # it maps the removed copy
            return CorruptError(f"soft labels of case {case_id} in {self.cache.path}: {copy_problem}")
        return CorruptError(
            f"soft labels of case {case_id} in {self.cache.path} are damaged: {reason}\n"
            f"rebuild this case with: {self.cache.rebuild_command(case_id)}"
        )
