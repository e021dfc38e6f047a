"""Building a cache: every case through the teacher, encoded and committed one by one.

Resumable by construction: what is committed is skipped, what is not is done. The same function runs a case in this
process, in a worker of a local dask cluster, or on a cluster elsewhere; where it runs changes no stored value.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastnnunet.cache.crew import Crew, Outcome, open_crew
from fastnnunet.cache.identity import cache_key, folds_for_case
from fastnnunet.cache.interfaces import MAX_MEAN_DIFFERENCE, MIN_ARGMAX_EQUAL, Float32Array, Teacher
from fastnnunet.cache.job import CacheJob
from fastnnunet.cache.label import CaseTask
from fastnnunet.cache.plan import MEMORY_LIMIT_BYTES, require_memory, require_space
from fastnnunet.cache.store.durable import write_error
from fastnnunet.cache.store.folder import CacheFolder, require_root
from fastnnunet.cache.store.manifest import Manifest
from fastnnunet.cache.store.storage import require_shared, require_writable
from fastnnunet.cache.store.writer import remove_leftovers
from fastnnunet.errors import BuildError, FastnnUNetError
from fastnnunet.events import Listener, Message, Progress, Remaining, ignore
from fastnnunet.system.locks import has_locks
from fastnnunet.system.words import size_text

log = logging.getLogger(__name__)

DEVIATION_CASES = 3
IN_PROCESS_CASES = 3  # one being labelled, one waiting, one being committed


class CasesFailedError(BuildError):
    """Some cases could not be labelled; the others are stored. `failed` maps case id -> reason."""

    exit_code = 1

    def __init__(self, message: str, failed: dict[str, str]) -> None:
        super().__init__(message)
        self.failed = failed


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseDone(Progress):
    """One case is finished (`manifest`) or failed (`error`)."""

    case_id: str
    manifest: Manifest | None
    error: str | None
    voxels: int
    unit: str = "cases"
    logged: bool = True

    @property
    def line(self) -> str:
        return f"{self.done:g}/{self.total:g} {self.case_id} {self.note}"


def build_cache(
    job: CacheJob,
    *,
    workers: int = 0,
    threads: int = 1,
    scheduler: str | None = None,
    only: Sequence[str] | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    progress: Listener = ignore,
) -> CacheFolder:
    """Label every case that is not stored yet and return the cache.

    `workers` = 0 runs in this process, otherwise a local dask cluster of that many processes is used, or the cluster at
    `scheduler` (tcp://host:port). Each teacher computes with `threads` threads. `only` restricts the build to these
    cases and replaces those among them that are damaged. A case that needs more than `memory_limit_bytes` beyond the
    teacher's weights and activations is refused before anything runs (SpecError).

    A case that fails does not stop the others; at the end CasesFailedError names each with its reason. Full disks, lost
    clusters and object stores that do not answer stop the build at once (DiskSpaceError, BuildError, StorageError). In
    every event what was committed stays and the same call resumes.
    """
    todo = job.todo(only)
    if todo:
        if workers > 0 or scheduler is not None:
            require_shared(job.root)
        require_root(job.root)
        try:
            require_writable(job.root)
        except OSError as e:
            raise write_error(e, job.root) from e
        require_space(job, todo, at_once=max(workers, IN_PROCESS_CASES))
        require_memory(job, todo, memory_limit_bytes)
    else:
        cache = job.create({})
        _tidy(cache)
        return cache
    with open_crew(cache_key(job.identity), job.factory, threads, min(workers, len(todo)), scheduler) as crew:
        cache = job.open() or job.create(_deviation(job, crew, todo, progress))
        if isinstance(cache.path, Path):
            has_locks(cache.path)  # says so where there are none: workers, who want them, are not heard
        _tidy(cache)
        tasks = [
            CaseTask(
                case_id=case,
                cache=replace(cache, cases={case: cache.cases[case]}),
                source=job.source,
                factory=job.factory,
                folds=folds_for_case(job.factory, job.spec, case),
                threads=threads,
            )
            for case in todo
        ]
        failed = _run(job, crew.label(tasks), todo, progress)
    if failed:
        raise CasesFailedError(
            f"{len(failed)} of {len(todo)} cases failed\n"
            + "\n".join(f"  {case}: {error}" for case, error in failed.items())
            + "\nthe others are stored; mend these and run the same command again",
            failed,
        )
    return cache


def _run(job: CacheJob, outcomes: Iterator[Outcome], todo: Sequence[str], progress: Listener) -> dict[str, str]:
    """Wait for all cases; returns those that failed, with the reason."""
    failed: dict[str, str] = {}
    remaining, voxels_done, voxels = Remaining(), 0, sum(map(job.voxels, todo))
    for done, (case, outcome) in enumerate(outcomes, start=1):
        manifest = outcome if isinstance(outcome, Manifest) else None
        error = None if isinstance(outcome, Manifest) else str(outcome)
        if error is not None:
            failed[case] = error
            progress(Message(text=f"{done}/{len(todo)} {case} failed: {error}", level="error"))
        voxels_done += job.voxels(case)  # cases differ in size
        progress(
            CaseDone(
                what="labelling",
                case_id=case,
                manifest=manifest,
                error=error,
                voxels=job.voxels(case),
                done=done,
                total=len(todo),
                remaining_s=remaining.seconds(voxels_done, voxels),
                note="failed" if manifest is None else _told(manifest),
                logged=manifest is not None,
            )
        )
    return failed


def _told(manifest: Manifest) -> str:
    size, voxels = manifest.stored_bytes, manifest.voxels
    return f"{manifest.seconds:.1f} s, {size_text(size)}, {size / voxels:.2f} B/voxel"


def _tidy(cache: CacheFolder) -> None:
    if leftovers := remove_leftovers(cache):
        log.info("removed %d unfinished case(s) of an interrupted build: %s", len(leftovers), ", ".join(leftovers))


def _deviation(job: CacheJob, crew: Crew, todo: Sequence[str], progress: Listener) -> dict[str, Any]:
    """For the provenance: how far the teacher is from the reference on patches of a few cases, which is told too."""
    step = max(1, len(todo) // DEVIATION_CASES)
    images = [job.source.image_CZYX(case) for case in todo[::step][:DEVIATION_CASES]]
    question = partial(_ask_deviation, images_CZYX=images, temperature=job.spec.temperature)
    try:
        found = crew.ask(question)
    except FastnnUNetError:
        raise
    except Exception as e:  # from the framework underneath, such as running out of memory
        log.exception("the deviation could not be measured")
        raise BuildError(f"the teacher failed on a patch of {todo[0]}: {type(e).__name__}: {e}") from e
    for message in _compared(found):
        progress(message)
    return {"deviation": found}


def _compared(found: dict[str, Any]) -> Iterator[Message]:
    """What a comparison found; nothing of a teacher that there is nothing to compare with."""
    if not found:
        return
    equal, difference = found["argmax_equal"], found["mean_abs_difference"]
    yield Message(
        text=f"teacher against {found['against']}, {found['patches']} patches: {equal:.3%} of labels equal, mean "
        f"difference of probabilities {difference:.1e}"
    )
    if equal < MIN_ARGMAX_EQUAL or difference > MAX_MEAN_DIFFERENCE:
        yield Message(
            text=f"that is further apart than it should be (expected {MIN_ARGMAX_EQUAL:.1%} or more, "
            f"{MAX_MEAN_DIFFERENCE:g} or less): with precision: fp32 in the recipe it is closer",
            level="warning",
        )


def _ask_deviation(teacher: Teacher, images_CZYX: list[Float32Array], temperature: float) -> dict[str, Any]:
    return teacher.deviation(images_CZYX, temperature)
