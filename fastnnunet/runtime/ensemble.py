"""Logits of an ensemble: nnU-Net's sliding window once per fold, its float16 mean over the folds."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastnnunet import native
from fastnnunet.engines.base import Engine
from fastnnunet.events import Event, Listener, Progress, ignore
from fastnnunet.geometry.chunked_window import streamed_window
from fastnnunet.geometry.half import check_half_limits
from fastnnunet.runtime.sliding_window import (
    Array,
    HalfArray,
    SlidingWindow,
    TileSums,
    finished_chunks,
    sliding_window_logits,
)


def ensemble_logits(
    data_CZYX: Array,
    backends: Sequence[Engine],
    window: SlidingWindow,
    *,
    progress: Listener = ignore,
    threads: int | None = None,
) -> HalfArray:
    """Logits (H, Z, Y, X) averaged over the folds.

    nnU-Net adds the float16 logits of a fold to the sum of those before it and divides the sum, rounding to float16
    after each step (`nnUNetPredictor.predict_logits_from_preprocessed_data`); so the order of the folds counts.
    Beside the sum there is never more of a fold than what its window still works on.
    Raises BackendError when the logits or their sum leave the range of float16.
    """
    first, *others = backends
    total = sliding_window_logits(
        data_CZYX, first.run, window, progress=_share(progress, 0, len(backends)), threads=threads
    )
    chunks = streamed_window(data_CZYX.shape[1:], window.patch_size, window.step_size)
    for number, backend in enumerate(others, 1):
        sums = TileSums(chunks, window, threads=threads)
        share = _share(progress, number, len(backends))
        for chunk, logits in finished_chunks(data_CZYX, backend.run, window, sums, share):
            native.add_halves(logits, total[:, *chunks.chunk_slices(chunk)], threads=threads)
    if others:
        count = np.full(total.shape[1:], len(backends), np.float16)
        sum_limits, _ = native.divide(total, count, threads=threads)
        check_half_limits(sum_limits, "the sum of the folds' logits")
    return total


def _share(progress: Listener, number: int, folds: int) -> Listener:
    """Progress of one fold as part of that of all."""

    def share(event: Event) -> None:
        if isinstance(event, Progress) and event.total is not None:
            event = replace(event, done=number * event.total + event.done, total=folds * event.total)
        progress(event)

    return share
