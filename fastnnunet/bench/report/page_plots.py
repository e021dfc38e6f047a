"""Plots of a benchmark record as SVG that stands inside a page and takes its colours."""

import io
from html import escape
from typing import Any

import numpy as np

from fastnnunet.bench.report.headline import Record, students
from fastnnunet.bench.report.numbers import dice, seconds
from fastnnunet.runtime.times import STAGES

# written by matplotlib, replaced by variables of the page's style sheet
_VARIABLES = {"#010203": "var(--ink)", "#040506": "var(--muted)", "#070809": "var(--accent)", "#0a0b0c": "var(--other)"}
INK, MUTED, ACCENT, OTHER = _VARIABLES
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_HEIGHTS_PT = (12, -20, 28, -36)
_LEAST_SCALE = 0.85  # below that a plot scrolls rather than shrinks


def stage_plot(record: Record) -> str:
    """Seconds of every stage, a panel each on one logarithmic axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    arms = record["arms"]
    with rc_context(_SETTINGS):
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
        return _svg(
            figure, "stages", "Bars: median seconds per case in each stage, for every arm; the table has the values"
        )


def total_plot(record: Record) -> str:
    """Warm seconds with a line to the 90th percentile, and cold ones."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    arms = record["arms"]
    rows = np.arange(len(arms))
    warm = [arm["median_s"] for arm in arms.values()]
    cold = [arm.get("cold", {}).get("median_s", np.nan) for arm in arms.values()]
    has_cold = bool(np.isfinite(cold).any())
    with rc_context(_SETTINGS):
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
        return _svg(
            figure, "total", "Bars: seconds per case of every arm, warm and in a new process; the table has the values"
        )


def dice_plot(record: Record) -> str:
    """Mean Dice against milliseconds. For records with Dice."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    arms = {name: arm for name, arm in record["arms"].items() if arm.get("dice_on_common_cases") is not None}
    with rc_context(_SETTINGS):
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
        return _svg(
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


def _svg(figure: Any, name: str, alt: str) -> str:
    """An `<svg>` element; ids are the same in every run and differ between plots."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({**_SETTINGS, "svg.hashsalt": name}):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=none)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    least_px = round(_LEAST_SCALE * 96 * figure.get_figwidth())
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" style="min-width: {least_px}px" ', 1)
