"""OpenVINO on the CPU: the fastest here (oneDNN kernels made for the patch size, bf16 where the CPU has it)."""

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.base import Precision, model_path
from fastnnunet.engines.calls import Calls
from fastnnunet.engines.devices import Device
from fastnnunet.errors import BackendError
from fastnnunet.specs.bundle import BundleSpec

log = logging.getLogger(__name__)

# Without the hint OpenVINO chooses bf16 by itself on CPUs that have it, and parity with nnU-Net is gone. A quantised
# model says itself what is computed in 8 bits; the hint is for the rest.
_PRECISION_HINT: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


class OpenVINOBackend:
    name = "openvino"

    def __init__(
        self, bundle_dir: Path, spec: BundleSpec, threads: int, precision: Precision, device: Device = Device()
    ) -> None:
        import openvino

        model_file = model_path(bundle_dir, spec, precision, self.name)
        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            log.warning("this CPU has no bf16, OpenVINO computes in fp32")
            precision = "fp32"
        self.precision = precision
        try:
            model = core.read_model(str(model_file))
            _check_shapes(model, spec)
            batch, channels, *space = model.input(0).partial_shape
            if any(axis.is_dynamic for axis in space):  # kernels are made for the patch size
                model.reshape([batch, channels, *spec.patch_size])
            self._compiled = core.compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _PRECISION_HINT[precision],
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": threads,
                    # Pinned threads wait for their core while others are idle: half the speed on a busy machine, and
                    # several predictors would all be pinned to the same first cores.
                    "ENABLE_CPU_PINNING": False,
                },
            )
        except RuntimeError as e:
            raise BackendError(f"openvino cannot load {model_file}: {e}") from e
        self._calls = Calls(self.name)
        self._own = threading.local()  # the request of each thread, which holds its results

    def run(self, batch_NCX: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with self._calls:
            try:
                request = getattr(self._own, "request", None)
                if request is None:
                    request = self._own.request = self._compiled.create_infer_request()
                results = request.infer({0: batch_NCX}, share_inputs=True, share_outputs=True)
            except RuntimeError as e:
                raise BackendError(f"openvino failed on a batch of shape {batch_NCX.shape}: {e}") from e
        return results[0]


def _check_shapes(model: Any, spec: BundleSpec) -> None:
    """Of a quantised model, which nobody has looked into yet. Raises RuntimeError."""
    channels = len(spec.channel_names) + len(spec.previous_labels)
    for what, values, axis in (("input", model.inputs, channels), ("output", model.outputs, spec.num_heads)):
        expected = [-1 if spec.batch_size is None else spec.batch_size, axis, *spec.patch_size]
        shapes = [value.partial_shape for value in values]
        if len(shapes) != 1 or not shapes[0].compatible(type(shapes[0])(expected)):
            raise RuntimeError(f"it has {what} {', '.join(map(str, shapes))}, expected one {what} {expected}")
