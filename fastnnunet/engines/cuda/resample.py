"""Resampling on a GPU: the passes of the core (`native/core/resample.cpp`) along one axis after another.

Tables of weights are the core's own, intermediate values float64 as there, hence results are the core's. Lines of a
spline are filtered in scratch memory, so many at once as `SCRATCH_BYTES` hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastnnunet import native
from fastnnunet.engines.cuda.arrays import DeviceArray, c_strides
from fastnnunet.engines.cuda.params import (
    DOUBLE,
    FLOAT,
    HALF,
    SPLINE_PADDING,
    CombineParams,
    LimitsParams,
    Lines,
    LineSamples,
    LoadParams,
    PrefilterParams,
    TapsParams,
    grid_of,
    grid_of_threads,
    three,
)
from fastnnunet.engines.cuda.stream import Stream, type_of

SCRATCH_BYTES = 2**26
_TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): HALF, np.dtype(np.float64): DOUBLE}


@dataclass(frozen=True, slots=True)
class Pass:
    """One axis resampled, and whether values are clipped to the limits of the input then."""

    axis: int
    clips: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """The tables of one axis."""

    first: np.ndarray  # (size_out) int32
    weights: np.ndarray  # (size_out, taps) float64
    sample: np.ndarray | None  # (size_out) int32, of splines
    poles: tuple[float, ...]
    taps: int
    is_identity: bool
    is_selection: bool
    key: tuple[int, int, int, bool]


@lru_cache(maxsize=64)
def operator(size_in: int, size_out: int, order: int, is_torch: bool) -> Operator:
    """The core's operator for an axis."""
    op = native.AxisOperator(size_in, size_out, order, is_torch)
    return Operator(
        first=np.array(op.first, np.int32),
        weights=np.array(op.weights, np.float64).reshape(-1, op.taps),
        sample=np.array(op.sample, np.int32) if op.poles else None,
        poles=tuple(op.poles),
        taps=op.taps,
        is_identity=op.is_identity,
        is_selection=op.is_selection,
        key=(size_in, size_out, order, is_torch),
    )


def passes(
    shape_in: Sequence[int], shape_out: Sequence[int], ops: Sequence[Operator], clip: str, separate_axis: int | None
) -> list[Pass]:
    """The axes in the core's order: planes across the first axis, and along it before or after, whichever is less."""
    first = separate_axis if clip == "per_plane" and separate_axis else 0
    z, y, x = {0: (0, 1, 2), 1: (1, 0, 2), 2: (2, 0, 1)}[first]
    shrinks = shape_out[y] < shape_in[y]
    in_plane = [axis for axis in ((y, x) if shrinks else (x, y)) if not ops[axis].is_identity]
    along = [] if ops[z].is_identity else [z]
    clips = clip != "none"

    def planes(clipped: bool) -> list[Pass]:
        return [Pass(axis, clipped and axis == in_plane[-1]) for axis in in_plane]

    if ops[z].is_selection:
        return planes(clips) + [Pass(axis) for axis in along]
    if not in_plane:
        return [Pass(axis, clip == "whole") for axis in along]
    before, after = shape_out[z] * shape_in[y] * shape_in[x], shape_in[z] * shape_out[y] * shape_out[x]
    if clip != "per_plane" and before < after:
        return [Pass(axis) for axis in along] + planes(clips)
    return planes(clip == "per_plane") + [Pass(axis, clip == "whole") for axis in along]


def resample(stream: Stream, array_CZYX: DeviceArray, plan: native.ResamplePlan | None) -> DeviceArray:
    """Every channel, float32 or float16 in any strides, to a contiguous float32 array."""
    shape_in = array_CZYX.shape[1:]
    shape_out = shape_in if plan is None else tuple(plan.shape_out)
    out = stream.empty((len(array_CZYX), *shape_out), np.float32)
    for channel in range(len(array_CZYX)):
        resample_volume(stream, array_CZYX[channel], plan, out[channel])
    return out


def resample_volume(stream: Stream, volume: DeviceArray, plan: native.ResamplePlan | None, out: DeviceArray) -> None:
    """One volume (Z, Y, X) into another of the plan's shape."""
    orders = (0, 0, 0) if plan is None else plan.orders
    sizes = zip(volume.shape, out.shape, orders, strict=True)
    ops = [operator(a, b, order, plan is not None and plan.is_torch) for a, b, order in sizes]
    clip, separate = ("none", None) if plan is None else (plan.clip, plan.separate_axis)
    todo = passes(volume.shape, out.shape, ops, clip, separate) or [Pass(2)]  # a copy, perhaps transposed
    limits, plane_axis = None, None
    if any(one.clips for one in todo):
        plane_axis = (separate or 0) if clip == "per_plane" else None
        limits = limits_of(stream, volume, plane_axis)
    for number, one in enumerate(todo):
        shape = [out.shape[axis] if axis == one.axis else size for axis, size in enumerate(volume.shape)]
        target = out if number == len(todo) - 1 else stream.empty(shape, np.float64)
        _apply(stream, volume, ops[one.axis], one.axis, target, limits if one.clips else None, plane_axis)
        volume = target


def limits_of(stream: Stream, volume: DeviceArray, plane_axis: int | None) -> DeviceArray:
    """Lowest and highest of a volume, or of each plane across an axis."""
    axes = sorted(range(3), key=lambda axis: (axis != plane_axis, -volume.strides[axis]))
    ordered = volume.transpose(*axes)
    limits = stream.new_limits(1 if plane_axis is None else ordered.shape[0])
    depth, height, width = ordered.shape
    params = LimitsParams(
        data=stream.uses(volume),
        limits=stream.uses(limits),
        type=type_of(volume),
        shape=three(ordered.shape),
        stride=three(ordered.strides),
        planes=depth if plane_axis is None else 1,
    )
    stream.start("find_limits", grid_of(width, height, depth, reduces=True), params)
    return limits


def _apply(
    stream: Stream,
    volume: DeviceArray,
    op: Operator,
    axis: int,
    out: DeviceArray,
    limits: DeviceArray | None,
    plane_axis: int | None,
) -> None:
    """One axis of a volume."""
    others = sorted((a for a in range(3) if a != axis), key=lambda a: (a != plane_axis, -volume.strides[a]))
    outer, inner = others  # limits are counted along the outer axis
    size_in, size_out, lines = volume.shape[axis], out.shape[axis], volume.shape[outer] * volume.shape[inner]
    is_along_line = volume.strides[axis] == 1
    first, weights = _table(stream, op, "first", op.first), _table(stream, op, "weights", op.weights)
    params = CombineParams(
        values=stream.uses(volume),
        in_type=_TYPES[volume.dtype],
        in_lines=_lines(volume, axis, outer, inner),
        first=stream.uses(first),
        weights=stream.uses(weights),
        limits=None if limits is None else stream.uses(limits),
        limits_step=0 if plane_axis is None else 1,
        out=stream.uses(out),
        out_type=_TYPES[out.dtype],
        out_lines=_lines(out, axis, outer, inner),
        count=lines,
        size_out=size_out,
        taps=op.taps,
        is_along_line=is_along_line,
    )
    if op.sample is None:
        _combine(stream, params)
        return
    params.sample = stream.uses(_table(stream, op, "sample", op.sample))
    padded = size_in + 2 * SPLINE_PADDING
    at_once = max(1, min(lines, SCRATCH_BYTES // (8 * padded)))
    scratch = stream.empty((at_once, padded), np.float64)
    for start in range(0, lines, at_once):
        count = min(at_once, lines - start)
        strides = (1, padded) if is_along_line else (count, 1)
        params.samples = LineSamples(stream.uses(scratch), *strides)
        params.first_line, params.count = start, count
        load = LoadParams(
            values=params.values,
            type=params.in_type,
            lines=params.in_lines,
            first=start,
            count=count,
            size_in=size_in,
            samples=params.samples,
            is_along_line=is_along_line,
        )
        stream.start("load_lines", grid_of(*((padded, count) if is_along_line else (count, padded))), load)
        filtering = PrefilterParams(samples=params.samples, size=padded, lines=count, poles=len(op.poles))
        filtering.pole[: len(op.poles)] = op.poles
        filtering.pole_n[: len(op.poles)] = [pole**padded for pole in op.poles]
        stream.start("prefilter", grid_of_threads(count), filtering)
        _combine(stream, params)


def _combine(stream: Stream, params: CombineParams) -> None:
    width, rows = (params.size_out, params.count) if params.is_along_line else (params.count, params.size_out)
    stream.start("combine_lines", grid_of(width, rows), params)


def _lines(volume: DeviceArray, axis: int, outer: int, inner: int) -> Lines:
    strides = volume.strides
    return Lines(volume.shape[inner], strides[outer], strides[inner], strides[axis])


def taps_of(stream: Stream, op: Operator) -> TapsParams:
    """The two neighbours of every output in float32, of an operator of order 0 or 1, as the core's labelling has."""
    low = _table(stream, op, "first", op.first)
    weight_low = _table(stream, op, "low", op.weights[:, 0].astype(np.float32))
    high = np.zeros(len(op.first), np.float32) if op.is_selection else op.weights[:, 1].astype(np.float32)
    weight_high = _table(stream, op, "high", high)
    return TapsParams(
        low=stream.uses(low),
        weight_low=stream.uses(weight_low),
        weight_high=stream.uses(weight_high),
        step=0 if op.is_selection else 1,
    )


def _table(stream: Stream, op: Operator, name: str, values: np.ndarray) -> DeviceArray:
    """On the GPU, brought there once for the stream."""
    key = (op.key, name)
    table = stream.tables.get(key)
    if table is None:
        table = stream.upload(values)
        stream.tables[key] = table
    return table


def contiguous(stream: Stream, array_CZYX: DeviceArray) -> DeviceArray:
    """The array itself, or a float32 copy in C order."""
    return array_CZYX if array_CZYX.strides == c_strides(array_CZYX.shape) else resample(stream, array_CZYX, None)
