"""Requests as jobs: what is asked, what became of it, and the folder that holds it until it is fetched or too old.

WORK/jobs/ID/input/     what was uploaded, under names of our own
WORK/jobs/ID/partial/   what is being written
WORK/jobs/ID/result/    what was predicted, one file: renamed to this when it is whole
WORK/jobs/ID/labels/    of a job that its client may come back to: the label map in the model's own format
WORK/jobs/ID/job.json   of such a job; written when it is taken on and when it is over

Such a job keeps `input` and `labels`, of which further answers are made, as long as its result; where room is short,
the inputs of the oldest go first. A folder without `job.json` belongs to nobody once the service has ended. A job that
was not over then is lost, and says so.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastnnunet.errors import CorruptError, FastnnUNetError
from fastnnunet.service.refusals import RefusedError, no_room
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.system.files import atomic_output, check_output_folder, make_folder
from fastnnunet.system.locks import locked

State = Literal["waiting", "running", "done", "failed", "cancelled", "lost"]
OVER = ("done", "failed", "cancelled", "lost")
_ID_BYTES = 16
_MOST_EVENTS = 1000  # of one job: the latest
_RECORD = "job.json"
_CLOCK_S = 60.0  # that the clock of the machine may be set back

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Job:
    """One image for one model. Times are seconds since 1970."""

    id: str
    model: str
    answers: tuple[str, ...]
    folder: Path
    is_kept: bool  # its client may come back to it
    size_bytes: int  # of the work folder, taken or set aside
    inputs: tuple[tuple[Path, str], ...] = ()  # file and kind of each channel; none where they are gone
    label_map: Path | None = None  # of what was predicted, where it is kept
    source: "Job | None" = None  # whose label map and inputs this one's answers are made of
    users: int = 0  # jobs that are not over and have this one as their source
    series_uid: str | None = None
    state: State = "waiting"
    created: float = field(default_factory=time.time)
    began: float | None = None
    over: float | None = None
    status: int = 200
    error: str = ""
    series: Mapping[str, str] = field(default_factory=dict)  # of which its client has to choose one
    result: Path | None = None
    media_type: str = ""
    times_s: dict[str, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    told: int = 0  # events so far
    finished: "Future[None]" = field(default_factory=Future)
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    def tell(self, kind: str, **content: Any) -> None:
        """Add an event for whoever listens."""
        self.events.append({"number": self.told, "kind": kind, **content})
        self.told += 1
        if len(self.events) > _MOST_EVENTS:
            del self.events[0]

    def record(self) -> dict[str, Any]:
        """What `job.json` holds."""
        return {
            **{name: getattr(self, name) for name in ("id", "model", "answers", "state", "created", "over")},
            **{name: getattr(self, name) for name in ("status", "error", "media_type", "times_s", "series_uid")},
            "series": dict(self.series),
            "inputs": [[file.name, kind] for file, kind in self.inputs],
            "label_map": None if self.label_map is None else self.label_map.name,
            "result": None if self.result is None else self.result.name,
            "result_bytes": None if self.result is None else self.result.stat().st_size,
        }


class JobStore:
    """All jobs of a work folder, which one service at a time may use. Any thread may call."""

    def __init__(self, folder: Path, *, room_bytes: int, keep_s: float) -> None:
        self.folder, self.room_bytes, self.keep_s = folder, room_bytes, keep_s
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._held = ExitStack()

    def open(self) -> None:
        """Take the folder, and see what an earlier service left. Raises FastnnUNetError."""
        check_output_folder(self.folder, "work folder (--work)")
        make_folder(self.folder / "jobs")
        os.chmod(self.folder / "jobs", 0o700)  # images of patients, no business of other users
        try:
            self._held.enter_context(locked(self.folder))
        except BlockingIOError as e:
            raise FastnnUNetError(
                f"another service is at work in {self.folder}\nstop it, or name another folder with --work"
            ) from e
        for place in sorted((self.folder / "jobs").iterdir()):
            job = self._recovered(place)
            if job is None:
                shutil.rmtree(place, ignore_errors=True)
            else:
                self._jobs[job.id] = job
        self.clean()

    def close(self) -> None:
        """Give the folder back."""
        self._held.close()

    def _recovered(self, place: Path) -> Job | None:
        """A job as an earlier service left it; None for what nobody will ask for."""
        try:
            record = read_json_object(place / _RECORD)
            job = Job(
                id=str(record["id"]),
                model=str(record["model"]),
                answers=tuple(map(str, record["answers"])),
                folder=place,
                is_kept=True,
                size_bytes=0,
                state=record["state"],
                created=float(record["created"]),
                over=None if record["over"] is None else float(record["over"]),
                status=int(record["status"]),
                error=str(record["error"]),
                media_type=str(record["media_type"]),
                times_s={str(name): float(value) for name, value in record["times_s"].items()},
                series_uid=record.get("series_uid"),
                series={str(uid): str(what) for uid, what in record.get("series", {}).items()},
                inputs=tuple((place / "input" / Path(file).name, str(kind)) for file, kind in record.get("inputs", [])),
                label_map=place / "labels" / Path(record.get("label_map") or "gone").name,
            )
        except (OSError, CorruptError, KeyError, TypeError, ValueError, AttributeError):
            return None
        if job.id != place.name or (job.state not in OVER and job.state not in ("waiting", "running")):
            return None
        job.finished.set_result(None)
        if job.state == "done":
            result = place / "result" / str(record["result"])
            is_there = result.parent.parent == place and result.is_file()
            if is_there and result.stat().st_size == record["result_bytes"]:
                job.result = result
                if job.label_map is not None and not job.label_map.is_file():
                    job.label_map = None
                if not (place / "input").is_dir():  # they made room for others
                    job.inputs = ()
                shutil.rmtree(place / "partial", ignore_errors=True)
                job.size_bytes = _size_of(place)
                return job
        if job.state in ("failed", "cancelled", "lost"):
            return job
        job.state, job.status, job.over = "lost", 410, time.time()
        job.error = "the service was ended before this job was over; send the image again"
        for name in ("input", "result", "partial"):
            shutil.rmtree(place / name, ignore_errors=True)
        _write(job)
        return job

    def new(self, model: str, answers: Sequence[str], size_bytes: int, *, is_kept: bool) -> Job:
        """A job with a folder, for an upload of at most `size_bytes`. Raises RefusedError where there is no room."""
        name = secrets.token_hex(_ID_BYTES)
        job = Job(
            id=name,
            model=model,
            answers=tuple(answers),
            folder=self.folder / "jobs" / name,
            is_kept=is_kept,
            size_bytes=size_bytes,
        )
        return self._added(job)

    def new_of(self, source: Job, answers: Sequence[str]) -> Job:
        """A job for further answers of one that is done, which keeps what they are made of meanwhile.

        Raises RefusedError.
        """
        name = secrets.token_hex(_ID_BYTES)
        job = Job(
            id=name,
            model=source.model,
            answers=tuple(answers),
            folder=self.folder / "jobs" / name,
            is_kept=False,
            size_bytes=0,
            inputs=source.inputs,
            series_uid=source.series_uid,
            source=source,
        )
        return self._added(job)

    def _added(self, job: Job) -> Job:
        with self._lock:
            self._require(job.size_bytes)
            self._jobs[job.id] = job
            if job.source is not None:
                job.source.users += 1
        try:
            (job.folder / "input").mkdir(parents=True)
        except OSError as e:
            self.remove(job)
            raise no_room() from e
        return job

    def grow(self, job: Job, size_bytes: int) -> None:
        """Set more room aside for a job. Raises RefusedError where there is none."""
        with self._lock:
            self._require(size_bytes)
            job.size_bytes += size_bytes

    def _require(self, size_bytes: int) -> None:
        """Make room, of inputs that are only kept; of what needs none of them, nothing is given up."""
        missing = sum(job.size_bytes for job in self._jobs.values()) + size_bytes - self.room_bytes
        kept = [job for job in self._jobs.values() if job.state == "done" and job.inputs and not job.users]
        for job in sorted(kept, key=lambda job: job.over or 0.0):
            if missing <= 0:
                break
            before, job.inputs = job.size_bytes, ()
            with contextlib.suppress(OSError):  # a part of a series would be taken for all of it
                (job.folder / "input").rename(job.folder / "partial")
            shutil.rmtree(job.folder / "partial", ignore_errors=True)
            job.size_bytes = _size_of(job.folder)
            missing -= before - job.size_bytes
        if missing > 0:
            raise RefusedError(503, "the work folder of the service is full; try again later", retry_after_s=60)

    def keep(self, job: Job) -> None:
        """From now on the job is known on disk. Raises FastnnUNetError."""
        if job.is_kept:
            _write(job)

    def get(self, name: str) -> Job:
        """The job that a client may come back to. Raises RefusedError."""
        job = self._jobs.get(name)
        if job is None or not job.is_kept:
            raise RefusedError(404, f"no such job; results are kept for {self.keep_s:.0f} s")
        return job

    def jobs(self) -> list[Job]:
        """All there are."""
        with self._lock:
            return list(self._jobs.values())

    def end(self, job: Job, state: State, *, refusal: RefusedError | None = None, result: Path | None = None) -> None:
        """What became of a job; of one that is kept, what nobody will come back to is removed."""
        may_be_asked = state == "done" and job.is_kept
        if job.is_kept:  # else all of it is removed as soon as it was answered
            gone = ["partial", *([] if may_be_asked else ["input", "labels"]), *([] if state == "done" else ["result"])]
            for name in gone:
                shutil.rmtree(job.folder / name, ignore_errors=True)
        with self._lock:
            job.result = result if state == "done" else None
            if not may_be_asked:
                job.inputs, job.label_map = (), None
            if job.is_kept:
                job.size_bytes = _size_of(job.folder)
            self._leave_source(job)
            job.over = time.time()
            if refusal is not None:
                job.status, job.error, job.series = refusal.status, refusal.sentence, refusal.series
            job.state = state
        try:
            self.keep(job)
        except FastnnUNetError:  # a full disk: the answer is there for who waits, and lost where the service ends
            log.error("a job's record cannot be written")
        job.tell("state", state=state, status=job.status, error=job.error)
        job.finished.set_result(None)
        if job.is_cancelled.is_set() and not job.is_kept:  # its client is gone
            self.remove(job)

    def remove(self, job: Job) -> None:
        """Forget a job and all its files."""
        with self._lock:
            self._jobs.pop(job.id, None)
            self._leave_source(job)
        shutil.rmtree(job.folder, ignore_errors=True)

    def _leave_source(self, job: Job) -> None:
        if job.source is not None:
            job.source.users -= 1
            job.source = None

    def clean(self) -> None:
        """Remove what is older than it need be."""
        now = time.time()
        for job in self.jobs():
            if job.over is not None and not job.users and not -_CLOCK_S <= now - job.over <= self.keep_s:
                self.remove(job)


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write(job: Job) -> None:
    with atomic_output(job.folder / _RECORD) as partial:
        partial.write_text(json.dumps(job.record()))
