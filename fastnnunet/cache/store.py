"""Committing one case, so that it is there whole or not at all.

The case is written into a folder of its own under `<root>/.partial/`, read back in full with zarr-python and compared,
given its manifest, flushed to disk, and renamed into the cache. A kill at any moment loses at most this one case. Two
builders of the same cache do no harm: the second to finish a case finds it there and drops its own copy.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from fastnnunet.cache.durable import fsync_file, write_error, write_synced
from fastnnunet.cache.folder import ARRAY_NAME, CacheFolder
from fastnnunet.cache.interfaces import StoredArray
from fastnnunet.cache.manifest import MANIFEST_NAME, Manifest, manifest_text
from fastnnunet.cache.shard import (
    ABSENT,
    SHARD_NAME,
    array_document,
    encode_shard,
    index_crc32c,
    layout_for,
    parse_index,
)
from fastnnunet.errors import BuildError
from fastnnunet.specs.canonical import canonical_json, sha256_of_file

PARTIAL = ".partial"


def commit_case(
    cache: CacheFolder, case_id: str, stored_SZYX: StoredArray, *, max_error: float, seconds: float
) -> Manifest:
    """Write one encoded case into the cache and return its manifest.

    Raises BuildError when what was read back differs from what was written, DiskSpaceError when the disk is full.
    """
    try:
        with _partial_folder(cache, case_id) as folder:
            manifest = _write(cache, case_id, folder, stored_SZYX, max_error, seconds)
            _move_into_place(cache, case_id, folder)
    except OSError as e:
        raise write_error(e, cache.case_dir(case_id)) from e
    return manifest


def remove_leftovers(cache: CacheFolder) -> list[str]:
    """Remove partial folders of this cache whose writer is gone; returns their names.

    A folder that a running builder holds is not touched.
    """
    removed = []
    for folder in sorted((cache.path.parent / PARTIAL).glob(f"{cache.path.name}.*")):
        try:
            with locked(folder):
                shutil.rmtree(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another builder is writing it, or has just finished
        removed.append(folder.name)
    return removed


def _write(
    cache: CacheFolder, case_id: str, folder: Path, stored_SZYX: StoredArray, max_error: float, seconds: float
) -> Manifest:
    codec = cache.codec
    if problem := codec.problem(stored_SZYX):
        raise BuildError(f"case {case_id}: {problem}")
    if not max_error <= codec.eps:
        raise BuildError(f"case {case_id}: measured error {max_error:.6g} exceeds the bound {codec.eps:.6g}")
    num_stored, z, y, x = stored_SZYX.shape
    layout = layout_for(cache.spec, num_stored, (z, y, x), codec.dtype)
    attributes = {"fastnnunet": {"key": cache.key, "case_id": case_id, "image_sha256": cache.cases[case_id]}}
    array_file, shard_file = folder / ARRAY_NAME, folder / SHARD_NAME
    write_synced(array_file, canonical_json(array_document(layout, attributes)).encode())
    shard_file.parent.mkdir(parents=True)
    digest = hashlib.sha256()
    tail = b""
    with shard_file.open("wb") as f:
        for tail in encode_shard(stored_SZYX, layout):
            f.write(tail)
            digest.update(tail)
        f.flush()
        os.fsync(f.fileno())
    stored_bytes = shard_file.stat().st_size
    _read_back(folder, case_id, stored_SZYX)
    manifest = Manifest(
        case_id=case_id,
        key=cache.key,
        image_sha256=cache.cases[case_id],
        shape=layout.shape,
        eps=codec.eps,
        max_error=max_error,
        stored_bytes=stored_bytes,
        absent_chunks=int((parse_index(tail, layout, stored_bytes - len(tail))[:, 0] == ABSENT).sum()),
        shard_sha256=digest.hexdigest(),
        index_crc32c=index_crc32c(tail),
        array_sha256=sha256_of_file(array_file),
        seconds=round(seconds, 3),
    )
    write_synced(folder / MANIFEST_NAME, manifest_text(manifest).encode())
    for directory in (*shard_file.parents[: len(Path(SHARD_NAME).parts) - 1], folder):
        fsync_file(directory)
    return manifest


def _read_back(folder: Path, case_id: str, stored_SZYX: StoredArray) -> None:
    """Every voxel, through a reader that shares no code with the writer."""
    import zarr  # heavy, and only builds need it

    array = zarr.open_array(str(folder), mode="r", zarr_format=3)
    if not np.array_equal(np.asarray(array[...]), stored_SZYX):
        raise BuildError(
            f"case {case_id}: reading the written store back gave other values; the disk or memory of this machine "
            "may be faulty"
        )


def _move_into_place(cache: CacheFolder, case_id: str, folder: Path) -> None:
    target = cache.case_dir(case_id)
    if cache.problem(case_id, deep=True) is None:
        return  # another builder was quicker; its bytes are the same
    if target.exists():  # damaged: out of the way, into the folder that is deleted next
        target.rename(folder.with_name(folder.name + "-replaced"))
    try:
        folder.rename(target)
    except OSError:
        if cache.problem(case_id, deep=True) is not None:
            raise
    fsync_file(cache.path)
    shutil.rmtree(folder.with_name(folder.name + "-replaced"), ignore_errors=True)


@contextmanager
def _partial_folder(cache: CacheFolder, case_id: str) -> Iterator[Path]:
    """A locked temporary folder on the cache's file system, gone afterwards unless it was renamed."""
    parent = cache.path.parent / PARTIAL
    parent.mkdir(exist_ok=True)
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder; the system releases it when the process dies, however it dies.

    Raises BlockingIOError when another process holds it, FileNotFoundError when the folder is gone.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
