"""Which engines there are, what each needs, and how one is chosen and made."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack, cast

from fastnnunet.engines.base import Engine, EngineClass, LiveNetwork, Precision, Settings
from fastnnunet.engines.devices import Device, DeviceKind, cuda_device_count, parse_device
from fastnnunet.engines.fixed_batch import FixedBatch
from fastnnunet.errors import BackendError, SpecError
from fastnnunet.specs.bundle import BundleSpec


class EngineOptions(TypedDict, total=False):
    """How an engine of a bundle computes."""

    threads: int | None  # None: all cores
    precision: Precision  # fp32 unless given
    device: str | None  # see `parse_device`; None: where the engine computes, of several kinds on the CPU


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """Where an engine lives and what it needs."""

    module: str  # imported when chosen, never before
    class_name: str
    requires: tuple[str, ...]  # top-level packages, one of which must be there
    extra: str | None  # of this package's optional dependencies; None: part of the base install
    precisions: tuple[Precision, ...]
    devices: tuple[DeviceKind, ...] = ("cpu",)  # where it can compute, the default first
    side_by_side: bool = False  # patches apart are computed so; otherwise one after the other, each by all threads

    @property
    def needs_gpu(self) -> bool:
        return "cpu" not in self.devices


ENGINES: dict[str, EngineEntry] = {
    "openvino": EngineEntry(
        "fastnnunet.engines.openvino",
        "OpenVINOEngine",
        ("openvino",),
        "openvino",
        ("fp32", "bf16", "int8"),
        side_by_side=True,
    ),
    "onnxruntime": EngineEntry(
        "fastnnunet.engines.onnxruntime",
        "OnnxRuntimeEngine",
        ("onnxruntime",),
        None,
        ("fp32", "int8"),
        devices=("cpu", "cuda"),
    ),
    "torch": EngineEntry(
        "fastnnunet.engines.torch", "TorchEngine", ("torch",), "train", ("fp32", "bf16"), devices=("cpu", "cuda")
    ),
    "tensorrt": EngineEntry(
        "fastnnunet.engines.tensorrt",
        "TensorRTEngine",
        ("tensorrt", "tensorrt_rtx"),
        "rtx",
        ("fp32", "fp16", "int8"),
        devices=("cuda",),
    ),
}
_CPU_ORDER = ("openvino", "onnxruntime")  # fastest first


def is_installed(name: str) -> bool:
    """Whether a package that engine needs can be imported (without importing it)."""
    return any(importlib.util.find_spec(package) is not None for package in ENGINES[name].requires)


def installed_cpu_engines() -> tuple[str, ...]:
    """Engines that run any bundle on this machine: installed, and without a GPU."""
    return tuple(name for name, entry in ENGINES.items() if not entry.needs_gpu and is_installed(name))


def create_engine(
    name: str, bundle_dir: Path, spec: BundleSpec, *, apart: bool = False, **options: Unpack[EngineOptions]
) -> Engine:
    """Load the model of a bundle (of an ensemble: its first). `apart`: see `Settings`.

    `auto` is the fastest engine that is installed and computes on the device (None: the CPU, since engines for GPUs
    have to be built first).
    Raises SpecError for an unknown name, BackendError when its package or the device is missing or it cannot load the
    model.
    """
    threads, precision = options.get("threads"), options.get("precision", "fp32")
    if threads is not None and threads < 1:
        raise SpecError(f"threads: got {threads}, expected at least 1")
    name, device = choose_engine(name, options.get("device"))
    settings = Settings(
        threads=threads or available_cores(),
        precision=precision,
        device=device,
        apart=apart and spec.batch_size is None,
    )
    engine = _engine_class(name, settings).of_bundle(bundle_dir, spec, settings)
    return engine if spec.batch_size is None else FixedBatch(engine, spec.batch_size)


def engine_of_network(name: str, network: LiveNetwork, settings: Settings) -> Engine:
    """Take a network over from PyTorch. Raises BackendError as `create_engine`."""
    return _engine_class(name, settings).of_network(network, settings)


def _engine_class(name: str, settings: Settings) -> EngineClass:
    """Raises BackendError where the engine is not installed or computes in other precisions."""
    _check_engine(name, settings.precision)
    entry = ENGINES[name]
    return cast(EngineClass, getattr(importlib.import_module(entry.module), entry.class_name))


def check_engine(name: str, precision: Precision, device: str | None) -> str:
    """Find out without loading anything that an engine could not be made. Returns its name, which was perhaps `auto`.

    Raises SpecError and BackendError as `create_engine`.
    """
    chosen, _ = choose_engine(name, device)
    _check_engine(chosen, precision)
    return chosen


def _check_engine(name: str, precision: Precision) -> None:
    check_installed(name)
    precisions = ENGINES[name].precisions
    if precision not in precisions:
        known = " or ".join(precisions)
        raise BackendError(f"backend {name} computes in {known} only, got precision {precision!r}")


def check_installed(name: str) -> None:
    """Raise BackendError where the package that an engine needs is missing."""
    if not is_installed(name):
        entry = ENGINES[name]
        install = f"fastnnunet[{entry.extra}]" if entry.extra else entry.requires[0]
        packages = " or ".join(entry.requires)
        raise BackendError(f"backend {name} needs the package {packages}\ninstall it: pip install '{install}'")


def create_ensemble(
    name: str, bundle_dir: Path, spec: BundleSpec, **options: Unpack[EngineOptions]
) -> Sequence[Engine]:
    """An engine for each model file of a bundle, all of one kind; see `create_engine`."""
    parts = [replace(spec, model_files=(file,)) for file in spec.model_files]
    return [create_engine(name, bundle_dir, part, **options) for part in parts]


def choose_engine(name: str, device: str | None = None) -> tuple[str, Device]:
    """The engine that `name` (which may be `auto`) stands for, and the device it is to compute on.

    Raises SpecError for unknown names, BackendError when there is no such device, or no engine for it.
    """
    if name != "auto" and name not in ENGINES:
        raise SpecError(f"backend: got {name!r}, expected auto or one of {', '.join(ENGINES)}")
    wanted = None if device is None else parse_device(device)
    if wanted is not None and wanted.kind == "cuda":
        _check_gpu(wanted)
    if name == "auto":
        wanted = wanted or Device()
        return _fastest_on(wanted), wanted
    wanted = wanted or Device(ENGINES[name].devices[0])
    if wanted.kind not in ENGINES[name].devices:
        where = " or ".join(ENGINES[name].devices)
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
    problem = why_no_cuda("onnxruntime")
    if problem is None or why_no_cuda("torch") is None:
        return "onnxruntime" if problem is None else "torch"
    raise BackendError(
        f"a GPU is asked for (-device {device}) but no installed backend computes on one\n"
        "install TensorRT: pip install 'fastnnunet[rtx]' or 'fastnnunet[gpu]', or give -device cpu\n"
        f"or use ONNX Runtime: {problem}"
    )


def why_no_cuda(name: str) -> str | None:
    """Why an engine that computes on both cannot use the GPUs of this machine; None where it can."""
    if not is_installed(name):
        return "it is not installed"
    reason: str | None = importlib.import_module(ENGINES[name].module).why_no_cuda()
    return reason


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
