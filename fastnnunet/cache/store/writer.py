"""Committing one case, so that it is there whole or not at all.

The case is written into a folder of its own under `<root>/.partial/`, read back in full with zarr-python and compared,
given its manifest, flushed to disk, and renamed into the cache. A kill at any moment loses at most this one case. Two
builders of the same cache do no harm: the second to finish a case finds it there and drops its own copy.

An object store has neither renames nor locks. There a case is written and read back in a folder of this machine, then
its files are uploaded and read back once more, the manifest last: until then the case does not exist.
"""

import hashlib
import math
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.codecs import encode_block
from fastnnunet.cache.interfaces import Float32Array
from fastnnunet.cache.store.durable import fsync_file, write_error, write_synced
from fastnnunet.cache.store.folder import ARRAY_NAME, CacheFolder
from fastnnunet.cache.store.manifest import MANIFEST_NAME, Manifest, manifest_text
from fastnnunet.cache.store.shard import (
    ABSENT,
    SHARD_NAME,
    ShardWriter,
    array_document,
    index_crc32c,
    layout_for,
    parse_index,
)
from fastnnunet.cache.store.storage import ObjectPath, Place
from fastnnunet.errors import BuildError
from fastnnunet.specs.canonical import canonical_json, sha256_of_file
from fastnnunet.specs.home import local_home
from fastnnunet.system.locks import locked

PARTIAL = ".partial"
ABANDONED_S = 24 * 3600


class CaseWriter:
    """Encodes the blocks of one case into an unfinished folder. Make one with `case_writer`, end it with `commit`.

    Of the case nothing stays in memory but a digest per chunk.
    """

    def __init__(self, cache: CacheFolder, case_id: str, shape_zyx: Sequence[int], folder: Path) -> None:
        self._cache, self._case_id, self._folder = cache, case_id, folder
        codec = cache.codec
        layout = layout_for(cache.spec, codec.num_stored, shape_zyx, codec.dtype, codec.chunk_channels)
        self._shard_file = folder / SHARD_NAME
        self._shard_file.parent.mkdir(parents=True)
        self._file = self._shard_file.open("wb")
        self._sha256 = hashlib.sha256()
        self._shard = ShardWriter(self._append, layout)
        self._layout = layout
        self._crcs: dict[tuple[int, ...], int] = {}
        self._max_error = 0.0

    def add(self, number_zyx: tuple[int, ...], values_CZYX: Float32Array, *, probabilities: bool = False) -> None:
        """Encode one chunk of mean logits, or of soft labels where `probabilities`.

        Raises BuildError when the values are not finite, the codec's bound does not hold or a chunk comes twice.
        """
        cache = self._cache
        if number_zyx in self._crcs:
            raise BuildError(f"the teacher gave chunk {number_zyx} twice")
        stored, error = encode_block(cache.codec, values_CZYX, cache.temperature, from_probabilities=probabilities)
        if problem := cache.codec.problem(stored):
            raise BuildError(problem)
        self._max_error = max(self._max_error, error)
        self._shard.add(number_zyx, stored)
        self._crcs[number_zyx] = zlib.crc32(np.ascontiguousarray(stored).data)

    def commit(self, seconds: float, seen: Mapping[str, Any]) -> Manifest:
        """Finish, read back, flush and rename into the cache, or upload; returns the manifest.

        `seen`: what `seen.py` knows of the case, as plain JSON values.

        Raises BuildError when chunks are missing or what was read back differs from what was written, StorageError when
        it cannot be uploaded.
        """
        cache, case_id, folder = self._cache, self._case_id, self._folder
        codec, layout = cache.codec, self._layout
        tail = self._shard.finish()
        if len(self._crcs) != (expected := math.prod(layout.grid[1:])):
            raise BuildError(f"the teacher gave {len(self._crcs)} chunks, expected {expected}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        array_file = folder / ARRAY_NAME
        attributes = {"key": cache.key, "case_id": case_id, "image_sha256": cache.cases[case_id], "seen": seen}
        document = array_document(layout, {"fastnnunet": attributes})
        write_synced(array_file, canonical_json(document).encode())
        self._read_back()
        stored_bytes = self._shard_file.stat().st_size
        manifest = Manifest(
            case_id=case_id,
            key=cache.key,
            image_sha256=cache.cases[case_id],
            shape=layout.shape,
            eps=codec.eps,
            max_error=self._max_error,
            stored_bytes=stored_bytes,
            absent_chunks=int((parse_index(tail, layout, stored_bytes - len(tail))[:, 0] == ABSENT).sum()),
            shard_sha256=self._sha256.hexdigest(),
            index_crc32c=index_crc32c(tail),
            array_sha256=sha256_of_file(array_file),
            seconds=round(seconds, 3),
        )
        write_synced(folder / MANIFEST_NAME, manifest_text(manifest).encode())
        for directory in (*self._shard_file.parents[: len(Path(SHARD_NAME).parts) - 1], folder):
            fsync_file(directory)
        if isinstance(cache.path, ObjectPath):
            _upload(cache, case_id, folder, manifest)
        else:
            _move_into_place(cache.path, cache, case_id, folder)
        return manifest

    def close(self) -> None:
        """Close the file; what was not committed is removed with its folder."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def _read_back(self) -> None:
        """Every voxel, through a reader that shares no code with the writer."""
        import zarr  # heavy, and only builds need it

        array = zarr.open_array(str(self._folder), mode="r", zarr_format=3)
        for number, expected in self._crcs.items():
            inside = tuple(slice(n * c, (n + 1) * c) for n, c in zip(number, self._layout.chunk[1:], strict=True))
            if zlib.crc32(np.ascontiguousarray(array[(slice(None), *inside)]).data) != expected:
                raise BuildError(
                    "reading the written store back gave other values; the disk or memory of this machine may be faulty"
                )


@contextmanager
def case_writer(cache: CacheFolder, case_id: str, shape_zyx: Sequence[int]) -> Iterator[CaseWriter]:
    """A writer for one case; whatever was not committed on leaving is removed.

    Raises DiskSpaceError when the disk is full, BuildError when the folder cannot be written.
    """
    try:
        with _partial_folder(cache, case_id) as folder:
            writer = CaseWriter(cache, case_id, shape_zyx, folder)
            try:
                yield writer
            finally:
                writer.close()
    except OSError as e:
        raise write_error(e, partial_folder(cache.path.parent)) from e


def remove_leftovers(cache: CacheFolder) -> list[str]:
    """Remove partial folders of this cache whose writer is gone; returns their names.

    A folder that a running builder holds is not touched.
    """
    removed = []
    for folder in sorted(partial_folder(cache.path.parent).glob(f"{cache.path.name}.*")):
        try:
            with locked(folder) as held:
                if not held and not is_abandoned(folder):
                    continue
                shutil.rmtree(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another builder is writing it, or has just finished
        removed.append(folder.name)
    return removed


def is_abandoned(folder: Path) -> bool:
    """Whether nothing in a partial folder has changed for so long that nobody writes it; for want of locks."""
    newest = max(p.lstat().st_mtime for p in (folder, *folder.rglob("*")))
    return time.time() - newest > ABANDONED_S


def partial_folder(root: Place) -> Path:
    """Where the unfinished cases of the caches under `root` are: on its file system, or else on this machine."""
    return root / PARTIAL if isinstance(root, Path) else local_home() / PARTIAL


def _upload(cache: CacheFolder, case_id: str, folder: Path, manifest: Manifest) -> None:
    """Put a finished case into an object store. Its manifest, put last, is what makes it exist."""
    target = cache.case_dir(case_id)
    assert isinstance(target, ObjectPath)
    if cache.problem(case_id, deep=True) is None:
        return  # another builder was quicker; its bytes are the same
    for name, expected in ((SHARD_NAME, manifest.shard_sha256), (ARRAY_NAME, manifest.array_sha256)):
        (target / name).upload(folder / name)
        if (got := (target / name).sha256()) != expected:
            raise BuildError(
                f"{target / name} reads back other bytes than were uploaded\n"
                f"  got      sha256 {got}\n  expected sha256 {expected}\nrun the same command again"
            )
    (target / MANIFEST_NAME).put((folder / MANIFEST_NAME).read_bytes())
    if problem := cache.problem(case_id):
        raise BuildError(f"{problem}\nanother program writes there too? run the same command again")


def _move_into_place(cache_path: Path, cache: CacheFolder, case_id: str, folder: Path) -> None:
    target = cache_path / case_id
    if cache.problem(case_id, deep=True) is None:
        return  # another builder was quicker; its bytes are the same
    if target.exists():  # damaged: out of the way, into the folder that is deleted next
        target.rename(folder.with_name(folder.name + "-replaced"))
    try:
        folder.rename(target)
    except OSError:
        if cache.problem(case_id, deep=True) is not None:
            raise
    fsync_file(cache_path)
    shutil.rmtree(folder.with_name(folder.name + "-replaced"), ignore_errors=True)


@contextmanager
def _partial_folder(cache: CacheFolder, case_id: str) -> Iterator[Path]:
    """A locked temporary folder in `partial_folder`, gone afterwards unless it was renamed.

    Without locks it is safe as well: its name is nobody else's, and what nobody can lock is removed late.
    """
    parent = partial_folder(cache.path.parent)
    parent.mkdir(exist_ok=True, parents=True)
    with ExitStack() as stack:
        while True:
            folder = parent / f"{cache.path.name}.{case_id}.{os.getpid()}.{secrets.token_hex(6)}"
            folder.mkdir()
            try:
                stack.enter_context(locked(folder))
            except (BlockingIOError, FileNotFoundError):
                continue  # a clean-up took it before it was locked: another one
            if folder.is_dir():
                break
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
