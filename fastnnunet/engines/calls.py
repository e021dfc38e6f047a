"""Which threads are in an engine, for the sake of processes that are forked meanwhile."""

import os
from threading import get_ident
from types import TracebackType
from typing import Self
from weakref import WeakSet

from fastnnunet.errors import BackendError


class Calls:
    """`with calls:` around every call of an engine.

    A forked process has the memory of its parent but only one of its threads. An engine that another thread was in is
    left as it was at that moment, locks held that nobody will release: it is refused there instead of hanging.
    """

    def __init__(self, name: str, *, survives_fork: bool = True) -> None:
        """`name`: of the engine. `survives_fork`: a forked process can use the engine at all."""
        self.is_forked = False  # the engine was loaded by a process that this one was forked from
        self._name = name
        self._survives_fork = survives_fork
        self._is_broken = False
        self._threads: set[int] = set()
        _all.add(self)

    def __enter__(self) -> Self:
        """Raises BackendError in a forked process that cannot use the engine."""
        if self._is_broken:
            raise BackendError(
                f"backend {self._name} was loaded before this process was forked and cannot be used here: "
                + ("another thread was predicting then" if self._survives_fork else "its GPU belongs to the parent")
                + "\nload the model in the child, or start processes with multiprocessing.get_context('spawn')"
            )
        self._threads.add(get_ident())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.discard(get_ident())

    def after_fork(self) -> None:
        """In the child."""
        self.is_forked = True
        self._is_broken = self._is_broken or not self._survives_fork or bool(self._threads - {get_ident()})
        self._threads.clear()


_all: WeakSet[Calls] = WeakSet()


def _after_fork() -> None:
    for calls in list(_all):
        calls.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
