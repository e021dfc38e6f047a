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
from fastnnunet.geometry.resample import ResampleSpec, plan_resampling, resample, resample_labels, resampled_shape
from fastnnunet.images.stored import memory_bytes
from fastnnunet.runtime.normalize import SCHEMES
from fastnnunet.specs.bundle import BundleSpec

_MOST_GROWTH = 4096  # times as many voxels: 16 along each axis, where thick slices of large pixels reach 20 in all
_FEW_VOXELS = 1 << 24


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """What the network sees, and what is needed to put its answer back into the image."""

    data_CZYX: npt.NDArray[np.float32]
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
    expected = len(spec.channel_names)
    if image_CZYX.ndim != 4 or image_CZYX.shape[0] != expected:
        raise ImageError(
            f"the image has {image_CZYX.shape[0]} channel(s) and {image_CZYX.ndim - 1} spatial axes; the model needs "
            f"{expected} channel(s) ({', '.join(spec.channel_names)}) and 3 axes"
        )
    if 0 in image_CZYX.shape:
        raise ImageError(f"the image is empty: shape {image_CZYX.shape}")
    _check_previous(previous_ZYX, image_CZYX.shape[1:], spec)
    data = image_CZYX.transpose(0, *(axis + 1 for axis in spec.transpose_forward))
    if not any(n > 1 and s == data.itemsize for n, s in zip(data.shape[1:], data.strides[1:], strict=True)):
        data = np.ascontiguousarray(
            data
        )  # colours side by side in memory, for one; the core wants neighbouring voxels so
    spacing = tuple(properties["spacing"][axis] for axis in spec.transpose_forward)
    shape_before_cropping = data.shape[1:]
    bbox = nonzero_bbox(data, threads)
    data = data[(slice(None), *(slice(start, stop) for start, stop in bbox))]
    cropped_shape = data.shape[1:]

    # a 2d configuration leaves the distance between slices alone
    target = (*spacing[: len(spacing) - len(spec.spacing_mm)], *spec.spacing_mm)
    previous = None
    if previous_ZYX is not None:
        previous = previous_ZYX.transpose(spec.transpose_forward)[tuple(slice(*limits) for limits in bbox)]
        # as nnU-Net's crop_to_nonzero: what was predicted outside the non-zero region counts as inside
        inside = _filled_nonzero_mask(data, threads)
        previous = np.where((previous == 0) & ~inside, -1, previous.astype(np.int32))
    _normalize(data, spec, None if previous is None else previous >= 0, threads)
    shape = resampled_shape(cropped_shape, spacing, target)
    if 0 in shape:
        raise ImageError(
            f"nothing of the image would be left: {cropped_shape} voxels of {tuple(spacing)} mm are {shape} voxels of "
            f"the model's {tuple(target)} mm\nexpected an image at least half such a voxel wide; check its spacing"
        )
    plan = plan_resampling(resample_spec, cropped_shape, shape, spacing, target)
    if plan is not None:
        voxel_bytes = data.itemsize * (len(data) + len(spec.previous_labels))
        _check_growth(cropped_shape, plan.shape_out, spacing, target, voxel_bytes=voxel_bytes)
    data = resample(data, plan, threads=threads)
    if previous is not None and resample_seg is not None:
        plan = plan_resampling(resample_seg, cropped_shape, data.shape[1:], spacing, target)
        previous = resample_labels(previous, plan, threads=threads)
        one_hot = np.stack([previous == label for label in spec.previous_labels])
        data = np.concatenate([data, one_hot.astype(np.float32)])
    return Preprocessed(
        data_CZYX=data,
        spacing_mm=spacing,
        target_spacing_mm=target,
        shape_before_cropping=shape_before_cropping,
        bbox=bbox,
        properties={
            **properties,
            "shape_before_cropping": shape_before_cropping,
            "bbox_used_for_cropping": [list(limits) for limits in bbox],
            "shape_after_cropping_and_before_resampling": cropped_shape,
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
