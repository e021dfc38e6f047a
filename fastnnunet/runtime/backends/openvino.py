"""OpenVINO on the CPU: the fastest here (oneDNN kernels made for the patch size, bf16 where the CPU has it)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import BackendError
from fastnnunet.runtime.backends.base import Precision
from fastnnunet.runtime.backends.devices import Device
from fastnnunet.specs.bundle import BundleSpec

# Without the hint OpenVINO chooses bf16 by itself on CPUs that have it, and parity with nnU-Net is gone.
_PRECISION_HINT: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}


class OpenVINOBackend:
    name = "openvino"

    def __init__(
        self, bundle_dir: Path, spec: BundleSpec, threads: int, precision: Precision, device: Device = Device()
    ) -> None:
        import openvino

        self.precision = precision
        core = openvino.Core()
        try:
            model = core.read_model(str(bundle_dir / spec.model_file))
            batch, channels, *space = model.input(0).partial_shape
            if any(axis.is_dynamic for axis in space):  # kernels are made for the patch size
                model.reshape([batch, channels, *spec.patch_size])
            compiled = core.compile_model(
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
            self._request = compiled.create_infer_request()
        except RuntimeError as e:
            raise BackendError(f"openvino cannot load {bundle_dir / spec.model_file}: {e}") from e

    def run(self, batch_NCX: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        try:
            results = self._request.infer({0: batch_NCX}, share_inputs=True, share_outputs=True)
        except RuntimeError as e:
            raise BackendError(f"openvino failed on a batch of shape {batch_NCX.shape}: {e}") from e
        return results[0]
