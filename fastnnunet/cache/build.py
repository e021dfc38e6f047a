"""Building a cache: every case through the teacher, encoded and committed one by one.

Resumable by construction: what is committed is skipped, what is not is done. The same function runs a case in this
process, in a worker of a local dask cluster, or on a cluster elsewhere; where it runs changes no stored value.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastnnunet.cache.codecs import encode_logits
from fastnnunet.cache.folder import CacheFolder
from fastnnunet.cache.identity import folds_for_case
from fastnnunet.cache.interfaces import CaseSource, Teacher, TeacherFactory
from fastnnunet.cache.job import CacheJob
from fastnnunet.cache.manifest import Manifest
from fastnnunet.cache.plan import require_space
from fastnnunet.cache.store import commit_case, remove_leftovers
from fastnnunet.errors import BuildError, DiskSpaceError, FastnnUNetError, MismatchError

log = logging.getLogger(__name__)

SCHEDULER_TIMEOUT_S = 30


class CasesFailedError(BuildError):
    """Some cases could not be labelled; the others are stored. `failed` maps case id -> reason."""

    def __init__(self, message: str, failed: dict[str, str]) -> None:
        super().__init__(message)
        self.failed = failed


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseDone:
    """Progress: one case is finished (`manifest`) or failed (`error`)."""

    case_id: str
    manifest: Manifest | None
    error: str | None
    voxels: int
    done: int
    total: int


Progress = Callable[[CaseDone], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseTask:
    """One case's work, small enough to be sent to a worker."""

    case_id: str
    cache: CacheFolder  # knows this one case only
    source: CaseSource
    factory: TeacherFactory
    folds: tuple[Any, ...]
    threads: int


def build_cache(
    job: CacheJob,
    *,
    workers: int = 0,
    threads: int = 1,
    scheduler: str | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> CacheFolder:
    """Label every case that is not stored yet and return the cache.

    `workers` = 0 runs in this process, otherwise a local dask cluster of that many processes is used, or the cluster at
    `scheduler` (tcp://host:port). Each teacher computes with `threads` threads. `only` restricts the build to these
    cases and replaces those among them that are damaged.

    A case that fails does not stop the others; at the end CasesFailedError names each with its reason. Full disks and
    lost clusters stop the build at once (DiskSpaceError, BuildError). In every event what was committed stays and the
    same call resumes.
    """
    todo = job.todo(only)
    if todo:
        require_space(job, todo)
    cache = job.create()
    if leftovers := remove_leftovers(cache):
        log.info("removed %d unfinished case(s) of an interrupted build: %s", len(leftovers), ", ".join(leftovers))
    if not todo:
        return cache
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
    outcomes = _in_process(tasks) if workers == 0 and scheduler is None else _with_dask(tasks, workers, scheduler)
    failed: dict[str, str] = {}
    for done, (case, outcome) in enumerate(outcomes, start=1):
        manifest = outcome if isinstance(outcome, Manifest) else None
        error = None if isinstance(outcome, Manifest) else str(outcome)
        if error is not None:
            failed[case] = error
        if progress is not None:
            progress(
                CaseDone(
                    case_id=case,
                    manifest=manifest,
                    error=error,
                    voxels=job.voxels(case),
                    done=done,
                    total=len(todo),
                )
            )
    if failed:
        raise CasesFailedError(
            f"{len(failed)} of {len(todo)} cases failed\n"
            + "\n".join(f"  {case}: {error}" for case, error in failed.items())
            + "\nthe others are stored; mend these and run the same command again",
            failed,
        )
    return cache


def run_task(task: CaseTask, teacher: Teacher) -> Manifest:
    """Label, encode and commit one case.

    Raises MismatchError when its image is not the one the cache is for, DiskSpaceError when the disk is full,
    BuildError for anything else that goes wrong with it.
    """
    try:
        return _label_and_commit(task, teacher)
    except FastnnUNetError:
        raise
    except Exception as e:  # from the framework underneath, such as running out of memory: the case must be named
        log.exception("case %s failed", task.case_id)
        raise BuildError(f"{type(e).__name__}: {e}") from e


def _label_and_commit(task: CaseTask, teacher: Teacher) -> Manifest:
    start = time.perf_counter()
    case = task.case_id
    if (got := task.source.digest(case)) != task.cache.cases[case]:
        raise MismatchError(
            f"the preprocessed image of case {case} changed during the build\n"
            f"  got      {got}\n  expected {task.cache.cases[case]}\nrun the same command again"
        )
    logits_CZYX = teacher.logits(task.source.image_CZYX(case), task.folds)
    expected = (task.cache.codec.num_heads, *task.source.shape_zyx(case))
    if logits_CZYX.shape != expected:
        raise BuildError(f"the teacher's logits have shape {logits_CZYX.shape}, expected {expected}")
    stored, max_error = encode_logits(task.cache.codec, logits_CZYX, task.cache.temperature)
    del logits_CZYX
    return commit_case(task.cache, case, stored, max_error=max_error, seconds=time.perf_counter() - start)


Outcome = tuple[str, Manifest | FastnnUNetError]


def _in_process(tasks: Sequence[CaseTask]) -> Iterator[Outcome]:
    teacher = tasks[0].factory.load(tasks[0].threads)
    for task in tasks:
        yield task.case_id, _case_outcome(lambda task=task: run_task(task, teacher))  # type: ignore[misc]


def _case_outcome(run: Callable[[], Manifest]) -> Manifest | FastnnUNetError:
    """The manifest, or the error when it concerns this case alone; an error that would hit every case is raised."""
    try:
        return run()
    except DiskSpaceError:
        raise
    except FastnnUNetError as e:
        return e


_loaded: dict[tuple[str, int], Teacher] = {}
_loading = threading.Lock()


def _run_in_worker(task: CaseTask) -> Manifest:
    """Runs in a dask worker; the teacher is loaded once per worker process and kept for the next case."""
    name = (task.cache.key, task.threads)
    with _loading:
        if name not in _loaded:
            _loaded.clear()  # a long-lived worker serves one cache after another: never two teachers in memory
            _loaded[name] = task.factory.load(task.threads)
        teacher = _loaded[name]
    return run_task(task, teacher)


def _with_dask(tasks: Sequence[CaseTask], workers: int, scheduler: str | None) -> Iterator[Outcome]:
    from distributed import KilledWorker, as_completed

    with _client(min(workers, len(tasks)), scheduler) as client:
        # earlier tasks are the larger cases: started first, so that no long one is left for the end
        futures = {
            client.submit(
                _run_in_worker, task, key=f"soft-labels-{task.case_id}-{task.cache.key}", priority=-rank
            ): task
            for rank, task in enumerate(tasks)
        }
        try:
            for future in as_completed(futures):
                case = futures[future].case_id
                try:
                    outcome = _case_outcome(future.result)
                except KilledWorker as e:
                    raise BuildError(
                        f"workers died again and again while labelling case {case}, usually for lack of memory\n"
                        "use fewer --workers, and run the same command again; finished cases are kept"
                    ) from e
                future.release()
                yield case, outcome
        finally:
            client.cancel(list(futures))


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=SCHEDULER_TIMEOUT_S)
        except (OSError, ValueError) as e:
            raise BuildError(
                f"no dask scheduler answers at {scheduler} ({e})\n"
                "expected an address such as tcp://host:8786; start one with: dask scheduler"
            ) from e
        with client:
            yield client
        return
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
