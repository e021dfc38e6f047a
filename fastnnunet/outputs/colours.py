"""One colour for a label wherever it is shown: overlays, meshes, DICOM objects, pages."""

import colorsys

# Okabe and Ito, https://jfly.uni-koeln.de/color/: told apart by colour-blind readers too
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#f0e442")
_GOLDEN = 0.618033988749895  # of the circle of hues: however many colours there are, the next one lies in a gap
_SATURATION, _VALUE = (0.85, 0.6, 0.4), (0.95, 0.75)

# linear sRGB to XYZ and the white of D65: that of sRGB, by which highdicom, dcmqi and dcmjs read these colours too
_SRGB_TO_XYZ = (
    ((0.4124564, 0.3575761, 0.1804375), 0.95047),
    ((0.2126729, 0.7151522, 0.0721750), 1.0),
    ((0.0193339, 0.1191920, 0.9503041), 1.08883),
)


def colour_of(number: int) -> str:
    """`#rrggbb` of the label with this number, from 1. The first ones are the easiest to tell apart."""
    if number <= len(COLOURS):
        return COLOURS[number - 1]
    saturation, value = _SATURATION[number % len(_SATURATION)], _VALUE[number % len(_VALUE)]
    parts = colorsys.hsv_to_rgb(number * _GOLDEN % 1, saturation, value)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def rgb_of(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of `#rrggbb`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


def linear_of(colour: str) -> tuple[float, float, float]:
    """Intensities from 0 to 1 of the light of `#rrggbb`, which is sRGB."""
    parts = (part / 255 for part in rgb_of(colour))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return red, green, blue


def cielab_of(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` as DICOM writes colours for display: L*, a*, b* in 16 bits (PS3.3 C.10.7.1.1)."""
    linear = linear_of(colour)
    x, y, z = (sum(m * p for m, p in zip(row, linear, strict=True)) / white for row, white in _SRGB_TO_XYZ)
    fx, fy, fz = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z))
    light, a, b = 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
    parts = ((light, 100.0), (a + 128, 255.0), (b + 128, 255.0))
    first, second, third = (round(max(0.0, min(most, part)) / most * 65535) for part, most in parts)
    return first, second, third
