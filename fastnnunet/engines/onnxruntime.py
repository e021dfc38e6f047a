"""ONNX Runtime: on the CPU part of the base install, runs everywhere; on NVIDIA GPUs with `onnxruntime-gpu`.

`onnxruntime` and `onnxruntime-gpu` are two distributions of one module. Where both are installed the files are those of
the one that came last, whatever the other one's metadata says, so the module itself is asked what it can do.
"""

import math
import threading
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastnnunet.engines.base import Array, LiveNetwork, Precision, Settings
from fastnnunet.engines.calls import Calls
from fastnnunet.engines.failures import batch_failed
from fastnnunet.engines.model_files import model_path
from fastnnunet.errors import BackendError
from fastnnunet.specs.bundle import BundleSpec

_CUDA = "CUDAExecutionProvider"
_MEND = "install the one for GPUs alone: pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


class OnnxRuntimeEngine:
    name = "onnxruntime"
    overhead = 1.25
    largest_tile: tuple[int, ...] | None = None

    def __init__(self, model: Path | bytes, num_heads: int, settings: Settings, *, shapes_vary: bool = False) -> None:
        import onnxruntime

        self.precision: Precision = settings.precision
        device, what = settings.device, model if isinstance(model, Path) else "the exported network"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # plans of memory, one for each shape, are kept: twice the memory from the second run of a large tile on
        options.enable_mem_pattern = not shapes_vary
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.kind == "cuda":
            if (problem := why_no_cuda()) is not None:
                raise BackendError(f"backend onnxruntime cannot compute on {device}: {problem}")
            if hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()  # finds CUDA and cuDNN where pip has put them
            # ONNX Runtime would compute on the CPU, operator by operator, what the GPU has no kernel for
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            providers = [(_CUDA, {"device_id": device.index})]
        try:
            self._session = onnxruntime.InferenceSession(
                str(model) if isinstance(model, Path) else model, options, providers=providers
            )
        except Exception as e:  # the engine's exceptions share no base class but Exception
            raise BackendError(f"onnxruntime cannot load {what} on {device}: {e}") from e
        self._session.disable_fallback()  # it would make another session on the CPU when this one fails
        if device.kind == "cuda" and _CUDA not in (got := self._session.get_providers()):
            raise BackendError(
                f"onnxruntime {onnxruntime.__version__} loaded {what} on {', '.join(got)}, expected {_CUDA}\n"
                "its CUDA libraries do not load: pip install 'onnxruntime-gpu[cuda,cudnn]' brings them; or give "
                "-device cpu"
            )
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name
        self._num_heads = num_heads
        self._apart = settings.apart
        self._device = device
        self._calls = Calls(self.name, survives_fork=device.kind == "cpu")
        self._own = threading.local()  # logits_NHX of each thread

    @classmethod
    def of_bundle(cls, bundle_dir: Path, spec: BundleSpec, settings: Settings) -> Self:
        model = model_path(bundle_dir, spec, settings.precision, cls.name)
        return cls(model, spec.num_heads, settings, shapes_vary=spec.one_pass is not None)

    @classmethod
    def of_network(cls, network: LiveNetwork, settings: Settings) -> Self:
        return cls(network.to_onnx(), network.num_heads, settings)

    def on_device(self) -> "OnnxRuntimeOnDevice | None":
        return None if self._device.kind == "cpu" else OnnxRuntimeOnDevice(self)

    def run(self, batch_NCX: Array) -> Array:
        """Logits in an array that the thread's next call writes to again: those of many classes are large."""
        shape = (len(batch_NCX), self._num_heads, *batch_NCX.shape[2:])
        logits_NHX = getattr(self._own, "logits_NHX", None)
        if logits_NHX is None or logits_NHX.shape != shape:
            logits_NHX = self._own.logits_NHX = np.empty(shape, np.float32)
        size = 1 if self._apart else len(batch_NCX)
        with self._calls:
            try:
                for first in range(0, len(batch_NCX), size):
                    part = logits_NHX[first : first + size]
                    binding = self._session.io_binding()
                    binding.bind_cpu_input(self._input, batch_NCX[first : first + size])
                    binding.bind_output(self._output, "cpu", 0, np.float32, part.shape, part.ctypes.data)
                    self._session.run_with_iobinding(binding)
            except Exception as e:
                raise batch_failed("onnxruntime", batch_NCX.shape, e) from e
        return logits_NHX


class OnnxRuntimeOnDevice:
    """See `DeviceNetwork`. ONNX Runtime computes on a stream of its own and returns when it is done."""

    most = 2**16

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        """Raises BackendError where cuda-python is missing."""
        from fastnnunet.engines.trt.cuda import Cuda

        self._engine = engine
        self._cuda = Cuda(engine._device.index)
        self._cuda.use_device()
        self.device = engine._device.index
        self.stream = self._cuda.new_stream()
        self.turn = threading.RLock()
        self._buffers: dict[str, tuple[int, int]] = {}  # address and bytes
        weakref.finalize(self, _give_back, self._cuda, self.stream, self._buffers)

    def addresses(self, shape_NCX: tuple[int, ...]) -> tuple[int, int]:
        count, _, *space = shape_NCX
        logits = (count, self._engine._num_heads, *space)
        return self._at_least("batch", shape_NCX), self._at_least("logits", logits)

    def run(self, shape_NCX: tuple[int, ...]) -> None:
        engine = self._engine
        batch, logits = self.addresses(shape_NCX)
        self._cuda.synchronize(self.stream)  # the batch is there
        with engine._calls:
            try:
                binding = engine._session.io_binding()
                binding.bind_input(engine._input, "cuda", self.device, np.float32, shape_NCX, batch)
                shape = (shape_NCX[0], engine._num_heads, *shape_NCX[2:])
                binding.bind_output(engine._output, "cuda", self.device, np.float32, shape, logits)
                engine._session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            except Exception as e:  # the engine's exceptions share no base class but Exception
                raise batch_failed("onnxruntime", shape_NCX, f"on the GPU: {e}") from e

    def _at_least(self, name: str, shape: tuple[int, ...]) -> int:
        needed = 4 * math.prod(shape)
        address, size = self._buffers.get(name, (0, 0))
        if size < needed:
            if size:
                self._cuda.synchronize(self.stream)
                self._cuda.free(address)
                del self._buffers[name]
            address = self._cuda.allocate(needed)
            self._buffers[name] = address, needed
        return address


def _give_back(cuda: Any, stream: int, buffers: dict[str, tuple[int, int]]) -> None:
    cuda.use_device()
    for address, _ in buffers.values():
        cuda.free(address)
    cuda.destroy_stream(stream)


def why_no_cuda() -> str | None:
    """None when the installed module was built for NVIDIA GPUs, else what it is and how to get the other."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if _CUDA in available:
        return None
    installed = [
        f"{dist} {metadata.version(dist)}" for dist in ("onnxruntime", "onnxruntime-gpu") if _is_installed(dist)
    ]
    both = " (two distributions of one module: the files are those of the last one)" if len(installed) > 1 else ""
    return (
        f"the module onnxruntime {onnxruntime.__version__} offers {', '.join(available)}, expected {_CUDA} too\n"
        f"installed: {' and '.join(installed) or 'a build of its own'}{both}\n{_MEND}"
    )


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
