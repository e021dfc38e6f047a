"""A label map on the slices of the series it refers to, whichever way its own axes run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError, MismatchError
from fastnnunet.images.dicom.head import Head
from fastnnunet.images.dicom.series import slice_heads
from fastnnunet.outputs.labelled import LabelledImage, same_grid


def series_affine(heads: Mapping[Path, Head]) -> npt.NDArray[np.float64]:
    """(4, 4): column, row and number of a slice (from 0) to mm, LPS, of slices that say their place, in their order."""
    first, *_, last = [*heads.values()] * 2
    row, column = np.reshape(first.orientation, (2, 3))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * first.pixel_spacing[1], column * first.pixel_spacing[0]
    affine[:3, 2] = np.cross(row, column)
    if len(heads) > 1:
        affine[:3, 2] = np.subtract(last.position, first.position) / (len(heads) - 1)
    affine[:3, 3] = first.position
    return affine


def on_slices(labelled: LabelledImage) -> npt.NDArray[np.integer[Any]]:
    """The label map (slice, row, column) of the series, in the order of `slice_heads`.

    Raises ImageError for a series that does not say its place, MismatchError where the label map is not on its grid.
    """
    series = labelled.series
    assert series is not None
    heads = slice_heads(series)
    if any(
        len(values) != count
        for head in heads.values()
        for values, count in ((head.position, 3), (head.orientation, 6), (head.pixel_spacing, 2))
    ):
        raise ImageError(f"{series.folder}: the slices do not say their place in the patient; export the series again")
    first = next(iter(heads.values()))
    shape = (len(heads), first.rows, first.columns)
    affine = series_affine(heads)
    to_series = np.linalg.solve(affine, labelled.affine)[:3, :3]
    order = [int(axis) for axis in np.abs(to_series).argmax(axis=1)]  # of the label map's axes (x, y, z)
    labels_XYZ = labelled.labels_ZYX.transpose(2, 1, 0)
    if sorted(order) == [0, 1, 2]:
        flips = [to_series[axis, order[axis]] < 0 for axis in range(3)]
        turned = labels_XYZ.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
        lengths = np.subtract(labels_XYZ.shape, 1)[order]
        moved = labelled.affine.copy()
        moved[:3, :3] = labelled.affine[:3, order] * np.where(flips, -1, 1)
        moved[:3, 3] += labelled.affine[:3, order] @ np.where(flips, lengths, 0)
        if turned.shape[::-1] == shape and same_grid(affine, moved, shape):
            return turned.transpose(2, 1, 0)
    raise MismatchError(
        f"{labelled.case}: a label map of shape {labelled.labels_ZYX.shape} (z, y, x) does not lie on the slices of "
        f"{series.folder}, {shape} (slice, row, column); give the series that was predicted"
    )
