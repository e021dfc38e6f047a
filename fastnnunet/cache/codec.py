"""Encodings: teacher logits -> what a cache stores, each with a proven error bound.

Shapes: (C, ...) arrays are channel first with any trailing axes; C = number of network heads, S = stored channels.

`simplex_u8` rounds C probabilities to whole multiples of 1/L that still sum to exactly L (largest-remainder rounding,
Hamilton's apportionment), with L = 255 levels, or 63 or 31 for a smaller cache. Channel 0, the background, is not
stored: it is L minus the others' sum, so an all-zero voxel *is* background and zero padding needs no special case.

The bound. With r_c = L p_c - floor(L p_c) and k = sum r_c whole units left to hand out, the k largest remainders go up.
A channel left down has k remainders at least as large above it, so k >= (k + 1) r_c and r_c <= k / (k + 1)
<= (C - 1) / C. One that goes up satisfies k <= (k - 1) + r_c (C - k + 1), so 1 - r_c <= 1 - 1 / C. Either way the
error is at most (1 - 1/C) / L < 1/L; the gap to 1/L is wider than float32 rounding for every C up to 10^4.

`float16` stores the C - 1 foreground probabilities as half floats, and background is 1 minus their sum. Half floats up
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
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from fastnnunet.cache.apportion import largest_mask
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.errors import BuildError, SpecError

LEVELS = 255
BLOCK_VALUES = 1 << 21  # values of one work block: bounds temporaries to a few tens of MiB whatever C is
SUM_TOLERANCE = 1e-3  # how far a float32 softmax may be from summing to one


class Codec(Protocol):
    """One way to store a teacher's answer. `target` is what is stored, `encode` and `decode` how."""

    @property
    def num_heads(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def eps(self) -> float:
        """Bound on |decode(encode(target)) - target|, per channel and voxel."""
        ...

    @property
    def num_stored(self) -> int: ...

    @property
    def chunk_channels(self) -> int: ...

    @property
    def dtype(self) -> str:
        """Of the stored values; zero must stand for background."""
        ...

    def target(self, logits: Float32Array, temperature: float) -> Float32Array:
        """(C, ...) logits -> (C, ...) soft labels."""
        ...

    def encode(self, target: Float32Array) -> StoredArray:
        """(C, ...) soft labels -> (S, ...) stored values."""
        ...

    def decode(self, stored: StoredArray) -> Float32Array:
        """(S, ...) stored values -> (C, ...) soft labels."""
        ...

    def problem(self, stored: StoredArray) -> str | None:
        """What makes these stored values impossible (None when nothing does)."""
        ...


def softmax(logits: Float32Array, temperature: float) -> Float32Array:
    """softmax(logits / temperature) over axis 0, in float32, stable for any finite input."""
    scaled = logits.astype(np.float32)
    scaled -= scaled.max(axis=0, keepdims=True)
    scaled /= np.float32(temperature)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=0, keepdims=True)
    return scaled


def sigmoid(logits: Float32Array, temperature: float) -> Float32Array:
    """sigmoid(logits / temperature) in float32; tanh form, which cannot overflow."""
    return (0.5 + 0.5 * np.tanh(logits.astype(np.float32) * np.float32(0.5 / temperature))).astype(np.float32)


@dataclass(frozen=True, slots=True)
class SimplexU8:
    """Exclusive classes: C-1 stored channels in units of 1/levels, background implied."""

    num_heads: int
    levels: int = LEVELS
    name: ClassVar[str] = "simplex_u8"
    dtype: ClassVar[str] = "uint8"
    version: ClassVar[int] = 1

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
        return self.num_stored

    def target(self, logits: Float32Array, temperature: float) -> Float32Array:
        return softmax(logits, temperature)

    def encode(self, target: Float32Array) -> StoredArray:
        """Largest-remainder rounding; equal remainders are served in channel order, background first.

        Raises ValueError when the input does not sum to one over axis 0 (or holds NaN).
        """
        scaled = target.reshape(self.num_heads, -1) * np.float32(self.levels)
        units = np.floor(scaled)
        scaled -= units  # now the remainders
        left = self.levels - units.sum(axis=0)
        # NaN fails both comparisons, so it is caught here too
        if not (np.all(left >= 0) and np.all(left <= self.num_heads)):
            raise ValueError("simplex_u8: the probabilities do not sum to one over the first axis")
        units += largest_mask(scaled, left.astype(np.int32))
        return units[1:].astype(np.uint8).reshape(self.num_stored, *target.shape[1:])

    def decode(self, stored: StoredArray) -> Float32Array:
        out = np.empty((self.num_heads, *stored.shape[1:]), np.float32)
        np.multiply(stored, np.float32(1 / self.levels), out=out[1:])
        background = self.levels - stored.sum(axis=0, dtype=np.int32)
        np.multiply(background, np.float32(1 / self.levels), out=out[0], casting="unsafe")
        return out

    def problem(self, stored: StoredArray) -> str | None:
        largest = int(stored.sum(axis=0, dtype=np.int32).max(initial=0))
        return (
            f"the channels of a voxel sum to {largest}, expected at most {self.levels}"
            if largest > self.levels
            else None
        )


@dataclass(frozen=True, slots=True)
class SigmoidU8:
    """Overlapping regions: every head stored, rounded to the nearest multiple of 1/255."""

    num_heads: int
    name: ClassVar[str] = "sigmoid_u8"
    dtype: ClassVar[str] = "uint8"
    version: ClassVar[int] = 1
    eps: ClassVar[float] = 0.5 / LEVELS + 1e-6  # half a unit, plus float32 rounding of the product

    @property
    def num_stored(self) -> int:
        return self.num_heads

    @property
    def chunk_channels(self) -> int:
        return self.num_stored

    def target(self, logits: Float32Array, temperature: float) -> Float32Array:
        return sigmoid(logits, temperature)

    def encode(self, target: Float32Array) -> StoredArray:
        return np.rint(target * np.float32(LEVELS)).astype(np.uint8)

    def decode(self, stored: StoredArray) -> Float32Array:
        return stored * np.float32(1 / LEVELS)

    def problem(self, stored: StoredArray) -> str | None:
        return None  # every byte is a valid probability


@dataclass(frozen=True, slots=True)
class Float16:
    """Exclusive classes: C-1 stored half floats that sum to at most 1, background implied. The reference encoding."""

    num_heads: int
    name: ClassVar[str] = "float16"
    dtype: ClassVar[str] = "float16"
    version: ClassVar[int] = 1

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
        return self.num_stored

    def target(self, logits: Float32Array, temperature: float) -> Float32Array:
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


CODECS: dict[str, type[SimplexU8] | type[SigmoidU8] | type[Float16]] = {
    c.name: c for c in (SimplexU8, SigmoidU8, Float16)
}


def make_codec(name: str, num_heads: int, levels: int = LEVELS) -> Codec:
    """The codec called `name` for a network with `num_heads` heads; `levels` concerns simplex_u8 alone.

    Raises SpecError for an unknown name.
    """
    if name not in CODECS:
        raise SpecError(f"encoding: got {name!r}, expected one of {', '.join(CODECS)}")
    return SimplexU8(num_heads, levels) if name == SimplexU8.name else CODECS[name](num_heads)


def codec_for_teacher(encoding: str, num_heads: int, *, has_regions: bool, levels: int = LEVELS) -> Codec:
    """Like `make_codec`, but refuses an encoding that contradicts the teacher's output (softmax or sigmoid)."""
    codec = make_codec(encoding, num_heads, levels)
    if has_regions != isinstance(codec, SigmoidU8):
        kind, fitting = ("overlapping regions", "sigmoid_u8") if has_regions else ("exclusive classes", "simplex_u8")
        raise SpecError(f"encoding: got {encoding!r}, but this teacher predicts {kind}; use encoding: {fitting}")
    return codec


def encode_block(
    codec: Codec, values: Float32Array, temperature: float, *, from_probabilities: bool = False
) -> tuple[StoredArray, float]:
    """Encode a block of logits (C, ...), or of soft labels where `from_probabilities`.

    Returns the stored (S, ...) array of the codec's dtype and the measured maximum of |decoded - soft label|.
    Raises BuildError when the values are not finite or the codec's bound does not hold.
    """
    flat = values.reshape(codec.num_heads, -1)
    stored: StoredArray = np.empty((codec.chunk_channels, flat.shape[1]), codec.dtype)
    step = max(1, BLOCK_VALUES // codec.num_heads)
    max_error = 0.0
    for start in range(0, flat.shape[1], step):
        block = np.ascontiguousarray(flat[:, start : start + step], dtype=np.float32)
        if not np.isfinite(block).all():
            bad = int(np.count_nonzero(~np.isfinite(block)))
            raise BuildError(f"the teacher's logits hold NaN or infinity (at least {bad} values)")
        target = block if from_probabilities else codec.target(block, temperature)
        encoded = codec.encode(target)
        max_error = max(max_error, float(np.abs(codec.decode(encoded) - target).max(initial=0)))
        stored[:, start : start + step] = encoded
    if max_error > codec.eps:
        raise BuildError(f"{codec.name} broke its bound: measured error {max_error:.6g}, expected <= {codec.eps:.6g}")
    return stored.reshape(codec.chunk_channels, *values.shape[1:]), max_error
