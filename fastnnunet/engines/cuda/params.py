"""The kernels' parameters as C lays them out (`native/engine/cuda/*.hpp`, of which these are the twins), and grids."""

import ctypes
from dataclasses import dataclass
from typing import Any, TypeAlias

Grid: TypeAlias = tuple[int, int, int]  # blocks of 32 x 8 threads

_Long, _Address, _Float, _Double = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_double
_Three = _Long * 3
FLOAT, HALF, DOUBLE = 0, 1, 2  # Type
MEAN, DEVIATION, RANGE = 0, 1, 2  # Finish
MOST_FLIPS, MOST_TILES, MOST_LEVELS = 8, 16, 10
SPLINE_PADDING = 12
LEAF = 128


class Strides(ctypes.Structure):
    _fields_ = (("head", _Long), ("z", _Long), ("y", _Long))


class GatherParams(ctypes.Structure):
    _fields_ = (
        ("image", _Address), ("out", _Address), ("channels", _Long), ("shape", _Three), ("tile", _Three),
        ("count", _Long), ("copies", _Long), ("origin", _Three * MOST_TILES), ("flips", _Long * MOST_FLIPS),
    )  # fmt: skip


class MirrorParams(ctypes.Structure):
    _fields_ = (
        ("parts", _Address), ("total", _Address), ("heads", _Long), ("tile", _Three), ("copies", _Long),
        ("flips", _Long * MOST_FLIPS), ("is_first", _Long), ("divisor", _Float), ("unused", _Float),
    )  # fmt: skip


class AddParams(ctypes.Structure):
    _fields_ = (
        ("logits", _Address), ("weights", _Address), ("sums", _Address), ("heads", _Long), ("shape", _Three),
        ("logits_stride", Strides), ("weights_stride", Strides), ("sums_stride", Strides), ("is_first", _Long),
    )  # fmt: skip


class AddHalvesParams(ctypes.Structure):
    _fields_ = (
        ("values", _Address), ("sums", _Address), ("heads", _Long), ("shape", _Three),
        ("values_stride", Strides), ("sums_stride", Strides),
    )  # fmt: skip


class DivideParams(ctypes.Structure):
    _fields_ = (
        ("sums", _Address), ("total", _Address), ("limits", _Address), ("heads", _Long), ("shape", _Three),
        ("sums_stride", Strides), ("total_stride", Strides), ("count", _Float), ("unused", _Float),
    )  # fmt: skip


class CopyParams(ctypes.Structure):
    _fields_ = (
        ("values", _Address), ("out", _Address), ("heads", _Long), ("shape", _Three),
        ("values_stride", Strides), ("out_stride", Strides),
    )  # fmt: skip


class BoxParams(ctypes.Structure):
    _fields_ = (("image", _Address), ("box", _Address), ("channels", _Long), ("shape", _Three))


class LimitsParams(ctypes.Structure):
    _fields_ = (
        ("data", _Address), ("limits", _Address), ("type", _Long), ("shape", _Three), ("stride", _Three),
        ("planes", _Long),
    )  # fmt: skip


class FillParams(ctypes.Structure):
    _fields_ = (("limits", _Address), ("count", _Long))


class Region(ctypes.Structure):
    _fields_ = (("data", _Address), ("shape", _Three), ("stride_z", _Long), ("stride_y", _Long))


class LeavesParams(ctypes.Structure):
    _fields_ = (("region", Region), ("mean", _Address), ("sums", _Address), ("depth", _Long))


class CombineSumsParams(ctypes.Structure):
    _fields_ = (("sums", _Address), ("out", _Address), ("count", _Long), ("depth", _Long), ("levels", _Long))


class FinishParams(ctypes.Structure):
    _fields_ = (("sum", _Address), ("limits", _Address), ("out", _Address), ("count", _Long), ("what", _Long))


class ScaleParams(ctypes.Structure):
    _fields_ = (
        ("region", Region), ("moments", _Address), ("low", _Float), ("high", _Float), ("shift", _Float),
        ("divisor", _Float),
    )  # fmt: skip


class Lines(ctypes.Structure):
    _fields_ = (("inners", _Long), ("outer_stride", _Long), ("inner_stride", _Long), ("stride", _Long))


class LineSamples(ctypes.Structure):
    _fields_ = (("data", _Address), ("stride", _Long), ("line_stride", _Long))


class LoadParams(ctypes.Structure):
    _fields_ = (
        ("values", _Address), ("type", _Long), ("lines", Lines), ("first", _Long), ("count", _Long),
        ("size_in", _Long), ("samples", LineSamples), ("is_along_line", _Long),
    )  # fmt: skip


class PrefilterParams(ctypes.Structure):
    _fields_ = (
        ("samples", LineSamples), ("size", _Long), ("lines", _Long), ("poles", _Long), ("pole", _Double * 2),
        ("pole_n", _Double * 2),
    )  # fmt: skip


class CombineParams(ctypes.Structure):
    _fields_ = (
        ("values", _Address), ("in_type", _Long), ("in_lines", Lines), ("samples", LineSamples), ("first", _Address),
        ("weights", _Address), ("sample", _Address), ("limits", _Address), ("limits_step", _Long),
        ("out", _Address), ("out_type", _Long), ("out_lines", Lines), ("first_line", _Long), ("count", _Long),
        ("size_out", _Long), ("taps", _Long), ("is_along_line", _Long),
    )  # fmt: skip


class TapsParams(ctypes.Structure):
    _fields_ = (("low", _Address), ("weight_low", _Address), ("weight_high", _Address), ("step", _Long))


class LabelMap(ctypes.Structure):
    _fields_ = (("data", _Address), ("stride", _Three), ("bytes", _Long))


class LabelParams(ctypes.Structure):
    _fields_ = (
        ("logits", _Address), ("type", _Long), ("stride", Strides), ("heads", _Long), ("taps", TapsParams * 3),
        ("first_in", _Long * 2), ("first_out", _Long * 2), ("shape_out", _Three), ("is_width_kept", _Long),
        ("rounds_to_half", _Long), ("regions", _Address), ("labels", LabelMap),
    )  # fmt: skip


class HeadParams(ctypes.Structure):
    _fields_ = (
        ("values", _Address), ("best", _Address), ("shape", _Three), ("label", _Long), ("is_first", _Long),
        ("rounds_to_half", _Long), ("labels", LabelMap),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a kernel is launched with."""

    params: type[ctypes.Structure]
    shared_bytes: int = 0  # of a block


KERNELS = {
    "gather": Kernel(GatherParams),
    "add_mirrored": Kernel(MirrorParams),
    "add_weighted": Kernel(AddParams),
    "add_halves": Kernel(AddHalvesParams),
    "divide": Kernel(DivideParams, 4096),
    "copy_halves": Kernel(CopyParams),
    "nonzero_box": Kernel(BoxParams, 6144),
    "find_limits": Kernel(LimitsParams, 4096),
    "fill_limits": Kernel(FillParams),
    "pairwise_leaves": Kernel(LeavesParams, 1024),
    "pairwise_combine": Kernel(CombineSumsParams, 4096),
    "finish_moments": Kernel(FinishParams),
    "scale": Kernel(ScaleParams),
    "load_lines": Kernel(LoadParams),
    "prefilter": Kernel(PrefilterParams),
    "combine_lines": Kernel(CombineParams),
    "label_logits": Kernel(LabelParams),
    "label_head": Kernel(HeadParams),
}

_MOST_ROWS = 65535  # blocks along y and z
_REDUCING = 64  # blocks along y where each ends in atomic operations


def grid_of(width: int, rows: int, groups: int = 1, *, reduces: bool = False) -> Grid:
    """For `rows` of `width` values, which threads walk over in strides where there are more."""
    most_x, most_y = (16, _REDUCING) if reduces else (2**20, _MOST_ROWS)
    return min(_blocks(width, 32), most_x), min(_blocks(rows, 8), most_y), max(1, min(groups, _MOST_ROWS))


def grid_of_blocks(blocks: int) -> Grid:
    """For kernels that count blocks."""
    return max(1, min(blocks, 2**16)), 1, 1


def grid_of_threads(threads: int) -> Grid:
    return grid_of_blocks(_blocks(threads, 256))


def _blocks(count: int, size: int) -> int:
    return max(1, -(-count // size))


def pairwise_depth(count: int) -> int:
    """How often NumPy halves so many values until none of the parts has more than `LEAF`."""
    sizes, depth = {count}, 0
    while max(sizes) > LEAF:
        halves = [(size, size // 2 - size // 2 % 8) for size in sizes if size > LEAF]
        sizes = {part for size, half in halves for part in (half, size - half)}
        depth += 1
    return depth


def three(values: Any) -> Any:
    return _Three(*values)
