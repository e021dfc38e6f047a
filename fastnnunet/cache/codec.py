"""Encodings: teacher logits -> what a cache stores, each with a proven error bound.

Shapes: (C, ...) arrays are channel first with any trailing axes; C = number of network heads, S = stored channels.

`simplex_u8` rounds C probabilities to whole multiples of 1/L that still sum to exactly L (largest-remainder rounding,
Hamilton's apportionment), with L = 255 levels, or 63 or 31 for a smaller cache. Channel 0, the background, is not
stored: it is L minus the others' sum, so an all-zero voxel *is* background and zero padding needs no special case.

The bound. With r_c = L p_c - floor(L p_c) and k = sum r_c whole units left to hand out, the k largest remainders go up.
A channel left down has k remainders at least as large above it, so k >= (k + 1) r_c and r_c <= k / (k + 1)
<= (C - 1) / C. One that goes up satisfies k <= (k - 1) + r_c (C - k + 1), so 1 - r_c <= 1 - 1 / C. Either way the
error is at most (1 - 1/C) / L < 1/L; the gap to 1/L is wider than float32 rounding for every C up to 10^4.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fastnnunet.cache.interfaces import Float32Array, Uint8Array
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

    def target(self, logits: Float32Array, temperature: float) -> Float32Array:
        """(C, ...) logits -> (C, ...) soft labels."""
        ...

    def encode(self, target: Float32Array) -> Uint8Array:
        """(C, ...) soft labels -> (S, ...) stored values."""
        ...

    def decode(self, stored: Uint8Array) -> Float32Array:
        """(S, ...) stored values -> (C, ...) soft labels."""
        ...

    def problem(self, stored: Uint8Array) -> str | None:
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

    def target(self, logits: Float32Array, temperature: float) -> Float32Array:
        return softmax(logits, temperature)

    def encode(self, target: Float32Array) -> Uint8Array:
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
        units += _largest(scaled, left.astype(np.int32))
        return units[1:].astype(np.uint8).reshape(self.num_stored, *target.shape[1:])

    def decode(self, stored: Uint8Array) -> Float32Array:
        out = np.empty((self.num_heads, *stored.shape[1:]), np.float32)
        np.multiply(stored, np.float32(1 / self.levels), out=out[1:])
        background = self.levels - stored.sum(axis=0, dtype=np.int32)
        np.multiply(background, np.float32(1 / self.levels), out=out[0], casting="unsafe")
        return out

    def problem(self, stored: Uint8Array) -> str | None:
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
    version: ClassVar[int] = 1
    eps: ClassVar[float] = 0.5 / LEVELS + 1e-6  # half a unit, plus float32 rounding of the product

    @property
    def num_stored(self) -> int:
        return self.num_heads

    def target(self, logits: Float32Array, temperature: float) -> Float32Array:
        return sigmoid(logits, temperature)

    def encode(self, target: Float32Array) -> Uint8Array:
        return np.rint(target * np.float32(LEVELS)).astype(np.uint8)

    def decode(self, stored: Uint8Array) -> Float32Array:
        return stored * np.float32(1 / LEVELS)

    def problem(self, stored: Uint8Array) -> str | None:
        return None  # every byte is a valid probability


CODECS: dict[str, type[SimplexU8] | type[SigmoidU8]] = {c.name: c for c in (SimplexU8, SigmoidU8)}


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


def encode_logits(codec: Codec, logits: Float32Array, temperature: float) -> tuple[Uint8Array, float]:
    """Encode a whole case block by block.

    Returns the stored (S, Z, Y, X) uint8 array and the measured maximum of |decoded - soft label|.
    Raises BuildError when the logits are not finite or the codec's bound does not hold.
    """
    flat = logits.reshape(codec.num_heads, -1)
    stored = np.empty((codec.num_stored, flat.shape[1]), np.uint8)
    step = max(1, BLOCK_VALUES // codec.num_heads)
    max_error = 0.0
    for start in range(0, flat.shape[1], step):
        block = np.ascontiguousarray(flat[:, start : start + step], dtype=np.float32)
        if not np.isfinite(block).all():
            bad = int(np.count_nonzero(~np.isfinite(block)))
            raise BuildError(f"the teacher's logits hold NaN or infinity (at least {bad} values)")
        target = codec.target(block, temperature)
        encoded = codec.encode(target)
        max_error = max(max_error, float(np.abs(codec.decode(encoded) - target).max(initial=0)))
        stored[:, start : start + step] = encoded
    if max_error > codec.eps:
        raise BuildError(f"{codec.name} broke its bound: measured error {max_error:.6g}, expected <= {codec.eps:.6g}")
    return stored.reshape(codec.num_stored, *logits.shape[1:]), max_error


def _largest(remainders: Float32Array, count: np.ndarray) -> np.ndarray:
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
