"""ONNX Runtime on the CPU: part of the base install, runs everywhere."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import BackendError
from fastnnunet.runtime.backends.base import Precision
from fastnnunet.specs.bundle import BundleSpec


class OnnxRuntimeBackend:
    name = "onnxruntime"

    def __init__(self, bundle_dir: Path, spec: BundleSpec, threads: int, precision: Precision) -> None:
        import onnxruntime

        self.precision = precision
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(bundle_dir / spec.model_file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:  # the engine's exceptions share no base class but Exception
            raise BackendError(f"onnxruntime cannot load {bundle_dir / spec.model_file}: {e}") from e
        self._input = self._session.get_inputs()[0].name

    def run(self, batch_NCX: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        try:
            return self._session.run(None, {self._input: batch_NCX})[0]
        except Exception as e:
            raise BackendError(f"onnxruntime failed on a batch of shape {batch_NCX.shape}: {e}") from e
