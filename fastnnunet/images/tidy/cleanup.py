"""Tidying a label map: largest components, small pieces, holes. Nothing of it happens unless it is asked for.

Components hang together by faces, edges and corners (as in nnU-Net's postprocessing); holes are closed off by faces.
Axes Z Y X; labels are integers from 0 to 65535, 0 is background. The work is done in `native/core/label_maps.hpp`.
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
    small = labels_ZYX.dtype in (np.uint8, np.uint16)
    cleaned = labels_ZYX.copy() if small else labels_ZYX.astype(np.uint16, order="C")
    for step in cleanup.keep_largest:
        native.keep_largest(cleaned, step.labels, step.background)
    if cleanup.min_size > 0:
        voxel = math.prod(spacing_zyx_mm) if cleanup.min_size_unit == "mm3" else 1.0
        # the tolerance: a size that is a whole number of voxels must not fail by a rounding of the spacing
        native.remove_small(cleaned, math.ceil(cleanup.min_size / voxel * (1 - 1e-6)))
    if cleanup.fill_holes:
        native.fill_label_holes(cleaned, cleanup.fill_holes)
    return cleaned if small else cleaned.astype(labels_ZYX.dtype)
