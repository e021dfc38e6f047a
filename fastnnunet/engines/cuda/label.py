"""From logits to labels on a GPU, the resampled logits of all heads never in memory; as `native/core/label.cpp`."""

from collections.abc import Sequence

import numpy as np

from fastnnunet import native
from fastnnunet.engines.cuda.arrays import DeviceArray
from fastnnunet.engines.cuda.params import HeadParams, LabelMap, LabelParams, TapsParams, grid_of, three
from fastnnunet.engines.cuda.resample import operator, resample_volume, taps_of
from fastnnunet.engines.cuda.stream import Stream, strides_of, type_of


def label_logits(
    stream: Stream,
    logits_HZYX: DeviceArray,
    labels_ZYX: DeviceArray,
    plan: native.ResamplePlan | None,
    regions: Sequence[int] | None,
    part: native.Part | None = None,
) -> None:
    """Resample as planned and write labels; see `native.label_logits`, and for splines (`part` None) head by head.

    `labels_ZYX` (uint8 or uint16, zero before, in any strides) may be a part of an image in other axes, by which it is
    uncropped and transposed back on the way.
    """
    if plan is not None and not plan.is_local:
        assert part is None, "splines need all of a head"
        _label_heads(stream, logits_HZYX, labels_ZYX, plan, regions)
        return
    whole = part or native.Part(
        shape_in=logits_HZYX.shape[1:], shape_out=labels_ZYX.shape, first_in=(0, 0), first_out=(0, 0)
    )
    orders = (0, 0, 0) if plan is None else plan.orders
    is_torch = plan is not None and plan.is_torch
    sizes = zip(whole.shape_in, whole.shape_out, orders, strict=True)
    ops = [operator(size_in, size_out, order, is_torch) for size_in, size_out, order in sizes]
    _check_part(ops[0].first, ops[0].is_selection, whole.first_in[0], len(logits_HZYX[0]), whole, labels_ZYX, 0)
    _check_part(ops[1].first, ops[1].is_selection, whole.first_in[1], logits_HZYX.shape[2], whole, labels_ZYX, 1)
    params = LabelParams(
        logits=stream.uses(logits_HZYX),
        type=type_of(logits_HZYX),
        stride=strides_of(logits_HZYX),
        heads=len(logits_HZYX),
        taps=(TapsParams * 3)(*(taps_of(stream, op) for op in ops)),
        first_in=tuple(whole.first_in),
        first_out=tuple(whole.first_out),
        shape_out=three(labels_ZYX.shape),
        is_width_kept=ops[2].is_identity,
        rounds_to_half=plan is not None and plan.keeps_dtype,
        regions=None if regions is None else stream.uses(_regions(stream, regions)),
        labels=_label_map(stream, labels_ZYX),
    )
    depth, height, width = labels_ZYX.shape
    if depth and height and width:
        stream.start("label_logits", grid_of(width, depth * height), params)


def _label_heads(
    stream: Stream,
    logits_HZYX: DeviceArray,
    labels_ZYX: DeviceArray,
    plan: native.ResamplePlan,
    regions: Sequence[int] | None,
) -> None:
    values = stream.empty(plan.shape_out, np.float32)
    best = stream.empty(plan.shape_out, np.float32) if regions is None else None
    depth, height, width = labels_ZYX.shape
    for head in range(len(logits_HZYX)):
        resample_volume(stream, logits_HZYX[head], plan, values)
        params = HeadParams(
            values=stream.uses(values),
            best=None if best is None else stream.uses(best),
            shape=three(labels_ZYX.shape),
            label=head if regions is None else regions[head],
            is_first=head == 0,
            rounds_to_half=plan.keeps_dtype,
            labels=_label_map(stream, labels_ZYX),
        )
        stream.start("label_head", grid_of(width, depth * height), params)


def _label_map(stream: Stream, labels_ZYX: DeviceArray) -> LabelMap:
    return LabelMap(stream.uses(labels_ZYX), three(labels_ZYX.strides), labels_ZYX.dtype.itemsize)


def _regions(stream: Stream, regions: Sequence[int]) -> DeviceArray:
    key = ("regions", *regions)
    if key not in stream.tables:
        stream.tables[key] = stream.upload(np.array(regions, np.int32))
    return stream.tables[key]


def _check_part(
    low: np.ndarray,
    is_selection: bool,
    first_in: int,
    size_in: int,
    part: native.Part,
    labels_ZYX: DeviceArray,
    axis: int,
) -> None:
    """The part has the inputs that its labels need: a kernel would read beyond it."""
    needed = low[part.first_out[axis] : part.first_out[axis] + labels_ZYX.shape[axis]]
    if len(needed) == 0:
        return
    highest = int(needed[-1]) + (0 if is_selection else 1)
    if needed[0] < first_in or highest >= first_in + size_in:
        raise ValueError(f"labelling: inputs {needed[0]} to {highest} of axis {axis} are not in the part")
