"""All logits of an image in one array, and their labels, which the product makes piece by piece."""

from typing import Any

import numpy as np

from fastnnunet import native
from fastnnunet.runtime.sliding_window import SlidingWindow


def sliding_window_logits(data_CZYX: np.ndarray, network: Any, window: SlidingWindow, **options: Any) -> np.ndarray:
    """Float16 logits (H, Z, Y, X) of the data's shape."""
    _, ((_, logits),) = window.begin(data_CZYX, network, whole=True, **options)
    return logits


def argmax_heads(values_HX: np.ndarray, out: np.ndarray) -> None:
    """Index of the largest head into `out` (unsigned, shape of one head) by the code that labels."""
    shape = (1,) * (3 - out.ndim) + out.shape
    native.label_logits(values_HX.reshape(-1, *shape), out.reshape(shape), (0, 0, 0), to_half=False)
