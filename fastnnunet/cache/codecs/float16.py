"""`float16`, the reference encoding: half floats that sum to at most one.

The C - 1 foreground probabilities are stored as half floats, and background is 1 minus their sum. Half floats up
to 1 are multiples of 2^-24, so float32 adds them without rounding while the sum is at most 1: the background is exact
and the channels sum to exactly one, provided the stored ones sum to at most 1. Where rounding to nearest would exceed
that, all but the largest are rounded towards zero, then the largest too; beside a largest that rounds to 1 the others,
at most 2^-12 together, become 0.

Its bound. Rounding to nearest errs by at most 2^-11 p, towards zero by less than 2^-10 p, below 2^-14 by at most 2^-24.
A foreground channel is at most 1, and below 1 half floats are at most 2^-11 apart: its error is at most 2^-11. The
background's error is the sum of the others', at most 2^-10 sum p + C 2^-24 <= 2^-10 + C 2^-24. float32 softmax sums to
one within C 2^-24 or so; where the stored sum still exceeds 1 by that much, the largest is lowered by one more step, at
most 2^-11. Altogether eps = 2^-10 + C 2^-22; typical is 2^-12, half a step below 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fastnnunet.cache.codecs.base import SUM_TOLERANCE, bounded_error, softmax
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.errors import SpecError


@dataclass(frozen=True, slots=True)
class Float16:
    """Exclusive classes: C-1 stored half floats that sum to at most 1, background implied. The reference encoding."""

    num_heads: int
    name: ClassVar[str] = "float16"
    dtype: ClassVar[str] = "float16"
    version: ClassVar[int] = 1
    needs_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_heads < 2:
            raise SpecError(f"float16 needs at least 2 classes (background and one more), got {self.num_heads}")

    @property
    def eps(self) -> float:
        return 2.0**-10 + self.num_heads * 2.0**-22

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
        """Round to half floats whose sum does not exceed one.

        Raises ValueError when the input does not sum to one over axis 0 (or holds NaN).
        """
        exact = target.reshape(self.num_heads, -1)[1:]
        if not np.all(np.abs(target.sum(axis=0) - 1) <= SUM_TOLERANCE):
            raise ValueError("float16: the probabilities do not sum to one over the first axis")
        stored = exact.astype(np.float16)
        if (over := _exceeds_one(stored)).any():
            stored[:, over] = _lowered(stored[:, over], exact[:, over])
        return stored.reshape(self.num_stored, *target.shape[1:])

    def decode(self, stored: StoredArray) -> Float32Array:
        out = np.empty((self.num_heads, *stored.shape[1:]), np.float32)
        out[1:] = stored
        np.subtract(np.float32(1), out[1:].sum(axis=0), out=out[0])
        return out

    def measured_error(self, stored: StoredArray, target: Float32Array) -> float:
        return bounded_error(self.name, self.decode(stored), target, self.eps)

    def problem(self, stored: StoredArray) -> str | None:
        if not (stored >= 0).all():
            return "a stored probability is negative or NaN"
        largest = float(stored.sum(axis=0, dtype=np.float64).max(initial=0))
        return f"the channels of a voxel sum to {largest}, expected at most 1" if largest > 1 else None


def _exceeds_one(stored: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    return stored.sum(axis=0, dtype=np.float64) > 1  # exact: multiples of 2^-24


def _lowered(stored: npt.NDArray[np.float16], exact: Float32Array) -> npt.NDArray[np.float16]:
    """(S, N) half floats just below `exact` where needed for the columns to sum to at most one."""
    columns = np.arange(stored.shape[1])
    zero = np.float16(0)
    down = np.where(stored > exact, np.nextafter(stored, zero), stored)
    largest = stored.argmax(axis=0)
    kept = down.copy()
    kept[:, stored[largest, columns] == 1] = 0  # certain: traces of other classes must not cost it 2^-11
    kept[largest, columns] = stored[largest, columns]
    out = np.where(_exceeds_one(kept), down, kept)
    while (over := _exceeds_one(out)).any():  # float32 softmax summed to a little more than one
        rows = out[:, over].argmax(axis=0)
        out[rows, columns[over]] = np.nextafter(out[rows, columns[over]], zero)
    return out
