"""Arrays in the memory of a GPU: shape, strides and views as NumPy has them; what is in them only kernels touch."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt


class Allocator(Protocol):
    """Memory in the order of streams; see `Gpu`."""

    def use_device(self) -> None: ...
    def allocate_on(self, size_bytes: int, stream: int) -> int: ...
    def free_on(self, address: int, stream: int) -> None: ...


class StreamHandle:
    """CUDA's handle of a stream, which lives as long as memory that is to be freed in its order."""

    def __init__(self, number: int, owner: object = None) -> None:
        """`owner`: of the stream, kept alive; None: whoever made it destroys it with this object."""
        self.number, self._owner = number, owner


class DeviceMemory:
    """A block that is freed in the order of the stream that used it last, when its last view is gone."""

    def __init__(self, gpu: Allocator, size_bytes: int, stream: StreamHandle) -> None:
        self.address = gpu.allocate_on(size_bytes, stream.number)
        self._last = [stream]
        weakref.finalize(self, _free, gpu, self.address, self._last)

    def used_by(self, stream: StreamHandle) -> None:
        """Whoever calls it sees to it that `stream` follows what used the memory before (`Gpu.follow`)."""
        self._last[0] = stream


def _free(gpu: Allocator, address: int, last: list[StreamHandle]) -> None:
    gpu.use_device()  # the current device is a matter of the thread, and any may be the one that drops the last view
    gpu.free_on(address, last[0].number)


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """Strides are in elements. `memory` keeps the block alive; None: it belongs to an engine."""

    memory: DeviceMemory | None
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_contiguous(self) -> bool:
        return self.strides == c_strides(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "DeviceArray":
        """A view, by NumPy's rules for slices, numbers and `...`."""
        shadow = self._shadow()
        return self._like(shadow, shadow[index])

    def transpose(self, *axes: int) -> "DeviceArray":
        shadow = self._shadow()
        return self._like(shadow, shadow.transpose(*axes))

    def reshape(self, *shape: int) -> Self:
        """Of a contiguous array."""
        assert self.is_contiguous
        assert math.prod(shape) == math.prod(self.shape), f"{self.shape} as {shape}"
        return replace(self, shape=shape, strides=c_strides(shape))

    def _shadow(self) -> npt.NDArray[Any]:
        """An array of that layout, whose values are never looked at."""
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(np.empty(1, self.dtype), self.shape, strides)

    def _like(self, shadow: npt.NDArray[Any], view: npt.NDArray[Any]) -> "DeviceArray":
        offset = view.__array_interface__["data"][0] - shadow.__array_interface__["data"][0]
        strides = tuple(stride // self.dtype.itemsize for stride in view.strides)
        return DeviceArray(self.memory, self.address + offset, view.shape, strides, self.dtype)


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """In elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
