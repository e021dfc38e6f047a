"""Centred padding to a minimum shape."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastnnunet import native


def centre_padding(shape: Sequence[int], min_shape: Sequence[int]) -> list[tuple[int, int]]:
    """(below, above) per axis so that `shape` reaches `min_shape`; the odd voxel goes above, as in nnU-Net.

    A shorter `min_shape` speaks of the last axes; an axis that is long enough is left alone.
    """
    least = (*shape[: len(shape) - len(min_shape)], *min_shape)
    return [native.centre_padding(size, minimum) for size, minimum in zip(shape, least, strict=True)]


def inner_slices(shape: Sequence[int], padding: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """Where the original `shape` lies inside the padded array."""
    return tuple(slice(below, below + s) for s, (below, _) in zip(shape, padding, strict=True))


def pad_spatial(image_CX: npt.NDArray[np.float32], padding: Sequence[tuple[int, int]]) -> npt.NDArray[np.float32]:
    """Zero padding of every axis but the first; the array itself (no copy) where nothing is to be padded."""
    if not any(below or above for below, above in padding):
        return image_CX
    return np.pad(image_CX, [(0, 0), *padding])
