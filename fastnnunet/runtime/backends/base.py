"""What runs the network: one contract, one small file per engine."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import BackendError, SpecError
from fastnnunet.runtime.backends.devices import has_cuda_device
from fastnnunet.specs.bundle import BundleSpec

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Device = Literal["cpu", "cuda"]


class Backend(Protocol):
    """A loaded network."""

    name: str  # as in BACKENDS
    precision: Precision

    def run(self, batch_NCX: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (N, heads, *patch) float32 of a contiguous float32 batch (N, C, *patch), any N >= 1.

        The result may be the engine's own memory: it is valid until the next call.
        Raises BackendError when the engine fails.
        """


class BackendClass(Protocol):
    """Constructor every backend module offers as its class."""

    def __call__(self, bundle_dir: Path, spec: BundleSpec, threads: int, precision: Precision) -> Backend:
        """Load `bundle_dir / spec.model_file`."""


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """Where a backend lives and what it needs."""

    module: str  # imported when chosen, never before
    class_name: str
    requires: tuple[str, ...]  # top-level packages, one of which must be there
    extra: str | None  # of this package's optional dependencies; None: part of the base install
    precisions: tuple[Precision, ...]
    needs_gpu: bool = False

    @property
    def device(self) -> Device:
        """Where it computes."""
        return "cuda" if self.needs_gpu else "cpu"


BACKENDS: dict[str, BackendEntry] = {
    "openvino": BackendEntry(
        "fastnnunet.runtime.backends.openvino", "OpenVINOBackend", ("openvino",), "openvino", ("fp32", "bf16")
    ),
    "onnxruntime": BackendEntry(
        "fastnnunet.runtime.backends.onnxruntime", "OnnxRuntimeBackend", ("onnxruntime",), None, ("fp32",)
    ),
    "torch": BackendEntry("fastnnunet.runtime.backends.torch", "TorchBackend", ("torch",), "train", ("fp32", "bf16")),
    "tensorrt": BackendEntry(
        "fastnnunet.runtime.backends.tensorrt",
        "TensorRTBackend",
        ("tensorrt", "tensorrt_rtx"),
        "rtx",
        ("fp32", "fp16", "int8"),
        needs_gpu=True,
    ),
}
# fastest first
_AUTO_ORDER: dict[Device, tuple[str, ...]] = {"cpu": ("openvino", "onnxruntime"), "cuda": ("tensorrt",)}


def is_installed(name: str) -> bool:
    """Whether a package that backend needs can be imported (without importing it)."""
    return any(importlib.util.find_spec(package) is not None for package in BACKENDS[name].requires)


def installed_cpu_backends() -> tuple[str, ...]:
    """Backends that run any bundle on this machine: installed, and without a GPU."""
    return tuple(name for name, entry in BACKENDS.items() if not entry.needs_gpu and is_installed(name))


def create_backend(
    name: str,
    bundle_dir: Path,
    spec: BundleSpec,
    *,
    threads: int | None = None,
    precision: Precision = "fp32",
    device: Device | None = None,
) -> Backend:
    """Load the model of a bundle (of an ensemble: its first).

    `auto` is the fastest backend that is installed and computes on `device` (None: the CPU, since engines for GPUs have
    to be built first); `threads` None: all cores.
    Raises SpecError for an unknown name, BackendError when its package or the device is missing or it cannot load the
    model.
    """
    if threads is not None and threads < 1:
        raise SpecError(f"threads: got {threads}, expected at least 1")
    name = choose_backend(name, device)
    entry = BACKENDS[name]
    if not is_installed(name):
        install = f"fastnnunet[{entry.extra}]" if entry.extra else entry.requires[0]
        packages = " or ".join(entry.requires)
        raise BackendError(f"backend {name} needs the package {packages}\ninstall it: pip install '{install}'")
    if precision not in entry.precisions:
        known = " or ".join(entry.precisions)
        raise BackendError(f"backend {name} computes in {known} only, got precision {precision!r}")
    backend_class = cast(BackendClass, getattr(importlib.import_module(entry.module), entry.class_name))
    backend = backend_class(bundle_dir, spec, threads or available_cores(), precision)
    if spec.batch_size is None:
        return backend
    from fastnnunet.runtime.backends.fixed_batch import FixedBatch

    return FixedBatch(backend, spec.batch_size)


def create_ensemble(
    name: str,
    bundle_dir: Path,
    spec: BundleSpec,
    *,
    threads: int | None = None,
    precision: Precision = "fp32",
    device: Device | None = None,
) -> Sequence[Backend]:
    """A backend for each model file of a bundle, all of one kind; see `create_backend`."""
    parts = [replace(spec, model_files=(file,)) for file in spec.model_files]
    return [
        create_backend(name, bundle_dir, part, threads=threads, precision=precision, device=device) for part in parts
    ]


def choose_backend(name: str, device: Device | None = None) -> str:
    """The backend that `name` (which may be `auto`) stands for on a device.

    Raises SpecError for unknown names, BackendError when there is no such device, or no backend for it.
    """
    if name != "auto" and name not in BACKENDS:
        raise SpecError(f"backend: got {name!r}, expected auto or one of {', '.join(BACKENDS)}")
    if device not in (None, *get_args(Device)):
        raise SpecError(f"device: got {device!r}, expected {' or '.join(get_args(Device))}")
    if device == "cuda" and not has_cuda_device():
        raise BackendError(
            "a GPU is asked for (-device cuda) but there is none: no NVIDIA driver, or it offers no device\n"
            "leave the option out or give -device cpu; nvidia-smi lists the GPUs the driver knows"
        )
    if name != "auto":
        if device not in (None, BACKENDS[name].device):
            raise BackendError(
                f"backend {name} computes on {BACKENDS[name].device}, not on {device}\n"
                f"give -device {BACKENDS[name].device}, or another --backend"
            )
        return name
    order = _AUTO_ORDER[device or "cpu"]
    if (installed := next((n for n in order if is_installed(n)), None)) is not None:
        return installed
    if device == "cuda":
        raise BackendError(
            "a GPU is asked for (-device cuda) but no installed backend computes on one\n"
            "install one: pip install 'fastnnunet[rtx]' or 'fastnnunet[gpu]', or give -device cpu"
        )
    return order[-1]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
