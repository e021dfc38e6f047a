"""Interpolation along one axis: separable resampling is one of these per axis.

`scipy.ndimage.zoom(grid_mode=True, mode="nearest")`, which scikit-image's `resize` calls, is linear and separable, so
zooming a volume is the same as applying a one-dimensional operator per axis. That is several times faster than the
64 taps per voxel of a cubic zoom in three dimensions, and lets one resample a few output planes at a time.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

Float = TypeVar("Float", np.float32, np.float64)
_BLOCK_ROWS = 64
_NEGLIGIBLE = 1e-18  # far below one float64 rounding: leaves out the exponential tail of the spline prefilter


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """Take the input index of each output index."""

    index: npt.NDArray[np.intp]

    def apply(self, values: npt.NDArray[Float], axis: int) -> npt.NDArray[Float]:
        return values.take(self.index, axis=axis)

    def rows(self, start: int, stop: int) -> "Nearest":
        return Nearest(self.index[start:stop])


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Weighted mean of two neighbours."""

    low: npt.NDArray[np.intp]
    high: npt.NDArray[np.intp]
    weight_high: npt.NDArray[np.float64]

    def apply(self, values: npt.NDArray[Float], axis: int) -> npt.NDArray[Float]:
        shape = [1] * values.ndim
        shape[axis] = -1
        weight_high = self.weight_high.astype(values.dtype).reshape(shape)
        out = values.take(self.low, axis=axis)
        out *= 1 - weight_high
        upper = values.take(self.high, axis=axis)
        upper *= weight_high
        out += upper
        return out

    def rows(self, start: int, stop: int) -> "Linear":
        return Linear(self.low[start:stop], self.high[start:stop], self.weight_high[start:stop])


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Any linear operator as blocks of rows of its (outputs, inputs) matrix, each with the columns that count."""

    blocks: tuple[tuple[int, npt.NDArray[np.float64]], ...]  # first input index, (rows, columns)

    def apply(self, values: npt.NDArray[Float], axis: int) -> npt.NDArray[Float]:
        parts = []
        for first, matrix in self.blocks:
            index = [slice(None)] * values.ndim
            index[axis] = slice(first, first + matrix.shape[1])
            part = np.tensordot(matrix.astype(values.dtype, copy=False), values[tuple(index)], axes=(1, axis))
            parts.append(np.moveaxis(part, 0, axis))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


AxisOperator = Nearest | Linear | Dense
Convention = Literal["scipy", "torch"]


@lru_cache(maxsize=64)
def axis_operator(size_in: int, size_out: int, order: int, convention: Convention = "scipy") -> AxisOperator:
    """Operator that takes `size_in` samples to `size_out`, half-pixel centres, border values repeated.

    `order` is the spline order (0 nearest, 1 linear, 3 cubic with prefilter). The convention says whose arithmetic:
    torch's `interpolate` computes coordinates in float32 and its `nearest-exact` is order 0.
    """
    if convention == "torch":
        scale32 = np.float32(size_in) / np.float32(size_out)
        centres32 = (np.arange(size_out, dtype=np.float32) + np.float32(0.5)) * scale32
        if order == 0:
            return Nearest(np.minimum(centres32.astype(np.intp), size_in - 1))
        position = np.maximum(centres32 - np.float32(0.5), np.float32(0)).astype(np.float64)
    else:
        if order > 1:
            return _spline(size_in, size_out, order)
        position = np.clip((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5, 0, size_in - 1)
        if order == 0:
            return Nearest(np.floor(position + 0.5).astype(np.intp))
    low = np.minimum(position.astype(np.intp), size_in - 1)
    return Linear(low, np.minimum(low + 1, size_in - 1), position - low)


def _spline(size_in: int, size_out: int, order: int) -> Dense:
    """The matrix of SciPy's own one-dimensional zoom, column by column, so that it cannot differ from it."""
    from scipy.ndimage import zoom

    matrix = np.empty((size_out, size_in))
    unit = np.zeros(size_in)
    for column in range(size_in):
        unit[column] = 1
        zoom(unit, size_out / size_in, output=matrix[:, column], order=order, mode="nearest", grid_mode=True)
        unit[column] = 0
    blocks = []
    for start in range(0, size_out, _BLOCK_ROWS):
        rows = matrix[start : start + _BLOCK_ROWS]
        used = np.flatnonzero(np.abs(rows).max(axis=0) > _NEGLIGIBLE)
        blocks.append((int(used[0]), np.ascontiguousarray(rows[:, used[0] : used[-1] + 1])))
    return Dense(tuple(blocks))
