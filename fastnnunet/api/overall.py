"""How far work of several stages is as a whole, with the time that is left of all of them."""

import time
from collections.abc import Mapping

from fastnnunet.events import Event, Listener, Progress, Remaining, Stage

_EVERY_S = 1.0


class Overall:
    """A listener that passes every event on and tells beside it how many seconds the whole has taken and still takes.

    A stage that goes on is extrapolated at its own pace; those that come are as long as was expected.
    """

    def __init__(self, listener: Listener, what: str, expected_s: Mapping[str, float]) -> None:
        """`expected_s`: the stages in their order and about how long each takes."""
        self._listener, self._what, self._expected = listener, what, dict(expected_s)
        self._stages = list(expected_s)
        self._begin = time.monotonic()
        self._told = 0.0
        self._number = -1
        self._work: tuple[str, str] | None = None
        self._pace = Remaining()

    def begin(self, stage: str) -> None:
        """A stage begins, and those before it are done."""
        self._number = self._stages.index(stage)
        self._work = None
        left = self._later() + self._expected[stage]
        done, total = self._number + 1, len(self._stages)
        note = f"{stage}, {_words(left)} left of all"
        self._listener(Stage(what=self._what, done=done, total=total, unit="stages", note=note))

    def end(self) -> None:
        """All stages are done."""
        self._number = len(self._stages)
        self._tell(0.0)

    def __call__(self, event: Event) -> None:
        """Pass an event of the stage on."""
        self._listener(event)
        if not isinstance(event, Progress) or isinstance(event, Stage) or not event.total or self._number < 0:
            return
        if event.unit == "tiles" or event.what.startswith("reading"):  # a part of what is counted otherwise
            return
        work = (event.what if event.unit != "cases" else "", event.unit)  # of cases each may have its name
        if self._work != work:
            self._work, self._pace = work, Remaining(event.done)
        left = event.remaining_s if event.remaining_s is not None else self._pace.seconds(event.done, event.total)
        if time.monotonic() - self._told >= _EVERY_S and left is not None:
            self._tell(self._later() + left)

    def _later(self) -> float:
        return sum(self._expected[stage] for stage in self._stages[self._number + 1 :])

    def _tell(self, left_s: float) -> None:
        self._told = time.monotonic()
        done = self._told - self._begin
        stage = self._stages[self._number] if self._number < len(self._stages) else "done"
        self._listener(
            Progress(what=self._what, done=done, total=done + left_s, unit="seconds", remaining_s=left_s, note=stage)
        )


def _words(seconds: float) -> str:
    if seconds >= 2 * 3600:
        return f"about {seconds / 3600:.0f} h"
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
