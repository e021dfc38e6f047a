"""What runs the network: one contract, one small file per engine."""

import importlib
import importlib.util
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypedDict, Unpack, cast

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.devices import Device, DeviceKind, cuda_device_count, parse_device
from fastnnunet.errors import BackendError, SpecError
from fastnnunet.specs.bundle import BundleSpec, int8_file

Precision = Literal["fp32", "bf16", "fp16", "int8"]


class Backend(Protocol):
    """A loaded network."""

    name: str  # as in BACKENDS
    precision: Precision

    def run(self, batch_NCX: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (N, heads, *patch) float32 of a contiguous float32 batch (N, C, *patch), any N >= 1.

        May be called from several threads at once. The result may be the engine's own memory: it is valid until the
        same thread calls again, whatever others do meanwhile.
        Raises BackendError when the engine fails, or cannot be used in this forked process (see `Calls`).
        """


class BackendClass(Protocol):
    """Constructor every backend module offers as its class."""

    def __call__(
        self, bundle_dir: Path, spec: BundleSpec, threads: int, precision: Precision, device: Device
    ) -> Backend:
        """Load the bundle's model, or its twin in that precision (`model_path`).

        It is to compute on `device`, one of a kind the backend's entry names.
        """


class BackendOptions(TypedDict, total=False):
    """How a backend computes."""

    threads: int | None  # None: all cores
    precision: Precision  # fp32 unless given
    device: str | None  # see `parse_device`; None: where the backend computes, of several kinds on the CPU


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """Where a backend lives and what it needs."""

    module: str  # imported when chosen, never before
    class_name: str
    requires: tuple[str, ...]  # top-level packages, one of which must be there
    extra: str | None  # of this package's optional dependencies; None: part of the base install
    precisions: tuple[Precision, ...]
    devices: tuple[DeviceKind, ...] = ("cpu",)  # where it can compute, the default first

    @property
    def needs_gpu(self) -> bool:
        return "cpu" not in self.devices


BACKENDS: dict[str, BackendEntry] = {
    "openvino": BackendEntry(
        "fastnnunet.engines.openvino", "OpenVINOBackend", ("openvino",), "openvino", ("fp32", "bf16", "int8")
    ),
    "onnxruntime": BackendEntry(
        "fastnnunet.engines.onnxruntime",
        "OnnxRuntimeBackend",
        ("onnxruntime",),
        None,
        ("fp32", "int8"),
        devices=("cpu", "cuda"),
    ),
    "torch": BackendEntry("fastnnunet.engines.torch", "TorchBackend", ("torch",), "train", ("fp32", "bf16")),
    "tensorrt": BackendEntry(
        "fastnnunet.engines.tensorrt",
        "TensorRTBackend",
        ("tensorrt", "tensorrt_rtx"),
        "rtx",
        ("fp32", "fp16", "int8"),
        devices=("cuda",),
    ),
}
INT8_ENDINGS = {"onnxruntime": ".onnx", "openvino": ".xml"}  # of the files these load for int8
_CPU_ORDER = ("openvino", "onnxruntime")  # fastest first


def is_installed(name: str) -> bool:
    """Whether a package that backend needs can be imported (without importing it)."""
    return any(importlib.util.find_spec(package) is not None for package in BACKENDS[name].requires)


def installed_cpu_backends() -> tuple[str, ...]:
    """Backends that run any bundle on this machine: installed, and without a GPU."""
    return tuple(name for name, entry in BACKENDS.items() if not entry.needs_gpu and is_installed(name))


def create_backend(name: str, bundle_dir: Path, spec: BundleSpec, **options: Unpack[BackendOptions]) -> Backend:
    """Load the model of a bundle (of an ensemble: its first).

    `auto` is the fastest backend that is installed and computes on the device (None: the CPU, since engines for GPUs
    have to be built first).
    Raises SpecError for an unknown name, BackendError when its package or the device is missing or it cannot load the
    model.
    """
    threads, precision = options.get("threads"), options.get("precision", "fp32")
    if threads is not None and threads < 1:
        raise SpecError(f"threads: got {threads}, expected at least 1")
    name, device = choose_backend(name, options.get("device"))
    entry = BACKENDS[name]
    if not is_installed(name):
        install = f"fastnnunet[{entry.extra}]" if entry.extra else entry.requires[0]
        packages = " or ".join(entry.requires)
        raise BackendError(f"backend {name} needs the package {packages}\ninstall it: pip install '{install}'")
    if precision not in entry.precisions:
        known = " or ".join(entry.precisions)
        raise BackendError(f"backend {name} computes in {known} only, got precision {precision!r}")
    backend_class = cast(BackendClass, getattr(importlib.import_module(entry.module), entry.class_name))
    backend = backend_class(bundle_dir, spec, threads or available_cores(), precision, device)
    if spec.batch_size is None:
        return backend
    from fastnnunet.engines.fixed_batch import FixedBatch

    return FixedBatch(backend, spec.batch_size)


def model_path(bundle_dir: Path, spec: BundleSpec, precision: Precision, backend: str) -> Path:
    """The file a backend loads, for int8 its quantised twin. Raises BackendError when the bundle has none."""
    if precision != "int8":
        return bundle_dir / spec.model_file
    names = {name: int8_file(spec.model_file, ending) for name, ending in INT8_ENDINGS.items()}
    if names[backend] not in spec.files:
        others = [name for name, file in names.items() if file in spec.files]
        raise BackendError(
            f"this bundle has no int8 model for {backend}: {names[backend]} is missing\n"
            f"make it: fastnnunet export quantize {shlex.quote(str(bundle_dir))} --precision int8 --backend {backend}"
            + (f"\nor predict with --backend {others[0]}, which has one" if others else "")
        )
    return bundle_dir / names[backend]


def create_ensemble(
    name: str, bundle_dir: Path, spec: BundleSpec, **options: Unpack[BackendOptions]
) -> Sequence[Backend]:
    """A backend for each model file of a bundle, all of one kind; see `create_backend`."""
    parts = [replace(spec, model_files=(file,)) for file in spec.model_files]
    return [create_backend(name, bundle_dir, part, **options) for part in parts]


def choose_backend(name: str, device: str | None = None) -> tuple[str, Device]:
    """The backend that `name` (which may be `auto`) stands for, and the device it is to compute on.

    Raises SpecError for unknown names, BackendError when there is no such device, or no backend for it.
    """
    if name != "auto" and name not in BACKENDS:
        raise SpecError(f"backend: got {name!r}, expected auto or one of {', '.join(BACKENDS)}")
    wanted = None if device is None else parse_device(device)
    if wanted is not None and wanted.kind == "cuda":
        _check_gpu(wanted)
    if name == "auto":
        wanted = wanted or Device()
        return _fastest_on(wanted), wanted
    wanted = wanted or Device(BACKENDS[name].devices[0])
    if wanted.kind not in BACKENDS[name].devices:
        where = " or ".join(BACKENDS[name].devices)
        raise BackendError(
            f"backend {name} computes on {where}, not on {wanted}\ngive -device {where}, or another --backend"
        )
    return name, wanted


def _check_gpu(device: Device) -> None:
    count = cuda_device_count()
    if count == 0:
        raise BackendError(
            f"a GPU is asked for (-device {device}) but there is none: no NVIDIA driver, or it offers no device\n"
            "leave the option out or give -device cpu; nvidia-smi lists the GPUs the driver knows"
        )
    if device.index >= count:
        raise BackendError(
            f"-device {device}: this process sees {count} GPU(s), expected cuda"
            + (f" to cuda:{count - 1}" if count > 1 else "")
            + "\nCUDA_VISIBLE_DEVICES decides which they are"
        )


def _fastest_on(device: Device) -> str:
    if device.kind == "cpu":
        return next((name for name in _CPU_ORDER if is_installed(name)), _CPU_ORDER[-1])
    if is_installed("tensorrt"):
        return "tensorrt"
    problem = "it is not installed"
    if is_installed("onnxruntime"):
        from fastnnunet.engines.onnxruntime import why_no_cuda

        if (reason := why_no_cuda()) is None:
            return "onnxruntime"
        problem = reason
    raise BackendError(
        f"a GPU is asked for (-device {device}) but no installed backend computes on one\n"
        "install TensorRT: pip install 'fastnnunet[rtx]' or 'fastnnunet[gpu]', or give -device cpu\n"
        f"or use ONNX Runtime: {problem}"
    )


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
