"""Matplotlib figures as SVG that stands inside a page and takes its colours."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

# written by matplotlib, replaced by variables of the page's style sheet
_VARIABLES = {"#010203": "var(--ink)", "#040506": "var(--muted)", "#070809": "var(--accent)", "#0a0b0c": "var(--other)"}
INK, MUTED, ACCENT, OTHER = _VARIABLES
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "text.parse_math": False,  # names are no formulae
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_LEAST_SCALE = 0.85  # below that a plot scrolls rather than shrinks


@contextmanager
def plotting(**more: Any) -> Iterator[None]:
    """Matplotlib as these pages want it, whatever was set before: nnU-Net enlarges all fonts once it has trained.

    `more`: further settings of matplotlib.
    """
    from matplotlib import rc_context, rcdefaults, rcParams

    with rc_context():
        rcdefaults()
        rcParams.update(_SETTINGS | more)
        yield


def svg(figure: Any, name: str, alt: str) -> str:
    """An `<svg>` element; ids are the same in every run and differ between plots."""
    file = io.StringIO()
    with plotting(**{"svg.hashsalt": name}):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=none)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    least_px = round(_LEAST_SCALE * 96 * figure.get_figwidth())
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" style="min-width: {least_px}px" ', 1)
