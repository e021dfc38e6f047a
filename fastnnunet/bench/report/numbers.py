"""How measured numbers are written for people: three digits, a unit, a dash where there is none."""

NONE = "–"


def seconds(value: float | None) -> str:
    """Three significant digits, in ms below a second."""
    if value is None or value != value:
        return NONE
    return f"{three_digits(value)} s" if value >= 1 else f"{three_digits(1e3 * value)} ms"


def times(value: float | None) -> str:
    return NONE if value is None or value != value else f"{three_digits(value)} times"


def dice(value: float | None) -> str:
    return NONE if value is None or value != value else f"{value:.3f}"


def size(value: float | None) -> str:
    """Bytes, in kB, MB or GB of 1000 each."""
    if value is None:
        return NONE
    if value < 1e6:
        return f"{value / 1e3:.0f} kB"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def percent(value: float | None) -> str:
    """A share, with digits enough to see one voxel in a million."""
    if value is None:
        return NONE
    return "100 %" if value == 1 else f"{100 * value:.4f} %"


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
