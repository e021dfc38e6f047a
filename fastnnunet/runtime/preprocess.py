"""From an image as read to what the network sees: transpose, crop to non-zero, normalise, resample.

As nnU-Net 2.8's DefaultPreprocessor, without the work of it that changes no voxel (resampling the non-zero mask; hole
filling where no channel is normalised inside the mask).
Axes: C channel, Z Y X in nnU-Net's internal order after transpose_forward, unless the name says `_image`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.errors import ImageError
from fastnnunet.geometry.resample import (
    ResamplePlan,
    ResampleSpec,
    plan_resampling,
    resample,
    resample_labels,
    resampled_shape,
)
from fastnnunet.images.stored import memory_bytes
from fastnnunet.runtime.normalize import SCHEMES
from fastnnunet.specs.bundle import BundleSpec

_MOST_GROWTH = 4096  # times as many voxels: 16 along each axis, where thick slices of large pixels reach 20 in all
_FEW_VOXELS = 1 << 24


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """What the network sees, and what is needed to put its answer back into the image."""

    data_CZYX: npt.NDArray[np.float32]  # or what stands for it on a GPU, see `runtime/device/`
    spacing_mm: tuple[float, ...]  # of the image, transposed
    target_spacing_mm: tuple[float, ...]
    shape_before_cropping: tuple[int, ...]
    bbox: tuple[tuple[int, int], ...]  # half open
    properties: dict[str, Any]  # the reader's, with nnU-Net's additions (what it writes as .pkl)

    @property
    def cropped_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bbox)

    @property
    def crop(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.bbox)


def _in_rows(data_CZYX: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A copy where no two voxels are neighbours in memory, as the core wants them: colours side by side are not, nor is
    what a crop leaves of one plane.
    """
    if any(n > 1 and s == data_CZYX.itemsize for n, s in zip(data_CZYX.shape[1:], data_CZYX.strides[1:], strict=True)):
        return data_CZYX
    return np.ascontiguousarray(data_CZYX)


def preprocess(
    image_CZYX: npt.NDArray[np.float32],
    properties: dict[str, Any],
    spec: BundleSpec,
    resample_spec: ResampleSpec,
    previous_ZYX: npt.NDArray[Any] | None = None,
    resample_seg: ResampleSpec | None = None,
    threads: int | None = None,
) -> Preprocessed:
    """Preprocess an image as the reader returned it (C, axes of the file); `image_CZYX` is overwritten.

    `threads`: None for all cores.

    A cascade stage needs `previous_ZYX`, the previous stage's segmentation in the axes of the file, and how to resample
    it; its labels follow the image as one-hot channels.
    Raises ImageError when the number of channels or dimensions is not the model's, or the segmentation does not fit.
    """
    check_image(image_CZYX, previous_ZYX, spec)
    data = _in_rows(image_CZYX.transpose(0, *(axis + 1 for axis in spec.transpose_forward)))
    bbox = nonzero_bbox(data, threads)
    geometry = plan_geometry(spec, resample_spec, properties, data.shape[1:], bbox)
    data = _in_rows(data[(slice(None), *(slice(start, stop) for start, stop in bbox))])
    previous = None
    if previous_ZYX is not None:
        previous = previous_ZYX.transpose(spec.transpose_forward)[tuple(slice(*limits) for limits in bbox)]
        # as nnU-Net's crop_to_nonzero: what was predicted outside the non-zero region counts as inside
        inside = _filled_nonzero_mask(data, threads)
        previous = np.where((previous == 0) & ~inside, -1, previous.astype(np.int32))
    _normalize(data, spec, None if previous is None else previous >= 0, threads)
    data = resample(data, geometry.plan, threads=threads)
    if previous is not None and resample_seg is not None:
        spacing, target = geometry.spacing_mm, geometry.target_spacing_mm
        plan = plan_resampling(resample_seg, geometry.cropped_shape, data.shape[1:], spacing, target)
        previous = resample_labels(previous, plan, threads=threads)
        one_hot = np.stack([previous == label for label in spec.previous_labels])
        data = np.concatenate([data, one_hot.astype(np.float32)])
    return preprocessed(data, geometry, properties)


def check_image(image_CZYX: npt.NDArray[np.float32], previous_ZYX: npt.NDArray[Any] | None, spec: BundleSpec) -> None:
    """Raises ImageError, see `preprocess`."""
    expected = len(spec.channel_names)
    if image_CZYX.ndim != 4 or image_CZYX.shape[0] != expected:
        raise ImageError(
            f"the image has {image_CZYX.shape[0]} channel(s) and {image_CZYX.ndim - 1} spatial axes; the model needs "
            f"{expected} channel(s) ({', '.join(spec.channel_names)}) and 3 axes"
        )
    if 0 in image_CZYX.shape:
        raise ImageError(f"the image is empty: shape {image_CZYX.shape}")
    _check_previous(previous_ZYX, image_CZYX.shape[1:], spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseGeometry:
    """What becomes of the grid of an image. Axes in nnU-Net's internal order."""

    spacing_mm: tuple[float, ...]
    target_spacing_mm: tuple[float, ...]
    shape_before_cropping: tuple[int, ...]
    bbox: tuple[tuple[int, int], ...]  # half open
    shape: tuple[int, ...]  # as the network sees it
    plan: ResamplePlan | None

    @property
    def cropped_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bbox)


def plan_geometry(
    spec: BundleSpec,
    resample_spec: ResampleSpec,
    properties: dict[str, Any],
    shape_before_cropping: tuple[int, ...],
    bbox: tuple[tuple[int, int], ...],
) -> CaseGeometry:
    """Of an image that is not zero in `bbox`. Raises ImageError when nothing would be left, or far too much."""
    spacing = tuple(properties["spacing"][axis] for axis in spec.transpose_forward)
    cropped_shape = tuple(stop - start for start, stop in bbox)
    # a 2d configuration leaves the distance between slices alone
    target = (*spacing[: len(spacing) - len(spec.spacing_mm)], *spec.spacing_mm)
    shape = resampled_shape(cropped_shape, spacing, target)
    if 0 in shape:
        raise ImageError(
            f"nothing of the image would be left: {cropped_shape} voxels of {tuple(spacing)} mm are {shape} voxels of "
            f"the model's {tuple(target)} mm\nexpected an image at least half such a voxel wide; check its spacing"
        )
    plan = plan_resampling(resample_spec, cropped_shape, shape, spacing, target)
    if plan is not None:
        voxel_bytes = 4 * (len(spec.channel_names) + len(spec.previous_labels))
        _check_growth(cropped_shape, plan.shape_out, spacing, target, voxel_bytes=voxel_bytes)
    return CaseGeometry(
        spacing_mm=spacing,
        target_spacing_mm=target,
        shape_before_cropping=shape_before_cropping,
        bbox=bbox,
        shape=shape if plan is None else plan.shape_out,
        plan=plan,
    )


def preprocessed(data_CZYX: Any, geometry: CaseGeometry, properties: dict[str, Any]) -> Preprocessed:
    """`data_CZYX`: an array, or what stands for one on a GPU."""
    return Preprocessed(
        data_CZYX=data_CZYX,
        spacing_mm=geometry.spacing_mm,
        target_spacing_mm=geometry.target_spacing_mm,
        shape_before_cropping=geometry.shape_before_cropping,
        bbox=geometry.bbox,
        properties={
            **properties,
            "shape_before_cropping": geometry.shape_before_cropping,
            "bbox_used_for_cropping": [list(limits) for limits in geometry.bbox],
            "shape_after_cropping_and_before_resampling": geometry.cropped_shape,
        },
    )


def nonzero_bbox(data_CZYX: npt.NDArray[np.float32], threads: int | None = None) -> tuple[tuple[int, int], ...]:
    """Half-open box around the voxels that are non-zero in any channel; the whole image when there are none."""
    return native.nonzero_box(data_CZYX, threads=threads)


def _check_growth(
    shape: tuple[int, ...],
    shape_out: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    *,
    voxel_bytes: int,
) -> None:
    """Raises ImageError when a spacing that is damaged or in another unit would make far too large an image."""
    voxels = math.prod(shape_out)
    too_many = voxels > max(_FEW_VOXELS, _MOST_GROWTH * math.prod(shape))
    if too_many or voxels * voxel_bytes > memory_bytes():
        raise ImageError(
            f"the resampled image would not fit: {shape} voxels of {spacing} mm are {shape_out} voxels of the model's "
            f"{target} mm\nexpected a spacing in millimetres; check that of the image"
        )


def _check_previous(previous_ZYX: npt.NDArray[Any] | None, shape: tuple[int, ...], spec: BundleSpec) -> None:
    if (previous_ZYX is None) != (not spec.previous_labels):
        needs = "needs the previous stage's segmentation" if spec.previous_labels else "is no cascade stage"
        raise ImageError(f"the model {needs}; give one with -prev_stage_predictions for a cascade stage and none else")
    if previous_ZYX is not None and previous_ZYX.shape != shape:
        raise ImageError(f"the previous segmentation has shape {previous_ZYX.shape}, expected the image's {shape}")


def _normalize(
    data_CZYX: npt.NDArray[np.float32], spec: BundleSpec, mask: npt.NDArray[np.bool_] | None, threads: int | None
) -> None:
    if mask is None and any(spec.use_mask_for_norm):
        mask = _filled_nonzero_mask(data_CZYX, threads)
    for index, (channel, scheme, use_mask) in enumerate(
        zip(data_CZYX, spec.normalization_schemes, spec.use_mask_for_norm, strict=True)
    ):
        intensity = spec.intensity_properties.get(str(index), {})
        SCHEMES[scheme](channel, mask if use_mask else None, intensity, threads)


def _filled_nonzero_mask(data_CZYX: npt.NDArray[np.float32], threads: int | None) -> npt.NDArray[np.bool_]:
    """Non-zero voxels and the holes they enclose.

    Equal to `binary_fill_holes` of the uncropped mask: everything outside the box is connected to the border, so a
    zero region that touches the box is no hole.
    """
    mask = native.nonzero_mask(data_CZYX, threads=threads)
    native.fill_holes(mask, threads=threads)
    return mask
