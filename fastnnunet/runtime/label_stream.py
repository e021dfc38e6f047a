"""Labels of an image while its tiles still go through the network: logits come chunk by chunk and are not kept.

A chunk is resampled to the voxels of the image that lie in it and labelled at once. Linear resampling reaches one plane
and one row beyond the chunk, so those of the chunks before it are all that is kept.
Axes: H head, Z Y X nnU-Net's internal order.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.events import Listener, ignore
from fastnnunet.geometry.chunked_window import Bounds, Index
from fastnnunet.geometry.resample import ResamplePlan
from fastnnunet.runtime.arithmetic import Arithmetic, HostArithmetic
from fastnnunet.runtime.logits import LabelRule
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.runtime.sliding_window import Network
from fastnnunet.runtime.times import StageTimes
from fastnnunet.runtime.ways import Chunks, Way

MARGIN = 1  # planes and rows before a chunk that go with it


def stream_labels(
    case: Preprocessed,
    network: Network,
    way: Way,
    plan: ResamplePlan | None,
    rule: LabelRule,
    times: StageTimes,
    *,
    progress: Listener = ignore,
    threads: int | None = None,
) -> npt.NDArray[Any]:
    """The segmentation, of the image's shape before it was cropped; `postprocess` would give the same of the logits.

    `plan`: None or one that is local. Raises SpecError and BackendError as `way`.
    """
    segmentation = np.zeros(case.shape_before_cropping, rule.dtype)
    chunks, finished = way.begin(
        case.data_CZYX, network, whole=False, margin=MARGIN, progress=progress, threads=threads
    )
    stream = LabelStream(chunks, plan, rule, segmentation[case.crop], threads)
    while True:
        with times.stage("infer"):
            chunk = next(finished, None)
        if chunk is None:
            return segmentation
        with times.stage("postprocess"):
            stream.add(*chunk)
        del chunk  # not beside the next one


class LabelStream:
    """Labels chunks as their logits come: along y in every layer of z, along z in every band of y."""

    def __init__(
        self,
        chunks: Chunks,
        plan: ResamplePlan | None,
        rule: LabelRule,
        labels_ZYX: Any,
        threads: int | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """`plan`: None or one that is local. `labels_ZYX` has the target's shape and is written to.

        `arithmetic`: of the chunks and labels; None: NumPy's, with so many `threads`.
        """
        self._chunks, self._plan, self._rule, self._labels_ZYX = chunks, plan, rule, labels_ZYX
        self._arithmetic = arithmetic or HostArithmetic(threads)
        self._ready = [self._ready_before(axis, bounds) for axis, bounds in enumerate(chunks.bounds[:2])]
        self._planes: dict[int, Any] = {}  # the last plane (H, Y, X) of a layer of chunks
        self._rows: dict[int, Any] = {}  # the last row (H, Z, X) of the latest chunk of a layer

    @property
    def held_bytes(self) -> int:
        """What is kept of earlier chunks."""
        return sum(kept.nbytes for kept in (*self._planes.values(), *self._rows.values()))

    def add(self, number: Index, logits_HZYX: Any) -> None:
        """Write the labels a chunk decides. Its margin, which belongs to the chunks before it, is filled in."""
        layer, band, _ = number
        rows = self._chunks.chunk_slices(number)[1]
        assign = self._arithmetic.assign
        if layer > 0:
            assign(logits_HZYX[:, 0, MARGIN:], self._planes[layer - 1][:, rows])
        if band > 0:
            assign(logits_HZYX[:, :, 0], self._rows.pop(layer))
        self._label(layer, band, logits_HZYX)
        if layer + 1 < self._chunks.grid[0]:
            if layer not in self._planes:
                shape = (len(logits_HZYX), *self._chunks.shape[1:])
                self._planes[layer] = self._arithmetic.empty(shape)
            assign(self._planes[layer][:, rows], logits_HZYX[:, -1, MARGIN:])
        if band + 1 < self._chunks.grid[1]:
            last = logits_HZYX[:, :, -1]
            self._rows[layer] = self._arithmetic.empty(last.shape)
            assign(self._rows[layer], last)
        elif layer > 0:
            del self._planes[layer - 1]

    def _label(self, layer: int, band: int, logits_HZYX: Any) -> None:
        (z_bounds, y_bounds, _), (z_ready, y_ready) = self._chunks.bounds, self._ready
        out_z, out_y = slice(z_ready[layer], z_ready[layer + 1]), slice(y_ready[band], y_ready[band + 1])
        before_z, before_y = MARGIN * (layer > 0), MARGIN * (band > 0)  # nothing lies before the first
        part = native.Part(
            shape_in=self._chunks.shape,
            shape_out=self._labels_ZYX.shape,
            first_in=(z_bounds[layer] - before_z, y_bounds[band] - before_y),
            first_out=(out_z.start, out_y.start),
        )
        logits = logits_HZYX[:, MARGIN - before_z :, MARGIN - before_y :]
        self._arithmetic.label(logits, self._plan, self._rule, self._labels_ZYX[out_z, out_y], part)

    def _ready_before(self, axis: int, bounds: Bounds) -> list[int]:
        """For each bound: how many voxels of the target need no logit from there on."""
        plan = self._plan
        order, is_torch = (0, False) if plan is None else (plan.orders[axis], plan.is_torch)
        last = native.last_inputs(self._chunks.shape[axis], self._labels_ZYX.shape[axis], order, torch=is_torch)
        return [int(count) for count in np.searchsorted(last, bounds)]
