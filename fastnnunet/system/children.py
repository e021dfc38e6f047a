"""Processes that end when the one that started them does, however that ends, and that leave Ctrl-C to it.

SIGKILL leaves nobody the time to stop its children, and those of multiprocessing would wait for it for ever. Linux can
send them a signal itself, but does so when the *thread* ends that started them; so where that is another than the main
thread, and on other systems, a thread in the child looks for the parent twice a second.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_EVERY_S = 0.5
_PATIENCE_S = 5.0
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with(parent: int, *, started_by_main_thread: bool) -> None:
    """End this process, at once, when its parent, the process `parent`, has ended."""
    if started_by_main_thread and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if _has_ended(parent):  # before it could be watched
        os._exit(1)
    threading.Thread(target=_watch, args=(parent, os.getppid()), name="parent", daemon=True).start()


def become_child(*, started_by_main_thread: bool) -> None:
    """To be called first in a process of multiprocessing: it ends with its parent, which alone minds Ctrl-C."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid, started_by_main_thread=started_by_main_thread)


def in_main_thread() -> bool:
    """Whether this is the main thread; what `started_by_main_thread` wants of the starting process."""
    return threading.current_thread() is threading.main_thread()


def _watch(parent: int, own: int) -> None:
    """`own` is what the system calls the parent: another than `parent` where a server forks for it."""
    process = multiprocessing.parent_process()
    sentinels = [] if process is None else [process.sentinel]
    while not wait(sentinels, _EVERY_S) and os.getppid() == own and not _has_ended(parent):
        pass
    os._exit(1)


def _has_ended(pid: int) -> bool:
    if os.name == "nt":  # there the sentinel tells, and signal 0 would not be a question
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, and somebody else's
        return False
    stat = Path(f"/proc/{pid}/stat")  # an ended process that nobody has waited for yet takes signals too
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] in "ZX"


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits for the end of this block, and processes that are started in it begin without minding it.

    An interrupt in the middle of starting a process would be lost in one of the handlers that run there, or leave the
    new process with a traceback.
    """
    if sys.platform != "win32":  # whose processes inherit no mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    arrived: list[int] = []
    handler = signal.getsignal(signal.SIGINT) if in_main_thread() else None
    if handler is not None:  # threads without this mask get it, and hand it to the main one
        signal.signal(signal.SIGINT, lambda number, _frame: arrived.append(number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if arrived:
            signal.raise_signal(signal.SIGINT)


class ChildProcess(SpawnProcess):
    """A spawned process that ends with its parent."""

    _started_by_main_thread = False

    def start(self) -> None:
        self._started_by_main_thread = in_main_thread()
        with interrupts_held():
            super().start()

    def run(self) -> None:
        become_child(started_by_main_thread=self._started_by_main_thread)
        super().run()


class Children(SpawnContext):
    """A context of multiprocessing, for pools too, whose processes end with this one or when told to."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[ChildProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> ChildProcess:  # type: ignore[override]
        """As of any context."""
        process = ChildProcess(*args, **kwargs)
        self._started.append(process)
        return process

    def end(self) -> None:
        """Stop those that still run; what they were doing is lost."""
        for process in self._started:
            if process.is_alive():
                process.terminate()


@contextlib.contextmanager
def others_children() -> Iterator[None]:
    """Within, what other libraries spawn by multiprocessing ends with this process too."""
    theirs = SpawnContext.Process
    SpawnContext.Process = ChildProcess
    try:
        yield
    finally:
        SpawnContext.Process = theirs


def stop(processes: Sequence[BaseProcess]) -> None:
    """Wait a little for processes that were told to end, then end them."""
    deadline = time.monotonic() + _PATIENCE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for end in (BaseProcess.terminate, BaseProcess.kill):
        for process in processes:
            if process.is_alive():
                end(process)
        for process in processes:
            process.join(_PATIENCE_S)
