"""OpenVINO on the CPU: the fastest here (oneDNN kernels made for the patch size, bf16 where the CPU has it)."""

import logging
import math
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from fastnnunet.engines.base import Array, LiveNetwork, Precision, Settings
from fastnnunet.engines.calls import Calls
from fastnnunet.engines.model_files import model_path
from fastnnunet.errors import BackendError
from fastnnunet.specs.bundle import BundleSpec

log = logging.getLogger(__name__)

# Without the hint OpenVINO chooses bf16 by itself on CPUs that have it, and parity with nnU-Net is gone. A quantised
# model says itself what is computed in 8 bits; the hint is for the rest.
_PRECISION_HINT: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


STREAM_BYTES = 64 << 20  # patches apart: every thread has a stream of its own while the logits of all stay below this


class OpenVINOEngine:
    name = "openvino"

    def __init__(self, model: Any, logits_bytes: int, settings: Settings) -> None:
        """`model`: an openvino.Model of a fixed patch; its logits for one take `logits_bytes`. Raises RuntimeError."""
        import openvino

        core = openvino.Core()
        precision = settings.precision
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            log.warning("this CPU has no bf16, OpenVINO computes in fp32")
            precision = "fp32"
        self.precision: Precision = precision
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINT[precision],
            "INFERENCE_NUM_THREADS": settings.threads,
            # Pinned threads wait for their core while others are idle: half the speed on a busy machine, and
            # several processes would all be pinned to the same first cores.
            "ENABLE_CPU_PINNING": False,
        }
        streams = max(1, min(settings.threads, STREAM_BYTES // logits_bytes))
        hints |= {"NUM_STREAMS": str(streams)} if settings.apart else {"PERFORMANCE_HINT": "LATENCY"}
        self._compiled = core.compile_model(model, "CPU", hints)
        self._queue: Any = openvino.AsyncInferQueue(self._compiled, streams) if settings.apart else None
        self._turn = threading.Lock()  # held while a batch has the queue
        self._calls = Calls(self.name)
        self._own = threading.local()  # the request of each thread, which holds its results

    @classmethod
    def of_bundle(cls, bundle_dir: Path, spec: BundleSpec, settings: Settings) -> Self:
        import openvino

        model_file = model_path(bundle_dir, spec, settings.precision, cls.name)
        try:
            model = openvino.Core().read_model(str(model_file))
            _check_shapes(model, spec)
            batch, channels, *space = model.input(0).partial_shape
            if settings.apart or any(axis.is_dynamic for axis in space):  # kernels are made for the patch size
                model.reshape([1 if settings.apart else batch, channels, *spec.patch_size])
            return cls(model, _logits_bytes(spec.num_heads, spec.patch_size), settings)
        except RuntimeError as e:
            raise BackendError(f"openvino cannot load {model_file}: {e}") from e

    @classmethod
    def of_network(cls, network: LiveNetwork, settings: Settings) -> Self:
        import openvino

        shape = (1, network.channels, *network.patch_size)
        batch = 1 if settings.apart else -1
        with warnings.catch_warnings():  # notes of the tracer about itself
            warnings.simplefilter("ignore")
            model = openvino.convert_model(
                network.module.eval(), example_input=np.zeros(shape, np.float32), input=[batch, *shape[1:]]
            )
        return cls(model, _logits_bytes(network.num_heads, network.patch_size), settings)

    def run(self, batch_NCX: Array) -> Array:
        with self._calls:
            try:
                return self._run_apart(batch_NCX) if self._queue else self._run_together(batch_NCX)
            except RuntimeError as e:
                raise BackendError(f"openvino failed on a batch of shape {batch_NCX.shape}: {e}") from e

    def _run_together(self, batch_NCX: Array) -> Array:
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._compiled.create_infer_request()
        logits_NHX: Array = request.infer({0: batch_NCX}, share_inputs=True, share_outputs=True)[0]
        return logits_NHX

    def _run_apart(self, batch_NCX: Array) -> Array:
        logits: list[Array | None] = [None] * len(batch_NCX)

        def keep(request: Any, number: int) -> None:
            logits[number] = request.get_output_tensor(0).data.copy()

        with self._turn:
            self._queue.set_callback(keep)
            for number in range(len(batch_NCX)):
                self._queue.start_async({0: batch_NCX[number : number + 1]}, number)
            self._queue.wait_all()
        return np.concatenate(cast(list[Array], logits))


def _logits_bytes(num_heads: int, patch_size: Sequence[int]) -> int:
    return 4 * num_heads * math.prod(patch_size)


def _check_shapes(model: Any, spec: BundleSpec) -> None:
    """Of a quantised model, which nobody has looked into yet. Raises RuntimeError."""
    channels = len(spec.channel_names) + len(spec.previous_labels)
    for what, values, axis in (("input", model.inputs, channels), ("output", model.outputs, spec.num_heads)):
        expected = [-1 if spec.batch_size is None else spec.batch_size, axis, *spec.patch_size]
        shapes = [value.partial_shape for value in values]
        if len(shapes) != 1 or not shapes[0].compatible(type(shapes[0])(expected)):
            raise RuntimeError(f"it has {what} {', '.join(map(str, shapes))}, expected one {what} {expected}")
