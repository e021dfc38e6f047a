"""`sparse_u8`: for many classes, of which a voxel has few.

Stored are slots of two bytes, (class, units of 1/255): slot by slot the foreground classes of a voxel, most units first,
equal ones in class order. A block has as many slots as its busiest voxel needs; the rest are (0, 0), and a chunk of
nothing else is not written at all. Background, 255 minus all units, is implied: an all-zero voxel is background.

`tolerance` 0: the units are those of `simplex_u8`, to the bit, with its bound 1/255.

But at a temperature of 3 or 4 a hundred classes that share 0.2 of the mass have half a unit each, and largest remainders
turn that into dozens of slots of noise. So with a `tolerance` t >= 0.004 the tail of a voxel, its foreground classes with
p <= t, is stored as one number in slot 0, (0, units): its mass, to be spread evenly over the classes that have no slot.

The bound is t. Background, the tail's mass and the listed classes are apportioned together as in `simplex_u8`, so each
errs by less than 1/255 < t. A tail of n classes has values in [0, t], so each differs from their mean by at most
t (1 - 1/n); the mean is off by its n-th of the tail's error, 1 / (255 n). The sum, t (1 - 1/n) + (1/255) / n, is a mean of
t and 1/255 and so at most t. The channels still sum to one exactly.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fastnnunet.cache.codecs.base import LEVELS, SUM_TOLERANCE, bounded_error, softmax
from fastnnunet.cache.codecs.simplex_u8 import SimplexU8
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.errors import SpecError

Integers = npt.NDArray[np.int64]
UNIT = np.float32(1 / LEVELS)
SMALLEST_TOLERANCE = 0.004  # the first round number above 1/255


@dataclass(frozen=True, slots=True)
class SparseU8:
    """Exclusive classes: slots of (class, units); S = 2 * slots, at least 2."""

    num_heads: int
    tolerance: float = 0.0
    name: ClassVar[str] = "sparse_u8"
    dtype: ClassVar[str] = "uint8"
    version: ClassVar[int] = 1
    needs_logits: ClassVar[bool] = False
    num_stored: ClassVar[None] = None
    chunk_channels: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 2 <= self.num_heads <= 256:
            raise SpecError(f"sparse_u8 needs 2 to 256 classes with background, got {self.num_heads}")
        if self.tolerance and not SMALLEST_TOLERANCE <= self.tolerance <= 0.1:
            raise SpecError(f"tolerance: got {self.tolerance}, expected 0, or {SMALLEST_TOLERANCE} to 0.1")

    @property
    def eps(self) -> float:
        return max(1 / LEVELS, self.tolerance)

    @property
    def num_targets(self) -> int:
        return self.num_heads - 1

    def target(self, logits: Float32Array, temperature: float | None) -> Float32Array:
        return softmax(logits, temperature)

    def encode(self, target: Float32Array) -> StoredArray:
        """(C, ...) soft labels -> (2 * slots, ...), as many slots as the busiest voxel needs, at least one.

        Raises ValueError when the input does not sum to one over axis 0 (or holds NaN).
        """
        flat = target.reshape(self.num_heads, -1)
        voxels = flat.shape[1]
        if self.tolerance:
            number, voxel, units, spread = _with_tail(flat, np.float32(self.tolerance))
        else:
            dense = SimplexU8(self.num_heads).encode(flat)
            at = np.flatnonzero(dense)
            number, voxel = np.divmod(at, max(voxels, 1))
            number, units, spread = number + 1, dense.reshape(-1)[at].astype(np.int64), None
        # one sort: by voxel, then most units first, then class
        key = np.sort(voxel << 16 | (LEVELS - units) << 8 | number)
        voxel = key >> 16
        slot, slots = _rank(voxel, voxels)
        if spread is not None:  # slot 0 is the tail's, used or not
            slot, slots = slot + 1, slots + 1
        stored = np.zeros((2 * max(slots, 1), voxels), np.uint8)
        stored[2 * slot, voxel] = key & 0xFF
        stored[2 * slot + 1, voxel] = LEVELS - (key >> 8 & 0xFF)
        if spread is not None:
            stored[1] = spread
        return stored.reshape(len(stored), *target.shape[1:])

    def decode(self, stored: StoredArray) -> Float32Array:
        """(S, ...) with any even S -> (C, ...); slots of zeros change nothing."""
        number, units = stored[0::2].reshape(len(stored) // 2, -1), stored[1::2].reshape(len(stored) // 2, -1)
        voxels = number.shape[1]
        total = units.sum(axis=0, dtype=np.int32)
        spread = np.where(number == 0, units, 0).sum(axis=0, dtype=np.int32)
        out = np.zeros((self.num_heads, voxels), np.float32)
        if spread.any():
            others = self.num_heads - 1 - np.count_nonzero(number, axis=0)
            out[...] = spread / np.maximum(others, 1) * UNIT
        flat = out.reshape(-1)
        for number_N, units_N in zip(number, units, strict=True):
            voxel = np.flatnonzero(number_N)
            flat[number_N[voxel] * np.int64(voxels) + voxel] = units_N[voxel] * UNIT
        out[0] = (LEVELS - total) * UNIT
        return out.reshape(self.num_heads, *stored.shape[1:])

    def measured_error(self, stored: StoredArray, target: Float32Array) -> float:
        return bounded_error(self.name, self.decode(stored), target, self.eps)

    def problem(self, stored: StoredArray) -> str | None:
        if len(stored) == 0 or len(stored) % 2:
            return f"{len(stored)} stored channels, expected slots of two"
        number, units = stored[0::2].reshape(len(stored) // 2, -1), stored[1::2].reshape(len(stored) // 2, -1)
        largest = int(units.sum(axis=0, dtype=np.int32).max(initial=0))
        if largest > LEVELS:
            return f"the slots of a voxel sum to {largest}, expected at most {LEVELS}"
        if (last := int(number.max(initial=0))) >= self.num_heads:
            return f"a slot names class {last}, expected at most {self.num_heads - 1}"
        if (number[units == 0] > 0).any():
            return "a slot names a class without units"
        spread = (number == 0) & (units > 0)
        if spread.any() and not (self.tolerance and np.count_nonzero(spread, axis=0).max() == 1):
            return "a slot has units without a class"
        if (spread.any(axis=0) & (np.count_nonzero(number, axis=0) == self.num_heads - 1)).any():
            return "a tail has units, but every class has a slot"
        slot, voxel = np.nonzero(number)
        key = np.sort(voxel << 8 | number[slot, voxel].astype(np.int64))
        return "two slots of a voxel name the same class" if (key[1:] == key[:-1]).any() else None


def _with_tail(p: Float32Array, tolerance: np.float32) -> tuple[Integers, Integers, Integers, Integers]:
    """Largest-remainder units of background, tail and the classes above `tolerance`, of (C, N) soft labels.

    Returns class, voxel and units of each listed class, and the units (N,) of the tail. Only the few listed values are
    sorted, never all C of a voxel.
    """
    heads, voxels = p.shape
    if not np.all(np.abs(p.sum(axis=0) - 1) <= SUM_TOLERANCE):
        raise ValueError("sparse_u8: the probabilities do not sum to one over the first axis")
    at = np.flatnonzero(p[1:] > tolerance)
    number, voxel = np.divmod(at, max(voxels, 1))
    number += 1
    listed = p[1:].reshape(-1)[at].astype(np.float64)
    background = p[0].astype(np.float64)
    tail = 1 - background - np.bincount(voxel, listed, voxels)  # what float32 lost goes here too
    tail[np.bincount(voxel, minlength=voxels) == heads - 1] = 0  # no class is left to carry it
    every = np.arange(voxels)
    scaled = np.concatenate((background, np.maximum(tail, 0), listed)) * LEVELS
    owner = np.concatenate((every, every, voxel))
    # equal remainders: background, then classes in their order, the tail last
    order = np.concatenate((np.zeros(voxels, np.int64), np.full(voxels, 511), number))
    units = np.floor(scaled)
    fine = ((1 - (scaled - units)) * (1 << 22)).astype(np.int64)  # remainders to 2^-22: far below float32's rounding
    left = LEVELS - np.bincount(owner, units, voxels)
    by_remainder = np.argsort(owner << 32 | fine << 9 | order)
    rank, _ = _rank(owner[by_remainder], voxels)
    units[by_remainder] += rank < left[owner[by_remainder]]
    whole = units.astype(np.int64)
    return number, voxel, whole[2 * voxels :], whole[voxels : 2 * voxels]


def _rank(group: Integers, groups: int) -> tuple[Integers, int]:
    """Position of each entry within its group, for sorted group numbers, and the size of the largest group."""
    sizes = np.bincount(group, minlength=groups)
    return np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group], int(sizes.max(initial=0))
