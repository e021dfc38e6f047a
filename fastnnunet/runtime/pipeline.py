"""Cases one after another, with the next being read and the last being written meanwhile.

Three cases are in memory at most: one in each thread and one in the network, which stays in the calling thread.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread, get_ident
from typing import Any, TypeAlias, TypeVar

from fastnnunet.errors import FastnnUNetError, ImageError, UnexpectedError
from fastnnunet.system.files import abandon_output, files_together

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Inferred = TypeVar("Inferred")
Finished = TypeVar("Finished")
Outcome: TypeAlias = Finished | FastnnUNetError
_GRACE_S = 2.0  # for the file that is being written when the run is interrupted


class WriteGate:
    """Lets the writing thread write until it is closed; closing waits for the file that is being written.

    What is written between two calls of `writing` appears together at the end or, where anything fails, not at all.
    """

    def __init__(self, first: Callable[[], None] | None = None) -> None:
        """`first` is called before anything else is written, until it has worked once."""
        self._lock = Lock()
        self._closed = False
        self._first = first
        self._writer = 0  # the thread that is writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around everything that puts files into place."""
        with self._lock:
            if self._closed:
                raise FastnnUNetError("interrupted")
            self._writer = get_ident()
            with files_together():
                if self._first:
                    self._first()
                yield
            self._first = None

    def close(self, grace_s: float | None = None) -> None:
        """Nothing is written afterwards. A file that takes long is given up, and what there is of it removed."""
        self._closed = True
        is_over = False
        try:
            is_over = self._lock.acquire(timeout=_GRACE_S if grace_s is None else grace_s)
        finally:  # also when interrupted again
            if is_over:
                self._lock.release()
            else:
                abandon_output(self._writer)


def run_pipeline(
    items: Iterable[Item],
    load: Callable[[Item], Loaded],
    infer: Callable[[Item, Loaded], Inferred],
    finish: Callable[[Item, Inferred], Finished],
    gate: WriteGate,
    *,
    threaded: bool,
    before_infer: Callable[[], object] = int,
) -> Generator[tuple[Item, Outcome[Finished]]]:
    """Each item with what `finish` made of it, or with the error that stopped it, in order.

    `before_infer()` returns when `infer` can be called, and the first item is loaded meanwhile; what it raises ends the
    run.
    `load` (and iterating over `items`) and `finish` run in a thread each. An exception of one item leaves the others
    alone; one that is no FastnnUNetError becomes one, and is logged with its traceback at level DEBUG. When the run
    ends early, by Ctrl-C, by an error of `items` or by closing the iterator, what has been through the network has two
    seconds to be finished; then the gate is closed and the threads are left to themselves.
    """

    def complete(item: Item, inferred: Outcome[Inferred]) -> Finished:
        if isinstance(inferred, FastnnUNetError):
            raise inferred
        return finish(item, inferred)

    if not threaded:
        before_infer()
        for item in items:
            loaded = _attempt(load, item)
            inferred = loaded if isinstance(loaded, FastnnUNetError) else _attempt(infer, item, loaded)
            yield item, _attempt(complete, item, inferred)
        return

    iterator = iter(items)

    def load_next() -> tuple[Item, Outcome[Loaded]] | None:
        for item in iterator:
            return item, _attempt(load, item)
        return None

    reader, writer = OneThread("read"), OneThread("write")
    behind: tuple[Item, Future[Finished]] | None = None
    ready: tuple[Item, Outcome[Inferred]] | None = None  # has been through the network and is not in `behind` yet
    try:
        ahead = reader.submit(load_next)
        before_infer()
        while ahead.exception() is None and (following := ahead.result()) is not None:
            ahead = reader.submit(load_next)
            item, loaded = following
            ready = item, loaded if isinstance(loaded, FastnnUNetError) else _attempt(infer, item, loaded)
            if behind is not None:  # its memory is free before the next one is written
                yield behind[0], _attempt(behind[1].result)
            behind, ready = (item, writer.submit(complete, *ready)), None
            del following, loaded
        if behind is not None:
            yield behind[0], _attempt(behind[1].result)
        ahead.result()  # raises what `items` raised
    finally:
        deadline = time.monotonic() + _GRACE_S
        try:
            if ready is not None:
                behind = ready[0], writer.submit(complete, *ready)
            if behind is not None:
                wait([behind[1]], _GRACE_S)
        finally:
            gate.close(max(0.0, deadline - time.monotonic()))
            reader.close()
            writer.close()


def _attempt(call: Callable[..., Finished], *arguments: Any) -> Outcome[Finished]:
    try:
        return call(*arguments)
    except FastnnUNetError as e:
        return e
    except MemoryError as e:
        return ImageError(f"not enough memory ({e})\nclose other programs, or crop the image")
    except Exception as e:  # what nobody thought of, in one image of many
        _log.debug("unexpected error", exc_info=True)
        return UnexpectedError(
            f"unexpected {type(e).__name__}: {e}\nplease report it, with the shape and the header of the image"
        )


class OneThread:
    """A thread that runs one call after another; a daemon, so that a process that is interrupted need not wait."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        Thread(target=self._run, name=f"fastnnunet-{name}", daemon=True).start()

    def submit(self, call: Callable[..., Finished], *arguments: Any) -> "Future[Finished]":
        future: Future[Finished] = Future()
        self._calls.put((future, partial(call, *arguments)))
        return future

    def close(self) -> None:
        self._calls.put(None)

    def _run(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, call = entry
            try:
                future.set_result(call())
            except BaseException as e:  # whoever waits for the result gets it
                future.set_exception(e)
            del entry, future, call  # a case is not kept until the next one comes
