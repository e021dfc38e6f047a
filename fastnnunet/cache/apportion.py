"""Who gets the units left over in largest-remainder rounding. C = channels, N = voxels."""

import numpy as np

from fastnnunet.cache.interfaces import Float32Array


def largest_mask(remainders: Float32Array, count: np.ndarray) -> np.ndarray:
    """(C, N) mask of the `count[n]` largest values of each column; equal values are taken in channel order."""
    channels = len(remainders)
    if channels <= 8:  # counting who is ahead is quicker than sorting short columns
        mask = np.empty(remainders.shape, bool)
        for c in range(channels):
            ahead = np.zeros(count.shape, np.int32)
            for other in range(channels):
                if other != c:
                    compare = np.greater_equal if other < c else np.greater
                    ahead += compare(remainders[other], remainders[c])
            np.less(ahead, count, out=mask[c])
        return mask
    ascending = np.sort(remainders.T, axis=1)
    rows = np.arange(len(ascending))
    # the value of the last channel served; with count 0 nothing is served and any value above 1 will do
    threshold = np.where(count > 0, ascending[rows, channels - np.maximum(count, 1)], np.float32(2))
    mask = remainders > threshold
    ties = remainders == threshold
    wanted = count - mask.sum(axis=0, dtype=np.int32)
    mask |= ties & (np.cumsum(ties, axis=0, dtype=np.int32) <= wanted)
    return mask
