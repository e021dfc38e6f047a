"""Preprocessing, window and labels of a case on the GPU of its networks.

A case has a stream of its own, on which it is uploaded, preprocessed, labelled and fetched; tiles go through the
network on the network's. So while the network is at one case the next one is on its way in, and chunks that are
finished are labelled beside it. Events order what one stream makes and another reads.
Axes: C channel, H head, N tile in a batch, Z Y X nnU-Net's order.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.engines.base import DeviceNetwork
from fastnnunet.engines.cuda import intensity
from fastnnunet.engines.cuda.arrays import DeviceArray, c_strides
from fastnnunet.engines.cuda.gpu import Gpu, Mark, gpu_with_kernels
from fastnnunet.engines.cuda.resample import contiguous, resample
from fastnnunet.engines.cuda.stream import Stream, check_size, flip_bits
from fastnnunet.events import Listener
from fastnnunet.geometry.resample import ResamplePlan, ResampleSpec
from fastnnunet.runtime.device.arithmetic import DeviceArithmetic
from fastnnunet.runtime.ensemble import share_of
from fastnnunet.runtime.label_stream import MARGIN, LabelStream
from fastnnunet.runtime.logits import LabelRule
from fastnnunet.runtime.normalize import check_colours
from fastnnunet.runtime.preprocess import Preprocessed, check_image, plan_geometry, preprocessed
from fastnnunet.runtime.times import StageTimes
from fastnnunet.runtime.ways import WayElsewhere
from fastnnunet.specs.bundle import BundleSpec

_AHEAD = 2  # batches that are put on the stream before the first of them is waited for


@dataclass(slots=True)
class OnDevice:
    """A case on the GPU: what `Preprocessed.data_CZYX` is there."""

    array: DeviceArray
    stream: Stream

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def fetch(self) -> npt.NDArray[np.float32]:
        """Waits for it."""
        return self.stream.download(self.array)


@dataclass(slots=True)
class DeviceLabels:
    """A label map in the axes of the image as read, before it was cropped, and what is to be checked of its logits."""

    labels: DeviceArray
    arithmetic: DeviceArithmetic

    def fetch(self) -> npt.NDArray[Any]:
        """Waits for it. Raises BackendError where logits left the range of float16, or the GPU failed."""
        labels = self.arithmetic.stream.download(self.labels)
        self.arithmetic.check()
        return labels


class DeviceStages:
    """What `LoadedBundle` does on arrays of the CPU, done on the GPU of its engines."""

    def __init__(self, spec: BundleSpec, networks: Sequence[DeviceNetwork]) -> None:
        """Raises BackendError where the kernels cannot be had for the GPU of the networks."""
        self._spec, self._networks = spec, tuple(networks)
        self._gpu = gpu_with_kernels(self._networks[0].device)
        self._dims = len(spec.patch_size)

    @property
    def can_preprocess(self) -> bool:
        """Not where a mask with its holes filled is needed, nor a previous segmentation."""
        return not self._spec.previous_labels and not any(self._spec.use_mask_for_norm)

    def upload(self, case_data_CZYX: npt.NDArray[np.float32]) -> OnDevice:
        """A case that was preprocessed on the CPU."""
        check_size(case_data_CZYX.shape)
        stream = Stream(self._gpu)
        return OnDevice(stream.upload(case_data_CZYX), stream)

    def preprocess(
        self, image_CZYX: npt.NDArray[np.float32], properties: dict[str, Any], resample_spec: ResampleSpec
    ) -> Preprocessed:
        """As `preprocess` of the CPU; the image is left as it is. Raises ImageError and BackendError."""
        check_image(image_CZYX, None, self._spec)
        data = image_CZYX.transpose(0, *(axis + 1 for axis in self._spec.transpose_forward))
        # neighbours in memory stay neighbours: normalisation adds up in that order
        axes = native.axes_by_stride(data[0])
        check_size(data.shape)
        stream = Stream(self._gpu)
        ordered = stream.upload(data.transpose(0, *(axis + 1 for axis in axes)))
        box = intensity.nonzero_box(stream, ordered)
        cropped = ordered[:, *(slice(*limits) for limits in box)]
        self._normalize(stream, cropped)
        back = [axes.index(axis) for axis in range(3)]
        bbox = tuple(box[axis] for axis in back)
        geometry = plan_geometry(self._spec, resample_spec, properties, data.shape[1:], bbox)
        view = cropped.transpose(0, *(axis + 1 for axis in back))
        check_size((len(view), *geometry.shape))
        out = contiguous(stream, view) if geometry.plan is None else resample(stream, view, geometry.plan)
        return preprocessed(OnDevice(out, stream), geometry, properties)

    def _normalize(self, stream: Stream, data: DeviceArray) -> None:
        for index, scheme in enumerate(self._spec.normalization_schemes):
            channel, known = data[index], self._spec.intensity_properties.get(str(index), {})
            if scheme == "ZScoreNormalization":
                intensity.z_score(stream, channel)
            elif scheme == "CTNormalization":
                low, high = known["percentile_00_5"], known["percentile_99_5"]
                intensity.clip_and_scale(stream, channel, low, high, known["mean"], known["std"])
            elif scheme == "RescaleTo01Normalization":
                intensity.rescale_to_01(stream, channel)
            elif scheme == "RGBTo01Normalization":
                check_colours(*intensity.rgb_to_01(stream, channel))
            else:
                assert scheme == "NoNormalization", scheme

    def infer(
        self,
        case: Preprocessed,
        data: OnDevice,
        way: WayElsewhere,
        plan: ResamplePlan | None,
        rule: LabelRule,
        mirror_axes: Sequence[int],
        times: StageTimes,
        progress: Listener,
        *,
        stream_bytes: int,
    ) -> DeviceLabels:
        """Labels, chunk by chunk where there is one network and its logits are of more than `stream_bytes`."""
        with times.stage("infer"):
            own, shape = data.stream, data.array.shape[1:]
            arithmetic = DeviceArithmetic(own, own.new_limits(2))
            # in the axes of the image as read: labels are put into it by strides
            forward = self._spec.transpose_forward
            image_shape = [case.shape_before_cropping[axis] for axis in self._spec.transpose_backward]
            labels = own.filled(image_shape, rule.dtype)
            cropped = labels.transpose(*forward)[case.crop]
            is_local = plan is None or plan.is_local
            if len(self._networks) == 1 and is_local and 2 * rule.num_heads * prod(shape) > stream_bytes:
                self._stream_labels(data, way, plan, rule, mirror_axes, progress, arithmetic, cropped)
            else:
                logits = self.logits(data, way, rule.num_heads, mirror_axes, progress, arithmetic)
                arithmetic.label(logits, plan, rule, cropped, None)
        return DeviceLabels(labels, arithmetic)

    def logits(
        self,
        data: OnDevice,
        way: WayElsewhere,
        num_heads: int,
        mirror_axes: Sequence[int],
        progress: Listener,
        arithmetic: DeviceArithmetic,
    ) -> DeviceArray:
        """Logits (H, Z, Y, X) float16 of the folds' mean, on the stream of the case."""
        own, total = data.stream, None
        for number, network in enumerate(self._networks):
            with ExitStack() as stack:
                stack.enter_context(network.turn)
                tiles = _Tiles(self._gpu, network, data, num_heads, mirror_axes, self._dims)
                ((_, logits),) = way.begin_tiles(
                    data.array.shape[1:],
                    tiles.predict,
                    whole=True,
                    margin=0,
                    progress=share_of(progress, number, len(self._networks)),
                    arithmetic=tiles.arithmetic(arithmetic),
                )[1]
                tiles.close()
            if total is None:
                total = logits
            else:
                own.add_halves(logits, total)
        assert total is not None
        if len(self._networks) > 1:
            arithmetic.divide(total, len(self._networks))
        return total

    def fetched_logits(
        self, data: OnDevice, way: WayElsewhere, num_heads: int, mirror_axes: Sequence[int], progress: Listener
    ) -> native.HalfArray:
        """Logits for whoever needs them on the CPU. Raises BackendError as `DeviceLabels.fetch`."""
        arithmetic = DeviceArithmetic(data.stream, data.stream.new_limits(2))
        logits = data.stream.download(self.logits(data, way, num_heads, mirror_axes, progress, arithmetic))
        arithmetic.check()
        return logits

    def _stream_labels(
        self,
        data: OnDevice,
        way: WayElsewhere,
        plan: ResamplePlan | None,
        rule: LabelRule,
        mirror_axes: Sequence[int],
        progress: Listener,
        arithmetic: DeviceArithmetic,
        labels: DeviceArray,
    ) -> None:
        (network,) = self._networks
        with network.turn:
            tiles = _Tiles(self._gpu, network, data, rule.num_heads, mirror_axes, self._dims)
            chunks, finished = way.begin_tiles(
                data.array.shape[1:],
                tiles.predict,
                whole=False,
                margin=MARGIN,
                progress=progress,
                arithmetic=tiles.arithmetic(arithmetic),
            )
            stream = LabelStream(chunks, plan, rule, labels, arithmetic=arithmetic)
            for number, logits in finished:
                data.stream.follow(tiles.stream)
                stream.add(number, logits)
                del logits  # not beside the next one
            tiles.close()


@dataclass(slots=True)
class _Tiles:
    """The tiles of a case through one network, on its stream."""

    gpu: Gpu
    network: DeviceNetwork
    data: OnDevice
    num_heads: int
    mirror_axes: Sequence[int]
    dims: int  # of the patch
    stream: Stream = field(init=False)
    marks: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = Stream(self.gpu, self.network.stream, owner=self.network)
        self.stream.follow(self.data.stream)  # the image, and limits that are begun

    def arithmetic(self, of_case: DeviceArithmetic) -> DeviceArithmetic:
        """The same on this stream: what it divides counts for the case."""
        return DeviceArithmetic(self.stream, of_case.limits)

    def close(self) -> None:
        """Waits for the network, whose buffers are the next caller's; the image is the case's alone again."""
        self.data.stream.follow(self.stream)
        self.stream.synchronize()
        self.data.stream.uses(self.data.array)

    def predict(self, origins: Sequence[Sequence[int]], tile: Sequence[int]) -> DeviceArray:
        """See `Predict`."""
        count, channels, most = len(origins), len(self.data.array), self.network.most
        if count > most:  # the network's memory is written to again
            out = self.stream.empty((count, self.num_heads, *tile))
            for first in range(0, count, most):
                part = self.predict(origins[first : first + most], tile)
                self.stream.copy(part, out[first : first + most])
            return out
        space = tuple(tile)[3 - self.dims :]
        batch_address, logits_address = self.network.addresses((count, channels, *space))
        batch = _engine_array(batch_address, (count, channels, *tile))
        logits = _engine_array(logits_address, (count, self.num_heads, *tile))
        subsets = [s for n in range(len(self.mirror_axes) + 1) for s in combinations(self.mirror_axes, n)]
        flips = [flip_bits(subset, len(space)) for subset in subsets]
        if len(flips) == 1:
            self._run(batch, origins, tile, 0, space)
            return logits
        total = self.stream.empty((count * self.num_heads, *tile))
        for number, flip in enumerate(flips):
            self._run(batch, origins, tile, flip, space)
            is_last = number == len(flips) - 1
            parts = logits.reshape(1, *total.shape)
            self.stream.add_mirrored(parts, total, [flip], is_first=number == 0, divisor=len(flips) if is_last else 0)
        return total.reshape(count, self.num_heads, *tile)

    def _run(
        self,
        batch: DeviceArray,
        origins: Sequence[Sequence[int]],
        tile: Sequence[int],
        flip: int,
        space: tuple[int, ...],
    ) -> None:
        self.stream.gather(self.data.array, origins, tile, [flip], batch)
        self.network.run((len(origins), len(self.data.array), *space))
        # the stream runs a little ahead of what is reported, and errors come to light where they belong
        self.marks.append(self.stream.mark())
        if len(self.marks) > _AHEAD:
            self.marks.pop(0).wait()


def _engine_array(address: int, shape: tuple[int, ...]) -> DeviceArray:
    return DeviceArray(None, address, shape, c_strides(shape), np.dtype(np.float32))
