"""A picture of a case: three planes through what is segmented, as radiologists hang them, the labels in colour.

The patient's right is on the left of axial and coronal planes, the front on the left of sagittal ones.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.outputs.colours import rgb_of
from fastnnunet.outputs.labelled import LabelledImage, Structure
from fastnnunet.outputs.picture import edges, grey_bytes, grey_window, png_of

_PIXELS = 360  # of the longest side of the patient's box
_GAP, _TEXT_PIXELS, _ROW = 8, 13, 20
_ALPHA = 0.4
_INK, _PAPER = (235, 235, 235), (0, 0, 0)
_MOST_NAMES = 60  # in the legend


@dataclass(frozen=True, slots=True)
class _Plane:
    """Axes (0 left, 1 back, 2 head) along which rows and columns run, and what stands at the edges of the picture."""

    across: int
    rows: int
    columns: int
    letters: str  # left, right, top, bottom


_PLANES = (_Plane(2, 1, 0, "RLAP"), _Plane(1, 2, 0, "RLSI"), _Plane(0, 2, 1, "APSI"))  # axial, coronal, sagittal


def preview(labelled: LabelledImage) -> bytes:
    """A PNG. Each plane is the one with most labelled voxels, or the middle one; without an image it is black.

    An image of one slice is one plane. Voxels keep their proportions, and all planes have one scale.
    """
    values_LPS, spacing_mm = _turned(labelled.labels_ZYX, labelled.affine)
    numbers_LPS = _numbers(values_LPS, labelled.structures)
    grey_LPS = None
    if labelled.image_CZYX is not None:
        image_ZYX = labelled.image_CZYX[0]
        is_ct = labelled.channel_names[:1] == ("CT",)
        grey_LPS, _ = _turned(image_ZYX, labelled.affine)
        window = grey_window(image_ZYX, labelled.labels_ZYX > 0, is_ct)
    pixels_per_mm = _PIXELS / max(n * s for n, s in zip(numbers_LPS.shape, spacing_mm, strict=True))
    shown = [p for p in _PLANES if min(numbers_LPS.shape[p.rows], numbers_LPS.shape[p.columns]) > 1] or _PLANES[:1]
    panels = []
    for plane in shown:
        index = _busiest(numbers_LPS, plane.across)
        numbers_YX = _slice(numbers_LPS, plane, index)
        size = tuple(
            max(1, round(n * spacing_mm[axis] * pixels_per_mm))
            for n, axis in zip(numbers_YX.shape[::-1], (plane.columns, plane.rows), strict=True)
        )
        grey_YX = None if grey_LPS is None else grey_bytes(_slice(grey_LPS, plane, index), window)
        panels.append((_panel(grey_YX, numbers_YX, labelled.structures, size), plane))
    seen = {int(n) for n in np.unique(numbers_LPS)}
    return png_of(_together(panels, [s for s in labelled.structures if s.number in seen], labelled.in_patient))


def _turned(array_ZYX: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], tuple[float, ...]]:
    """A view whose axes run to the left, back and head of the patient as nearly as can be, and their spacing in mm."""
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / spacing_mm  # column: an axis x, y, z of the array
    order = max(itertools.permutations(range(3)), key=lambda o: sum(abs(cosines[i, o[i]]) for i in range(3)))
    turned = array_ZYX.transpose([2 - axis for axis in order])
    flips = tuple(slice(None, None, -1 if cosines[i, order[i]] < 0 else 1) for i in range(3))
    return turned[flips], tuple(float(spacing_mm[axis]) for axis in order)


def _numbers(values: npt.NDArray[Any], structures: tuple[Structure, ...]) -> npt.NDArray[np.uint16]:
    """Numbers of structures; a voxel of several has the last one's."""
    number_of = np.zeros(max(1, int(values.max(initial=0)), *(max(s.values) for s in structures)) + 1, np.uint16)
    for structure in structures:
        number_of[list(structure.values)] = structure.number
    return number_of[values]


def _busiest(numbers_LPS: npt.NDArray[np.uint16], axis: int) -> int:
    seen = np.count_nonzero(numbers_LPS, axis=tuple({0, 1, 2} - {axis}))
    return int(np.argmax(seen)) if seen.any() else len(seen) // 2


def _slice(array_LPS: npt.NDArray[Any], plane: _Plane, index: int) -> npt.NDArray[Any]:
    """Rows and columns as they are seen: the head is above."""
    found = np.take(array_LPS, index, axis=plane.across)  # the axes that are left keep their order
    found = found.T if plane.columns < plane.rows else found
    return found[::-1] if plane.rows == 2 else found


def _panel(
    grey_YX: npt.NDArray[np.uint8] | None,
    numbers_YX: npt.NDArray[np.uint16],
    structures: tuple[Structure, ...],
    size: tuple[int, ...],
) -> npt.NDArray[np.uint8]:
    from PIL import Image

    numbers = np.array(Image.fromarray(numbers_YX.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    rgb = np.zeros((*numbers.shape, 3), np.uint8)
    if grey_YX is not None:
        grey = Image.fromarray(np.ascontiguousarray(grey_YX))
        smooth = Image.Resampling.BICUBIC if size[0] > grey.width else Image.Resampling.BOX
        rgb[:] = np.array(grey.resize(size, smooth))[..., None]
    border = edges(numbers)
    for structure in structures:
        inside, colour = numbers == structure.number, np.array(rgb_of(structure.colour))
        mixed = (1 - _ALPHA) * rgb[inside] + _ALPHA * colour if grey_YX is not None else colour
        rgb[inside] = np.asarray(mixed, np.uint8)
        rgb[inside & border] = colour
    return rgb


def _together(
    panels: list[tuple[npt.NDArray[np.uint8], _Plane]], seen: list[Structure], in_patient: bool
) -> npt.NDArray[np.uint8]:
    """Panels side by side on black, letters of directions at their edges, and the names of the labels below."""
    from PIL import Image, ImageDraw, ImageFont

    width = sum(p.shape[1] for p, _ in panels) + _GAP * (len(panels) + 1)
    height = max(p.shape[0] for p, _ in panels) + 2 * _GAP
    font = ImageFont.load_default(_TEXT_PIXELS)
    width = max(width, _PIXELS)
    names = [s.name for s in seen[:_MOST_NAMES]] + (
        [f"and {len(seen) - _MOST_NAMES} more"] if seen[_MOST_NAMES:] else []
    )
    texts = [_printed(name) for name in names]
    column = max((round(font.getlength(text)) for text in texts), default=0) + 28
    columns = max(1, width // column)
    legend = _ROW * -(-len(texts) // columns)
    picture = Image.new("RGB", (width, height + legend), _PAPER)
    draw = ImageDraw.Draw(picture)
    left = _GAP
    for rgb, plane in panels:
        rows, cols = rgb.shape[:2]
        top = (height - rows) // 2
        picture.paste(Image.fromarray(rgb), (left, top))
        if in_patient:
            middle, centre = top + rows // 2, left + cols // 2
            across = ((left + 2, middle, "lm"), (left + cols - 2, middle, "rm"))
            places = (*across, (centre, top + 2, "mt"), (centre, top + rows - 2, "mb"))
            for letter, (x, y, anchor) in zip(plane.letters, places, strict=True):
                draw.text((x, y), letter, _INK, font, anchor=anchor, stroke_width=1, stroke_fill=_PAPER)
        left += cols + _GAP
    for place, text in enumerate(texts):
        x, y = _GAP + place % columns * column, height + place // columns * _ROW
        if place < len(seen[:_MOST_NAMES]):
            draw.rectangle((x, y + 3, x + 11, y + 14), rgb_of(seen[place].colour))
        draw.text((x + 17, y + 8), text, _INK, font, anchor="lm")
    return np.asarray(picture)


def _printed(name: str) -> str:
    """As far as the font of Pillow has its letters; others would be boxes."""
    short = name if len(name) <= 40 else f"{name[:39]}…"
    return "".join(c if c.isprintable() else "?" for c in short)
