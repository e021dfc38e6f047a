"""Numbers that float16 can hold, in float32.

nnU-Net accumulates logits in float16, so parity needs its roundings; NumPy converts to float16 in software.
"""

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.errors import BackendError


def round_to_half(
    values: npt.NDArray[np.float32], out: npt.NDArray[np.float32] | None = None, *, threads: int | None = None
) -> npt.NDArray[np.float32]:
    """The float32 values nearest to `values` that float16 can hold, ties to even, subnormals included.

    Values of magnitude 65520 and above, where float16 has only infinity, stay finite: see `check_half_range`.
    Contiguous arrays; `out` may be `values`.
    """
    rounded = np.empty_like(values) if out is None else out
    native.round_to_half(values, rounded, threads=threads)
    return rounded


def check_half_range(values: npt.NDArray[np.float32], what: str) -> None:
    """Raise BackendError when float16 would hold an infinity or NaN (nnU-Net aborts there too)."""
    if values.size:
        check_half_limits(native.limits(values), what)


def check_half_limits(lowest_and_highest: tuple[float, float], what: str) -> None:
    """`check_half_range` of values of which these are the limits."""
    low, high = lowest_and_highest
    if not native.fits_half(low, high):
        raise BackendError(
            f"{what} left the range of float16: got values from {low:g} to {high:g}, expected less than 65520 in "
            "magnitude\nthe model is damaged or was trained on other intensities than this image has"
        )
