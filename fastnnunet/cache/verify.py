"""Checking a whole cache: nothing is believed that can be computed again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastnnunet.cache.folder import CacheFolder
from fastnnunet.cache.reader import SoftLabelReader
from fastnnunet.errors import FastnnUNetError

Status = Literal["ok", "missing", "damaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseReport:
    """What was found out about one case."""

    case_id: str
    status: Status
    problem: str | None
    stored_bytes: int


def verify_cache(cache: CacheFolder, progress: Callable[[CaseReport], None] | None = None) -> list[CaseReport]:
    """Check every case: manifest, digests of metadata and shard, every chunk decoded, simplex, shape.

    The group (key, identity, list of cases) was checked when `cache` was opened. A damaged case does not hide the next.
    """
    reader = SoftLabelReader(cache.path)
    reports = []
    for case_id in cache.cases:
        reports.append(_verify_case(cache, reader, case_id))
        if progress is not None:
            progress(reports[-1])
    return reports


def _verify_case(cache: CacheFolder, reader: SoftLabelReader, case_id: str) -> CaseReport:
    if not cache.case_dir(case_id).exists():
        return CaseReport(case_id=case_id, status="missing", problem="not built", stored_bytes=0)
    problem = cache.problem(case_id, deep=True)
    stored_bytes = 0
    if problem is None:
        try:
            stored = reader.read_case(case_id)
            manifest = cache.manifest(case_id)
            stored_bytes = manifest.stored_bytes if manifest is not None else 0
            problem = cache.codec.problem(stored)
            if problem is None and len(stored) != cache.codec.num_stored:
                problem = f"{len(stored)} stored channels, expected {cache.codec.num_stored}"
        except FastnnUNetError as e:
            problem = str(e)
    return CaseReport(
        case_id=case_id, status="ok" if problem is None else "damaged", problem=problem, stored_bytes=stored_bytes
    )
