"""Results as rich tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fastnnunet.evaluate.cases import CaseResult
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


def case_table(results: Sequence[CaseResult], labels: LabelSet) -> Table:
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


def benchmark_table(record: Mapping[str, Any]) -> Table:
    """One row per arm of a benchmark record; the record itself says more."""
    with_dice = any("metrics" in result for result in record["arms"].values())
    with_cold = any("cold" in result for result in record["arms"].values())
    table = Table(title=f"{len(record['cases'])} cases, {record['threads']} threads, {record['hardware']['cpu']}")
    table.add_column("arm", no_wrap=True)
    optional = (*(["cold s"] if with_cold else []), *(["Dice"] if with_dice else []))
    for heading in ("s/case", "x ens.", "x fold", "params", "MB", "peak", *optional):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in record["arms"].items():
        peak, parameters = result.get("peak_memory_bytes"), result["parameters"]
        cells = [
            f"{result['median_s']:.3g}",
            f"{result['times_faster_than_ensemble']:.3g}",
            f"{result['times_faster_than_single_fold']:.3g}",
            "-" if parameters is None else f"{parameters / 1e6:.2f}M",
            f"{result['size_bytes'] / 1e6:.1f}",
            "-" if peak is None else f"{peak / 1e9:.2f}G",
        ]
        if with_cold:
            cells.append(number(result.get("cold", {}).get("median_s"), 2))
        if with_dice:
            cells.append(number(result.get("dice_on_common_cases")))
        table.add_row(name, *cells)
    table.caption = "s/case: median from file to file, warm" + (
        f"; Dice: the {record['baseline_cases']} case(s) every arm predicted" if with_dice else ""
    )
    return table
