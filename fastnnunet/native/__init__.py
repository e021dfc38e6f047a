"""The compiled core: arithmetic before and after the network and of the soft loss, in C++ (`core/`), for NumPy arrays.

Arrays are C, Z, Y, X (or without C); whatever a function writes into may be a view whose last axis is contiguous, and
what it reads is copied only where its last axis is not. Every function lets other Python threads run while it works and
takes `threads`, the most there may be: None for all cores this process may use (or OMP_NUM_THREADS). Results do not
depend on their number. A process forked after its parent used more than one thread works on one.
Raises ValueError and TypeError for arrays of wrong shapes and types, which are mistakes of the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import BackendError

try:
    import _fastnnunet_core as _core
except ImportError as error:
    raise BackendError(
        f"the compiled core of fastnnunet cannot be loaded ({error})\n"
        "install the package (again): pip install . (or -e .) in its folder, which needs a C++ compiler"
    ) from error

_INTERFACE = 8
if _core.INTERFACE != _INTERFACE:
    raise BackendError(
        f"the compiled core of fastnnunet has interface {_core.INTERFACE}, these Python files need {_INTERFACE}\n"
        "install the package again: pip install . (or -e .) in its folder"
    )

_FEW_VALUES = 2**19  # which one core passes over in a quarter of a millisecond

Array = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
Logits = Array | HalfArray
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
LabelMap = npt.NDArray[np.int32]
Shape = tuple[int, ...]
Orders = tuple[int, int, int]  # of the spline along z, y, x
Clip = Literal["none", "whole", "per_plane"]

# Decisions of the core, without arrays: types and functions of `core/window.hpp`, `core/tiles.hpp`,
# `core/resample_plan.hpp`, `core/axis_operator.hpp` and `core/locate.hpp`.
AxisOperator = _core.AxisOperator
ChunkedWindow = _core.ChunkedWindow
Cut = _core.Cut
TileAxis = _core.TileAxis
Tiling = _core.Tiling
ResamplePlan = _core.ResamplePlan
ImagePart = _core.ImagePart
window_part = _core.window_part
with_margin = _core.with_margin
seen_box = _core.seen_box
smaller_limit = _core.smaller_limit
tells_no_memory = _core.tells_no_memory
fewest_tiles = _core.fewest_tiles
least_cost = _core.least_cost
centre_padding = _core.centre_padding
tile_starts = _core.tile_starts
resampled_shape = _core.resampled_shape
plan_resampling = _core.plan_resampling
fits_half = _core.fits_half


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where arrays that hold a part of the logits and of the labels, in whole rows, lie in the whole."""

    shape_in: Shape  # of all the logits
    shape_out: Shape  # of all the labels
    first_in: tuple[int, int]  # z and y of the first logit there is
    first_out: tuple[int, int]  # z and y of the first label wanted


def _count(threads: int | None, values: npt.NDArray[Any], work: int = 1) -> int:
    """Threads for a pass over values that takes `work` times as long as most; 0: all cores.

    Threads that wait for each other keep cores from the network's.
    """
    return 1 if values.size * work <= _FEW_VALUES else threads or 0


def resample(
    values_CZYX: Logits,
    shape_out: Sequence[int],
    orders: Orders,
    *,
    torch: bool = False,
    clip: Clip = "none",
    dtype: type[np.float32] | type[np.float64] = np.float32,
    threads: int | None = None,
) -> npt.NDArray[Any]:
    """Every channel resampled to `shape_out`, half-pixel centres, border values repeated, float64 inside.

    `orders`: 0 nearest, 1 linear, 2 to 5 splines as SciPy filters and pads them; an axis that keeps its size is left
    alone. `torch`: coordinates in float32 and "nearest-exact". `clip`: to the range of the whole channel, or of each
    plane z before planes are combined. float64 results only of float32 input.
    """
    out: npt.NDArray[Any] = np.empty((len(values_CZYX), *shape_out), dtype)
    _core.resample(_readable(values_CZYX), out, orders, torch, clip, threads or 0)
    return out


def resample_planned(values_CZYX: Logits, plan: ResamplePlan, *, threads: int | None = None) -> Array:
    """Every channel resampled as nnU-Net does between the two shapes of the plan."""
    out = np.empty((len(values_CZYX), *plan.shape_out), np.float32)
    _core.resample_planned(_readable(values_CZYX), out, plan, threads or 0)
    return out


def gaussian_weights(tile_shape: Sequence[int]) -> Array:
    """nnU-Net's weights of a tile's voxels: its float16 values in float32, 10 in the centre."""
    weights = np.empty(tuple(tile_shape), np.float32)
    _core.gaussian_weights(weights)
    return weights


def label_logits(
    logits_HZYX: Logits,
    labels_ZYX: Labels,
    orders: Orders,
    *,
    torch: bool = False,
    to_half: bool,
    regions: Sequence[int] | None = None,
    part: Part | None = None,
    threads: int | None = None,
) -> None:
    """Resample logits (orders 0 and 1) and write the label of every voxel into `labels_ZYX`, whose shape is the target.

    `to_half`: logits are rounded to float16 before they are compared. Without `regions` the largest logit wins, ties go
    to the lowest head. `regions`: a label per head, painted in turn where its sigmoid in float32 is above 0.5.
    `part`: the arrays are a part of the whole, which must hold the logits that its labels need (`last_inputs`); its
    labels are those they would be in the whole. Memory beyond the arrays does not depend on the number of heads.
    """
    order = None if regions is None else list(regions)
    whole = part or Part(shape_in=logits_HZYX.shape[1:], shape_out=labels_ZYX.shape, first_in=(0, 0), first_out=(0, 0))
    _core.label_logits(
        _readable(logits_HZYX),
        labels_ZYX,
        whole.shape_in,
        whole.shape_out,
        whole.first_in,
        whole.first_out,
        orders,
        torch,
        to_half,
        order,
        _count(threads, logits_HZYX),
    )


def last_inputs(size_in: int, size_out: int, order: int, *, torch: bool = False) -> list[int]:
    """The last input that each output of an axis needs with order 0 or 1; the first is at most one before it."""
    return _core.last_inputs(size_in, size_out, order, torch)


def resample_planes(
    logits_HZYX: Logits,
    shape_out: Sequence[int],
    planes: slice,
    orders: Orders,
    *,
    torch: bool = False,
    to_half: bool,
    threads: int | None = None,
) -> Array:
    """Only the planes `planes` (start and stop given) of the resampled logits of all heads, float32 arithmetic."""
    out = np.empty((len(logits_HZYX), planes.stop - planes.start, *shape_out[1:]), np.float32)
    _core.resample_planes(_readable(logits_HZYX), out, shape_out[0], planes.start, orders, torch, to_half, threads or 0)
    return out


def label_head(
    values_ZYX: Array, head: int, best_ZYX: Array, labels_ZYX: Labels, *, to_half: bool, threads: int | None = None
) -> None:
    """Where a head's value is above `best_ZYX` (-infinity at first), it becomes the best and `head` the label."""
    _core.label_head(_readable(values_ZYX), to_half, head, best_ZYX, labels_ZYX, _count(threads, values_ZYX))


def paint_head(values_ZYX: Array, label: int, labels_ZYX: Labels, *, to_half: bool, threads: int | None = None) -> None:
    """Write `label` where the sigmoid in float32 of a head's value is above 0.5."""
    _core.paint_head(_readable(values_ZYX), to_half, label, labels_ZYX, _count(threads, values_ZYX))


def add_weighted(
    logits_HZYX: Array,
    weights_ZYX: Array,
    sums_HZYX: HalfArray,
    *,
    is_first: bool = False,
    threads: int | None = None,
) -> None:
    """sums = half(sums + logits * weights); `is_first`: half(logits * weights), whatever sums held."""
    _core.add_weighted(
        _readable(logits_HZYX), _readable(weights_ZYX), sums_HZYX, is_first, _count(threads, logits_HZYX)
    )


def add_halves(values_HZYX: HalfArray, sums_HZYX: HalfArray, *, threads: int | None = None) -> None:
    """sums = half(sums + values)"""
    _core.add_halves(_readable(values_HZYX), sums_HZYX, _count(threads, values_HZYX))


def divide(
    sums_HZYX: HalfArray, total_ZYX: HalfArray, *, threads: int | None = None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """sums = half(sums / total). Returns (lowest, highest) of the sums before and of the quotients; NaN if any is."""
    return _core.divide(sums_HZYX, _readable(total_ZYX), _count(threads, sums_HZYX, work=8))


def round_to_half(values: Array, out: Array, *, threads: int | None = None) -> None:
    """The float32 values nearest to `values` that float16 can hold; `out` may be `values`, both contiguous.

    Magnitudes of 65520 and above, where float16 has only infinity, stay finite.
    """
    _core.round_to_half(_rows(values), _rows(out), _count(threads, values))


def limits(values: Array, *, threads: int | None = None) -> tuple[float, float]:
    """Lowest and highest of contiguous values; NaN if any is, infinities the wrong way round if there are none."""
    return _core.limits(_rows(values), _count(threads, values))


def moments(channel_ZYX: Array, mask_ZYX: Mask | None = None, *, threads: int | None = None) -> tuple[float, float]:
    """Mean and standard deviation (inside the mask) as NumPy computes them in float32."""
    return _core.moments(*_memory_order(channel_ZYX, mask_ZYX), _count(threads, channel_ZYX))


def z_score(channel_ZYX: Array, mask_ZYX: Mask | None = None, *, threads: int | None = None) -> None:
    """In place: (value - mean) / max(std, 1e-8); with a mask of the voxels inside, the others left alone."""
    _core.z_score(*_memory_order(channel_ZYX, mask_ZYX), _count(threads, channel_ZYX))


def clip_and_scale(
    channel_ZYX: Array, low: float, high: float, mean: float, std: float, *, threads: int | None = None
) -> None:
    """In place: (clip(value, low, high) - mean) / max(std, 1e-8), in float32."""
    _core.clip_and_scale(_memory_order(channel_ZYX)[0], low, high, mean, std, _count(threads, channel_ZYX))


def rescale_to_01(channel_ZYX: Array, *, threads: int | None = None) -> None:
    """In place: (value - lowest) / max(highest - lowest, 1e-8)."""
    _core.rescale_to_01(_memory_order(channel_ZYX)[0], _count(threads, channel_ZYX))


def rgb_to_01(channel_ZYX: Array, *, threads: int | None = None) -> tuple[float, float]:
    """In place: value / 255 if all are from 0 to 255, else nothing. Returns the lowest and highest value before."""
    return _core.rgb_to_01(_memory_order(channel_ZYX)[0], _count(threads, channel_ZYX))


def nonzero_box(channels_CZYX: Array, *, threads: int | None = None) -> tuple[tuple[int, int], ...]:
    """Half-open (start, stop) per axis around what is not zero in any channel; the whole image where nothing is."""
    axes = axes_by_stride(channels_CZYX[0])
    start, stop = _core.nonzero_box(
        _readable(channels_CZYX.transpose(0, *(a + 1 for a in axes))), _count(threads, channels_CZYX)
    )
    return tuple((start[axes.index(axis)], stop[axes.index(axis)]) for axis in range(3))


def nonzero_mask(channels_CZYX: Array, *, threads: int | None = None) -> Mask:
    """True where any channel is not zero, in the axes of `channels_CZYX` and its order in memory."""
    axes = axes_by_stride(channels_CZYX[0])
    ordered = channels_CZYX.transpose(0, *(a + 1 for a in axes))
    mask = np.empty(ordered.shape[1:], np.bool_)
    _core.nonzero_mask(_readable(ordered), mask, _count(threads, channels_CZYX))
    return mask.transpose([axes.index(axis) for axis in range(3)])


def softmax_heads(logits_HZYX: Array, *, threads: int | None = None) -> None:
    """In place: exp(logit - largest) / sum over the heads, in float32."""
    _core.softmax_heads(logits_HZYX, _count(threads, logits_HZYX, 4))


def sigmoid_heads(logits_HZYX: Array, *, threads: int | None = None) -> None:
    """In place: 1 / (1 + exp(-logit)), in float32."""
    _core.sigmoid_heads(logits_HZYX, _count(threads, logits_HZYX, 4))


def block_means(image_CZYX: Array, factor: Sequence[int], *, threads: int | None = None) -> Array:
    """The mean of each block of `factor` (z, y, x) voxels, summed in float64; those at the end may be smaller."""
    shape = (-(-n // size) for n, size in zip(image_CZYX.shape[1:], factor, strict=True))
    means = np.empty((len(image_CZYX), *shape), np.float32)
    _core.block_means(_readable(image_CZYX), tuple(factor), means, _count(threads, image_CZYX))
    return means


def label_components(
    mask_ZYX: Mask, connectivity: int = 1, *, threads: int | None = None
) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Labels 1, 2, ... as scipy.ndimage.label gives them, and the number of voxels of each.

    `connectivity`: the most axes in which neighbours differ (1: 6 neighbours, 2: 18, 3: 26).
    """
    labels = np.empty(mask_ZYX.shape, np.int32)
    return labels, _core.label_components(_readable(mask_ZYX), connectivity, labels, _count(threads, mask_ZYX))


def fill_holes(mask_ZYX: Mask, *, threads: int | None = None) -> None:
    """In place: True where False voxels are enclosed (over faces), as scipy.ndimage.binary_fill_holes."""
    _core.fill_holes(mask_ZYX.transpose(axes_by_stride(mask_ZYX)), _count(threads, mask_ZYX))


def resample_labels(labels_ZYX: npt.NDArray[np.int32], plan: ResamplePlan, *, threads: int | None = None) -> LabelMap:
    """A label map between the two shapes of a plan of order 1 and order_z 0 in the scipy convention, as nnU-Net does.

    Every label's indicator is interpolated in plane and the largest wins, nearest between planes; of labels that tie
    the nearest neighbour's is taken, else the lowest.
    """
    out = np.empty(plan.shape_out, np.int32)
    _core.resample_labels(_readable(labels_ZYX), out, plan, threads or 0)
    return out


def keep_largest(labels_ZYX: Labels, wanted: Sequence[int], background: int = 0, *, threads: int | None = None) -> None:
    """In place: of the voxels with any of the labels `wanted`, those outside the largest component become background.

    Components hang together by faces, edges and corners; several of the largest size all stay.
    """
    _core.keep_largest(labels_ZYX, list(wanted), background, _count(threads, labels_ZYX))


def remove_small(labels_ZYX: Labels, min_voxels: int, *, threads: int | None = None) -> None:
    """In place: components of fewer voxels, each label by itself, become 0."""
    _core.remove_small(labels_ZYX, min_voxels, _count(threads, labels_ZYX))


def fill_label_holes(labels_ZYX: Labels, wanted: Sequence[int], *, threads: int | None = None) -> None:
    """In place: zeros enclosed (over faces) by one of the labels `wanted` become it, the innermost where several do."""
    _core.fill_label_holes(labels_ZYX, list(wanted), _count(threads, labels_ZYX))


def sample(
    values_CZYX: Array, labels_KZYX: npt.NDArray[np.int16], grid_PD: Array, outside: int, *, threads: int | None = None
) -> tuple[Array, npt.NDArray[np.int16]]:
    """Values (C, P), interpolated linearly with zeros around, and labels (K, P) at the P points of a grid.

    Of the labels around a point, `outside` beyond the border, the one of the largest weight; near ties go to the
    nearest neighbour, as in nnU-Net's SpatialTransform. The grid (contiguous) has D = 3 coordinates x, y, z, or 2 where
    there is one plane, as torch's `grid_sample` takes them with align_corners=False.
    """
    values_CP = np.empty((len(values_CZYX), len(grid_PD)), np.float32)
    labels_KP = np.empty((len(labels_KZYX), len(grid_PD)), np.int16)
    _core.sample(_readable(values_CZYX), _readable(labels_KZYX), grid_PD, outside, values_CP, labels_KP, threads or 0)
    return values_CP, labels_KP


def sample_inside(
    values_CZYX: Array,
    space_zyx: Sequence[int],
    lower_zyx: Sequence[int],
    grid_PD: Array,
    nothing: float,
    *,
    threads: int | None = None,
) -> Array:
    """Values (C, P) of a box at the points of a grid: the mean of the neighbours inside the box, by their weights.

    `nothing` where less than half of the weight is inside. The grid, as that of `sample`, counts in `space`, in which
    the box starts at `lower`.
    """
    out_CP = np.empty((len(values_CZYX), len(grid_PD)), np.float32)
    space, lower = tuple(map(int, space_zyx)), tuple(map(int, lower_zyx))
    _core.sample_inside(_readable(values_CZYX), space, lower, grid_PD, nothing, out_CP, threads or 0)
    return out_CP


def kl_classes(
    logits_NCV: Array,
    soft_NSV: Array,
    temperature: float,
    mask_NV: Mask | None,
    difference_NCV: Array,
    *,
    threads: int | None = None,
) -> tuple[float, int]:
    """Sum of KL(p || softmax(logits / T)) over the voxels where `mask` (contiguous) is true, and how many those are.

    p is `soft` (S = C - 1 channels, contiguous voxels) below the channel that completes it to 1. Softmax - p is written
    into `difference`, 0 where the mask is false. Logits and difference may have any strides.
    """
    return _core.kl_classes(logits_NCV, soft_NSV, temperature, mask_NV, difference_NCV, threads or 0)


def _readable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, or a copy where its last axis is not contiguous."""
    return array if array.strides[-1] == array.itemsize or array.shape[-1] <= 1 else np.ascontiguousarray(array)


def _rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous array as a volume of rows that are long enough to be worth a call and short enough to share out."""
    flat = array.ravel(order="K")
    if array.size and not np.may_share_memory(flat, array):
        raise ValueError(f"a contiguous array is needed, got strides {array.strides} of shape {array.shape}")
    row = 2**14
    return flat.reshape(1, -1, row) if flat.size and flat.size % row == 0 else flat.reshape(1, 1, -1)


def axes_by_stride(array: npt.NDArray[Any]) -> list[int]:
    """The axes so that neighbours along the last are neighbours in memory: what works per voxel need not care."""
    return sorted(range(array.ndim), key=lambda axis: (array.shape[axis] > 1, -abs(array.strides[axis])))


def _memory_order(array: npt.NDArray[Any], mask: Mask | None = None) -> tuple[npt.NDArray[Any], Mask | None]:
    axes = axes_by_stride(array)
    return array.transpose(axes), None if mask is None else _readable(mask.transpose(axes))
