"""The one temperature that brings a student's probabilities closest to its teacher's.

Labels teach a network to be surer than its teacher: dividing its logits by one number, fitted afterwards, mends most of
that and changes no label (C. Guo et al., arXiv:1706.04599, 2017, section 4.2; here with the teacher's probabilities as
the target, and at the borders of its labels, since all else is certain).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastnnunet.evaluate.calibration import label_codes, near_borders

BORDER_MM = 2.0
LOWEST, HIGHEST = 0.25, 8.0  # temperatures that are looked at


def border_sample(
    logits_CZYX: NDArray[np.floating],
    target_CZYX: NDArray[np.floating],
    count: int,
    *,
    spacing_mm: Sequence[float] | None = None,
    regions: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and target (n, C) of at most `count` voxels near the borders of the target's labels, evenly spread."""
    near = np.flatnonzero(near_borders(label_codes(target_CZYX, regions), spacing_mm or (1.0, 1.0, 1.0), BORDER_MM))
    chosen = near[np.linspace(0, near.size - 1, min(count, near.size)).astype(np.intp)]
    logits_NC, target_NC = (
        np.ascontiguousarray(values.reshape(len(values), -1)[:, chosen].T, np.float32)
        for values in (logits_CZYX, target_CZYX)
    )
    return logits_NC, target_NC


def fit_temperature(
    logits_NC: NDArray[np.floating], target_NC: NDArray[np.floating], *, regions: bool = False
) -> float:
    """The t in [0.25, 8] with the least cross entropy of `target` and softmax(logits / t), sigmoid for `regions`.

    1.0 where there are no voxels. The cross entropy is convex in 1 / t, so there is one least.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    if len(logits_NC) == 0:
        return 1.0
    logits, target = np.asarray(logits_NC, np.float64), np.asarray(target_NC, np.float64)
    mean = float((target * logits).sum())  # linear in 1 / t, so summed once

    def cross_entropy(sharpness: float) -> float:
        scaled = logits * sharpness
        partition = np.logaddexp(0, scaled).sum() if regions else (logsumexp(scaled, axis=1) * target.sum(axis=1)).sum()
        return float(partition - sharpness * mean) / len(logits)

    found = minimize_scalar(cross_entropy, bounds=(1 / HIGHEST, 1 / LOWEST), method="bounded", options={"xatol": 1e-5})
    return float(1 / found.x)
