"""The loop: look, predict what is complete, remember, wait."""

import threading
import time
from dataclasses import dataclass

from fastnnunet.api.predict import IMAGE
from fastnnunet.api.resident.kept import KeptModel
from fastnnunet.connect.watch.arrivals import Arrival, Arrivals
from fastnnunet.connect.watch.ledger import MOST_CRASHES, Entry, Ledger
from fastnnunet.connect.watch.spec import WatchSpec
from fastnnunet.errors import (
    LINES,
    FastnnUNetError,
    ImageError,
    MismatchError,
    NotFoundError,
    UnexpectedError,
    printable,
)
from fastnnunet.events import Event, Listener, Message, ignore
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.specs.bundle import bundle_digest
from fastnnunet.specs.canonical import sha256_of, sha256_of_file, to_plain
from fastnnunet.specs.run.kept import KeptModelSpec
from fastnnunet.system.files import make_folder

_OF_THE_IMAGE = (ImageError, MismatchError, UnexpectedError)  # others are the machine's or the model's, and end it


class _StopError(BaseException):
    """Whoever watches is told to end. No Exception, so that nothing on the way takes it for an error of an image."""


@dataclass(slots=True)
class Watched:
    """How many images were predicted, and how many could not be."""

    done: int = 0
    failed: int = 0


def watch(
    model: KeptModelSpec,
    spec: WatchSpec,
    outputs: OutputSpec = IMAGE,
    *,
    stop: threading.Event | None = None,
    progress: Listener = ignore,
) -> Watched:
    """Predict every image of a folder once it is complete, until `stop` is set; with `once`, all that is there.

    Results appear whole. A prediction that `stop` interrupts is given up, and made when the folder is watched again;
    so is one whose process was killed, `MOST_CRASHES` times at most. An image that fails is recorded with its message,
    and tried again when one of its files, the bundle or a setting changes.
    `outputs`: what is written of each image.
    Raises what `KeptModel` raises, FastnnUNetError where another process writes into the same folder, DiskSpaceError,
    and other errors that are no image's.
    """
    stop = stop or threading.Event()
    codes = None if outputs.label_codes is None else sha256_of_file(outputs.label_codes)
    written = {**to_plain(outputs), "label_codes": codes}
    ledger = Ledger(spec.output, sha256_of([bundle_digest(model.bundle), model.changes(), written]))
    watched = Watched()
    with ledger.held():
        kept = KeptModel(model, outputs)
        make_folder(spec.output)
        arrivals = Arrivals(spec.source, kept.spec, spec.settle_s)
        progress(
            Message(text=f"watching {printable(spec.source)} for {kept.spec.file_ending} images and DICOM folders")
        )
        one = _One(kept, ledger, spec, stop, progress)
        told: set[str] = set()
        settled: dict[str, str] = {}  # case -> the mark with which nothing is left to do
        trouble = ""
        while not stop.is_set():
            try:
                complete, is_more_to_come = arrivals.look()
                kinds, trouble = arrivals.left_over, ""
            except OSError as e:  # a network drive that is gone for a while, a folder removed while it was looked at
                if spec.once:
                    raise NotFoundError(f"{spec.source} cannot be read: {e.strerror}") from e
                if str(e) != trouble:
                    progress(Message(text=f"{printable(e)}: waiting until it can be read", level="warning"))
                complete, is_more_to_come, kinds, trouble = [], True, [], str(e)
            for kind in kinds:
                if kind not in told:
                    progress(Message(text=f"{printable(spec.source)}: not predicted: {kind}", level="warning"))
            told.update(kinds)
            for arrival in complete:
                name, mark = arrival.case.case_id, arrival.mark
                if stop.is_set() or settled.get(name) == mark:
                    continue
                before = ledger.of(name, mark)
                is_done = one.predict(arrival, before) if before is None or before.state == "begun" else None
                _count(watched, is_done)
                if not stop.is_set():
                    settled[name] = mark
            if spec.once and not is_more_to_come:
                break
            stop.wait(spec.every_s)
    return watched


def _count(watched: Watched, is_done: bool | None) -> None:
    if is_done is not None:
        watched.done += is_done
        watched.failed += not is_done


@dataclass(frozen=True, slots=True)
class _One:
    """What predicts one image."""

    model: KeptModel
    ledger: Ledger
    spec: WatchSpec
    stop: threading.Event
    progress: Listener

    def predict(self, arrival: Arrival, before: Entry | None) -> bool | None:
        """Whether the result is there; None where it was given up."""
        name = arrival.case.case_id
        output = self.spec.output / f"{name}{self.model.ending}"
        if before is not None and output.is_file() and output.stat().st_mtime_ns >= self.ledger.began_ns(before):
            return self._done(before)  # the process ended between the result and its record
        crashes = 0 if before is None else before.crashes + 1
        entry = self.ledger.begin(name, arrival.mark, crashes)
        if entry.crashes >= MOST_CRASHES:
            return self._failed(entry, f"the process ended {entry.crashes} times while it predicted this image")
        begin = time.perf_counter()
        try:
            self.model.predict(arrival.case, output, progress=self._heard)
        except _StopError:
            self.ledger.forget(entry)
            return None
        except _OF_THE_IMAGE as e:
            return self._failed(entry, str(e))
        except (FastnnUNetError, KeyboardInterrupt):
            self.ledger.forget(entry)
            raise
        self._done(entry)
        self.progress(Message(text=f"{printable(name)}: done in {time.perf_counter() - begin:.2f} s"))
        return True

    def _done(self, entry: Entry) -> bool:
        self.model.tell_all(self.spec.output)  # first: it is told again where the process ends before the record
        self.ledger.done(entry)
        return True

    def _heard(self, event: Event) -> None:
        if self.stop.is_set():
            raise _StopError
        self.progress(event)

    def _failed(self, entry: Entry, message: str) -> bool:
        self.ledger.failed(entry, message)
        self.progress(Message(text=f"failed: {printable(entry.case)}: {printable(message, keep=LINES)}", level="error"))
        return False
