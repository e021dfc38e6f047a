"""nnU-Net's intensity normalisation schemes, one function each, in place on one float32 channel (z, y, x).

The operations and their order are nnU-Net's own (`default_normalization_schemes.py`), so results are bit-identical.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError, SpecError

Channel = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_EPSILON = 1e-8


def _z_score(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any]) -> None:
    if mask is None:
        mean = channel.mean()
        std = channel.std()
        channel -= mean
        channel /= max(std, _EPSILON)
    else:
        inside = channel[mask]
        channel[mask] = (inside - inside.mean()) / max(inside.std(), _EPSILON)


def _ct(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any]) -> None:
    np.clip(channel, intensity["percentile_00_5"], intensity["percentile_99_5"], out=channel)
    channel -= intensity["mean"]
    channel /= max(intensity["std"], _EPSILON)


def _rescale_to_01(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any]) -> None:
    channel -= channel.min()
    channel /= np.clip(channel.max(), a_min=_EPSILON, a_max=None)


def _rgb_to_01(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any]) -> None:
    low, high = channel.min(), channel.max()
    if low < 0 or high > 255:
        raise ImageError(f"the model expects colour values from 0 to 255, got {low:g} to {high:g}")
    channel /= 255.0


def _none(channel: Channel, mask: Mask | None, intensity: Mapping[str, Any]) -> None:
    return


SCHEMES: dict[str, Callable[[Channel, Mask | None, Mapping[str, Any]], None]] = {
    "ZScoreNormalization": _z_score,
    "CTNormalization": _ct,
    "RescaleTo01Normalization": _rescale_to_01,
    "RGBTo01Normalization": _rgb_to_01,
    "NoNormalization": _none,
}


def check_normalization(schemes: tuple[str, ...], intensity_properties: Mapping[str, Any]) -> None:
    """Raise SpecError for a scheme this runtime does not have, or CT without its intensity statistics."""
    for index, scheme in enumerate(schemes):
        if scheme not in SCHEMES:
            raise SpecError(f"normalisation {scheme!r} of channel {index} is unknown; known: {', '.join(SCHEMES)}")
        needed = {"mean", "std", "percentile_00_5", "percentile_99_5"} if scheme == "CTNormalization" else set()
        if missing := sorted(needed - intensity_properties.get(str(index), {}).keys()):
            raise SpecError(f"CTNormalization of channel {index} needs the training statistics {', '.join(missing)}")
