"""Checking a whole cache: nothing is believed that can be computed again."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from fastnnunet.cache.store.folder import CacheFolder
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.shard import chunk_for
from fastnnunet.errors import FastnnUNetError, StorageError
from fastnnunet.events import Listener, Progress, ignore

Status = Literal["ok", "missing", "damaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseReport:
    """What was found out about one case."""

    case_id: str
    status: Status
    problem: str | None
    stored_bytes: int


def verify_cache(cache: CacheFolder, progress: Listener = ignore) -> list[CaseReport]:
    """Check every case: manifest, digests of metadata and shard, every chunk decoded, simplex, shape.

    The group (key, identity, list of cases) was checked when `cache` was opened. A damaged case does not hide the next.
    """
    reports = []
    with TemporaryDirectory(prefix="fastnnunet-verify-") as fetched:
        reader = SoftLabelReader(cache.path, fetched=Path(fetched))
        for case_id in cache.cases:
            reports.append(_verify_case(cache, reader, case_id))
            progress(Progress(what="checking", done=len(reports), total=len(cache.cases), unit="cases", note=case_id))
            for file in Path(fetched).iterdir():  # one remote shard at a time; copies fetched earlier prove nothing
                file.unlink()
    return reports


def _verify_case(cache: CacheFolder, reader: SoftLabelReader, case_id: str) -> CaseReport:
    remote = not isinstance(cache.path, Path)
    if not cache.case_dir(case_id).exists():
        return CaseReport(case_id=case_id, status="missing", problem="not built", stored_bytes=0)
    problem = cache.problem(case_id, deep=not remote)  # a remote shard is hashed when it is fetched
    stored_bytes = 0
    if problem is None:
        try:
            manifest = cache.manifest(case_id)
            stored_bytes = manifest.stored_bytes if manifest is not None else 0
            problem = _problem_of_values(cache, reader, case_id)
        except StorageError:
            raise
        except FastnnUNetError as e:
            problem = str(e)
    return CaseReport(
        case_id=case_id, status="ok" if problem is None else "damaged", problem=problem, stored_bytes=stored_bytes
    )


def _problem_of_values(cache: CacheFolder, reader: SoftLabelReader, case_id: str) -> str | None:
    """What is wrong with the values of a case. Reads one layer of chunks at a time, so that a case of any size fits."""
    codec = cache.codec
    size_z, size_y, size_x = reader.shape_zyx(case_id)
    depth = chunk_for(cache.spec, (size_z, size_y, size_x))[0]
    for lower in range(0, size_z, depth):
        stored_SZYX = reader.read_patch(case_id, (lower, 0, 0), (min(lower + depth, size_z), size_y, size_x))
        if problem := codec.problem(stored_SZYX):
            return problem
        if len(stored_SZYX) != codec.num_stored:
            return f"{len(stored_SZYX)} stored channels, expected {codec.num_stored}"
    return None
