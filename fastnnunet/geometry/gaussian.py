"""The weight of each voxel of a tile: high in the centre, low at the rim."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fastnnunet import native


def gaussian_weights(tile_shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """nnU-Net's importance map of a tile: float32 values that are exactly its float16 ones. Read only, cached."""
    return _weights(tuple(int(t) for t in tile_shape))


@lru_cache(maxsize=8)
def _weights(tile_shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    weights = native.gaussian_weights(tile_shape)
    weights.setflags(write=False)
    return weights
