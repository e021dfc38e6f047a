"""Rounding to float16 without leaving float32.

nnU-Net accumulates logits in float16, so parity needs its roundings. NumPy converts to float16 in software, 100 times
slower still when the result is subnormal (at the rim of the Gaussian 17 % of the values are). Rounding float32 values
onto the float16 grid gives the same numbers with five vectorised operations.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import BackendError

HALF_OVERFLOW = 65520.0  # the smallest magnitude that rounds to infinity in float16

_EXPONENT = np.uint32(0x7F800000)
# 1.5 * 2^(e + 13) for a value of exponent e: adding it leaves float32 exactly the 10 mantissa bits of float16.
_SHIFT = np.uint32((13 << 23) | 0x00400000)
# Below 2^-14 float16 is subnormal with the fixed quantum 2^-24, which is the spacing of float32 around 0.75.
_SUBNORMAL = np.uint32(0x3F400000)


# Several passes over a block this large stay in the processor's second level cache.
BLOCK_VALUES = 2**16


def round_to_half(
    values: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
    scratch: npt.NDArray[np.uint32] | None = None,
) -> npt.NDArray[np.float32]:
    """The float32 values nearest to `values` that float16 can hold, ties to even, subnormals included.

    Values of magnitude HALF_OVERFLOW and above, where float16 has only infinity, stay finite: see `check_half_range`.
    `out` may be `values`; `scratch` (of their shape) spares an allocation.
    """
    magic = np.bitwise_and(values.view(np.uint32), _EXPONENT, out=scratch)
    magic += _SHIFT
    np.maximum(magic, _SUBNORMAL, out=magic)
    shift = magic.view(np.float32)
    rounded = np.add(values, shift, out=out)
    rounded -= shift
    return rounded


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(head, rows) that cut an array (H, rows, ...) into blocks of about BLOCK_VALUES."""
    rows = max(1, BLOCK_VALUES // max(1, math.prod(shape[2:])))
    for head in range(shape[0]):
        for start in range(0, shape[1], rows):
            yield head, slice(start, min(start + rows, shape[1]))


def check_half_range(values: npt.NDArray[np.float32], what: str) -> None:
    """Raise BackendError when float16 would hold an infinity or NaN (nnU-Net aborts there too)."""
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    if not (low > -HALF_OVERFLOW and high < HALF_OVERFLOW):  # also true for NaN
        raise BackendError(
            f"{what} left the range of float16: got values from {low:g} to {high:g}, expected less than 65520 in "
            "magnitude\nthe model is damaged or was trained on other intensities than this image has"
        )
