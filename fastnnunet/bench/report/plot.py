"""Pictures of benchmark records."""

from pathlib import Path
from typing import Any

from fastnnunet.bench.report.numbers import seconds
from fastnnunet.system.files import atomic_output, make_folder


def plot_benchmark(record: dict[str, Any], path: Path) -> None:
    """Bars of seconds per case on a logarithmic axis, with ratio and Dice beside each; written whole or not at all."""
    from matplotlib.figure import Figure

    arms = list(record["arms"].items())
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(arms)), layout="constrained")
    axes = figure.subplots()
    colours = {"nnunetv2": "#8c8c8c", "bundle": "#2a78b5"}
    values = [result["median_s"] for _, result in arms]
    axes.barh([name for name, _ in arms], values, color=[colours[result["kind"]] for _, result in arms])
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 12)
    axes.invert_yaxis()
    for row, (_, result) in enumerate(arms):
        text = f" {seconds(result['median_s'])}   {result['times_faster_than_ensemble']:.3g}x"
        if result.get("dice_on_common_cases") is not None:
            text += f"   Dice {result['dice_on_common_cases']:.3f}"
        axes.text(result["median_s"], row, text, va="center", fontsize=9)
    axes.set_xlabel("seconds per case, image file to label file (median, log scale)")
    axes.set_title(
        f"{record['dataset']} {record['teacher']['configuration']} on {record['hardware']['cpu']}, "
        f"{record['threads']} threads, {record['created'][:10]}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


def plot_sizes(record: dict[str, Any], path: Path) -> None:
    """Mean Dice of students against milliseconds per patch, marker area by parameters; the reference and the budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    reference = record["reference"]["mean_dice"]
    largest = max(row["parameters"] for row in record["students"].values())
    chosen = record["choice"]["name"] if record["choice"]["found"] else None
    for name, row in record["students"].items():
        x, y, points = row["ms_per_patch"], row["mean_dice"], row["points"]
        error = [[(points["mean"] - points["low"]) / 100], [(points["high"] - points["mean"]) / 100]]
        colour = "#2a78b5" if name == chosen else "#8c8c8c"
        axes.errorbar(x, y, yerr=error, color=colour, capsize=3, linewidth=1)
        axes.scatter(x, y, s=30 + 300 * row["parameters"] / largest, color=colour, zorder=3)
        text = f"{name}, {row['parameters'] / 1e6:.3g} M"
        axes.annotate(text, (x, y), xytext=(9, 6), textcoords="offset points", fontsize=9)
    axes.axhline(reference, color="black", linewidth=1, label=f"reference ({record['reference']['kind']})")
    budget = reference - record["within_points"] / 100
    axes.axhline(budget, color="black", linewidth=1, linestyle=":", label=f"budget: {record['within_points']:g} points")
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_xlabel(f"milliseconds per patch (log scale, {record['threads']} threads)")
    axes.set_ylabel(f"mean Dice, {len(record['cases'])} validation cases")
    axes.set_title("students: marker area is parameters, bars are 95 % of the paired difference", fontsize=10)
    axes.legend(loc="lower right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


def save_png(figure: Any, path: Path) -> None:
    """Save a matplotlib figure through a temporary sibling."""
    make_folder(path.parent)
    with atomic_output(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
