"""Logits of an ensemble: nnU-Net's sliding window once per fold, its float16 mean over the folds."""

from collections.abc import Callable, Sequence

import numpy as np

from fastnnunet import native
from fastnnunet.geometry.half import check_half_limits
from fastnnunet.runtime.backends.base import Backend
from fastnnunet.runtime.sliding_window import Array, HalfArray, sliding_window_logits


def ensemble_logits(
    data_CZYX: Array,
    backends: Sequence[Backend],
    *,
    num_heads: int,
    patch_size: Sequence[int],
    step_size: float,
    mirror_axes: Sequence[int] | None,
    use_gaussian: bool = True,
    on_tiles: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> HalfArray:
    """Logits (H, Z, Y, X) averaged over the folds.

    nnU-Net adds the float16 logits of a fold to the sum of those before it and divides the sum, rounding to float16
    after each step (`nnUNetPredictor.predict_logits_from_preprocessed_data`); so the order of the folds counts.
    Raises BackendError when the logits or their sum leave the range of float16.
    """
    total: HalfArray | None = None
    for number, backend in enumerate(backends):
        logits = sliding_window_logits(
            data_CZYX,
            backend.run,
            num_heads=num_heads,
            patch_size=patch_size,
            step_size=step_size,
            mirror_axes=mirror_axes,
            use_gaussian=use_gaussian,
            on_tiles=_share(on_tiles, number, len(backends)),
            threads=threads,
        )
        if total is None:
            total = logits
        else:
            native.add_halves(logits, total, threads=threads)
    if total is None:
        raise ValueError("no backends")
    if len(backends) > 1:
        count = np.full(total.shape[1:], len(backends), np.float16)
        sum_limits, _ = native.divide(total, count, threads=threads)
        check_half_limits(sum_limits, "the sum of the folds' logits")
    return total


def _share(on_tiles: Callable[[int, int], None] | None, number: int, folds: int) -> Callable[[int, int], None] | None:
    """Progress of one fold as part of that of all."""
    if on_tiles is None:
        return None
    return lambda done, total: on_tiles(number * total + done, folds * total)
