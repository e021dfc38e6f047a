"""How far a fast teacher is from nnU-Net's own predictor, on patches of real cases."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastnnunet.cache.interfaces import Fold

Logits = Callable[[np.ndarray, Fold], np.ndarray]  # patch float32 (C, z, y, x) and fold -> float32 (heads, z, y, x)


def measure_deviation(
    got: Logits,
    expected: Logits,
    patches: Sequence[tuple[np.ndarray, Fold]],
    *,
    temperature: float,
    has_regions: bool,
) -> dict[str, Any]:
    """Compare the logits of the same patches by the same folds.

    Returns plain values for a record: the fraction of voxels with the same label, mean and largest difference of
    probabilities at `temperature`, and the number of patches. Patches whose logits are not finite do not count:
    labelling that case will fail and say so.
    """
    equal, mean, largest = [], [], 0.0
    for patch_CZYX, fold in patches:
        theirs, ours = expected(patch_CZYX, fold), got(patch_CZYX, fold)
        if not np.isfinite(ours).all():
            continue
        difference = np.abs(
            _probabilities(ours, temperature, has_regions) - _probabilities(theirs, temperature, has_regions)
        )
        same = (ours > 0) == (theirs > 0) if has_regions else ours.argmax(0) == theirs.argmax(0)
        equal.append(float(same.mean()))
        mean.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
    return {
        "patches": len(equal),
        "argmax_equal": sum(equal) / max(1, len(equal)),
        "mean_abs_difference": sum(mean) / max(1, len(mean)),
        "max_abs_difference": largest,
        "temperature": temperature,
    }


def middle(image_CZYX: np.ndarray, size_zyx: Sequence[int]) -> np.ndarray:
    """The patch in the middle of an image, not larger than it, contiguous."""
    starts = [max(0, (n - s) // 2) for n, s in zip(image_CZYX.shape[1:], size_zyx, strict=True)]
    inside = tuple(slice(a, a + s) for a, s in zip(starts, size_zyx, strict=True))
    return np.ascontiguousarray(image_CZYX[(slice(None), *inside)])


def _probabilities(logits: np.ndarray, temperature: float, has_regions: bool) -> np.ndarray:
    import torch

    scaled = torch.from_numpy(logits) / temperature
    probabilities: np.ndarray = (scaled.sigmoid() if has_regions else scaled.softmax(0)).numpy()
    return probabilities
