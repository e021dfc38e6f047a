"""What every encoding offers, and the soft labels they are measured against.

Shapes: (C, ...) arrays are channel first with any trailing axes; C = number of network heads, S = stored channels.
"""

from typing import Protocol

import numpy as np

from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.errors import BuildError

LEVELS = 255
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
        """Bound on |decoded - soft label|, per channel and voxel, at every temperature the encoding serves."""
        ...

    @property
    def num_stored(self) -> int:
        """S."""
        ...

    @property
    def chunk_channels(self) -> int:
        """Stored channels that are read together: all of them, except where most are empty in most places."""
        ...

    @property
    def num_targets(self) -> int:
        """Soft-label channels a training needs: the C - 1 foreground classes, or all C regions."""
        ...

    @property
    def dtype(self) -> str:
        """Of the stored values; zero must stand for background."""
        ...

    @property
    def needs_logits(self) -> bool:
        """True when probabilities alone, such as an average of probabilities, cannot be encoded."""
        ...

    def target(self, logits: Float32Array, temperature: float | None) -> Float32Array:
        """(C, ...) logits -> (C, ...) what `encode` takes: the soft labels at `temperature`, unless `needs_logits`."""
        ...

    def encode(self, target: Float32Array) -> StoredArray:
        """(C, ...) target -> (S, ...) stored values."""
        ...

    def decode(self, stored: StoredArray) -> Float32Array:
        """(S, ...) stored values -> (C, ...) soft labels."""
        ...

    def measured_error(self, stored: StoredArray, target: Float32Array) -> float:
        """Maximum of |decoded - soft label| over what was encoded. Raises BuildError when it exceeds the bound."""
        ...

    def problem(self, stored: StoredArray) -> str | None:
        """What makes these stored values impossible (None when nothing does)."""
        ...


def softmax(logits: Float32Array, temperature: float | None) -> Float32Array:
    """softmax(logits / temperature) over axis 0, in float32, stable for any finite input."""
    scaled = logits.astype(np.float32)
    scaled -= scaled.max(axis=0, keepdims=True)
    scaled /= np.float32(known(temperature))
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=0, keepdims=True)
    return scaled


def sigmoid(logits: Float32Array, temperature: float | None) -> Float32Array:
    """sigmoid(logits / temperature) in float32; tanh form, which cannot overflow."""
    return (0.5 + 0.5 * np.tanh(logits.astype(np.float32) * np.float32(0.5 / known(temperature)))).astype(np.float32)


def known(temperature: float | None) -> float:
    """The temperature, which only an encoding that serves a whole range can do without."""
    if temperature is None:
        raise ValueError("soft labels need a temperature, got None")
    return temperature


def bounded_error(name: str, decoded: Float32Array, target: Float32Array, eps: float) -> float:
    """Maximum of |decoded - target|; `decoded` is overwritten. Raises BuildError above `eps` (or for NaN)."""
    np.subtract(decoded, target, out=decoded)
    error = max(float(decoded.max(initial=0)), -float(decoded.min(initial=0)))  # cheaper than abs: no third pass
    if not error <= eps:
        raise BuildError(f"{name} broke its bound: measured error {error:.6g}, expected <= {eps:.6g}")
    return error
