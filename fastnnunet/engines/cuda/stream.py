"""Work on one stream of a GPU: arrays made, brought over and back, and the window's arithmetic on them.

Functions that take arrays put kernels on the stream and return; only `download` waits. Arrays of other streams may be
used after `follow`. Axes: C channel, H head, N tile in a batch, Z Y X space.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.cuda.arrays import DeviceArray, DeviceMemory, StreamHandle, c_strides
from fastnnunet.engines.cuda.gpu import Gpu, Mark
from fastnnunet.engines.cuda.params import (
    FLOAT,
    HALF,
    MOST_TILES,
    AddHalvesParams,
    AddParams,
    CopyParams,
    DivideParams,
    FillParams,
    GatherParams,
    Grid,
    MirrorParams,
    Strides,
    grid_of,
    three,
)
from fastnnunet.errors import BackendError

MOST_VOXELS = 2**31  # of a volume: kernels count rows and lines in 32 bits
_TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): HALF}
_LIMITS = np.dtype([("low", "<u4"), ("high", "<u4"), ("has_nan", "<u4"), ("unused", "<u4")])


class Stream:
    """A stream of its own, or that of an owner by its handle."""

    def __init__(self, gpu: Gpu, handle: int | None = None, owner: object = None) -> None:
        self.gpu = gpu
        self.tables: dict[Any, DeviceArray] = {}  # numbers that were brought over once, by what they are
        gpu.use_device()
        self.handle = gpu.new_stream() if handle is None else handle
        self._memory_of = StreamHandle(self.handle, owner)
        if handle is None:
            weakref.finalize(self._memory_of, _destroy, gpu, self.handle)

    def follow(self, other: "Stream") -> None:
        """What is put here from now on waits for what is there now."""
        self.gpu.follow(self.handle, other.handle)

    def mark(self) -> Mark:
        return self.gpu.mark(self.handle)

    def synchronize(self) -> None:
        self.gpu.synchronize(self.handle)

    # memory

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> DeviceArray:
        shape, kind = tuple(map(int, shape)), np.dtype(dtype)
        memory = DeviceMemory(self.gpu, kind.itemsize * math.prod(shape), self._memory_of)
        return DeviceArray(memory, memory.address, shape, c_strides(shape), kind)

    def filled(self, shape: Sequence[int], dtype: npt.DTypeLike, byte: int = 0) -> DeviceArray:
        """Every byte of it is `byte`."""
        array = self.empty(shape, dtype)
        self.gpu.fill(array.address, byte, array.nbytes, self.handle)
        return array

    def upload(self, array: npt.NDArray[Any]) -> DeviceArray:
        """The array may change as soon as this returns: ordinary memory is staged by the driver."""
        array = np.ascontiguousarray(array)
        target = self.empty(array.shape, array.dtype)
        if array.nbytes:
            self.gpu.copy_to_device(target.address, array.ctypes.data, array.nbytes, self.handle)
        return target

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """Waits for the stream. The array must be contiguous."""
        assert array.is_contiguous
        target = np.empty(array.shape, array.dtype)
        self.gpu.use_device()
        if array.nbytes:
            self.gpu.copy_to_host(target.ctypes.data, self.uses(array), array.nbytes, self.handle)
        self.synchronize()
        return target

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Between contiguous arrays of one type."""
        assert source.is_contiguous
        assert target.is_contiguous
        assert source.nbytes == target.nbytes
        self.gpu.copy_within(self.uses(target), self.uses(source), source.nbytes, self.handle)

    def uses(self, array: DeviceArray) -> int:
        """The address of an array that a kernel of this stream is given."""
        if array.memory is not None:
            array.memory.used_by(self._memory_of)
        return array.address

    def start(self, kernel: str, grid: Grid, params: ctypes.Structure) -> None:
        self.gpu.start(kernel, grid, params, self.handle)

    # limits of values

    def new_limits(self, count: int) -> DeviceArray:
        """Of no values yet."""
        limits = self.empty((count,), _LIMITS)
        self.start("fill_limits", grid_of(count, 1), FillParams(limits=self.uses(limits), count=count))
        return limits

    # the window

    def gather(
        self,
        image_CZYX: DeviceArray,
        origins: Sequence[Sequence[int]],
        tile_zyx: Sequence[int],
        flips: Sequence[int],
        out: DeviceArray,
    ) -> None:
        """Tiles of the image, zeros around it, once for each of `flips` (`flip_bits`): (len(flips) * N, C, *tile)."""
        assert image_CZYX.is_contiguous
        assert len(origins) <= MOST_TILES
        params = GatherParams(
            image=self.uses(image_CZYX),
            out=self.uses(out),
            channels=image_CZYX.shape[0],
            shape=three(image_CZYX.shape[1:]),
            tile=three(tile_zyx),
            count=len(origins),
            copies=len(flips),
        )
        for number, origin in enumerate(origins):
            params.origin[number] = three(origin)
        params.flips[: len(flips)] = list(flips)
        rows = len(flips) * len(origins) * image_CZYX.shape[0] * tile_zyx[0] * tile_zyx[1]
        self.start("gather", grid_of(tile_zyx[2], rows), params)

    def add_mirrored(
        self, parts: DeviceArray, total_HZYX: DeviceArray, flips: Sequence[int], *, is_first: bool, divisor: int = 0
    ) -> None:
        """total (+)= parts (len(flips), H, Z, Y, X) mirrored back, in that order; then divided, unless by 0."""
        assert parts.is_contiguous
        assert total_HZYX.is_contiguous
        heads, *tile = total_HZYX.shape
        params = MirrorParams(
            parts=self.uses(parts),
            total=self.uses(total_HZYX),
            heads=heads,
            tile=three(tile),
            copies=len(flips),
            is_first=is_first,
            divisor=divisor,
        )
        params.flips[: len(flips)] = list(flips)
        self.start("add_mirrored", grid_of(tile[2], heads * tile[0] * tile[1]), params)

    def add_weighted(
        self, logits_HZYX: DeviceArray, weights_ZYX: DeviceArray | None, sums_HZYX: DeviceArray, *, is_first: bool
    ) -> None:
        """sums = half(sums + logits * weights); `is_first`: half(logits * weights). Weights None: all one."""
        _check_equal(logits_HZYX.shape, sums_HZYX.shape)
        params = AddParams(
            logits=self.uses(logits_HZYX),
            weights=None if weights_ZYX is None else self.uses(weights_ZYX),
            sums=self.uses(sums_HZYX),
            heads=len(sums_HZYX),
            shape=three(sums_HZYX.shape[1:]),
            logits_stride=strides_of(logits_HZYX),
            weights_stride=Strides() if weights_ZYX is None else strides_of(weights_ZYX),
            sums_stride=strides_of(sums_HZYX),
            is_first=is_first,
        )
        self.start("add_weighted", _grid_of_volumes(sums_HZYX), params)

    def add_halves(self, values_HZYX: DeviceArray, sums_HZYX: DeviceArray) -> None:
        """sums = half(sums + values)"""
        _check_equal(values_HZYX.shape, sums_HZYX.shape)
        params = AddHalvesParams(
            values=self.uses(values_HZYX),
            sums=self.uses(sums_HZYX),
            heads=len(sums_HZYX),
            shape=three(sums_HZYX.shape[1:]),
            values_stride=strides_of(values_HZYX),
            sums_stride=strides_of(sums_HZYX),
        )
        self.start("add_halves", _grid_of_volumes(sums_HZYX), params)

    def divide(self, sums_HZYX: DeviceArray, total_ZYX: DeviceArray | int, limits: DeviceArray) -> None:
        """sums = half(sums / total); extends `limits` (of two) by the sums before and by the quotients."""
        is_number = isinstance(total_ZYX, int)
        params = DivideParams(
            sums=self.uses(sums_HZYX),
            total=None if isinstance(total_ZYX, int) else self.uses(total_ZYX),
            limits=self.uses(limits),
            heads=len(sums_HZYX),
            shape=three(sums_HZYX.shape[1:]),
            sums_stride=strides_of(sums_HZYX),
            total_stride=Strides() if isinstance(total_ZYX, int) else strides_of(total_ZYX),
            count=total_ZYX if is_number else 0,
        )
        rows = len(sums_HZYX) * sums_HZYX.shape[1] * sums_HZYX.shape[2]
        self.start("divide", grid_of(sums_HZYX.shape[3], rows, reduces=True), params)

    def copy_halves(self, values_HZYX: DeviceArray, out_HZYX: DeviceArray) -> None:
        _check_equal(values_HZYX.shape, out_HZYX.shape)
        params = CopyParams(
            values=self.uses(values_HZYX),
            out=self.uses(out_HZYX),
            heads=len(out_HZYX),
            shape=three(out_HZYX.shape[1:]),
            values_stride=strides_of(values_HZYX),
            out_stride=strides_of(out_HZYX),
        )
        self.start("copy_halves", _grid_of_volumes(out_HZYX), params)


def flip_bits(axes: Sequence[int], dims: int) -> int:
    """Mirrored axes, counted from 0 among `dims` spatial ones, as bits: 1 z, 2 y, 4 x."""
    return sum(1 << (axis + 3 - dims) for axis in axes)


def values_of_limits(limits: npt.NDArray[Any]) -> list[tuple[float, float]]:
    """(lowest, highest) of each; NaN where there was one."""
    found = []
    for entry in limits:
        if entry["has_nan"]:
            found.append((math.nan, math.nan))
            continue
        keys = np.array([entry["low"], entry["high"]], np.uint32)
        bits = np.where(keys & 0x80000000, keys & 0x7FFFFFFF, ~keys)
        low, high = bits.astype(np.uint32).view(np.float32)
        found.append((float(low), float(high)))
    return found


def strides_of(array: DeviceArray) -> Strides:
    """Of heads (0 where there are none), z and y. x must be contiguous."""
    *before, x = array.strides
    assert x == 1 or array.shape[-1] == 1, f"neighbours along x lie {x} apart"
    return Strides(*([0] * (3 - len(before)) + before))


def type_of(array: DeviceArray) -> int:
    """As kernels name the types of what they read."""
    return _TYPES[array.dtype]


def check_size(shape: Sequence[int]) -> None:
    """Raises BackendError for a volume that kernels cannot count."""
    if math.prod(shape) >= MOST_VOXELS:
        raise BackendError(
            f"an array of {' x '.join(map(str, shape))} is beyond what is computed on a GPU, {MOST_VOXELS} values\n"
            "predict with -device cpu"
        )


def _grid_of_volumes(array_HZYX: DeviceArray) -> Grid:
    heads, depth, height, width = array_HZYX.shape
    return grid_of(width, heads * depth * height)


def _check_equal(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert shape == other, f"arrays of shapes {shape} and {other}"


def _destroy(gpu: Gpu, handle: int) -> None:
    gpu.use_device()
    gpu.destroy_stream(handle)
