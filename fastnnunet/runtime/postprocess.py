"""From logits back to the image: resample, label, uncrop, transpose back. As nnU-Net 2.8 exports a prediction.

nnU-Net resamples all heads to the cropped shape, casts them to float16 and only then takes the argmax. Here that
happens a few planes at a time, so the resampled logits of all heads never exist at once.
Axes: H head, Z Y X nnU-Net's internal order after transpose_forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import SpecError
from fastnnunet.geometry.half import round_to_half
from fastnnunet.geometry.resample import ResamplePlan, ResampleSpec, plan_resampling, resample
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.specs.bundle import BundleSpec

Array = npt.NDArray[np.float32]
_SLAB_VALUES = 2**20  # 4 MB of logits at a time: they stay in the cache from resampling to argmax


@dataclass(frozen=True, slots=True)
class LabelRule:
    """How heads become labels: the largest wins, or (regions) each head above 0.5 is painted in class order."""

    num_heads: int
    regions_class_order: tuple[int, ...] | None
    dtype: type[np.unsignedinteger[Any]]  # of the segmentation


def label_rule(spec: BundleSpec) -> LabelRule:
    """Read the labels of a bundle. Raises SpecError when they do not fit the number of heads."""
    has_regions = any(isinstance(value, list | tuple) and len(value) > 1 for value in spec.labels.values())
    order = spec.regions_class_order if has_regions else None
    if has_regions and (order is None or len(order) != spec.num_heads):
        raise SpecError(
            f"the model has regions and {spec.num_heads} heads but regions_class_order is {order}, expected one label "
            "per head; export the bundle again"
        )
    labels = {
        int(label)
        for name, value in spec.labels.items()
        if name != "ignore"
        for label in (value if isinstance(value, list | tuple) else [value])
    }
    if not has_regions and len(labels) != spec.num_heads:
        raise SpecError(f"the model has {spec.num_heads} heads but {len(labels)} labels; export the bundle again")
    # nnU-Net counts the labels; a region painted with a label above 255 needs the wider type too
    small = len(labels - {0}) < 255 and max(order or (0,)) < 256
    return LabelRule(spec.num_heads, order, np.uint8 if small else np.uint16)


def postprocess(
    logits_HZYX: Array,
    case: Preprocessed,
    spec: BundleSpec,
    resample_spec: ResampleSpec,
    rule: LabelRule,
    return_probabilities: bool = False,
) -> tuple[npt.NDArray[Any], Array | None]:
    """Segmentation in the axes of the image as read and, if wanted, float32 probabilities (H, those axes).

    `logits_HZYX`: float32 holding float16 values, of the preprocessed shape. With probabilities the labels come from
    them, as in nnU-Net (softmax can make two float16 logits equal).
    """
    plan = plan_resampling(
        resample_spec, logits_HZYX.shape[1:], case.cropped_shape, case.target_spacing_mm, case.spacing_mm
    )
    segmentation = np.zeros(case.shape_before_cropping, rule.dtype)
    cropped = segmentation[case.crop]
    probabilities = None
    if return_probabilities:
        probabilities = np.zeros((rule.num_heads, *case.shape_before_cropping), np.float32)
        if rule.regions_class_order is None:
            probabilities[0] = 1  # outside the crop is background

    for planes, logits in _resampled_slabs(logits_HZYX, plan):
        if probabilities is not None:
            values = _sigmoid(logits) if rule.regions_class_order else _softmax(logits)
            probabilities[(slice(None), *case.crop)][:, planes] = values
        else:
            values = _sigmoid(logits) if rule.regions_class_order else logits
        if rule.regions_class_order:
            _paint_regions(values, rule.regions_class_order, cropped[planes])
        else:
            argmax_heads(values, cropped[planes])

    segmentation = segmentation.transpose(spec.transpose_backward)
    if probabilities is not None:
        probabilities = probabilities.transpose(0, *(axis + 1 for axis in spec.transpose_backward))
    return segmentation, probabilities


def _resampled_slabs(logits_HZYX: Array, plan: ResamplePlan | None) -> Iterator[tuple[slice, Array]]:
    """Consecutive planes of the resampled logits, rounded to float16 where nnU-Net casts back to it."""
    if plan is not None and not plan.is_local:
        logits_HZYX = resample(logits_HZYX, plan)
        if plan.keeps_dtype:
            round_to_half(logits_HZYX, out=logits_HZYX)
        plan = None
    shape_out = logits_HZYX.shape[1:] if plan is None else plan.shape_out
    step = max(1, _SLAB_VALUES // (logits_HZYX.shape[0] * int(np.prod(shape_out[1:]))))
    for start in range(0, shape_out[0], step):
        planes = slice(start, min(start + step, shape_out[0]))
        if plan is None:
            yield planes, logits_HZYX[:, planes]
            continue
        slab = plan.resample_planes(logits_HZYX, planes)
        yield planes, round_to_half(slab, out=slab) if plan.keeps_dtype else slab


def argmax_heads(values_HX: Array, out: npt.NDArray[Any]) -> None:
    """Index of the largest head into `out` (unsigned, shape of one head); ties go to the lowest index."""
    if len(values_HX) == 1:
        out[...] = 0
        return
    labels = (values_HX[1] > values_HX[0]).astype(out.dtype)
    if len(values_HX) > 2:
        best = np.maximum(values_HX[0], values_HX[1])
        for head in range(2, len(values_HX)):
            np.putmask(labels, values_HX[head] > best, head)
            np.maximum(best, values_HX[head], out=best)
    out[...] = labels


def _paint_regions(probabilities_HX: Array, order: tuple[int, ...], out: npt.NDArray[Any]) -> None:
    for probability, label in zip(probabilities_HX, order, strict=True):
        out[probability > 0.5] = label


def _softmax(logits_HX: Array) -> Array:
    values = np.exp(logits_HX - logits_HX.max(axis=0))
    values /= values.sum(axis=0)
    return values


def _sigmoid(logits_HX: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) may overflow to infinity, which gives the right 0
        return np.float32(1) / (np.float32(1) + np.exp(-logits_HX))
