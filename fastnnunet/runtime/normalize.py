"""nnU-Net's intensity normalisation schemes, one function each, in place on one float32 channel (z, y, x).

The operations and their order are nnU-Net's own (`default_normalization_schemes.py`), so results are bit-identical.
NumPy adds up a cropped channel in pieces that depend on its version: there mean and deviation may differ in the last
bits.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.errors import ImageError, SpecError
from fastnnunet.specs.checks.reproducible import unknown_scheme_problems

Channel = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Threads = int | None  # None: all cores


def _z_score(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any], threads: Threads = None) -> None:
    native.z_score(channel, mask, threads=threads)


def _ct(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any], threads: Threads = None) -> None:
    native.clip_and_scale(
        channel,
        intensity["percentile_00_5"],
        intensity["percentile_99_5"],
        intensity["mean"],
        intensity["std"],
        threads=threads,
    )


def _rescale_to_01(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any], threads: Threads = None) -> None:
    native.rescale_to_01(channel, threads=threads)


def _rgb_to_01(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any], threads: Threads = None) -> None:
    check_colours(*native.rgb_to_01(channel, threads=threads))


def check_colours(low: float, high: float) -> None:
    """Raise ImageError unless values from `low` to `high` are of colours."""
    if low < 0 or high > 255:
        raise ImageError(f"the model expects colour values from 0 to 255, got {low:g} to {high:g}")


def _none(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any], threads: Threads = None) -> None:
    return


SCHEMES: dict[str, Callable[..., None]] = {
    "ZScoreNormalization": _z_score,
    "CTNormalization": _ct,
    "RescaleTo01Normalization": _rescale_to_01,
    "RGBTo01Normalization": _rgb_to_01,
    "NoNormalization": _none,
}


def check_normalization(schemes: tuple[str, ...], intensity_properties: Mapping[str, Any]) -> None:
    """Raise SpecError for a scheme this runtime does not have, or CT without its intensity statistics."""
    if problems := unknown_scheme_problems(schemes, intensity_properties):
        raise SpecError("\n".join(problems))
