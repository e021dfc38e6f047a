"""The arithmetic of the window and of labels on a GPU; see `Arithmetic`."""

from collections.abc import Sequence

import numpy as np

from fastnnunet import native
from fastnnunet.engines.cuda.arrays import DeviceArray
from fastnnunet.engines.cuda.label import label_logits
from fastnnunet.engines.cuda.stream import Stream, values_of_limits
from fastnnunet.geometry.chunked_window import ChunkedWindow, chunked_window
from fastnnunet.geometry.half import check_half_limits
from fastnnunet.geometry.resample import ResamplePlan
from fastnnunet.runtime.arithmetic import Weighting, tile_weights
from fastnnunet.runtime.logits import LabelRule


class DeviceArithmetic:
    """On one stream. `limits` (2): of sums and of quotients, looked at when the labels are fetched."""

    def __init__(self, stream: Stream, limits: DeviceArray) -> None:
        self.stream, self.limits = stream, limits

    def empty(self, shape: Sequence[int], *, zero: bool = False) -> DeviceArray:
        return self.stream.filled(shape, np.float16) if zero else self.stream.empty(shape, np.float16)

    def weights(self, chunks: ChunkedWindow, weighting: Weighting) -> tuple[DeviceArray, DeviceArray]:
        stream, weights = self.stream, tile_weights(weighting.patch_size, weighting.use_gaussian)
        on_gpu = stream.upload(weights.reshape(chunks.tile))
        halves = stream.upload(weights.astype(np.float16).reshape(1, *chunks.tile))  # exact
        total = self.empty((1, *chunks.shape), zero=True)
        whole = chunked_window(chunks.shape, weighting.patch_size, weighting.step_size, chunks.shape)
        for number in range(len(whole.tiles)):
            in_image, in_tile = whole.overlap(number, (0, 0, 0))
            stream.add_halves(halves[:, *in_tile], total[:, *in_image])
        return on_gpu, total[0]

    def add_weighted(
        self, logits_HZYX: DeviceArray, weights_ZYX: DeviceArray | None, sums_HZYX: DeviceArray, *, is_first: bool
    ) -> None:
        self.stream.add_weighted(logits_HZYX, weights_ZYX, sums_HZYX, is_first=is_first)

    def divide(self, sums_HZYX: DeviceArray, total_ZYX: DeviceArray | int) -> None:
        self.stream.divide(sums_HZYX, total_ZYX, self.limits)

    def assign(self, target: DeviceArray, source: DeviceArray) -> None:
        """Of (H, Z, Y, X), or without one of the last three axes but x."""
        if target.ndim == 3:
            target, source = target[:, None], source[:, None]
        self.stream.copy_halves(source, target)

    def label(
        self,
        logits_HZYX: DeviceArray,
        plan: ResamplePlan | None,
        rule: LabelRule,
        labels_ZYX: DeviceArray,
        part: native.Part | None,
    ) -> None:
        label_logits(self.stream, logits_HZYX, labels_ZYX, plan, rule.regions_class_order, part)

    def check(self) -> None:
        """Waits for the stream. Raises BackendError where values left the range of float16."""
        of_sums, of_quotients = values_of_limits(self.stream.download(self.limits))
        if of_sums[0] > of_sums[1]:  # nothing was divided
            return
        check_half_limits(of_sums, "the weighted logits")
        check_half_limits(of_quotients, "the logits")
