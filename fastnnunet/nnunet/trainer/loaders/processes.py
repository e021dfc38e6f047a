"""Loader processes that hand over what went wrong in them, that end with this one, and that leave Ctrl-C to it.

batchgenerators' augmenter, whose place this takes, prints the traceback of a loader and of its own thread and then says
that some worker is no longer alive, forks while Ctrl-C may arrive, and leaves its processes behind when it is killed.
"""

import contextlib
import multiprocessing
import queue
import sys
import threading
from collections.abc import Iterator
from ctypes import Array
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from fastnnunet.errors import FastnnUNetError
from fastnnunet.nnunet.trainer.loaders.numbered import NumberedBatches
from fastnnunet.nnunet.trainer.loading_errors import loader_ended, not_handed_over
from fastnnunet.system.children import become_child, in_main_thread, interrupts_held, stop

if sys.platform == "win32":  # what `Pipe` gives there
    from multiprocessing.connection import PipeConnection as Connection
else:
    from multiprocessing.connection import Connection

_AHEAD = 2  # batches a process makes before they are asked for
_NAME_BYTES = 512
_NEXT, _END = b"next", b"end"
_POLL_S = 0.1
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Loader:
    """A process, the pipe its batches come through, and the name of the case it is loading, zero bytes when none."""

    process: BaseProcess
    pipe: Connection
    case: "Array[Any]"


class LoaderProcesses:
    """Batches in the order of their numbers; process i of n makes every n-th one from the i-th on.

    `pin_memory` copies them to where a GPU reads them faster. Raises what a loader raised when that batch is due, and
    BuildError when a process ended without a word.
    """

    def __init__(self, batches: NumberedBatches, num_processes: int, *, pin_memory: bool) -> None:
        self._batches, self._num_processes = batches, num_processes
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._device = torch.cuda.current_device() if self._pin_memory else 0
        self._loaders: list[_Loader] = []
        self._ready: queue.Queue[Any] = queue.Queue(max(3, num_processes))
        self._over = threading.Event()
        self._reader: threading.Thread | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._reader is None:
            self._start()
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _start(self) -> None:
        context = multiprocessing.get_context()
        with interrupts_held(), threadpool_limits(limits=1, user_api="blas"):
            for number in range(self._num_processes):
                ours, theirs = context.Pipe()
                case = context.RawArray("c", _NAME_BYTES)
                process = context.Process(
                    target=_load, args=(theirs, self._batches, number, case, in_main_thread()), daemon=True
                )
                self._loaders.append(_Loader(process, ours, case))
                process.start()
                theirs.close()  # so that the pipe ends with the process
            self._reader = threading.Thread(target=self._read, name="batches", daemon=True)
            self._reader.start()

    def _read(self) -> None:
        """Take batches from the processes in turn until the end; an error is the last thing."""
        turn = 0
        if self._pin_memory:
            torch.cuda.set_device(self._device)
        while not self._over.is_set():
            loader = self._loaders[turn % len(self._loaders)]
            item = self._received(loader)
            if item is None:
                continue
            self._put(item)
            if isinstance(item, Exception):
                return
            turn += 1

    def _received(self, loader: _Loader) -> Any:
        """The next batch of a process, or an error; None when there is none yet."""
        try:
            ready = wait([loader.pipe, loader.process.sentinel], _POLL_S)
            if not ready:
                return None
            if loader.pipe not in ready:
                raise EOFError
            item = loader.pipe.recv()
            loader.pipe.send_bytes(_NEXT)
        except Exception:  # from the pipe, or the shared memory of tensors: the other end is gone
            loader.process.join(_PATIENCE_S)
            case = loader.case.value.decode(errors="replace")
            return loader_ended(loader.process.exitcode, case, self._batches.repair)
        if not self._pin_memory or isinstance(item, Exception):
            return item
        try:
            return _pinned(item)
        except Exception as e:  # of the GPU: raised where batches are asked for
            return e

    def _put(self, item: Any) -> None:
        while not self._over.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=_POLL_S)
                return

    def _finish(self) -> None:
        """Stop the processes; under the name that nnU-Net's augmenter has for it."""
        with interrupts_held():
            self._over.set()
            if self._reader is not None:
                self._reader.join()
            for loader in self._loaders:
                with contextlib.suppress(OSError):  # it has ended by itself
                    loader.pipe.send_bytes(_END)
            stop([loader.process for loader in self._loaders if loader.process.pid is not None])
            for loader in self._loaders:
                loader.pipe.close()
            self._loaders.clear()


def _pinned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pinned(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_pinned(v) for v in value]
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


def _load(
    pipe: Connection, batches: NumberedBatches, number: int, case: "Array[Any]", started_by_main_thread: bool
) -> None:
    """What a loader process does, until nobody wants its batches any more."""
    become_child(started_by_main_thread=started_by_main_thread)
    sys.excepthook = _say_unless_left  # the thread that hands tensors over uses it
    batches.set_thread_id(number)

    def note(name: str) -> None:
        case.value = name.encode()[: _NAME_BYTES - 1]

    batches.on_case = note
    wanted = _AHEAD
    try:
        while True:
            packed, failed = _packed(batches)
            note("")
            while not wanted or pipe.poll():
                if pipe.recv_bytes() == _END:
                    return
                wanted += 1
            pipe.send_bytes(packed)
            wanted -= 1
            while failed:  # the tensors of earlier batches are fetched from this process
                if pipe.recv_bytes() == _END:
                    return
    except (EOFError, OSError):  # the other end is closed
        return


def _say_unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Nothing is wrong here when the process on the other end of a connection is gone."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _packed(batches: NumberedBatches) -> tuple[Any, bool]:
    """The next batch, or the error in its place, pickled; and which of the two it is."""
    try:
        batch = next(batches)
    except FastnnUNetError as e:
        # without what led to it, which some libraries (tblib, by dask) have exceptions pickled with
        e.__cause__ = e.__context__ = e.__traceback__ = None
        return ForkingPickler.dumps(e), True
    try:
        return ForkingPickler.dumps(batch), False
    except Exception as e:
        return ForkingPickler.dumps(not_handed_over(e)), True
