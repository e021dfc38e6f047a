"""A network over mirrored copies of a batch: the one loop of teachers and runtime."""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from fastnnunet.engines.base import Array


def mirrored(
    run: Callable[[Array], Array], batch_NCX: Array, mirror_axes: Sequence[int] | None, *, at_once: int = 1
) -> Array:
    """Mean of the logits over every subset of the mirrored axes (spatial axes counted from 0), as nnU-Net sums them.

    `at_once`: mirrored copies of the batch that `run` gets together.
    Without mirrors the result is that of `run`, which may be an engine's own memory.
    """
    axes = [axis + 2 for axis in mirror_axes or ()]
    flips = [subset for count in range(len(axes) + 1) for subset in combinations(axes, count)]
    if len(flips) == 1:
        return run(batch_NCX)
    total: Array | None = None
    for first in range(0, len(flips), at_once):
        group = flips[first : first + at_once]
        copies = [np.flip(batch_NCX, flip) for flip in group]
        logits_NHX = run(np.ascontiguousarray(copies[0]) if len(group) == 1 else np.concatenate(copies))
        for part, flip in zip(np.split(logits_NHX, len(group)), group, strict=True):
            if total is None:
                total = part.copy()  # the first is not flipped
            else:
                total += np.flip(part, flip)
    assert total is not None
    total /= len(flips)
    return total
