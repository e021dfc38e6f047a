"""Tidying a label map: largest components, small pieces, holes. Nothing of it happens unless it is asked for.

Components hang together by faces, edges and corners (as in nnU-Net's postprocessing); holes are closed off by faces.
Axes Z Y X; labels are non-negative integers, 0 is background.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastnnunet import native

Labels = npt.NDArray[Any]
SizeUnit = Literal["voxels", "mm3"]


@dataclass(frozen=True, slots=True)
class KeepLargest:
    """Of the voxels with any of these labels, taken as one structure, only the largest component stays."""

    labels: tuple[int, ...]
    background: int = 0  # what the others become


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleanup:
    """What to do to a label map, in this order."""

    keep_largest: tuple[KeepLargest, ...] = ()
    min_size: float = 0  # smaller components of each label go
    min_size_unit: SizeUnit = "voxels"
    fill_holes: tuple[int, ...] = ()  # in these labels


def clean(labels_ZYX: Labels, cleanup: Cleanup, spacing_zyx_mm: Sequence[float]) -> Labels:
    """A tidied copy of a label map; `spacing_zyx_mm` is used only where a size is in mm3."""
    labels_ZYX = labels_ZYX.copy()
    for step in cleanup.keep_largest:
        keep_largest(labels_ZYX, step)
    if cleanup.min_size > 0:
        voxel = math.prod(spacing_zyx_mm) if cleanup.min_size_unit == "mm3" else 1.0
        # the tolerance: a size that is a whole number of voxels must not fail by a rounding of the spacing
        remove_small(labels_ZYX, math.ceil(cleanup.min_size / voxel * (1 - 1e-6)))
    if cleanup.fill_holes:
        fill_holes(labels_ZYX, cleanup.fill_holes)
    return labels_ZYX


def keep_largest(labels_ZYX: Labels, step: KeepLargest) -> None:
    """In place. Several components of the largest size all stay, as nnU-Net leaves them."""
    mask = np.isin(labels_ZYX, step.labels)
    components, sizes = _components(mask)
    if len(sizes) > 1:
        labels_ZYX[mask & (sizes < sizes.max())[components - 1]] = step.background


def remove_small(labels_ZYX: Labels, min_voxels: int) -> None:
    """Components of fewer voxels, each label by itself, become background. In place."""
    for label, box in _boxes(labels_ZYX):
        inside = labels_ZYX[box]
        mask = inside == label
        components, sizes = _components(mask)
        inside[mask & (sizes < min_voxels)[components - 1]] = 0


def fill_holes(labels_ZYX: Labels, labels: Sequence[int]) -> None:
    """Background enclosed by a label becomes that label; what another label covers stays. In place.

    Enclosed: no way out of the label by steps across faces; the border of the image is out. Where structures lie
    inside each other a hole goes to the innermost, whose bounding box is the smallest, so the order of `labels` does
    not matter.
    """
    is_picture = labels_ZYX.shape[0] == 1
    wanted = [(box, label) for label, box in _boxes(labels_ZYX) if label in labels]
    for box, label in sorted(wanted, key=lambda item: math.prod(s.stop - s.start for s in item[0])):
        inside = labels_ZYX[box]
        filled = inside == label
        if is_picture:  # above and below it is no way out
            filled = np.pad(filled, ((1, 1), (0, 0), (0, 0)), constant_values=True)
        native.fill_holes(filled)
        inside[(filled[1:2] if is_picture else filled) & (inside == 0)] = label


def _components(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """Component numbers from 1 (0 outside) and the size of each."""
    components, sizes = native.label_components(mask, connectivity=3)
    return components, np.array(sizes, np.intp)


def _boxes(labels_ZYX: Labels) -> list[tuple[int, tuple[slice, ...]]]:
    """Foreground labels that occur, each with its bounding box."""
    from scipy import ndimage

    return [(i + 1, box) for i, box in enumerate(ndimage.find_objects(labels_ZYX.astype(np.int32))) if box is not None]
