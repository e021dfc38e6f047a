"""Where an image is not zero, and nnU-Net's intensity normalisation, on a GPU; as `native/core/normalize.cpp`."""

import math

import numpy as np

from fastnnunet.engines.cuda.arrays import DeviceArray
from fastnnunet.engines.cuda.params import (
    DEVIATION,
    MEAN,
    MOST_LEVELS,
    RANGE,
    BoxParams,
    CombineSumsParams,
    FinishParams,
    LeavesParams,
    Region,
    ScaleParams,
    grid_of,
    grid_of_blocks,
    pairwise_depth,
    three,
)
from fastnnunet.engines.cuda.resample import limits_of
from fastnnunet.engines.cuda.stream import Stream, values_of_limits

_LEAVES_PER_BLOCK = 32
Box = tuple[tuple[int, int], ...]


def nonzero_box(stream: Stream, image_CZYX: DeviceArray) -> Box:
    """Half-open (start, stop) per axis around what is not zero in any channel; the whole image where nothing is.

    Waits for the stream: the box decides the shapes of all that follows.
    """
    assert image_CZYX.is_contiguous
    channels, *shape = image_CZYX.shape
    box = stream.upload(np.array([0xFFFFFFFF] * 3 + [0] * 3, np.uint32))
    params = BoxParams(image=stream.uses(image_CZYX), box=stream.uses(box), channels=channels, shape=three(shape))
    rows = channels * shape[0] * shape[1]
    stream.start("nonzero_box", grid_of(shape[2], rows, reduces=True), params)
    found = [int(n) for n in stream.download(box)]
    if found[3] == 0:
        return tuple((0, size) for size in shape)
    return tuple(zip(found[:3], found[3:], strict=True))


def moments(stream: Stream, channel_ZYX: DeviceArray) -> DeviceArray:
    """Mean and standard deviation (2) float32, as NumPy computes them of the values in this order."""
    count, out = math.prod(channel_ZYX.shape), stream.filled((2,), np.float32)
    depth = pairwise_depth(count)
    for what in (MEAN, DEVIATION):
        sums = stream.empty((2**depth,), np.float32)
        leaves = LeavesParams(
            region=_region(stream, channel_ZYX),
            mean=None if what == MEAN else stream.uses(out),
            sums=stream.uses(sums),
            depth=depth,
        )
        stream.start("pairwise_leaves", grid_of_blocks(-(-(2**depth) // _LEAVES_PER_BLOCK)), leaves)
        left = depth
        while left > 0:
            levels = min(left, MOST_LEVELS)
            combined = stream.empty((2 ** (left - levels),), np.float32)
            params = CombineSumsParams(stream.uses(sums), stream.uses(combined), count, left, levels)
            stream.start("pairwise_combine", grid_of_blocks(2 ** (left - levels)), params)
            sums, left = combined, left - levels
        finish = FinishParams(sum=stream.uses(sums), out=stream.uses(out), count=count, what=what)
        stream.start("finish_moments", (1, 1, 1), finish)
    return out


def z_score(stream: Stream, channel_ZYX: DeviceArray) -> None:
    """In place: (value - mean) / max(std, 1e-8)"""
    _scale(stream, channel_ZYX, moments=moments(stream, channel_ZYX))


def clip_and_scale(stream: Stream, channel_ZYX: DeviceArray, low: float, high: float, mean: float, std: float) -> None:
    """In place: (clip(value, low, high) - mean) / max(std, 1e-8)"""
    _scale(stream, channel_ZYX, low, high, mean, std)


def rescale_to_01(stream: Stream, channel_ZYX: DeviceArray) -> None:
    """In place: (value - lowest) / max(highest - lowest, 1e-8)"""
    out = stream.empty((2,), np.float32)
    limits = limits_of(stream, channel_ZYX, None)
    params = FinishParams(limits=stream.uses(limits), out=stream.uses(out), what=RANGE)
    stream.start("finish_moments", (1, 1, 1), params)
    _scale(stream, channel_ZYX, moments=out)


def rgb_to_01(stream: Stream, channel_ZYX: DeviceArray) -> tuple[float, float]:
    """In place: value / 255 if all are from 0 to 255, else nothing. Returns the lowest and highest before; waits."""
    ((low, high),) = values_of_limits(stream.download(limits_of(stream, channel_ZYX, None)))
    if low >= 0 and high <= 255:
        _scale(stream, channel_ZYX, divisor=255)
    return low, high


def _scale(
    stream: Stream,
    channel_ZYX: DeviceArray,
    low: float = -math.inf,
    high: float = math.inf,
    shift: float = 0,
    divisor: float = 1,
    *,
    moments: DeviceArray | None = None,
) -> None:
    depth, height, width = channel_ZYX.shape
    params = ScaleParams(
        region=_region(stream, channel_ZYX),
        moments=None if moments is None else stream.uses(moments),
        low=low,
        high=high,
        shift=shift,
        divisor=divisor,
    )
    stream.start("scale", grid_of(width, depth * height), params)


def _region(stream: Stream, channel_ZYX: DeviceArray) -> Region:
    z, y, x = channel_ZYX.strides
    assert x == 1 or channel_ZYX.shape[2] == 1, f"neighbours along x lie {x} apart"
    return Region(stream.uses(channel_ZYX), three(channel_ZYX.shape), z, y)
