"""`simplex_u8`: whole multiples of 1/L that sum to one.

C probabilities are rounded to whole multiples of 1/L that still sum to exactly L (largest-remainder rounding,
Hamilton's apportionment), with L = 255 levels, or 63, 31 or 15 for a smaller cache. Channel 0, the background, is not
stored: it is L minus the others' sum, so an all-zero voxel *is* background and zero padding needs no special case.

The bound. With r_c = L p_c - floor(L p_c) and k = sum r_c whole units left to hand out, the k largest remainders go up.
A channel left down has k remainders at least as large above it, so k >= (k + 1) r_c and r_c <= k / (k + 1)
<= (C - 1) / C. One that goes up satisfies k <= (k - 1) + r_c (C - k + 1), so 1 - r_c <= 1 - 1 / C. Either way the
error is at most (1 - 1/C) / L < 1/L; the gap to 1/L is wider than float32 rounding for every C up to 10^4.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastnnunet.cache.codecs.apportion import apportioned
from fastnnunet.cache.codecs.base import LEVELS, bounded_error, softmax
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.errors import SpecError


@dataclass(frozen=True, slots=True)
class SimplexU8:
    """Exclusive classes: C-1 stored channels in units of 1/levels, background implied."""

    num_heads: int
    levels: int = LEVELS
    name: ClassVar[str] = "simplex_u8"
    dtype: ClassVar[str] = "uint8"
    version: ClassVar[int] = 1
    needs_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_heads < 2:
            raise SpecError(f"simplex_u8 needs at least 2 classes (background and one more), got {self.num_heads}")
        if not 1 <= self.levels <= LEVELS:
            raise SpecError(f"simplex_u8: got {self.levels} levels, expected 1 to {LEVELS}")

    @property
    def eps(self) -> float:
        return 1 / self.levels

    @property
    def num_stored(self) -> int:
        return self.num_heads - 1

    @property
    def chunk_channels(self) -> int:
        return self.num_heads - 1

    @property
    def num_targets(self) -> int:
        return self.num_heads - 1

    def target(self, logits: Float32Array, temperature: float | None) -> Float32Array:
        return softmax(logits, temperature)

    def encode(self, target: Float32Array) -> StoredArray:
        """Largest-remainder rounding; equal remainders are served in channel order, background first.

        Raises ValueError when the input does not sum to one over axis 0 (or holds NaN).
        """
        units = apportioned(target.reshape(self.num_heads, -1), self.levels)
        return units[1:].astype(np.uint8).reshape(self.num_stored, *target.shape[1:])

    def decode(self, stored: StoredArray) -> Float32Array:
        out = np.empty((self.num_heads, *stored.shape[1:]), np.float32)
        np.multiply(stored, np.float32(1 / self.levels), out=out[1:])
        background = self.levels - stored.sum(axis=0, dtype=np.int32)
        np.multiply(background, np.float32(1 / self.levels), out=out[0], casting="unsafe")
        return out

    def measured_error(self, stored: StoredArray, target: Float32Array) -> float:
        return bounded_error(self.name, self.decode(stored), target, self.eps)

    def problem(self, stored: StoredArray) -> str | None:
        largest = int(stored.sum(axis=0, dtype=np.int32).max(initial=0))
        return (
            f"the channels of a voxel sum to {largest}, expected at most {self.levels}"
            if largest > self.levels
            else None
        )
