"""Who waits and who is at work: one bounded queue, and for each device a thread with a child process that predicts."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from fastnnunet.events import Event, Progress
from fastnnunet.service.jobs import Job, JobStore
from fastnnunet.service.models import Served
from fastnnunet.service.refusals import RefusedError
from fastnnunet.service.worker import Done, Failed, KeptLabels, Loading, Task, Unload, work
from fastnnunet.system.children import ChildProcess, Children, stop

_LOOK_S = 0.05  # how often a running job is looked at for a cancellation or its time
_GRACE_S = 3.0  # for a prediction to notice that nobody wants it
_USUAL_S = 1.0  # a prediction, before any was made
CANCEL = "cancel"

log = logging.getLogger(__name__)


class Waiting:
    """Jobs in the order they came. A place is taken before an upload is read, so that uploads are bounded too."""

    def __init__(self, most: int, devices: int) -> None:
        self.most, self._devices = most, devices
        self._jobs: deque[Job] = deque()
        self._places = 0  # taken by uploads that are still read
        self._changed = threading.Condition()
        self._is_closed = False
        self._usual_s = _USUAL_S

    def __len__(self) -> int:
        return len(self._jobs) + self._places

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for a job that is about to be put, until it is put or the block ends. Raises RefusedError."""
        with self._changed:
            if self._is_closed:
                raise RefusedError(503, "the service is being stopped", retry_after_s=10)
            if len(self) >= self.most:
                told = f"{self.most} requests wait already; try again later"
                raise RefusedError(503, told, retry_after_s=self.wait_s())
            self._places += 1
        try:
            yield
        finally:
            with self._changed:
                self._places -= 1

    def wait_s(self) -> int:
        """About how long it takes until there is a place, from 1 to 60 s."""
        return max(1, min(60, round(self._usual_s * max(1, len(self._jobs)) / self._devices)))

    def put(self, job: Job) -> None:
        """Called within `place`."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def take(self, timeout_s: float) -> Job | None:
        """The next one; None where none came in time, or the queue was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed, timeout_s)
            return self._jobs.popleft() if self._jobs and not self._is_closed else None

    def withdraw(self, job: Job) -> bool:
        """Take a job out; False where it does not wait (any more)."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            return True

    def close(self) -> list[Job]:
        """Nobody is taken on any more. Returns who waited."""
        with self._changed:
            self._is_closed = True
            left = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
            return left

    def took(self, seconds: float) -> None:
        """What a prediction took, for `wait_s`."""
        self._usual_s += 0.2 * (seconds - self._usual_s)


class DeviceThread(threading.Thread):
    """Predicts one job after another, in a child that is started when it is needed and ended when it idles."""

    def __init__(
        self,
        waiting: Waiting,
        store: JobStore,
        served: Served,
        loading: Loading,
        *,
        idle_s: float,
        time_limit_s: float,
    ) -> None:
        super().__init__(name=f"device {loading.device or 'auto'}", daemon=True)
        self._waiting, self._store, self._served, self._loading = waiting, store, served, loading
        self._idle_s, self.time_limit_s = idle_s, time_limit_s
        self._child: tuple[ChildProcess, Connection] | None = None
        self._used: dict[str, float] = {}  # models that are loaded -> when they were used last
        self._is_stopping = threading.Event()

    @property
    def loaded(self) -> list[str]:
        """Ids of the models in memory."""
        return sorted(self._used)

    @property
    def pid(self) -> int | None:
        """Of the child, where there is one."""
        child = self._child
        return None if child is None else child[0].pid

    def run(self) -> None:
        self._ready_child()  # imports take it longer than most predictions
        while not self._is_stopping.is_set():
            job = self._waiting.take(self._until_idle_s())
            if job is not None:
                self._run(job)
            self._unload_idle()
        self._end_child()

    def stop(self) -> None:
        """End after the job that runs, which is cancelled. The queue must be closed."""
        self._is_stopping.set()

    def _until_idle_s(self) -> float:
        oldest = min(self._used.values(), default=None)
        return 60.0 if oldest is None else max(0.0, oldest + self._idle_s - time.monotonic()) + 0.01

    def _unload_idle(self) -> None:
        now = time.monotonic()
        idle = [name for name, used in self._used.items() if now - used >= self._idle_s]
        for name in idle:
            del self._used[name]
        if idle and self._child is not None:
            log.info("idle: %s unloaded", ", ".join(idle))
            if self._used and self._child[0].is_alive():
                with contextlib.suppress(OSError):  # it ends at this moment
                    self._child[1].send(Unload(bundles=tuple(self._served.bundles[name] for name in idle)))
            else:
                self._end_child()  # which gives all memory back

    def _run(self, job: Job) -> None:
        job.state, job.began = "running", time.time()
        job.tell("state", state="running")
        begin = time.monotonic()
        try:
            outcome = self._outcome(job)
        except Exception as e:  # of this process; said without its message, see `worker`
            log.error("a job failed with %s", type(e).__name__)
            self._end_child()
            outcome = Failed(status=500, sentence="the prediction failed; the log of the service says more")
        if job.source is None:
            self._waiting.took(time.monotonic() - begin)
        if isinstance(outcome, Done):
            job.times_s = {**job.times_s, "queued": job.began - job.created, **outcome.times_s}
            job.media_type, job.label_map = outcome.media_type, outcome.label_map
            self._store.end(job, "done", result=outcome.result)
            return
        if outcome.logged:
            log.error("a prediction failed: %s", outcome.logged)
        refusal = RefusedError(outcome.status, outcome.sentence, series=outcome.series)
        self._store.end(job, "cancelled" if outcome.status == 499 else "failed", refusal=refusal)

    def _outcome(self, job: Job) -> Done | Failed:
        child, connection = self._ready_child()
        task = Task(
            bundle=self._served.bundles[job.model],
            inputs=job.inputs,
            series_uid=job.series_uid,
            answers=job.answers,
            folder=job.folder,
            keep_labels=job.is_kept,
            predicted=None if job.source is None else self._predicted(job.source),
        )
        connection.send(task)
        deadline, given_up, told = time.monotonic() + self.time_limit_s, None, False
        while True:
            try:
                message = connection.recv() if connection.poll(_LOOK_S) else None
            except (EOFError, OSError):
                child.join(1)
                log.error("the process that predicts ended with exit code %s", child.exitcode)
                self._end_child()
                return given_up or Failed(
                    status=500, sentence="the process that read this image ended: it is damaged, or memory was short"
                )
            if isinstance(message, Done | Failed):
                if job.source is None:  # else there was no need of the model
                    self._used[job.model] = time.monotonic()
                return given_up or message
            if message is not None:
                _tell(job, message)
            now = time.monotonic()
            if given_up is None:
                if job.is_cancelled.is_set() or self._is_stopping.is_set():
                    given_up = Failed(status=499, sentence="the job was cancelled")
                elif now > deadline:
                    given_up = Failed(status=504, sentence=f"the prediction took more than {self.time_limit_s:.0f} s")
                deadline = now + _GRACE_S if given_up else deadline
            elif not told:
                with contextlib.suppress(OSError):
                    connection.send(CANCEL)
                told = True
            elif now > deadline:
                self._end_child()
                return given_up

    def _predicted(self, source: Job) -> KeptLabels:
        assert source.label_map is not None  # who asks for more of a job sees to that
        return KeptLabels(label_map=source.label_map, spec=self._served.specs[source.model])

    def _ready_child(self) -> tuple[ChildProcess, Connection]:
        if self._child is not None and self._child[0].is_alive():
            return self._child
        self._end_child()
        context = Children()
        ends: tuple[Any, Any] = context.Pipe()  # of another type on Windows
        ours, theirs = ends
        child = context.Process(target=work, args=(theirs, self._loading), name="fastnnunet-serve", daemon=True)
        child.start()
        theirs.close()
        self._child = child, ours
        return self._child

    def _end_child(self) -> None:
        self._used.clear()
        if self._child is not None:
            child, connection = self._child
            self._child = None
            connection.close()
            child.terminate()
            stop([child])


def _tell(job: Job, event: Event) -> None:
    if isinstance(event, Progress):
        job.tell("progress", done=event.done, total=event.total, unit=event.unit)
    else:
        job.tell("message", text=event.text if hasattr(event, "text") else "")
