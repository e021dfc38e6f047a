"""A benchmark as a table for a terminal."""

from rich.table import Table

from fastnnunet.bench.report.headline import Record
from fastnnunet.evaluate.tables import number


def benchmark_table(record: Record) -> Table:
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
