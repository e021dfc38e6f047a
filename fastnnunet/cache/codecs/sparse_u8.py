"""`sparse_u8`: for many classes, of which each place has few.

Stored are C bytes in units of 1/L, L = 255 or fewer levels: channel c >= 1 the class c, channel 0 the *tail*.
Background, L minus all of them, is implied, so an all-zero voxel is background. Every channel is a chunk of its own:
where a class is not near, its chunk is empty and is neither written nor read.

`tolerance` 0: there is no tail and the units are those of `simplex_u8`, to the bit, with its bound 1/L.

But at a temperature of 3 or 4 a hundred classes that share 0.2 of the mass have half a unit each, everywhere, and the
largest remainders turn that into noise in all channels. So with a `tolerance` t > 1/L the foreground classes of a voxel
with p <= t are stored as one number, their sum, to be spread evenly over the classes that have no units of their own.

The bound is t. Background, the tail's sum and the classes above t are apportioned together as in `simplex_u8`, so each
errs by less than 1/L < t. (A class above t has at least one unit, since L t > 1: no units of its own means tail.) A
tail of n classes has values in [0, t], so each differs from their mean by at most t (1 - 1/n); the mean is off by its
n-th of the sum's error, 1 / (L n). The total, t (1 - 1/n) + (1/L) / n, is a weighted mean of t and 1/L and so at most
t. The channels still sum to one.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastnnunet.cache.codecs.apportion import apportioned
from fastnnunet.cache.codecs.base import LEVELS, bounded_error, softmax
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.errors import SpecError
from fastnnunet.specs.cache import LARGEST_TOLERANCE


@dataclass(frozen=True, slots=True)
class SparseU8:
    """Exclusive classes: C stored bytes in units of 1/levels, the tail and the foreground; a chunk for each."""

    num_heads: int
    tolerance: float = 0.0
    levels: int = LEVELS
    name: ClassVar[str] = "sparse_u8"
    dtype: ClassVar[str] = "uint8"
    version: ClassVar[int] = 1
    needs_logits: ClassVar[bool] = False
    chunk_channels: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.num_heads < 2:
            raise SpecError(f"sparse_u8 needs at least 2 classes (background and one more), got {self.num_heads}")
        if not 1 <= self.levels <= LEVELS:
            raise SpecError(f"sparse_u8: got {self.levels} levels, expected 1 to {LEVELS}")
        if self.tolerance and not 1.001 / self.levels <= self.tolerance <= LARGEST_TOLERANCE:
            raise SpecError(
                f"tolerance: got {self.tolerance:g}, expected 0, or more than 1/levels ({1 / self.levels:.5f}) "
                f"and at most {LARGEST_TOLERANCE}"
            )

    @property
    def eps(self) -> float:
        return max(1 / self.levels, self.tolerance)

    @property
    def num_stored(self) -> int:
        return self.num_heads

    @property
    def num_targets(self) -> int:
        return self.num_heads - 1

    def target(self, logits: Float32Array, temperature: float | None) -> Float32Array:
        return softmax(logits, temperature)

    def encode(self, target: Float32Array) -> StoredArray:
        """(C, ...) soft labels -> (C, ...) units.

        Raises ValueError when the input does not sum to one over axis 0 (or holds NaN).
        """
        p = target.reshape(self.num_heads, -1)
        if not self.tolerance:
            units = apportioned(p, self.levels)
            units[0] = 0
            return units.astype(np.uint8).reshape(target.shape)
        merged = np.empty((self.num_heads + 1, p.shape[1]), np.float32)  # background, classes above t, tail
        merged[0] = p[0]
        np.multiply(p[1:], p[1:] > np.float32(self.tolerance), out=merged[1:-1])
        np.subtract(p[1:], merged[1:-1]).sum(axis=0, out=merged[-1])
        units = apportioned(merged, self.levels)
        units[0] = units[-1]
        return units[:-1].astype(np.uint8).reshape(target.shape)

    def decode(self, stored: StoredArray) -> Float32Array:
        unit = np.float32(1 / self.levels)
        out = np.empty(stored.shape, np.float32)
        np.multiply(stored[1:], unit, out=out[1:])
        if stored[0].any():
            in_tail = stored[1:] == 0
            classes = np.maximum(np.count_nonzero(in_tail, axis=0), 1)
            out[1:] += in_tail * (stored[0] * unit / classes).astype(np.float32)
        np.multiply(self.levels - stored.sum(axis=0, dtype=np.int32), unit, out=out[0], casting="unsafe")
        return out

    def measured_error(self, stored: StoredArray, target: Float32Array) -> float:
        return bounded_error(self.name, self.decode(stored), target, self.eps)

    def problem(self, stored: StoredArray) -> str | None:
        largest = int(stored.sum(axis=0, dtype=np.int32).max(initial=0))
        if largest > self.levels:
            return f"the channels of a voxel sum to {largest}, expected at most {self.levels}"
        if stored[0].any():
            if not self.tolerance:
                return "channel 0 holds a tail, expected zeros with tolerance 0"
            if (stored[1:] != 0).all(axis=0)[stored[0] > 0].any():
                return "a voxel has a tail, but every class has units of its own"
        return None
