"""Who labels the cases: this process, or the workers of a dask cluster. Where a case runs changes no stored value."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol, TypeVar

from fastnnunet.cache.interfaces import Teacher, TeacherFactory
from fastnnunet.cache.label import CaseTask, label_case
from fastnnunet.cache.store.manifest import Manifest
from fastnnunet.errors import BuildError, DiskSpaceError, FastnnUNetError, StorageError
from fastnnunet.system.children import interrupts_held, others_children
from fastnnunet.system.locks import has_locks

SCHEDULER_TIMEOUT_S = 30
WORKERS_TIMEOUT_S = 300  # clusters that grow on demand take their time

log = logging.getLogger(__name__)
T = TypeVar("T")
Outcome = tuple[str, Manifest | FastnnUNetError]


class Crew(Protocol):
    """One teacher or several of the same."""

    def ask(self, question: Callable[[Teacher], T]) -> T:
        """Put a question to one teacher, loaded."""
        ...

    def label(self, tasks: Sequence[CaseTask]) -> Iterator[Outcome]:
        """Label all cases; each is yielded once it is stored or has failed."""
        ...


def open_crew(
    key: str, factory: TeacherFactory, threads: int, workers: int, scheduler: str | None
) -> AbstractContextManager[Crew]:
    """This process where `workers` is 0 and there is no `scheduler`, else a cluster. `key` is that of the cache.

    Raises BuildError when no scheduler answers there.
    """
    if workers == 0 and scheduler is None:
        return _here(factory, threads)
    return _cluster(key, factory, threads, workers, scheduler)


@contextmanager
def _here(factory: TeacherFactory, threads: int) -> Iterator[Crew]:
    yield InProcess(factory.load(threads))


class InProcess:
    """The cases one after another; one is committed while the teacher is at the next."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def ask(self, question: Callable[[Teacher], T]) -> T:
        return question(self._teacher)

    def label(self, tasks: Sequence[CaseTask]) -> Iterator[Outcome]:
        with ThreadPoolExecutor(1, "encode") as encoder, ThreadPoolExecutor(1, "commit") as committer:
            waiting: deque[tuple[str, Future[Manifest]]] = deque()
            for task in tasks:
                labelled = _case_outcome(partial(label_case, task, self._teacher, encoder))
                if isinstance(labelled, FastnnUNetError):
                    yield task.case_id, labelled
                else:
                    waiting.append((task.case_id, committer.submit(labelled)))
                while len(waiting) > 1 or (waiting and task is tasks[-1]):
                    case, future = waiting.popleft()
                    yield case, _case_outcome(future.result)


@contextmanager
def _cluster(key: str, factory: TeacherFactory, threads: int, workers: int, scheduler: str | None) -> Iterator[Crew]:
    with _client(workers, scheduler) as client:
        yield Cluster(client, key, factory, threads)


class Cluster:
    """Workers of a dask cluster, one case at a time each."""

    def __init__(self, client: Any, key: str, factory: TeacherFactory, threads: int) -> None:
        self._client, self._key, self._factory, self._threads = client, key, factory, threads

    def ask(self, question: Callable[[Teacher], T]) -> T:
        with _connection(self._client):
            answer: T = self._client.submit(
                _ask_in_worker, self._key, self._factory, self._threads, question, pure=False
            ).result()
        return answer

    def label(self, tasks: Sequence[CaseTask]) -> Iterator[Outcome]:
        from distributed import KilledWorker, as_completed

        # earlier tasks are the larger cases: started first, so that no long one is left for the end
        futures = {
            self._client.submit(
                _label_in_worker, task, key=f"soft-labels-{task.case_id}-{task.cache.key}", priority=-rank
            ): task
            for rank, task in enumerate(tasks)
        }
        try:
            for future in as_completed(futures):
                case = futures[future].case_id
                try:
                    with _connection(self._client):
                        outcome = _case_outcome(future.result)
                except KilledWorker as e:
                    raise BuildError(
                        f"workers died again and again while labelling case {case}, usually for lack of memory\n"
                        "use fewer --workers, and run the same command again; finished cases are kept"
                    ) from e
                future.release()
                yield case, outcome
        finally:
            if self._client.status == "running":  # one that is closed, after an interrupt, has given them up already
                self._client.cancel(list(futures))


_loaded: dict[tuple[str, int], Teacher] = {}
_loading = threading.Lock()


def _worker_teacher(key: str, factory: TeacherFactory, threads: int) -> Teacher:
    """The teacher is loaded once per worker process and kept for the next case."""
    name = (key, threads)
    with _loading:
        if name not in _loaded:
            _loaded.clear()  # a long-lived worker serves one cache after another: never two teachers in memory
            _loaded[name] = factory.load(threads)
        return _loaded[name]


def _ask_in_worker(key: str, factory: TeacherFactory, threads: int, question: Callable[[Teacher], T]) -> T:
    return question(_worker_teacher(key, factory, threads))


def _label_in_worker(task: CaseTask) -> Manifest:
    """Label one case, unless a worker that died before it could say so has stored it."""
    if task.cache.problem(task.case_id, deep=True) is None and (stored := task.cache.manifest(task.case_id)):
        return stored
    with ThreadPoolExecutor(1, "encode") as encoder:
        return label_case(task, _worker_teacher(task.cache.key, task.factory, task.threads), encoder)()


def _case_outcome(run: Callable[[], T]) -> T | FastnnUNetError:
    """The result, or the error when it concerns this case alone; an error that would hit every case is raised."""
    try:
        return run()
    except (DiskSpaceError, StorageError):
        raise
    except FastnnUNetError as e:
        return e


@contextmanager
def _connection(client: Any) -> Iterator[None]:
    """A lost scheduler becomes a BuildError."""
    from distributed import CancelledError
    from distributed.comm import CommClosedError

    try:
        yield
    except (CancelledError, CommClosedError) as e:
        raise BuildError(
            f"the connection to the dask scheduler at {client.scheduler.address} is lost\n"
            "see why it ended, start it again, and run the same command again; finished cases are kept"
        ) from e


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """dask logs every attempt to reconnect; what matters is raised here."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client", "tornado.application")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
        with _without_tracebacks(), client:
            try:
                client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
            except TimeoutError as e:
                raise BuildError(
                    f"the dask scheduler at {scheduler} has had no worker for {WORKERS_TIMEOUT_S} s\n"
                    f"start some: dask worker {scheduler} --nthreads 1"
                ) from e
            yield client
        return
    import dask

    scratch = Path(dask.config.get("temporary-directory") or gettempdir())
    locking = scratch.is_dir() and has_locks(scratch, quiet=True)  # else dask logs a traceback, and goes on
    with others_children(), dask.config.set({"distributed.worker.use-file-locking": locking}):
        with interrupts_held():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                silence_logs=logging.ERROR,
            )
        try:
            with Client(cluster) as client:
                yield client
        finally:
            with _without_tracebacks():
                try:
                    cluster.close()
                except TimeoutError:  # a busy machine: dask gives them seconds; they end with this process soon
                    log.warning("the worker processes are slow to stop; they end with this command")
