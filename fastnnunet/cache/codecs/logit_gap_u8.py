"""`logit_gap_u8`: one cache for every temperature of a range.

Stored are the gaps d_c = max(z) - z_c of the logits, clipped at G, in 255 uniform steps s = G / 255: C bytes.
Background holds its gap k_0, a foreground channel holds 255 - k_c, so an all-zero voxel has background on top and every
foreground class clipped: it *is* certain background. A clipped gap, k = 255, decodes to probability zero.

The bound at temperature T. *Clipping*: n <= C - 1 channels have gaps of at least D = 254.5 s, so together they have a
probability delta <= n exp(-D / T). Leaving them out and renormalising changes any channel by at most delta: a dropped
one had at most delta, and a kept one grows by p delta / (1 - delta) <= delta. *Rounding*: each kept gap moves by at
most s / 2, a log weight by at most s / (2T). The log-odds of a channel are its log weight minus the log of the sum of
the others' weights, so they move by at most s / T. The sigmoid maps an interval of that length to at most
tanh(s / (4T)), reached when it is centred at zero. Altogether

    eps(T) = tanh(s / (4T)) + (C - 1) exp(-D / T) + float32 rounding.

The first term is convex and falls with T, the second is convex and rises (for D > 2T), so the largest eps of a range is
at one of its ends. What a training feels is T eps(T): s / 4 at every T, plus T times the clipping. Its sum at T_high is
smallest where the two derivatives in G cancel, exp(-G / T_high) = 1 / (1020 (C - 1)): hence
G = T_high ln(1020 (C - 1)), rounded up to eighths so that every platform computes the same number.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fastnnunet.cache.codecs.base import LEVELS, bounded_error, softmax
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.errors import SpecError

WIDEST = 16  # T_high / T_low; beyond it the bound at T_low exceeds 0.12


@dataclass(frozen=True, slots=True)
class LogitGapU8:
    """Exclusive classes: C stored bytes, gaps to the largest logit. `temperature` is what `decode` decodes at."""

    num_heads: int
    low: float
    high: float
    temperature: float | None = None
    name: ClassVar[str] = "logit_gap_u8"
    dtype: ClassVar[str] = "uint8"
    version: ClassVar[int] = 1
    needs_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_heads < 2:
            raise SpecError(f"logit_gap_u8 needs at least 2 classes (background and one more), got {self.num_heads}")
        if not 0 < self.low <= self.high <= WIDEST * self.low:
            raise SpecError(
                f"temperature_range: got {self.low:g} to {self.high:g}, "
                f"expected 0 < low <= high <= {WIDEST} low for logit_gap_u8"
            )
        if self.temperature is not None:
            self._check(self.temperature)

    def at(self, temperature: float) -> "LogitGapU8":
        """The same encoding, decoding at `temperature`. Raises SpecError outside the range."""
        return dataclasses.replace(self, temperature=float(temperature))

    @property
    def largest_gap(self) -> float:
        """G."""
        return math.ceil(8 * self.high * math.log(4 * LEVELS * (self.num_heads - 1))) / 8

    @property
    def step(self) -> float:
        """s, in logits."""
        return self.largest_gap / LEVELS

    def eps_at(self, temperature: float) -> float:
        """Bound on |decoded - soft label| at one temperature. Raises SpecError outside the range."""
        self._check(temperature)
        rounding = math.tanh(self.step / (4 * temperature))
        clipping = (self.num_heads - 1) * math.exp(-(LEVELS - 0.5) * self.step / temperature)
        return rounding + clipping + 2.0**-19 + self.num_heads * 2.0**-22  # float32 sums over C channels

    @property
    def eps(self) -> float:
        return max(self.eps_at(self.low), self.eps_at(self.high))

    @property
    def num_stored(self) -> int:
        return self.num_heads

    @property
    def chunk_channels(self) -> int:
        return self.num_heads

    @property
    def num_targets(self) -> int:
        return self.num_heads - 1

    def target(self, logits: Float32Array, temperature: float | None) -> Float32Array:
        """(C, ...) logits -> (C, ...) gaps to the largest, whatever the temperature."""
        return logits.max(axis=0, keepdims=True) - logits.astype(np.float32, copy=False)

    def encode(self, target: Float32Array) -> StoredArray:
        """Round gaps; raises ValueError for anything negative or NaN, or a voxel without a gap of zero."""
        if not (target.min(axis=0, initial=np.inf) == 0).all():
            raise ValueError("logit_gap_u8: the smallest gap of every voxel must be zero")
        units = np.minimum(target, np.float32(self.largest_gap))
        units *= np.float32(1 / self.step)
        np.rint(units, out=units)
        np.subtract(np.float32(LEVELS), units[1:], out=units[1:])
        return units.astype(np.uint8)

    def decode(self, stored: StoredArray) -> Float32Array:
        """Raises SpecError when no temperature was chosen (see `at`)."""
        if self.temperature is None:
            raise SpecError(
                f"logit_gap_u8 serves temperatures from {self.low:g} to {self.high:g}: "
                "say which (SoftLabelReader(cache, temperature=...))"
            )
        weights = self._weights(self.temperature)
        out = np.empty(stored.shape, np.float32)
        byte = stored.astype(np.uint8, copy=False)
        np.take(weights, byte[0], out=out[0], mode="clip")  # "clip" lets numpy write into `out` unbuffered
        np.take(weights[::-1], byte[1:], out=out[1:], mode="clip")
        out /= out.sum(axis=0, keepdims=True)
        return out

    def measured_error(self, stored: StoredArray, target: Float32Array) -> float:
        """At both ends and the geometric middle of the range, each against its own bound."""
        return max(
            bounded_error(f"{self.name} at T = {t:g}", self.at(t).decode(stored), softmax(-target, t), self.eps_at(t))
            for t in sorted({self.low, math.sqrt(self.low * self.high), self.high})
        )

    def problem(self, stored: StoredArray) -> str | None:
        top = (stored[0] == 0) | (stored[1:] == LEVELS).any(axis=0)
        missing = int(np.count_nonzero(~top))
        return f"{missing} voxels have no largest channel (a gap of zero)" if missing else None

    def _weights(self, temperature: float) -> npt.NDArray[np.float32]:
        """(256,) weight exp(-gap / T) of every stored gap; the clipped one weighs nothing."""
        weights = np.exp(np.arange(LEVELS + 1) * (-self.step / temperature))
        weights[LEVELS] = 0
        return weights.astype(np.float32)

    def _check(self, temperature: float) -> None:
        if not self.low <= temperature <= self.high:
            raise SpecError(
                f"temperature: got {temperature:g}, expected {self.low:g} to {self.high:g}, the range of this cache; "
                "train within it, or build a cache with a wider temperature_range"
            )
