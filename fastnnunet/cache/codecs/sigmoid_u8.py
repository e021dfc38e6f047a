"""`sigmoid_u8`: overlapping regions, each its own byte.

The bound: rounding to the nearest multiple of 1/255 errs by at most 0.5/255. Zero is "not in the region", so zero
padding is outside every region.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastnnunet.cache.codecs.base import LEVELS, bounded_error, sigmoid
from fastnnunet.cache.interfaces import Float32Array, StoredArray


@dataclass(frozen=True, slots=True)
class SigmoidU8:
    """Overlapping regions: every head stored, rounded to the nearest multiple of 1/255."""

    num_heads: int
    name: ClassVar[str] = "sigmoid_u8"
    dtype: ClassVar[str] = "uint8"
    version: ClassVar[int] = 1
    needs_logits: ClassVar[bool] = False
    eps: ClassVar[float] = 0.5 / LEVELS + 1e-6  # half a unit, plus float32 rounding of the product

    @property
    def num_stored(self) -> int:
        return self.num_heads

    @property
    def chunk_channels(self) -> int:
        return self.num_heads

    @property
    def num_targets(self) -> int:
        return self.num_heads

    def target(self, logits: Float32Array, temperature: float | None) -> Float32Array:
        return sigmoid(logits, temperature)

    def encode(self, target: Float32Array) -> StoredArray:
        return np.rint(target * np.float32(LEVELS)).astype(np.uint8)

    def decode(self, stored: StoredArray) -> Float32Array:
        return stored * np.float32(1 / LEVELS)

    def measured_error(self, stored: StoredArray, target: Float32Array) -> float:
        return bounded_error(self.name, self.decode(stored), target, self.eps)

    def problem(self, stored: StoredArray) -> str | None:
        return None  # every byte is a valid probability
