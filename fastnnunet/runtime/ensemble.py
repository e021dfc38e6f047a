"""Logits of an ensemble: the whole image once per fold, nnU-Net's float16 mean over the folds."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastnnunet import native
from fastnnunet.engines.base import Engine
from fastnnunet.events import Event, Listener, Progress, ignore
from fastnnunet.geometry.half import check_half_limits
from fastnnunet.runtime.arithmetic import Array, HalfArray
from fastnnunet.runtime.ways import Way


def ensemble_logits(
    data_CZYX: Array,
    backends: Sequence[Engine],
    way: Way,
    *,
    progress: Listener = ignore,
    threads: int | None = None,
) -> HalfArray:
    """Logits (H, Z, Y, X) averaged over the folds.

    nnU-Net adds the float16 logits of a fold to the sum of those before it and divides the sum, rounding to float16
    after each step (`nnUNetPredictor.predict_logits_from_preprocessed_data`); so the order of the folds counts.
    Beside the sum there is never more of a fold than what its tiles still work on.
    Raises SpecError as `way`, BackendError when the logits or their sum leave the range of float16.
    """
    first, *others = backends
    share = share_of(progress, 0, len(backends))
    _, ((_, total),) = way.begin(data_CZYX, first.run, whole=True, margin=0, progress=share, threads=threads)
    for number, backend in enumerate(others, 1):
        share = share_of(progress, number, len(backends))
        chunks, finished = way.begin(data_CZYX, backend.run, whole=False, margin=0, progress=share, threads=threads)
        for chunk, logits in finished:
            native.add_halves(logits, total[:, *chunks.chunk_slices(chunk)], threads=threads)
    if others:
        count = np.full(total.shape[1:], len(backends), np.float16)
        sum_limits, _ = native.divide(total, count, threads=threads)
        check_half_limits(sum_limits, "the sum of the folds' logits")
    return total


def share_of(progress: Listener, number: int, folds: int) -> Listener:
    """Progress of one fold as part of that of all."""

    def share(event: Event) -> None:
        if isinstance(event, Progress) and event.total is not None:
            event = replace(event, done=number * event.total + event.done, total=folds * event.total)
        progress(event)

    return share
