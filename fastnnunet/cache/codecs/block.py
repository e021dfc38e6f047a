"""Encoding one block of a case in bounded memory."""

import numpy as np

from fastnnunet.cache.codecs.base import Codec
from fastnnunet.cache.interfaces import Float32Array, StoredArray
from fastnnunet.errors import BuildError, SpecError

# Values of one work block, 1 MiB of float32: the few temporaries of an encoding then stay in a core's cache.
BLOCK_VALUES = 1 << 18


def encode_block(
    codec: Codec, block: Float32Array, temperature: float | None, *, from_probabilities: bool = False
) -> tuple[StoredArray, float]:
    """Encode a block of a case: (C, ...) logits, or with `from_probabilities` (C, ...) soft labels.

    `temperature` is not used for soft labels, nor by an encoding that serves a range of temperatures (None will do).
    Returns the stored (S, ...) array of the codec's dtype and the measured maximum of |decoded - soft label|. Work
    space: a few arrays of BLOCK_VALUES values. Raises BuildError when a value is not finite or not a probability, or
    when the codec's bound does not hold; SpecError when the encoding cannot store soft labels that were made elsewhere.
    """
    if len(block) != codec.num_heads:
        raise BuildError(f"the teacher gave {len(block)} channels, expected {codec.num_heads}")
    if from_probabilities and codec.needs_logits:
        raise SpecError(
            f"{codec.name} stores differences of logits, which an average of probabilities does not have\n"
            "pool logits instead (pooling: logits), or choose another encoding"
        )
    flat = block.reshape(codec.num_heads, -1)
    step = max(1, BLOCK_VALUES // codec.num_heads)
    voxels = flat.shape[1]
    stored: StoredArray = np.empty((codec.num_stored, voxels), codec.dtype)
    max_error = 0.0
    for start in range(0, voxels, step):
        part = np.ascontiguousarray(flat[:, start : start + step], dtype=np.float32)
        _check(part, from_probabilities)
        target = part if from_probabilities else codec.target(part, temperature)
        try:
            encoded = codec.encode(target)
        except ValueError as e:
            raise BuildError(f"the teacher's soft labels cannot be stored: {e}") from e
        max_error = max(max_error, codec.measured_error(encoded, target))
        stored[:, start : start + step] = encoded
    return stored.reshape(len(stored), *block.shape[1:]), max_error


def _check(values: Float32Array, from_probabilities: bool) -> None:
    what = "soft labels" if from_probabilities else "logits"
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise BuildError(f"the teacher's {what} hold NaN or infinity (at least {bad} values)")
    if from_probabilities and not (values.min(initial=0) >= 0 and values.max(initial=0) <= 1 + 1e-5):
        raise BuildError(
            f"the teacher's soft labels range from {values.min():.6g} to {values.max():.6g}, expected 0 to 1"
        )
