"""What a build would write, need and take, before it starts."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnnunet.cache.codecs import BLOCK_VALUES, Codec, codec_for_spec
from fastnnunet.cache.identity import cache_key
from fastnnunet.cache.interfaces import Teacher
from fastnnunet.cache.job import CacheJob
from fastnnunet.cache.label import MAX_PENDING_BLOCKS
from fastnnunet.cache.store.shard import chunk_for
from fastnnunet.cache.store.storage import Place
from fastnnunet.errors import DiskSpaceError, SpecError
from fastnnunet.geometry.grid import tile_starts
from fastnnunet.specs.home import HOME_VARIABLE, local_home
from fastnnunet.system.words import size_text

# Bytes per stored value until one case is measured. uint8 at some temperatures, with a margin: on hippocampus
# 0.04, 0.23 and 0.32 (measure/cache/cache_layout.py). The mantissas of float16 are noise to a compressor.
TEMPERATURES, UINT8_BYTES = (1.0, 2.0, 3.0), (0.1, 0.3, 0.4)
FLOAT16_BYTES = 1.6
FILES_PER_CASE_BYTES = 3 * 4096  # manifest, zarr.json and the rounding of three files to disk blocks
SPACE_MARGIN = 1.1
MEMORY_LIMIT_BYTES = 4 << 30  # of one worker, beyond the teacher's weights and activations


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """What `cache plan` prints."""

    path: Place
    key: str
    cases: int
    cases_todo: int
    voxels_todo: int
    bytes_estimated: int
    bytes_per_voxel: float
    bytes_measured: bool  # estimated from cases that are already stored, not from the rule
    bytes_free: int | None  # None: an object store, which has no end
    memory_per_worker: int  # beyond the teacher's weights and activations
    tiles_todo: int
    seconds_per_patch: float | None
    seconds_estimated: float | None
    workers: int


def plan_cache(
    job: CacheJob, *, teacher: Teacher | None = None, workers: int = 1, only: Sequence[str] | None = None
) -> CachePlan:
    """Work the plan out; with a `teacher` one patch is timed, without one there is no time estimate. Writes nothing."""
    todo = job.todo(only)
    voxels = sum(map(job.voxels, todo))
    per_voxel, measured = _bytes_per_voxel(job)
    tiles = sum(count_tiles(job.source.shape_zyx(case), job.factory.patch_size, job.spec.step_size) for case in todo)
    per_patch = teacher.seconds_per_patch() if teacher is not None and todo else None
    return CachePlan(
        path=job.path,
        key=cache_key(job.identity),
        cases=len(job.cases),
        cases_todo=len(todo),
        voxels_todo=voxels,
        bytes_estimated=_estimated_bytes(job, todo),
        bytes_per_voxel=per_voxel,
        bytes_measured=measured,
        bytes_free=free_bytes(job.root) if isinstance(job.root, Path) else None,
        memory_per_worker=max((_case_memory(job, case) for case in todo), default=0),
        tiles_todo=tiles,
        seconds_per_patch=per_patch,
        seconds_estimated=None if per_patch is None else per_patch * tiles / max(1, min(workers, len(todo))),
        workers=workers,
    )


def require_space(job: CacheJob, todo: Sequence[str], *, at_once: int = 1) -> None:
    """Raise DiskSpaceError when there is too little room for these cases.

    A local root must hold them all. For an object store this machine holds only those being written, `at_once` of them.
    """
    if isinstance(job.root, Path):
        folder, written, mend = job.root, list(todo), "choose another place with --root (for scans, -i: --work)"
    else:
        folder, written, mend = local_home(), list(todo)[:at_once], f"choose another folder with {HOME_VARIABLE}"
    needed = int(_estimated_bytes(job, written) * SPACE_MARGIN)
    free = free_bytes(folder)
    if free < needed:
        raise DiskSpaceError(
            f"not enough disk space under {folder} for {len(written)} cases\n"
            f"  got      {size_text(free)} free\n  expected {size_text(needed)}\n"
            f"free some space, {mend}, or build fewer cases with --case"
        )


def require_memory(job: CacheJob, todo: Sequence[str], limit_bytes: int) -> None:
    """Raise SpecError when labelling one of these cases would take more memory than allowed."""
    needed, case = max((_case_memory(job, case), case) for case in todo)
    if needed > limit_bytes:
        raise SpecError(
            f"case {case} ({' x '.join(map(str, job.source.shape_zyx(case)))} voxels, {job.factory.num_heads} heads) "
            "needs too much memory\n"
            f"  got      {needed / 2**30:.1f} GiB beyond the teacher's weights and activations\n"
            f"  expected at most {limit_bytes / 2**30:.1f} GiB\n"
            "allow more with --memory-limit, or leave the case out with --case"
        )


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` or its nearest existing parent."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def count_tiles(shape_zyx: Sequence[int], patch_size: Sequence[int], step_size: float) -> int:
    """Number of sliding-window tiles; a two-dimensional patch visits every slice."""
    slices = shape_zyx[0] if len(patch_size) == 2 else 1
    padded = [max(n, t) for n, t in zip(shape_zyx[-len(patch_size) :], patch_size, strict=True)]
    return slices * math.prod(map(len, tile_starts(padded, patch_size, step_size)))


def _bytes_per_voxel(job: CacheJob) -> tuple[float, bool]:
    """Bytes per voxel and whether it is measured on stored cases."""
    cache = job.open()
    if cache is not None and (manifests := cache.stored_manifests()):
        return sum(m.stored_bytes for m in manifests) / sum(m.voxels for m in manifests), True
    codec = _codec(job)
    if codec.dtype == "float16":
        return codec.num_stored * FLOAT16_BYTES, False
    # gaps between logits are stored whatever the temperature
    temperature = math.inf if job.spec.temperature_range is not None else job.spec.temperature
    return codec.num_stored * float(np.interp(temperature, TEMPERATURES, UINT8_BYTES)), False


def _codec(job: CacheJob) -> Codec:
    return codec_for_spec(job.spec, job.factory.num_heads, has_regions=job.factory.has_regions)


def _estimated_bytes(job: CacheJob, todo: Sequence[str]) -> int:
    per_voxel, _ = _bytes_per_voxel(job)
    return int(per_voxel * sum(map(job.voxels, todo))) + FILES_PER_CASE_BYTES * len(todo)


def _case_memory(job: CacheJob, case_id: str) -> int:
    """Peak bytes of labelling a case: the teacher's sums and tiles, blocks that wait to be encoded, work blocks."""
    shape_zyx = job.source.shape_zyx(case_id)
    chunk_zyx = chunk_for(job.spec, shape_zyx)
    block_bytes = 4 * job.factory.num_heads * math.prod(chunk_zyx)
    waiting = (MAX_PENDING_BLOCKS + 2) * block_bytes
    return job.factory.memory_bytes(shape_zyx, chunk_zyx) + waiting + 16 * BLOCK_VALUES
