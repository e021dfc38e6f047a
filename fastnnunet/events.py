"""What long work says while it runs: one stream of typed events to one listener, whatever the work.

A function that takes long has an argument `progress`, a `Listener`. It is called in the thread that called the
function, and what it raises ends the work. Who shows events is the caller's business: nothing here prints.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done` of `total` (None: unknown) things of the kind `unit`; work in other units may go on around it."""

    what: str
    done: float
    total: float | None
    unit: str
    remaining_s: float | None = None
    note: str = ""  # more of what goes on
    logged: bool = False  # worth a line where nobody watches a bar

    @property
    def line(self) -> str:
        """The event as a line of a log."""
        left = "" if self.remaining_s is None else f" left {self.remaining_s:.0f} s"
        return f"{self.what} {self.note}".rstrip() + left


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Progress):
    """Stage `done` of `total`, counted from 1, begins: `note`."""

    logged: bool = True

    @property
    def line(self) -> str:
        return f"{self.what} {self.done:g}/{self.total:g}: {self.note}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Something to be told, in words; may have several lines."""

    text: str
    level: Level = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One of several results is there: of a case its id and what became of it."""

    what: str
    value: Any


Event = Progress | Message | Result
Listener = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """The listener of those who want to hear nothing."""


class Remaining:
    """Seconds left of some work, at its pace since this was made."""

    def __init__(self, done: float = 0) -> None:
        self._begin, self._before = time.monotonic(), done

    def seconds(self, done: float, total: float) -> float | None:
        """None before anything was done."""
        new = done - self._before
        return (time.monotonic() - self._begin) / new * (total - done) if new > 0 else None


class Timed:
    """A listener that passes every event on, with the remaining time where the work itself tells none."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._known: dict[str, tuple[tuple[str, float], float, Remaining]] = {}  # by unit: what and total, done, pace

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.remaining_s is None and event.total is not None:
            work = (event.what if event.unit != "cases" else "", event.total)  # of cases each may have its name
            known = self._known.get(event.unit)
            same = known is not None and known[0] == work and known[1] <= event.done
            pace = known[2] if known is not None and same else Remaining(event.done)
            self._known[event.unit] = work, event.done, pace
            event = replace(event, remaining_s=pace.seconds(event.done, event.total))
        self._listener(event)
