"""TensorRT on an NVIDIA GPU: an engine of `fastnnunet export tensorrt`, replayed as a CUDA graph for each shape.

Everything a batch size, and for one pass a size of tiles, needs is made when it is first seen: an execution context
(its shapes are part of the captured graph, so it is never given others), one ordinary run as warm-up, and the graph of
copy in and inference. All contexts share the buffers and the working memory, since they run one after the other on one
stream. Results are copied out to memory of the thread that called, so that those of others do not change under them.
"""

import logging
import math
import shlex
import threading
import weakref
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np

from fastnnunet.engines.base import Array, LiveNetwork, Precision, Settings
from fastnnunet.engines.calls import Calls
from fastnnunet.engines.trt.cuda import Cuda
from fastnnunet.engines.trt.library import Library, find_library, installed_names
from fastnnunet.engines.trt.store import StoredEngine, list_engines, source_file
from fastnnunet.errors import BackendError
from fastnnunet.specs.bundle import BundleSpec

log = logging.getLogger(__name__)
_Pinned: TypeAlias = tuple[int, Array]  # address and array of page-locked memory
_Shape: TypeAlias = tuple[int, ...]  # (N, *tile)
_Use: TypeAlias = tuple[_Shape, bool]  # a shape, and whether its batch is copied in first or lies on the GPU
_MOST_SHAPES = 16  # that are kept


@dataclass(slots=True)
class _Prepared:
    """A batch size and tile that have been run."""

    context: Any
    graph: Any | None  # None: the library does not allow capture, the context is run instead


class TensorRTEngine:
    name = "tensorrt"
    overhead = 1.2

    def __init__(self, library: Library, stored: StoredEngine, cuda: Cuda, precision: Precision) -> None:
        """Load an engine that fits the GPU and allocate its memory."""
        self.precision = precision
        self._cuda = cuda
        cuda.use_device()
        self._library = library
        self._key = key = stored.key
        library.logger.errors.clear()
        # kept as long as the engine, which uses it
        self._runtime = library.module.Runtime(library.logger)
        self._engine = self._runtime.deserialize_cuda_engine(stored.read_plan())
        if self._engine is None:
            raise BackendError(
                f"{key.library} {key.library_version} cannot load {stored.path}: {'; '.join(library.logger.errors)}\n"
                "remove it and export again on this machine"
            )
        self._input, self._output = _io_names(self._engine, stored, library.module)
        self._prepared: dict[_Use, _Prepared] = {}  # what was used last comes last
        self._calls = Calls(self.name, survives_fork=False)
        self._turn = threading.Lock()  # held while a batch has the stream and the buffers
        self._own = threading.local()  # output: the _Pinned memory for the results of each thread
        with ExitStack() as release:
            self._stream = cuda.new_stream()
            release.callback(cuda.destroy_stream, self._stream)
            self._host_input_address, self._host_input = cuda.allocate_pinned((key.max_batch, *key.input_shape))
            self._unused = [self._new_output()]  # for the first thread that runs a batch
            self._device_input = _on_device(cuda, release, self._host_input.nbytes)
            self._device_output = _on_device(cuda, release, self._unused[0][1].nbytes)
            self._work_bytes = int(self._engine.device_memory_size_v2)
            self._work = _on_device(cuda, release, max(self._work_bytes, 1))
            release.callback(_destroy_graphs, cuda, self._prepared)
            weakref.finalize(self, release.pop_all().close)

    @classmethod
    def of_bundle(cls, bundle_dir: Path, spec: BundleSpec, settings: Settings) -> Self:
        cuda = require_gpu(settings.device.index)
        library, stored = choose_stored(bundle_dir, spec, settings.precision, cuda.architecture())
        return cls(library, stored, cuda, settings.precision)

    @property
    def largest_tile(self) -> tuple[int, ...] | None:
        return self._key.input_shape[1:]

    @classmethod
    def of_network(cls, network: LiveNetwork, settings: Settings) -> Self:
        from fastnnunet.engines.trt.build import engine_of_network

        cuda, library = require_gpu(settings.device.index), find_library()
        stored = engine_of_network(network, settings.precision, library, cuda.architecture())
        return cls(library, stored, cuda, settings.precision)

    def run(self, batch_NCX: Array) -> Array:
        if not self._takes(batch_NCX.shape):
            raise BackendError(f"tensorrt failed on a batch of shape {batch_NCX.shape}: {self._expected()}")
        with self._calls:
            self._cuda.use_device()  # the current device is a matter of the thread
            most = self._key.max_batch
            if len(batch_NCX) <= most:
                return self._run_once(batch_NCX)
            heads = self._key.output_shape[0]
            logits_NHX = np.empty((len(batch_NCX), heads, *batch_NCX.shape[2:]), np.float32)
            for first in range(0, len(batch_NCX), most):
                logits_NHX[first : first + most] = self._run_once(batch_NCX[first : first + most])
            return logits_NHX

    def captured(self) -> list[int]:
        """Batch sizes that are replayed as CUDA graphs."""
        return sorted(shape[0] for (shape, _), one in self._prepared.items() if one.graph is not None)

    def on_device(self) -> "TensorRTOnDevice":
        return TensorRTOnDevice(self)

    def _takes(self, shape_NCX: tuple[int, ...]) -> bool:
        channels, *patch = self._key.input_shape
        if len(shape_NCX) != 2 + len(patch) or shape_NCX[1] != channels or not shape_NCX[0]:
            return False
        least = self._key.smallest_tile or tuple(patch)
        return all(low <= n <= high for low, n, high in zip(least, shape_NCX[2:], patch, strict=True))

    def _run_once(self, batch_NCX: Array) -> Array:
        """Logits in the thread's pinned buffer."""
        count, _, *tile = batch_NCX.shape
        shape = (count, *tile)
        address, host_output = self._output_of_thread()
        logits_NHX = _beginning(host_output, (count, self._key.output_shape[0], *tile))
        with self._turn:
            _beginning(self._host_input, batch_NCX.shape)[...] = batch_NCX
            self._start(shape, copies_in=True)
            self._cuda.copy_to_host(address, self._device_output, logits_NHX.nbytes, self._stream)
            self._cuda.synchronize(self._stream)
        return logits_NHX

    def _new_output(self) -> _Pinned:
        return self._cuda.allocate_pinned((self._key.max_batch, *self._key.output_shape))

    def _output_of_thread(self) -> _Pinned:
        output: _Pinned | None = getattr(self._own, "output", None)
        if output is None:
            try:
                output = self._unused.pop()
            except IndexError:
                output = self._new_output()
            self._own.output = output
        return output

    def _start(self, shape: _Shape, *, copies_in: bool) -> None:
        """Put the batch in the buffer through the network; `copies_in`: it is in host memory."""
        use = (shape, copies_in)
        prepared = self._prepared.pop(use, None)
        if prepared is None:
            self._prepare(shape, copies_in)
            return
        self._prepared[use] = prepared
        if prepared.graph is not None:
            self._cuda.launch(prepared.graph, self._stream)
        else:
            self._issue(prepared.context, shape, copies_in)

    def _prepare(self, shape: _Shape, copies_in: bool) -> None:
        """Run a shape for the first time, which computes what is in the buffer, and capture it."""
        if len(self._prepared) == _MOST_SHAPES:
            oldest = next(iter(self._prepared))
            _destroy_graphs(self._cuda, {oldest: self._prepared.pop(oldest)})
        context = self._library.new_context(self._engine)
        if context is None or not (
            context.set_input_shape(self._input, self._input_shape(shape))
            and context.set_tensor_address(self._input, self._device_input)
            and context.set_tensor_address(self._output, self._device_output)
        ):
            raise self._failed(f"no execution context for {_words(shape)}")
        context.set_device_memory(self._work, self._work_bytes)
        self._issue(context, shape, copies_in)  # compiles and loads kernels, which must not happen during capture
        self._cuda.synchronize(self._stream)
        prepared = self._prepared[shape, copies_in] = _Prepared(context, None)
        if self._library.can_capture(context, self._stream):
            try:
                prepared.graph = self._cuda.capture(lambda: self._issue(context, shape, copies_in), self._stream)
            except BackendError as e:
                log.warning("%s run without a CUDA graph: %s", _words(shape), e)

    def _input_shape(self, shape: _Shape) -> tuple[int, ...]:
        return shape[0], self._key.input_shape[0], *shape[1:]

    def _issue(self, context: Any, shape: _Shape, copies_in: bool) -> None:
        """Put copy in and inference of the patches that lie at the beginning of the buffer on the stream."""
        if copies_in:
            input_bytes = self._host_input.itemsize * math.prod(self._input_shape(shape))
            self._cuda.copy_to_device(self._device_input, self._host_input_address, input_bytes, self._stream)
        if not context.execute_async_v3(self._stream):
            raise self._failed(f"inference of {_words(shape)} failed")

    def _failed(self, what: str) -> BackendError:
        errors = "; ".join(self._library.logger.errors) or "the library gave no reason"
        return BackendError(f"tensorrt: {what}: {errors}")

    def _expected(self) -> str:
        least = self._key.smallest_tile
        smaller = "" if least is None else f", or axes down to {' x '.join(map(str, least))}"
        return f"expected (N, {', '.join(map(str, self._key.input_shape))}){smaller}"


class TensorRTOnDevice:
    """See `DeviceNetwork`. Batches lie in the engine's own buffers; a captured graph is the network alone."""

    def __init__(self, engine: TensorRTEngine) -> None:
        self._engine = engine
        self.device, self.stream, self.most = engine._cuda.device, engine._stream, engine._key.max_batch

    device: int
    stream: int
    most: int

    @property
    def turn(self) -> AbstractContextManager[Any]:
        return self._engine._turn

    def addresses(self, shape_NCX: tuple[int, ...]) -> tuple[int, int]:
        return self._engine._device_input, self._engine._device_output

    def run(self, shape_NCX: tuple[int, ...]) -> None:
        engine = self._engine
        if not engine._takes(shape_NCX) or shape_NCX[0] > self.most:
            raise BackendError(f"tensorrt failed on a batch of shape {shape_NCX}: {engine._expected()}")
        with engine._calls:
            engine._cuda.use_device()
            engine._start((shape_NCX[0], *shape_NCX[2:]), copies_in=False)


def require_gpu(index: int = 0) -> Cuda:
    """A GPU of this machine. Raises BackendError when CUDA has none."""
    cuda = Cuda(index)
    if (reason := cuda.why_no_device()) is not None:
        raise BackendError(
            f"backend tensorrt needs an NVIDIA GPU with a current driver; CUDA says: {reason}\n"
            "predict with --backend auto instead"
        )
    return cuda


def choose_stored(
    bundle_dir: Path, spec: BundleSpec, precision: Precision, architecture: str
) -> tuple[Library, StoredEngine]:
    """The engine of the model file in that precision for this GPU and an installed library, the largest batch first.

    Raises BackendError that names what was found instead and how to make the right one.
    """
    libraries = [find_library(name) for name in installed_names()] or [find_library()]
    model_file = bundle_dir / source_file(spec.model_file, precision)
    engines = list_engines(bundle_dir, model_file) if model_file.is_file() else []
    for library in libraries:
        fitting = [
            engine
            for engine in engines
            if (engine.key.library, engine.key.library_version) == (library.name, library.version)
            and engine.key.precision == precision
            and engine.key.architecture == architecture
        ]
        if fitting:
            return library, max(fitting, key=lambda engine: engine.key.max_batch)
    here = " or ".join(f"{library.name} {library.version}" for library in libraries)
    there = "\n".join(f"  - {engine.key}" for engine in engines) or "  - none"
    raise BackendError(
        f"no engine of {bundle_dir} ({spec.model_file}) fits this machine: needed {precision} {architecture} {here}\n"
        f"engines of this model that were found:\n{there}\n"
        f"make one with: fastnnunet export tensorrt {shlex.quote(str(bundle_dir))} --arch {architecture} "
        f"--precision {precision}"
    )


def _words(shape: _Shape) -> str:
    return f"batches of {shape[0]} of {' x '.join(map(str, shape[1:]))}"


def _beginning(buffer: Array, shape: tuple[int, ...]) -> Array:
    """As much of a buffer as an array of that shape takes."""
    return buffer.reshape(-1)[: math.prod(shape)].reshape(shape)


def _io_names(engine: Any, stored: StoredEngine, module: Any) -> tuple[str, str]:
    """Names of the engine's input and output. Raises BackendError when they are not the bundle's."""
    key, modes = stored.key, module.TensorIOMode
    wanted = {
        modes.INPUT: (key.input_shape[0], *key.space),
        modes.OUTPUT: (key.output_shape[0], *key.space),
    }
    names: dict[Any, str] = {}
    found = []
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        mode, kind = engine.get_tensor_mode(name), engine.get_tensor_dtype(name)
        shape = tuple(engine.get_tensor_shape(name))
        found.append(f"{name} {mode} {kind} {shape}")
        if kind == module.float32 and shape[1:] == wanted.get(mode):
            names[mode] = name
    if len(found) != 2 or len(names) != 2:
        raise BackendError(
            f"the engine at {stored.path} has inputs and outputs {', '.join(found)}, expected one of each, float32, "
            f"{key.input_shape} -> {key.output_shape} after the batch\nremove it and export again"
        )
    return names[modes.INPUT], names[modes.OUTPUT]


def _on_device(cuda: Cuda, release: ExitStack, size_bytes: int) -> int:
    address = cuda.allocate(size_bytes)
    release.callback(cuda.free, address)
    return address


def _destroy_graphs(cuda: Cuda, prepared: dict[_Use, _Prepared]) -> None:
    for one in prepared.values():
        if one.graph is not None:
            cuda.destroy_graph(one.graph)
    prepared.clear()  # contexts go before the memory they work in
