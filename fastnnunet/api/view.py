"""Events on a terminal: a bar for each kind of thing that is counted, or lines where nobody watches."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

from fastnnunet.errors import LINES, printable
from fastnnunet.events import Event, Message, Progress, Stage, Timed

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class View(AbstractContextManager["View"]):
    """A listener that shows events, on standard error unless `console` is another place.

    On a terminal a bar, gone at the end; elsewhere, and without `bars`, a line for each event that is worth one.
    """

    def __init__(self, *, bars: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._watched = bars and self._console.is_terminal
        self._bars: Bars | None = None  # made for the first thing that is counted
        self._tasks: dict[str, TaskID] = {}  # by unit
        self._timed = Timed(self._show)

    def __enter__(self) -> "View":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._timed(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, Message):
            self.print(event.text)
        elif isinstance(event, Progress) and self._watched and not isinstance(event, Stage):
            self._advance(event)
        elif isinstance(event, Progress) and event.logged:
            self.print(event.line)

    def print(self, text: str) -> None:
        """A text above the bars."""
        self._console.print(printable(text, keep=LINES), markup=False, highlight=False, soft_wrap=True)

    def _advance(self, event: Progress) -> None:
        bars = self._bars = self._bars or _new_bars(self._console)
        if event.unit not in self._tasks:
            bars.start()
            self._end_finished(bars)
            self._tasks[event.unit] = bars.add_task("", total=None, count="", left="")
        count = f"{event.done:.0f}" + ("" if event.total is None else f"/{event.total:.0f}")
        left = event.remaining_s
        bars.update(
            self._tasks[event.unit],
            description=printable(event.what),
            completed=event.done,
            total=event.total,
            count=printable(" ".join(filter(None, (count if event.total else "", event.note)))),
            left="" if left is None else f"left {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}",
            visible=event.unit != "tiles" or (event.total or 0) > 1,
        )

    def _end_finished(self, bars: "Bars") -> None:
        """Work in another unit begins: what is done needs no bar any more."""
        for unit in [unit for unit, task in self._tasks.items() if bars.tasks[bars.task_ids.index(task)].finished]:
            bars.remove_task(self._tasks.pop(unit))


def _new_bars(console: Console) -> "Bars":
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),  # a case may be called [x]
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        console=console,
        transient=True,
    )
