"""Results as rich tables for a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from fastnnunet.evaluate.cases import CaseScores
from fastnnunet.evaluate.metrics import METRICS, nanmean
from fastnnunet.evaluate.segmentations import LabelSet

MOST_COLUMNS = 8  # more labels than this do not fit a terminal: the table of cases then shows their mean only


def wide_console() -> Console:
    """A console for wide tables: a file or pipe has no width, so columns need not be cut to the usual 80 there."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits; a dash for None and NaN."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def case_table(results: Sequence[CaseScores], labels: LabelSet) -> Table:
    """Dice of every case, per label."""
    names = list(labels.names) if len(labels.names) <= MOST_COLUMNS else []
    table = Table(title="Dice per case")
    table.add_column("case")
    for name in (*names, "mean"):
        table.add_column(name, justify="right")
    for result in results:
        mean = nanmean(m.dice for m in result.metrics.values())
        table.add_row(result.case, *(number(result.metrics[n].dice) for n in names), number(mean))
    return table


def mean_table(means: Mapping[str, Mapping[str, float]], tolerance_mm: float) -> Table:
    """Means over cases per label, and over labels."""
    table = Table(title="Mean over cases")
    table.add_column("label")
    for heading in ("Dice", f"surface Dice {tolerance_mm:g} mm", "HD95 mm", "cases"):
        table.add_column(heading, justify="right")
    for name, values in means.items():
        total = name == "foreground_mean"
        cells = [number(values[m], 2 if m == "hd95_mm" else 3) for m in METRICS]
        table.add_row(
            name.replace("_", " ") if total else name,
            *cells,
            "" if total else str(values["cases"]),
            style="bold" if total else "",
        )
    return table
