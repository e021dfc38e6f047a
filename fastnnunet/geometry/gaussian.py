"""The weight of each voxel of a tile: high in the centre, low at the rim."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_SIGMA_SCALE = 1.0 / 8
_PEAK = 10.0
_TRUNCATE = 4.0  # scipy.ndimage.gaussian_filter's default


def gaussian_weights(tile_shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """nnU-Net's importance map of a tile: float32 values that are exactly its float16 ones. Read only, cached.

    It is what `scipy.ndimage.gaussian_filter(delta at T // 2, sigma = T / 8, mode="constant")` gives, scaled to a
    peak of 10, cast to float16, zeros replaced by the smallest non-zero weight. The filter of a delta is the outer
    product of its one-dimensional kernels, so SciPy is not needed.
    """
    return _weights(tuple(int(t) for t in tile_shape))


@lru_cache(maxsize=8)
def _weights(tile_shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    weights = np.ones(())
    for size in tile_shape:
        weights = weights[..., None] * _filtered_delta(size)
    weights = weights / (weights.max() / _PEAK)
    # through float32, as torch converts float64 to float16
    half = weights.astype(np.float32).astype(np.float16)
    half[half == 0] = half[half != 0].min()
    out = half.astype(np.float32)
    out.setflags(write=False)
    return out


def _filtered_delta(size: int) -> npt.NDArray[np.float64]:
    """A one-dimensional delta at size // 2 after a Gaussian filter of sigma size / 8, zeros outside the kernel."""
    sigma = size * _SIGMA_SCALE
    radius = int(_TRUNCATE * sigma + 0.5)
    kernel = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    kernel = kernel / kernel.sum()
    out = np.zeros(size)
    distance = np.arange(size) - size // 2
    reached = np.abs(distance) <= radius
    out[reached] = kernel[distance[reached] + radius]
    return out
