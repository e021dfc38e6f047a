"""One GPU with streams that overlap: memory in the order of a stream, events between streams, and kernels."""

import ctypes
import importlib
import threading
import weakref
from typing import Any

from fastnnunet.engines.cuda.code import kernel_code
from fastnnunet.engines.cuda.params import KERNELS, Grid
from fastnnunet.engines.trt.cuda import Cuda
from fastnnunet.errors import BackendError

BLOCK = (32, 8, 1)  # kBlockX, kBlockY


class Gpu(Cuda):
    """Raises BackendError with CUDA's name for what went wrong, as `Cuda` does."""

    def __init__(self, device: int = 0) -> None:
        """Raises BackendError where there is no GPU, and no code of the kernels for it."""
        super().__init__(device)
        if (reason := self.why_no_device()) is not None:
            raise BackendError(f"there is no GPU: {reason}")
        self.use_device()
        self._driver = _import_driver()
        code = kernel_code(self.architecture())
        self._module = self._drive("cuModuleLoadData", code)
        self._functions = {
            name: self._drive("cuModuleGetFunction", self._module, f"fastnnunet_{name}".encode()) for name in KERNELS
        }

    def start(self, name: str, grid: Grid, params: ctypes.Structure, stream: int) -> None:
        """Put a kernel on a stream; `params` may change as soon as this returns."""
        kernel = KERNELS[name]
        assert isinstance(params, kernel.params), f"{name} takes {kernel.params.__name__}"
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._drive(
            "cuLaunchKernel", self._functions[name], *grid, *BLOCK, kernel.shared_bytes, stream,
            ctypes.addressof(pointers), 0,
        )  # fmt: skip

    def allocate_on(self, size_bytes: int, stream: int) -> int:
        """Memory that work on `stream` may use from here on, and other streams after an event."""
        return int(self._call("cudaMallocAsync", max(1, size_bytes), stream))

    def free_on(self, address: int, stream: int) -> None:
        """Give memory back once the work on `stream` so far is done."""
        self._call("cudaFreeAsync", address, stream)

    def fill(self, address: int, byte: int, size_bytes: int, stream: int) -> None:
        self._call("cudaMemsetAsync", address, byte, size_bytes, stream)

    def copy_within(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """From the GPU's memory to the GPU's memory."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def follow(self, stream: int, other: int) -> None:
        """Work put on `stream` from now on waits for what is on `other` now."""
        event = self._call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)
        try:
            self._call("cudaEventRecord", event, other)
            self._call("cudaStreamWaitEvent", stream, event, 0)
        finally:
            self._call("cudaEventDestroy", event)  # its memory goes when it has come to pass

    def mark(self, stream: int) -> "Mark":
        """A point of a stream that the host can wait for."""
        return Mark(self, self._call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming), stream)

    def _drive(self, function: str, *arguments: Any) -> Any:
        try:
            error, *results = getattr(self._driver, function)(*arguments)
        except RuntimeError as e:  # cuda-python without a driver
            raise BackendError(f"{function} failed: {e}") from e
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{function} failed: {error.name}")
        return results[0] if len(results) == 1 else tuple(results)


class Mark:
    """An event on a stream."""

    def __init__(self, gpu: Gpu, event: Any, stream: int) -> None:
        self._gpu, self._event = gpu, event
        weakref.finalize(self, gpu._call, "cudaEventDestroy", event)
        gpu._call("cudaEventRecord", event, stream)

    def wait(self) -> None:
        """Until the work before it is done. Raises BackendError when that failed."""
        self._gpu._call("cudaEventSynchronize", self._event)


_gpus: dict[int, Gpu] = {}
_lock = threading.Lock()


def gpu_with_kernels(device: int) -> Gpu:
    """The GPU, its kernels loaded once. Raises BackendError as `Gpu`."""
    with _lock:
        if device not in _gpus:
            _gpus[device] = Gpu(device)
        return _gpus[device]


def _import_driver() -> Any:
    """cuda.bindings.driver, begun. Raises BackendError where cuda-python or the driver itself is missing."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        driver.cuInit(0)  # what comes after tells if this fails
    except ImportError as e:
        raise BackendError("the package cuda-python is missing\ninstall it: pip install cuda-python") from e
    except (RuntimeError, OSError) as e:  # cuda-python looks for the library at the first call
        raise BackendError(f"the NVIDIA driver cannot be loaded: {e}") from e
    return driver
