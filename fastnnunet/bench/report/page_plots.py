"""Plots of a benchmark record for its page."""

from typing import Any

import numpy as np

from fastnnunet.bench.report.headline import Record, students
from fastnnunet.bench.report.numbers import dice, seconds
from fastnnunet.bench.report.svg import ACCENT, INK, MUTED, OTHER, plotting, svg
from fastnnunet.runtime.times import STAGES

_HEIGHTS_PT = (12, -20, 28, -36)


def stage_plot(record: Record) -> str:
    """Seconds of every stage, a panel each on one logarithmic axis."""
    from matplotlib.figure import Figure

    arms = record["arms"]
    with plotting():
        figure = Figure(figsize=(12, 1.1 + 0.34 * len(arms)), layout="constrained")
        panels = figure.subplots(1, len(STAGES), sharex=True, sharey=True)
        for axes, stage in zip(panels, STAGES, strict=True):
            values = [arm["stages"].get(stage, {}).get("p50_s", 0.0) for arm in arms.values()]
            axes.barh(list(arms), values, color=_colours(record), height=0.62)
            for row, value in enumerate(values):
                _beside(axes, max(value, 1e-9), row, seconds(value))
            axes.set_title(stage, fontsize=10, loc="left", color=INK)
            axes.set_xlabel("seconds (log)")
        _log_axis(panels[0], [s["p50_s"] for arm in arms.values() for s in arm["stages"].values()], room=30)
        panels[0].invert_yaxis()
        return svg(
            figure, "stages", "Bars: median seconds per case in each stage, for every arm; the table has the values"
        )


def total_plot(record: Record) -> str:
    """Warm seconds with a line to the 90th percentile, and cold ones."""
    from matplotlib.figure import Figure

    arms = record["arms"]
    rows = np.arange(len(arms))
    warm = [arm["median_s"] for arm in arms.values()]
    cold = [arm.get("cold", {}).get("median_s", np.nan) for arm in arms.values()]
    has_cold = bool(np.isfinite(cold).any())
    with plotting():
        figure = Figure(figsize=(9, 1.2 + (0.62 if has_cold else 0.36) * len(arms)), layout="constrained")
        axes = figure.subplots()
        height = 0.34 if has_cold else 0.62
        shift = 0.5 * height if has_cold else 0.0
        axes.barh(rows - shift, warm, height, color=_colours(record), label="warm, models loaded")
        p90 = [arm["p90_s"] for arm in arms.values()]
        axes.hlines(rows - shift, warm, p90, color=INK, linewidth=1)
        for row, (value, high) in enumerate(zip(warm, p90, strict=True)):
            _beside(axes, high, row - shift, seconds(value))
        if has_cold:
            axes.barh(rows + shift, cold, height, color="none", edgecolor=INK, hatch="///", linewidth=0.8)
            for row, value in enumerate(cold):
                if np.isfinite(value):
                    _beside(axes, value, row + shift, seconds(value))
        axes.set_yticks(rows, list(arms))
        axes.invert_yaxis()
        _log_axis(axes, [v for v in (*warm, *p90, *cold) if np.isfinite(v)], room=4)
        filled = "filled: warm median, line to the 90th percentile"
        axes.set_xlabel(f"seconds per case (log); {filled}" + ("; hatched: new process" if has_cold else ""))
        return svg(
            figure, "total", "Bars: seconds per case of every arm, warm and in a new process; the table has the values"
        )


def dice_plot(record: Record) -> str:
    """Mean Dice against milliseconds. For records with Dice."""
    from matplotlib.figure import Figure

    arms = {name: arm for name, arm in record["arms"].items() if arm.get("dice_on_common_cases") is not None}
    with plotting():
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        ordered = sorted(arms.items(), key=lambda entry: entry[1]["median_s"])
        for number, (name, arm) in enumerate(ordered):
            x, y = 1e3 * arm["median_s"], arm["dice_on_common_cases"]
            axes.scatter(x, y, s=48, color=_colour(record, name), zorder=3)
            # arms of one network lie side by side, so their names are put at different heights
            axes.annotate(
                f"{name}  {dice(y)}",
                (x, y),
                xytext=(6, _HEIGHTS_PT[number % len(_HEIGHTS_PT)]),
                textcoords="offset points",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkB": 3},
            )
        axes.set_xscale("log")
        axes.margins(x=0.3, y=0.4)
        axes.set_xlabel("milliseconds per case, median, warm (log)")
        axes.set_ylabel("mean Dice (0 to 1)")
        axes.grid(color=MUTED, linewidth=0.3)
        return svg(
            figure, "dice", "Points: mean Dice against milliseconds per case for every arm; the table has the values"
        )


def _beside(axes: Any, x: float, row: float, text: str) -> None:
    """Right of the end of a bar."""
    axes.annotate(text, (x, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _colours(record: Record) -> list[str]:
    return [_colour(record, name) for name in record["arms"]]


def _colour(record: Record, name: str) -> str:
    """nnU-Net grey, students in the accent colour, the ensemble through this runtime in another."""
    if record["arms"][name]["kind"] == "nnunetv2":
        return MUTED
    return ACCENT if name in students(record) else OTHER


def _log_axis(axes: Any, values: list[float], *, room: float) -> None:
    """Logarithmic from half the smallest value; `room` times the largest one for what is written beside bars."""
    positive = [v for v in values if v > 0]
    axes.set_xscale("log")
    axes.set_xlim(min(positive) / 2, max(positive) * room)
