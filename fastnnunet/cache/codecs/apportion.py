"""Largest-remainder rounding: shares of one become whole units that sum to a given number. C = channels, N = voxels."""

import numpy as np

from fastnnunet.cache.interfaces import Float32Array

SORTED_AT_ONCE = 1 << 12  # columns: a sort works on what fits in a core's cache


def apportioned(p: Float32Array, levels: int) -> Float32Array:
    """(C, N) probabilities -> (C, N) whole units that sum to `levels` in each column, each within 1 of p * levels.

    Equal remainders are served in channel order. Raises ValueError when a column does not sum to one (or holds NaN).
    """
    scaled = p * np.float32(levels)
    units = np.floor(scaled)
    scaled -= units  # now the remainders
    left = levels - units.sum(axis=0)
    # NaN fails both comparisons, so it is caught here too
    if not (np.all(left >= 0) and np.all(left <= len(p))):
        raise ValueError("the probabilities do not sum to one over the first axis")
    units += largest_mask(scaled, left.astype(np.int32))
    return units


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
