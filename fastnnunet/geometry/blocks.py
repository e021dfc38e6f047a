"""Images at a coarse spacing: one voxel for a block of voxels. Blocks at the end of an axis may be smaller."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastnnunet import native


def block_means(
    image_CZYX: npt.NDArray[np.float32], factor: Sequence[int], *, threads: int | None = None
) -> npt.NDArray[np.float32]:
    """The mean of each block of `factor` (z, y, x) voxels: float32 (C, ceil(Z / z), ceil(Y / y), ceil(X / x))."""
    return native.block_means(image_CZYX, factor, threads=threads)


def block_any(mask_ZYX: npt.NDArray[np.bool_], factor: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Whether any voxel of each block is true: bool (ceil(Z / z), ceil(Y / y), ceil(X / x))."""
    found = mask_ZYX
    for axis, size in enumerate(factor):
        if size > 1:
            found = np.logical_or.reduceat(found, _starts(found.shape[axis], size), axis=axis)
    return found


def coarse_shape(shape_zyx: Sequence[int], factor: Sequence[int]) -> tuple[int, ...]:
    """How many blocks there are along each axis."""
    return tuple(-(-n // size) for n, size in zip(shape_zyx, factor, strict=True))


def _starts(length: int, size: int) -> npt.NDArray[np.intp]:
    return np.arange(0, length, size)
