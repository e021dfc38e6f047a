"""What the addresses of `app` act on: models, jobs, the queue and the devices, from start to stop."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from fastnnunet.errors import FastnnUNetError
from fastnnunet.service.answers import made_of_image, refuse_without_series
from fastnnunet.service.devices import DeviceThread, Waiting
from fastnnunet.service.jobs import OVER, Job, JobStore
from fastnnunet.service.models import Served
from fastnnunet.service.refusals import RefusedError, no_room
from fastnnunet.service.spec import ServiceSpec
from fastnnunet.service.uploads.receive import announced_bytes, receive
from fastnnunet.service.worker import Loading

if TYPE_CHECKING:
    from starlette.requests import Request

_CLEAN_EVERY_S = 5.0
_PATIENCE_S = 10.0

log = logging.getLogger(__name__)


class Service:
    """A context manager: within, jobs are taken on and predicted."""

    def __init__(self, served: Served, spec: ServiceSpec) -> None:
        self.served, self.spec = served, spec
        self.store = JobStore(spec.folder, room_bytes=spec.room_bytes, keep_s=spec.keep_s)
        devices = spec.devices or (None,)
        self.waiting = Waiting(spec.queue, len(devices))
        self.devices = [
            DeviceThread(
                self.waiting,
                self.store,
                served,
                Loading(
                    backend=spec.backend,
                    precision=spec.precision,
                    threads=spec.threads,
                    device=device,
                    most_voxels=spec.voxels,
                    most_bytes=spec.unpacked_bytes,
                ),
                idle_s=spec.idle_s,
                time_limit_s=spec.time_limit_s,
            )
            for device in devices
        ]
        self._is_over = threading.Event()
        self._cleaner = threading.Thread(target=self._clean, name="cleaner", daemon=True)

    def __enter__(self) -> "Service":
        """Raises FastnnUNetError where the work folder cannot be used."""
        self.store.open()
        for device in self.devices:
            device.start()
        self._cleaner.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        for device in self.devices:
            device.stop()
        for job in self.waiting.close():
            self.store.end(job, "cancelled", refusal=RefusedError(410, "the service was stopped"))
        for device in self.devices:
            device.join(_PATIENCE_S)
        self.store.close()

    def _clean(self) -> None:
        while not self._is_over.wait(min(_CLEAN_EVERY_S, self.spec.keep_s / 2)):
            try:
                self.store.clean()
            except OSError as e:
                log.error("the work folder cannot be cleaned: %s", type(e).__name__)

    async def take_on(
        self,
        request: "Request",
        model: str,
        answers: Sequence[str],
        *,
        is_kept: bool,
        series_uid: str | None = None,
        fields: Sequence[str] = ("image",),
        check: Callable[[dict[str, str]], None] = lambda _fields: None,
    ) -> Job:
        """Read an upload and put it into the queue.

        Raises RefusedError, also that of `check`, which gets the other fields of the form.
        """
        begin = time.time()
        name = self.served.require(model)
        size = announced_bytes(request, self.spec)
        with self.waiting.place():
            # twice: what is still being read lies in a temporary file first
            job = self.store.new(name, answers, 2 * size, is_kept=is_kept)
            try:
                others = await receive(
                    request,
                    job,
                    self.store,
                    self.spec,
                    kinds=self.served.kinds(name),
                    fields=fields,
                    most_files=len(self.served.specs[name].channel_names),
                )
                check(others)
                kinds = [kind for _, kind in job.inputs]
                refuse_without_series(answers, kinds)
                if series_uid is not None and not set(kinds) <= {"zip", "dicom"}:
                    raise RefusedError(422, "series: this image is no DICOM series, there is none to choose")
                job.series_uid = series_uid
                if is_kept:
                    await run_in_threadpool(self.store.keep, job)
            except FastnnUNetError as e:
                self.store.remove(job)
                raise no_room() from e
            except BaseException:
                self.store.remove(job)
                raise
            job.created = time.time()
            job.times_s = {"upload": job.created - begin}
            self.waiting.put(job)
        return job

    def take_on_more(self, source: Job, answers: Sequence[str]) -> Job:
        """Put further answers of a job that is done into the queue; nothing is predicted for them.

        Raises RefusedError, also where what they are made of is gone.
        """
        if source.label_map is None:
            raise RefusedError(410, "the label map of this job is gone; send the image again")
        if not source.inputs and (needing := made_of_image(answers)):
            raise RefusedError(
                410,
                f"answer: {' and '.join(needing)} is made of the image, which the service had no room to keep; send it "
                "again, or ask for another answer",
            )
        refuse_without_series(answers, [kind for _, kind in source.inputs])
        with self.waiting.place():
            job = self.store.new_of(source, answers)
            self.waiting.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """End a job: one that waits now, one that runs within seconds, one that is over not at all."""
        if self.waiting.withdraw(job):
            self.store.end(job, "cancelled", refusal=RefusedError(410, "the job was cancelled"))
        else:
            job.is_cancelled.set()

    @property
    def loaded(self) -> set[str]:
        """Ids of the models in memory."""
        return {name for device in self.devices for name in device.loaded}

    @property
    def running(self) -> int:
        """Jobs at work."""
        return sum(job.state == "running" for job in self.store.jobs())

    @property
    def pids(self) -> list[int]:
        """Of the child processes that there are."""
        return [pid for device in self.devices if (pid := device.pid) is not None]


def refuse_unfinished(job: Job) -> None:
    """Raises RefusedError where there is no result: with the reason, or because it is not there yet."""
    if job.state == "done":
        return
    if job.state not in OVER:
        raise RefusedError(409, f"the job is {job.state}, there is no result yet", retry_after_s=1)
    raise RefusedError(410 if job.state in ("cancelled", "lost") else job.status, job.error or job.state)
