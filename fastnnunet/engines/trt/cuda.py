"""Memory, streams and graphs of one GPU through cuda-python, with errors of this package."""

import ctypes
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import BackendError, NoMemoryError


class Cuda:
    """The calls of the CUDA runtime this package makes. Addresses, streams and graphs are the runtime's own handles.

    Every method raises BackendError with CUDA's name for what went wrong, NoMemoryError for too little memory.
    """

    def __init__(self, device: int = 0) -> None:
        """`device`: counted among those that CUDA_VISIBLE_DEVICES leaves."""
        self._runtime = _import_runtime()
        self._device = device

    @property
    def device(self) -> int:
        return self._device

    def why_no_device(self) -> str | None:
        """None when there is a GPU that can be used, else CUDA's reason."""
        error, count = self._runtime.cudaGetDeviceCount()
        if error == self._runtime.cudaError_t.cudaSuccess:
            return None if count else "no device"
        return self._describe(error)

    def architecture(self) -> str:
        """E.g. sm86."""
        attributes = self._runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, self._device)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, self._device)
        return f"sm{major}{minor}"

    def device_name(self) -> str:
        name: bytes = self._call("cudaGetDeviceProperties", self._device).name
        return name.split(b"\0")[0].decode()

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory of the GPU."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def use_device(self) -> None:
        """Make the GPU current in this thread."""
        self._call("cudaSetDevice", self._device)

    def allocate(self, size_bytes: int) -> int:
        return int(self._call("cudaMalloc", size_bytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, shape: tuple[int, ...]) -> tuple[int, npt.NDArray[np.float32]]:
        """Address and float32 array of page-locked host memory, which is copied without a detour and asynchronously.

        It is freed when the last view of the array is gone.
        """
        count = int(np.prod(shape))
        address = int(self._call("cudaHostAlloc", 4 * count, self._runtime.cudaHostAllocDefault))
        memory = (ctypes.c_float * count).from_address(address)
        weakref.finalize(memory, self._call, "cudaFreeHost", address)
        return address, np.ctypeslib.as_array(memory).reshape(shape)

    def new_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def copy_to_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def copy_to_host(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def capture(self, issue: Callable[[], None], stream: int) -> Any:
        """A graph, ready to launch, of what `issue` puts on `stream`; nothing of it is run."""
        # thread-local: other threads may go on calling CUDA meanwhile
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            issue()
        except BaseException:
            self._runtime.cudaStreamEndCapture(stream)  # fails as well, but makes the stream usable again
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *results = getattr(self._runtime, function)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            said = f"{function}{arguments} failed: {self._describe(error)}"
            if error.name == "cudaErrorMemoryAllocation":
                raise NoMemoryError(f"the GPU has not enough memory: {said}")
            raise BackendError(said)
        return results[0] if len(results) == 1 else tuple(results)

    def _describe(self, error: Any) -> str:
        text: bytes = self._runtime.cudaGetErrorString(error)[1]
        return f"{error.name} ({text.decode()})"


def _import_runtime() -> Any:
    """cuda.bindings.runtime. Raises BackendError where cuda-python is missing."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as e:
        raise BackendError(
            "backend tensorrt needs the package cuda-python\ninstall it: pip install 'fastnnunet[rtx]'"
        ) from e


def gpu_architecture() -> str | None:
    """Architecture of the first GPU, None where there is none or no cuda-python."""
    try:
        cuda = Cuda()
    except BackendError:
        return None
    return cuda.architecture() if cuda.why_no_device() is None else None
