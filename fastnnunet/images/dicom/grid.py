"""Whether the slices of a DICOM series form one rectangular grid, and in which order.

Positions are millimetres, axes x to the left, y to the back, z to the head of the patient (LPS). Attributes: DICOM
PS3.3 C.7.6.2 (image plane module).
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError, printable
from fastnnunet.images.dicom.head import Head

_OFF_GRID = 0.05  # of the spacing: how far a slice may lie from where a regular grid has it
_HALF_PIXEL = 0.5  # how far the last slice may be shifted sideways against the first
_SAME_COSINE = 1e-4  # also of pixel spacings


def in_order(heads: Mapping[Path, Head]) -> tuple[Path, ...]:
    """Files in the order of their positions along the normal of the slices, or of their names where there is none."""
    files = sorted(heads)
    first = heads[files[0]]
    if any(
        len(head.position) != 3 or len(head.orientation) != 6 or not np.allclose(head.orientation, first.orientation)
        for head in heads.values()
    ):
        return tuple(files)
    normal = np.cross(*np.reshape(first.orientation, (2, 3)))
    return tuple(sorted(files, key=lambda file: float(np.dot(heads[file].position, normal))))


def check_grid(folder: Path, heads: Mapping[Path, Head]) -> None:
    """Raises ImageError unless the slices are of one kind and size, straight above each other and evenly spaced.

    `heads` are in the order of the slices.
    """
    files = tuple(heads)
    for file, head in heads.items():
        for number, what in ((head.frames, "frames"), (head.samples, "colour samples per pixel")):
            if number > 1:
                raise ImageError(f"{file} has {number} {what}, expected a grey image of one slice; convert it first")
    _check_sizes(folder, heads)
    if len(files) == 1:
        return
    for what, size in (("position", 3), ("orientation", 6), ("pixel_spacing", 2)):
        for file, head in heads.items():
            # some kinds of images have their spacing elsewhere, where the reader finds it
            if len(getattr(head, what)) != size and (what != "pixel_spacing" or head.pixel_spacing):
                raise ImageError(f"{file} does not say its {_words(what)} in the patient; export the series again")
    first = heads[files[0]]
    for what in ("orientation", "pixel_spacing"):
        value = getattr(first, what)
        for file, head in heads.items():
            other = getattr(head, what)
            if len(value) != len(other) or not np.allclose(other, value, atol=_SAME_COSINE):
                raise ImageError(
                    f"{folder}: the {_words(what)} is {value} in {files[0].name} and {other} in {file.name}, "
                    "expected parallel slices of one kind (is a scout among them?)"
                )
    row, column = np.reshape(first.orientation, (2, 3))
    normal = np.cross(row, column)
    if not np.allclose((row @ row, column @ column, row @ column), (1, 1, 0), atol=0.01):
        raise ImageError(
            f"{folder}: the orientation of the slices is {first.orientation}, expected two perpendicular directions of "
            "length 1; export the series again"
        )
    offsets = np.asarray([head.position for head in heads.values()]) - first.position
    _check_places(folder, files, offsets, normal, min(first.pixel_spacing or (1.0,)))


def slice_spacing_mm(heads: Mapping[Path, Head]) -> float:
    """Mean distance of the slices of a grid, two or more, in their order."""
    first, *_, last = heads.values()
    normal = np.cross(*np.reshape(first.orientation, (2, 3)))
    return abs(float(np.subtract(last.position, first.position) @ normal)) / (len(heads) - 1)


def _words(attribute: str) -> str:
    return attribute.replace("_", " ")


def _check_sizes(folder: Path, heads: Mapping[Path, Head]) -> None:
    sizes = Counter((head.rows, head.columns) for head in heads.values())
    if len(sizes) == 1:
        return
    usual = sizes.most_common(1)[0][0]
    odd = [file.name for file, head in heads.items() if (head.rows, head.columns) != usual]
    other = next((head.rows, head.columns) for head in heads.values() if (head.rows, head.columns) != usual)
    raise ImageError(
        f"{folder}: {len(odd)} of {len(heads)} slices have {other[0]} x {other[1]} pixels (rows x columns) instead of "
        f"{usual[0]} x {usual[1]}: {', '.join(map(printable, odd[:3]))}\n"
        "expected slices of one size; take the others out of the folder, or export the series again"
    )


def _check_places(
    folder: Path,
    files: tuple[Path, ...],
    offsets_mm: npt.NDArray[np.float64],
    normal: npt.NDArray[np.float64],
    pixel_mm: float,
) -> None:
    """`offsets_mm` (slice, xyz) from the first slice."""
    heights = offsets_mm @ normal
    gaps = np.diff(heights)
    spacing = heights[-1] / len(gaps)
    if (np.abs(gaps) < 0.01 * abs(spacing)).any() or spacing == 0:
        index = int(np.argmin(np.abs(gaps)))
        raise ImageError(
            f"{folder}: {files[index].name} and {files[index + 1].name} are different slices at the same position, "
            "expected one image per position (several time points or echoes?); give each a folder of its own"
        )
    sideways = np.linalg.norm(offsets_mm[-1] - heights[-1] * normal)
    if sideways > _HALF_PIXEL * pixel_mm:
        tilt = np.degrees(np.arctan2(sideways, abs(heights[-1])))
        raise ImageError(
            f"{folder}: the slices are shifted against each other, {sideways:.2f} mm from first to last (a gantry tilt "
            f"of {tilt:.1f} degrees), expected them straight above each other\n"
            "resample the series to a rectangular grid first (dcm2niix does)"
        )
    off = np.abs(heights - spacing * np.arange(len(heights)))
    if off.max() > _OFF_GRID * abs(spacing):
        raise ImageError(f"{folder}: {_uneven(files, gaps)}\nexport the whole series, or resample it evenly first")


def _uneven(files: tuple[Path, ...], gaps_mm: npt.NDArray[np.float64]) -> str:
    usual = float(np.median(gaps_mm))
    index = int(np.argmax(np.abs(gaps_mm - usual)))
    between = f"between {files[index].name} and {files[index + 1].name}"
    steps = gaps_mm / usual
    missing = np.rint(steps) - 1
    if np.abs(steps - np.rint(steps)).max() < 0.1 and missing.sum() < len(gaps_mm):
        return (
            f"{int(missing.sum())} slice(s) are missing: {gaps_mm[index]:.2f} mm {between}, expected {usual:.2f} mm as "
            "elsewhere"
        )
    return (
        f"the slices are not evenly spaced: {gaps_mm.min():.2f} to {gaps_mm.max():.2f} mm, the odd one {between}, "
        "expected one distance"
    )
