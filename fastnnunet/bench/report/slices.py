"""Slices of images with label maps over them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnnunet.errors import ImageError
from fastnnunet.evaluate.segmentations import read_segmentation
from fastnnunet.outputs.colours import colour_of, rgb_of

_ALPHA = 0.55
_INCHES, _DPI = 3.0, 120


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG and what it shows."""

    png: bytes
    caption: str
    alt: str


@dataclass(frozen=True, slots=True)
class CasePictures:
    """The same slice with several label maps, and the label values that are seen in them."""

    case: str
    where: str
    pictures: tuple[Picture, ...]
    values: tuple[int, ...]


def case_pictures(case: str, image: Path, maps: dict[str, Path]) -> CasePictures:
    """The slice with most foreground in the first of `maps` (caption -> label file).

    Raises ImageError when a file cannot be read, or image and label map have other shapes than each other.
    """
    grey_ZYX = read_grey(image)
    first = read_segmentation(next(iter(maps.values())))
    labels = {caption: read_segmentation(file).labels_zyx for caption, file in maps.items()}
    for caption, labels_ZYX in labels.items():
        if labels_ZYX.shape != grey_ZYX.shape:
            raise ImageError(f"{case}: image of shape {grey_ZYX.shape}, {caption} of shape {labels_ZYX.shape}")
    z = int(np.argmax((first.labels_zyx > 0).sum(axis=(1, 2))))
    low, high = np.percentile(grey_ZYX, (0.5, 99.5))
    aspect = first.spacing_mm[1] / first.spacing_mm[2]
    where = f"slice {z + 1} of {len(grey_ZYX)}"
    pictures = tuple(
        Picture(
            png=_png(grey_ZYX[z], labels_ZYX[z], (float(low), float(high)), aspect),
            caption=caption,
            alt=f"{case}, {where}, coloured by {caption}: "
            f"{int(np.count_nonzero(labels_ZYX[z]))} of {labels_ZYX[z].size} pixels are foreground",
        )
        for caption, labels_ZYX in labels.items()
    )
    values = sorted({int(v) for labels_ZYX in labels.values() for v in np.unique(labels_ZYX[z])} - {0})
    return CasePictures(case=case, where=where, pictures=pictures, values=tuple(values))


def read_grey(path: Path) -> NDArray[np.float32]:
    """An image (z, y, x); colours become their mean. Raises ImageError."""
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as e:
        raise ImageError(f"cannot read {path}: {str(e).strip().splitlines()[-1]}") from e
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = array.mean(axis=-1)
    return array[None] if array.ndim == 2 else array


def draw_slice(
    axes: Any,
    grey_YX: NDArray[Any],
    labels_YX: NDArray[Any] | None,
    window: tuple[float, float],
    aspect: float,
) -> None:
    """Onto matplotlib axes; `aspect` is the height of a pixel over its width."""
    low, high = window
    axes.imshow(grey_YX, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest")
    if labels_YX is not None:
        axes.imshow(overlay(labels_YX), aspect=aspect, interpolation="nearest")
    axes.set_axis_off()


def overlay(labels_YX: NDArray[Any]) -> NDArray[np.float32]:
    """RGBA (y, x, 4) from 0 to 1 of a label map; background is transparent."""
    rgba = np.zeros((*labels_YX.shape, 4), np.float32)
    for value in np.unique(labels_YX[labels_YX > 0]):
        red_green_blue = [part / 255 for part in rgb_of(colour_of(int(value)))]
        rgba[labels_YX == value] = (*red_green_blue, _ALPHA)
    return rgba


def _png(grey_YX: NDArray[Any], labels_YX: NDArray[Any], window: tuple[float, float], aspect: float) -> bytes:
    from matplotlib.figure import Figure

    height, width = grey_YX.shape[0] * aspect, grey_YX.shape[1]
    figure = Figure(figsize=(_INCHES, min(2.0, max(0.25, height / width)) * _INCHES), dpi=_DPI, facecolor="black")
    draw_slice(figure.add_axes((0, 0, 1, 1)), grey_YX, labels_YX, window, aspect)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def legend(values: Sequence[int], names: dict[str, Any]) -> list[tuple[str, str]]:
    """(colour, name) of label values; `names` as in dataset.json."""
    by_value = {value: name for name, value in names.items() if isinstance(value, int)}
    return [(colour_of(value), by_value.get(value, f"label {value}")) for value in values]
