"""The seam between this package and NVIDIA's two TensorRT libraries; nothing else imports either.

`tensorrt` (11 and later) times kernels on the GPU it builds for, so it builds for that GPU alone. `tensorrt_rtx` builds
for any architecture it knows (SM75 to SM121 without SM90), needs no GPU to, and compiles kernels where an engine is
loaded. Both build strongly typed networks only: precision lives in the ONNX graph, there are no precision flags.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from fastnnunet.errors import BackendError, SpecError

log = logging.getLogger(__name__)

OLDEST_TENSORRT = 11  # before it, networks were weakly typed and part of the API had other names


class Library(Protocol):
    """One of the two libraries. `module` offers what both have under the same names."""

    @property
    def name(self) -> str: ...  # of the Python package

    @property
    def version(self) -> str: ...

    @property
    def module(self) -> Any: ...

    @property
    def logger(self) -> Any:
        """The module's ILogger of this process, with `errors`: texts of the errors since they were last cleared."""
        ...

    def architectures(self) -> tuple[str, ...]:
        """What it can build for here, e.g. sm86."""
        ...

    def set_target(self, config: Any, architecture: str) -> None:
        """Make a builder config build for one of `architectures()`, an engine that a CUDA graph can capture."""
        ...

    def new_context(self, engine: Any) -> Any:
        """An execution context without device memory of its own: the caller gives it some before it is used."""
        ...

    def can_capture(self, context: Any, stream: int) -> bool:
        """Whether a context that has run once may be captured into a CUDA graph on `stream`."""
        ...


@dataclass(frozen=True, slots=True)
class TensorRT:
    """The full library."""

    module: Any
    logger: Any
    gpu_architecture: Callable[[], str | None]  # of the GPU here, None without one
    name: str = "tensorrt"

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def architectures(self) -> tuple[str, ...]:
        here = self.gpu_architecture()
        return () if here is None else (here,)

    def set_target(self, config: Any, architecture: str) -> None:
        _check_target(self, architecture, "tensorrt builds only for the GPU of this machine")

    def new_context(self, engine: Any) -> Any:
        return engine.create_execution_context(_runtime_config(self.module, engine))

    def can_capture(self, context: Any, stream: int) -> bool:
        return True  # it has no such question; networks without data-dependent shapes can be captured


@dataclass(frozen=True, slots=True)
class TensorRTRTX:
    """TensorRT for RTX."""

    module: Any
    logger: Any
    name: str = "tensorrt_rtx"

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def architectures(self) -> tuple[str, ...]:
        names = (n.lower() for n in self.module.ComputeCapability.__members__ if n.startswith("SM"))
        return tuple(sorted(names, key=lambda name: int(name[2:])))

    def set_target(self, config: Any, architecture: str) -> None:
        _check_target(self, architecture, "tensorrt_rtx has no other targets; tensorrt on that machine has")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(self.module.ComputeCapability, architecture.upper()), 0)
        config.set_flag(self.module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # stream capture needs it

    def new_context(self, engine: Any) -> Any:
        config = _runtime_config(self.module, engine)
        # a captured graph would keep the slow stand-in kernels that run while specialised ones are still compiled
        strategies = self.module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return engine.create_execution_context(config)

    def can_capture(self, context: Any, stream: int) -> bool:
        return bool(context.is_stream_capturable(stream))


_NAMES = ("tensorrt", "tensorrt_rtx")  # the first that is installed is taken


def installed_names() -> tuple[str, ...]:
    """Of the two libraries those that can be imported (without importing them)."""
    return tuple(name for name in _NAMES if importlib.util.find_spec(name) is not None)


def find_library(name: str | None = None) -> Library:
    """The library of that name, or the first one installed.

    Raises SpecError for another name, BackendError when it is absent, too old or does not load.
    """
    if name is not None and name not in _NAMES:
        raise SpecError(f"library: got {name!r}, expected {' or '.join(_NAMES)}")
    there = installed_names()
    wanted = name or (there[0] if there else None)
    if wanted is None or wanted not in there:
        raise BackendError(
            f"{wanted or 'neither tensorrt nor tensorrt_rtx'} is {'not ' if wanted else ''}installed\n"
            "install one: pip install 'fastnnunet[rtx]' (RTX GPUs; builds engines without a GPU), "
            "or pip install 'fastnnunet[gpu]' (all of NVIDIA's GPUs)"
        )
    return _load(wanted)


@cache  # a process has one logger per library
def _load(name: str) -> Library:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as e:  # shared libraries that are missing or of another CUDA version
        raise BackendError(f"{name} is installed but cannot be loaded: {e}\ninstall it again") from e
    if name == "tensorrt_rtx":
        return TensorRTRTX(module, _make_logger(module))
    major = str(module.__version__).partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST_TENSORRT:
        raise BackendError(
            f"tensorrt {module.__version__} is too old, expected {OLDEST_TENSORRT} or later\n"
            f"update it: pip install 'tensorrt>={OLDEST_TENSORRT}'"
        )
    from fastnnunet.engines.trt.cuda import gpu_architecture

    return TensorRT(module, _make_logger(module), gpu_architecture)


def _make_logger(module: Any) -> Any:
    severe = (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR)

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            log.debug("%s", message)
            if severity in severe:
                self.errors.append(message)

    return Logger()


def _runtime_config(module: Any, engine: Any) -> Any:
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    return config


def _check_target(library: Library, architecture: str, reason: str) -> None:
    known = library.architectures()
    if architecture not in known:
        raise SpecError(
            f"architecture: got {architecture!r}, expected {' or '.join(known) or 'a GPU in this machine'} "
            f"({library.name} {library.version})\n{reason}"
        )
