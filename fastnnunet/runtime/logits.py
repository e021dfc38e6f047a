"""From logits back to the image: resample, label, uncrop, transpose back. As nnU-Net 2.8 exports a prediction.

nnU-Net resamples all heads to the cropped shape, casts them to float16 and only then takes the argmax. Here that
happens block by block (linear resampling) or head by head (splines), so the resampled logits of all heads never exist
at once unless probabilities are asked for.
Axes: H head, Z Y X nnU-Net's internal order after transpose_forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import native
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


def plan_logits(resample_spec: ResampleSpec, case: Preprocessed) -> ResamplePlan | None:
    """How the logits of a case are brought to the shape of the cropped image."""
    shape = case.data_CZYX.shape[1:]
    return plan_resampling(resample_spec, shape, case.cropped_shape, case.target_spacing_mm, case.spacing_mm)


def postprocess(
    logits_HZYX: native.Logits,
    case: Preprocessed,
    spec: BundleSpec,
    plan: ResamplePlan | None,
    rule: LabelRule,
    return_probabilities: bool = False,
    threads: int | None = None,
) -> tuple[npt.NDArray[Any], Array | None]:
    """Segmentation in the axes of the image as read and, if wanted, float32 probabilities (H, those axes).

    `logits_HZYX`: float16 values (or float32 that hold such) of the preprocessed shape. `plan`: see `plan_logits`.
    With probabilities the labels come from them, as in nnU-Net (softmax can make two float16 logits equal).
    `threads`: None for all cores.
    """
    segmentation = np.zeros(case.shape_before_cropping, rule.dtype)
    cropped = segmentation[case.crop]
    probabilities = None
    if not return_probabilities:
        _label(logits_HZYX, plan, rule, cropped, threads)
        return segmentation.transpose(spec.transpose_backward), None

    probabilities = np.zeros((rule.num_heads, *case.shape_before_cropping), np.float32)
    if rule.regions_class_order is None:
        probabilities[0] = 1  # outside the crop is background
    for planes, logits in _resampled_slabs(logits_HZYX, plan, threads):
        if rule.regions_class_order is None:
            native.softmax_heads(logits, threads=threads)
        _label(logits, None, rule, cropped[planes], threads)
        if rule.regions_class_order is not None:
            native.sigmoid_heads(logits, threads=threads)
        probabilities[(slice(None), *case.crop)][:, planes] = logits
    return (
        segmentation.transpose(spec.transpose_backward),
        probabilities.transpose(0, *(axis + 1 for axis in spec.transpose_backward)),
    )


def _label(
    logits_HZYX: native.Logits,
    plan: ResamplePlan | None,
    rule: LabelRule,
    labels_ZYX: npt.NDArray[Any],
    threads: int | None,
) -> None:
    """Resample and write the labels, zero before; logits are rounded to float16 where nnU-Net casts back to it."""
    if plan is None or plan.is_local:
        label_locally(logits_HZYX, plan, rule, labels_ZYX, threads)
        return
    to_half = plan.keeps_dtype
    best = np.full(plan.shape_out, -np.inf, np.float32)
    for head in range(len(logits_HZYX)):
        values = resample(logits_HZYX[head : head + 1], plan, threads=threads)[0]
        if rule.regions_class_order is None:
            native.label_head(values, head, best, labels_ZYX, to_half=to_half, threads=threads)
        else:
            native.paint_head(values, rule.regions_class_order[head], labels_ZYX, to_half=to_half, threads=threads)


def label_locally(
    logits_HZYX: native.Logits,
    plan: ResamplePlan | None,
    rule: LabelRule,
    labels_ZYX: npt.NDArray[Any],
    threads: int | None,
    part: native.Part | None = None,
) -> None:
    """Resample and write the labels of all of the image or of a `part`. `plan`: None or one that is local."""
    native.label_logits(
        logits_HZYX,
        labels_ZYX,
        (0, 0, 0) if plan is None else plan.orders,
        torch=plan is not None and plan.is_torch,
        to_half=plan is not None and plan.keeps_dtype,
        regions=rule.regions_class_order,
        part=part,
        threads=threads,
    )


def _resampled_slabs(
    logits_HZYX: native.Logits, plan: ResamplePlan | None, threads: int | None
) -> Iterator[tuple[slice, Array]]:
    """Consecutive planes of the resampled logits, rounded to float16 where nnU-Net casts back to it."""
    if plan is not None and not plan.is_local:
        logits_HZYX = resample(logits_HZYX, plan, threads=threads)
        if plan.keeps_dtype:
            round_to_half(logits_HZYX, out=logits_HZYX, threads=threads)
        plan = None
    shape_out = logits_HZYX.shape[1:] if plan is None else plan.shape_out
    step = max(1, _SLAB_VALUES // (logits_HZYX.shape[0] * int(np.prod(shape_out[1:]))))
    for start in range(0, shape_out[0], step):
        planes = slice(start, min(start + step, shape_out[0]))
        if plan is None:
            yield planes, logits_HZYX[:, planes].astype(np.float32)
        else:
            yield (
                planes,
                native.resample_planes(
                    logits_HZYX,
                    plan.shape_out,
                    planes,
                    plan.orders,
                    torch=plan.is_torch,
                    to_half=plan.keeps_dtype,
                    threads=threads,
                ),
            )
