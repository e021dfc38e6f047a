"""What pictures of scans have in common: grey values, lines around labels, PNG."""

import io

import numpy as np
from numpy.typing import NDArray

_CT_AROUND_HU, _CT_WINDOW_HU = 100.0, (-160.0, 240.0)  # soft tissue where nothing is labelled
_SAMPLED_VOXELS = 2_000_000


def grey_window(image_ZYX: NDArray[np.float32], seen_ZYX: NDArray[np.bool_], is_ct: bool) -> tuple[float, float]:
    """Values that are black and white. CT: most of what is labelled and 100 HU around it. Others: all but the darkest
    and brightest half percent.
    """
    if is_ct:
        inside = image_ZYX[seen_ZYX]
        if not inside.size:
            return _CT_WINDOW_HU
        low, high = np.percentile(inside, (5, 95))
        return float(low) - _CT_AROUND_HU, float(high) + _CT_AROUND_HU
    values = image_ZYX.ravel()
    low, high = np.percentile(values[:: max(1, values.size // _SAMPLED_VOXELS)], (0.5, 99.5))
    return float(low), float(high)


def grey_bytes(image: NDArray[np.float32], window: tuple[float, float]) -> NDArray[np.uint8]:
    """0 to 255 within the window."""
    low, high = window
    return (255 * ((image - low) / max(high - low, 1e-6)).clip(0, 1)).astype(np.uint8)


def edges(labels_YX: NDArray[np.integer], width: int = 2) -> NDArray[np.bool_]:
    """Pixels with another label at most `width` to a side; lines of that width inside of every label."""
    found = np.zeros(labels_YX.shape, bool)
    for by in range(1, width + 1):
        for axis in (0, 1):
            low, high = ([slice(None)] * 2 for _ in range(2))
            low[axis], high[axis] = slice(None, -by), slice(by, None)
            differ = labels_YX[tuple(low)] != labels_YX[tuple(high)]
            found[tuple(low)] |= differ
            found[tuple(high)] |= differ
    return found


def png_of(rgb: NDArray[np.uint8]) -> bytes:
    """A PNG of (y, x, 3)."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(rgb).save(file, format="png", optimize=True)
    return file.getvalue()
