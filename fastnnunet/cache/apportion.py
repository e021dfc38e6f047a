"""Who gets the units left over in largest-remainder rounding. C = channels, N = voxels."""

import numpy as np

from fastnnunet.cache.interfaces import Float32Array

SORTED_AT_ONCE = 1 << 12  # columns: a sort works on what fits in a core's cache


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
    # the value of the last channel served; with count 0 nothing is served and any value above 1 will do
    threshold = np.where(count > 0, remainders.max(axis=0), np.float32(2))
    several = np.flatnonzero(count > 1)  # where one class has nearly everything a single unit is left: no sorting
    for start in range(0, len(several), SORTED_AT_ONCE):
        columns = several[start : start + SORTED_AT_ONCE]
        ascending = np.sort(remainders[:, columns].T, axis=1)
        threshold[columns] = ascending[np.arange(len(columns)), channels - count[columns]]
    mask = remainders >= threshold
    tied = np.flatnonzero(np.count_nonzero(mask, axis=0) != count)
    if len(tied):  # more values equal to the threshold than units left
        above = remainders[:, tied] > threshold[tied]
        ties = remainders[:, tied] == threshold[tied]
        wanted = count[tied] - above.sum(axis=0, dtype=np.int32)
        mask[:, tied] = above | (ties & (np.cumsum(ties, axis=0, dtype=np.int32) <= wanted))
    return mask
