"""A GPU made of host memory: the CUDA runtime and the TensorRT calls the backend makes, with the rules they have.

Work on a stream is put off until the stream is synchronised, device memory starts as NaN, every address is checked
against what was allocated, capture forbids what CUDA forbids, and an engine computes with ONNX Runtime. What a real
library punishes with undefined behaviour is an assertion here.
"""

import ctypes
import enum
import importlib.machinery
import json
import types
from collections.abc import Callable

import numpy as np


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


OK = CudaError.cudaSuccess
Operation = Callable[[], None]


class _Stream:
    def __init__(self) -> None:
        self.pending: list[Operation] = []
        self.touched: set[int] = set()  # addresses that pending copies use
        self.captured: list[Operation] | None = None
        self.invalidated = False

    def put(self, operation: Operation) -> None:
        (self.pending if self.captured is None else self.captured).append(operation)


class FakeCuda(types.ModuleType):
    """cuda.bindings.runtime. Failing calls return an error, as the real ones do."""

    cudaError_t = CudaError
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
    cudaDeviceAttr = enum.IntEnum(
        "cudaDeviceAttr", {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76}
    )
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1

    def __init__(self, capability: tuple[int, int] = (8, 6), memory_bytes: int = 1 << 30) -> None:
        super().__init__("cuda.bindings.runtime")
        self.__spec__ = importlib.machinery.ModuleSpec("cuda.bindings.runtime", None)
        self.capability = capability
        self.device_error = OK
        self.devices, self.device = 1, 0  # how many there are, which is current
        self.left_bytes = memory_bytes
        self.memory: dict[int, tuple[str, ctypes.Array]] = {}
        self.streams: dict[int, _Stream] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.launches = 0
        self._handles = iter(range(1, 1_000_000))

    def alive(self) -> dict[str, int]:
        """What was made and not given back."""
        kinds = [kind for kind, _ in self.memory.values()]
        return {
            "device": kinds.count("device"),
            "host": kinds.count("host"),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
        }

    # the device
    def cudaGetDeviceCount(self):
        return self.device_error, self.devices if self.device_error == OK else None

    def cudaSetDevice(self, device):
        if not 0 <= device < self.devices:
            return (CudaError.cudaErrorInvalidValue,)
        self.device = device
        return (OK,)

    def cudaDeviceGetAttribute(self, attribute, device):
        assert 0 <= device < self.devices
        return OK, self.capability[attribute - 75]

    def cudaGetDeviceProperties(self, device):
        assert device == 0
        return OK, types.SimpleNamespace(name=b"Fake GPU\0\0")

    def cudaMemGetInfo(self):
        return OK, self.left_bytes, 1 << 30

    def cudaGetErrorString(self, error):
        return OK, b"what " + error.name.encode() + b" means"

    # memory
    def _allocate(self, kind, size):
        if size > self.left_bytes:
            return CudaError.cudaErrorMemoryAllocation, None
        block = (ctypes.c_ubyte * size)()
        ctypes.memset(block, 0xFF, size)  # NaN
        self.left_bytes -= size
        self.memory[ctypes.addressof(block)] = kind, block
        return OK, ctypes.addressof(block)

    def _free(self, kind, address):
        assert self.memory[address][0] == kind, "freed what is not allocated, or twice"
        # page-locked memory of one thread may be freed while others work, if their work does not touch it
        working = [s for s in self.streams.values() if s.pending and (kind == "device" or address in s.touched)]
        assert not working, "freed under running work"
        self.left_bytes += ctypes.sizeof(self.memory.pop(address)[1])
        return (OK,)

    def cudaMalloc(self, size):
        return self._allocate("device", size)

    def cudaFree(self, address):
        return self._free("device", address)

    def cudaHostAlloc(self, size, flags):
        return self._allocate("host", size)

    def cudaFreeHost(self, address):
        return self._free("host", address)

    def check(self, kind, address, size):
        """The range lies in one living block of that kind."""
        for start, (found, block) in list(self.memory.items()):  # other threads may allocate meanwhile
            if found == kind and start <= address and address + size <= start + ctypes.sizeof(block):
                return
        raise AssertionError(f"{size} bytes at {address} are no {kind} memory")

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        to_device = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        kinds = ("device", "host") if to_device else ("host", "device")

        def copy():
            self.check(kinds[0], target, size)
            self.check(kinds[1], source, size)
            ctypes.memmove(target, source, size)

        self.streams[stream].touched |= {target, source}
        self.streams[stream].put(copy)
        return (OK,)

    # streams and graphs
    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        handle = next(self._handles)
        self.streams[handle] = _Stream()
        return OK, handle

    def cudaStreamDestroy(self, stream):
        del self.streams[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        it = self.streams[stream]
        if it.captured is not None:
            it.invalidated = True
            return (CudaError.cudaErrorStreamCaptureUnsupported,)
        for operation in it.pending:
            operation()
        it.pending.clear()
        it.touched.clear()
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.streams[stream].captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        it = self.streams[stream]
        operations, invalidated = it.captured, it.invalidated
        it.captured, it.invalidated = None, False
        if invalidated or operations is None:
            return CudaError.cudaErrorStreamCaptureInvalidated, None
        return OK, self._graph(operations)

    def _graph(self, operations):
        handle = next(self._handles)
        self.graphs[handle] = list(operations)
        return handle

    def cudaGraphInstantiate(self, graph, flags):
        return OK, self._graph(self.graphs[graph])

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for operation in self.graphs[graph]:
            self.streams[stream].put(operation)
        return (OK,)


def _enum(name: str, *members: str):
    return enum.Enum(name, {member: index for index, member in enumerate(members)})


class FakeTensorRT(types.ModuleType):
    """Either library, as far as running an engine goes. A plan is a JSON line and an ONNX model (see `plan`)."""

    float32, float16 = "float32", "float16"
    TensorIOMode = _enum("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    ExecutionContextAllocationStrategy = _enum("Strategy", "STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED")

    class ILogger:
        Severity = _enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

        def __init__(self) -> None: ...

    def __init__(self, cuda: FakeCuda, name: str = "tensorrt_rtx", version: str = "1.7.1.116") -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = version
        self.cuda = cuda
        self.capturable = True
        self.executions = 0
        if name == "tensorrt_rtx":
            self.ComputeCapability = _enum("ComputeCapability", "NONE", "CURRENT", "SM75", "SM80", "SM86", "SM120")
            self.DynamicShapesKernelSpecializationStrategy = _enum("Kernels", "LAZY", "EAGER", "NONE")

    def Runtime(self, logger):
        return FakeRuntime(self, logger)

    def plan(self, onnx_model: bytes, architecture: str, max_batch: int) -> bytes:
        header = {"architecture": architecture, "version": self.__version__, "max_batch": max_batch}
        return json.dumps(header).encode() + b"\n" + onnx_model


class FakeRuntime:
    def __init__(self, library: FakeTensorRT, logger) -> None:
        self._library, self._logger = library, logger

    def deserialize_cuda_engine(self, plan: bytes):
        header, _, model = plan.partition(b"\n")
        header = json.loads(header)
        major, minor = self._library.cuda.capability
        if header["architecture"] != f"sm{major}{minor}" or header["version"] != self._library.__version__:
            self._logger.log(self._library.ILogger.Severity.ERROR, "the engine is for something else")
            return None
        return FakeEngine(self._library, self._logger, model, header["max_batch"])


class FakeEngine:
    num_io_tensors = 2
    device_memory_size_v2 = 1024

    def __init__(self, library: FakeTensorRT, logger, model: bytes, max_batch: int) -> None:
        import onnxruntime

        self.library, self.logger, self.max_batch = library, logger, max_batch
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        modes = library.TensorIOMode
        self.tensors = {t.name: (modes.INPUT, t.shape) for t in self.session.get_inputs()}
        self.tensors |= {t.name: (modes.OUTPUT, t.shape) for t in self.session.get_outputs()}

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return self.tensors[name][0]

    def get_tensor_shape(self, name):
        return tuple(n if isinstance(n, int) else -1 for n in self.tensors[name][1])

    def get_tensor_dtype(self, name):
        return self.library.float32

    def create_runtime_config(self):
        return FakeRuntimeConfig()

    def create_execution_context(self, runtime_config):
        context = FakeContext if self.library.__name__ == "tensorrt" else FakeContextRTX
        return context(self, runtime_config)


class FakeRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class FakeContext:
    def __init__(self, engine: FakeEngine, config: FakeRuntimeConfig) -> None:
        strategies = engine.library.ExecutionContextAllocationStrategy
        self._engine = engine
        self._needs_memory = config.strategy == strategies.USER_MANAGED
        self._memory: tuple[int, int] | None = None
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self._changes = 0
        self._warm_for: tuple[int, ...] | None = None

    def set_input_shape(self, name, shape):
        self._changes += 1
        self._shape = tuple(shape)
        expected = self._engine.get_tensor_shape(name)
        fits = 1 <= shape[0] <= self._engine.max_batch if expected[0] == -1 else shape[0] == expected[0]
        return fits and all(n in (-1, got) for n, got in zip(expected[1:], shape[1:], strict=True))

    def set_tensor_address(self, name, address):
        self._changes += 1
        self._addresses[name] = address
        return name in self._engine.tensors

    def set_device_memory(self, memory, size):
        self._changes += 1
        assert size >= self._engine.device_memory_size_v2
        self._memory = memory, size

    def execute_async_v3(self, stream):
        library = self._engine.library
        log = self._engine.logger.log
        if self._shape is None or set(self._addresses) != set(self._engine.tensors):
            log(library.ILogger.Severity.ERROR, "shape or address is missing")
            return False
        if self._needs_memory and self._memory is None:
            log(library.ILogger.Severity.ERROR, "no device memory")
            return False
        it = library.cuda.streams[stream]
        if it.captured is not None and (self._warm_for != self._shape or not library.capturable):
            it.invalidated = True
            log(library.ILogger.Severity.ERROR, "operation not permitted when stream is capturing")
            return False
        self._warm_for = self._shape
        library.executions += 1
        changes = self._changes

        def compute():
            assert self._changes == changes, "a context was changed after it was captured or before its work was done"
            library.cuda.check("device", *self._memory)
            ctypes.memset(self._memory[0], 0, self._memory[1])
            inputs = {n: self._array(n) for n, (mode, _) in self._engine.tensors.items() if mode.name == "INPUT"}
            names = [n for n in self._engine.tensors if n not in inputs]
            for name, value in zip(names, self._engine.session.run(names, inputs), strict=True):
                self._array(name)[...] = value

        it.put(compute)
        return True

    def _array(self, name):
        own = self._engine.get_tensor_shape(name)
        shape = (self._shape[0], own[1], *self._shape[2:])
        count = int(np.prod(shape))
        self._engine.library.cuda.check("device", self._addresses[name], 4 * count)
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self._addresses[name])).reshape(shape)


class FakeContextRTX(FakeContext):
    def __init__(self, engine: FakeEngine, config: FakeRuntimeConfig) -> None:
        super().__init__(engine, config)
        strategies = engine.library.DynamicShapesKernelSpecializationStrategy
        # with any other a captured graph may hold stand-in kernels
        assert config.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER

    def is_stream_capturable(self, stream):
        return self._engine.library.capturable and self._warm_for == self._shape
