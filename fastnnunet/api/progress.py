"""A progress bar over the cases of a run and the tiles of a case."""

from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastnnunet.errors import printable
from fastnnunet.images.cases import Case


class RunProgress(AbstractContextManager["RunProgress"]):
    """Methods to be given to `Predictor.predict_planned` as its callbacks; on standard error."""

    def __init__(self, *, disable: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),  # a case may be called [x]
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("remaining"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=disable,
        )
        self._cases = self._progress.add_task("cases", total=None, visible=False)
        self._tiles = self._progress.add_task("tiles", total=None, visible=False)

    def __enter__(self) -> "RunProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_start(self, case: Case, index: int, total: int) -> None:
        self._progress.update(self._cases, total=total, visible=True)
        self._progress.update(self._tiles, description=printable(case.case_id), visible=False)

    def on_tiles(self, done: int, total: int) -> None:
        self._progress.update(self._tiles, completed=done, total=total, visible=total > 1)

    def case_done(self) -> None:
        self._progress.advance(self._cases)

    def tell(self, message: str) -> None:
        """Print a message above the bar."""
        self._progress.console.print(message, markup=False, highlight=False, soft_wrap=True)
