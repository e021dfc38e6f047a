"""OpenVINO on the CPU: the fastest here (oneDNN kernels made for the patch size, bf16 where the CPU has it)."""

import importlib
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from fastnnunet.engines.base import Array, LiveNetwork, Precision, Settings, side_by_side
from fastnnunet.engines.calls import Calls
from fastnnunet.engines.compiled import compile_kept
from fastnnunet.engines.failures import batch_failed
from fastnnunet.engines.model_files import model_path
from fastnnunet.errors import BackendError
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.canonical import sha256_of_file

log = logging.getLogger(__name__)

# Without the hint OpenVINO chooses bf16 by itself on CPUs that have it, and parity with nnU-Net is gone. A quantised
# model says itself what is computed in 8 bits; the hint is for the rest.
_PRECISION_HINT: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
_CONVERTER = "openvino.tools.ovc"


def import_openvino() -> Any:
    """The module, at first without its converter of other frameworks' models, which takes twice as long to import as
    all the rest and is loaded when it is called.
    """
    if "openvino" not in sys.modules:
        sys.modules[_CONVERTER] = cast(Any, None)  # makes its import fail, which openvino takes for not installed
        try:
            import openvino
        finally:
            del sys.modules[_CONVERTER]
        openvino.convert_model = _convert_model
    return importlib.import_module("openvino")


def _convert_model(*arguments: Any, **options: Any) -> Any:
    return importlib.import_module(_CONVERTER).convert_model(*arguments, **options)


_cores: dict[int, Any] = {}  # of each process: a forked one cannot use its parent's threads
_making = threading.Lock()

if hasattr(os, "register_at_fork"):

    def _after_fork() -> None:
        global _making
        _making = threading.Lock()  # the parent's may be held by a thread that is not there

    os.register_at_fork(after_in_child=_after_fork)


def shared_core() -> Any:
    """The openvino.Core of this process, which is never let go.

    Where a CPU has AMX each Core gives the thread that loads its plugin a stack for signals, and takes it away when it
    is let go, by whichever thread, in whichever order: after two of them a Ctrl-C is a segmentation fault. Cores that
    come and go one after the other while this one lives put back what they found.
    """
    with _making:
        core = _cores.get(os.getpid())
        if core is None:
            core = import_openvino().Core()
            core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # loads the plugin
            _cores[os.getpid()] = core
        return core


class OpenVINOEngine:
    name = "openvino"
    largest_tile: tuple[int, ...] | None = None

    def __init__(
        self,
        model: Callable[[], Any],
        logits_bytes: int,
        settings: Settings,
        key: dict[str, Any] | None = None,
    ) -> None:
        """`model` makes an openvino.Model of a fixed patch, or of any for one pass; a patch has `logits_bytes`.

        `key`: see `compile_kept`. Raises RuntimeError.
        """
        openvino = import_openvino()
        core = shared_core()
        precision = settings.precision
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            log.warning("this CPU has no bf16, OpenVINO computes in fp32")
            precision = "fp32"
        self.precision: Precision = precision
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINT[precision],
            "INFERENCE_NUM_THREADS": settings.threads,
            # Pinned threads wait for their core while others are idle: half the speed on a busy machine, and
            # several processes would all be pinned to the same first cores.
            "ENABLE_CPU_PINNING": False,
        }
        streams = side_by_side(settings.threads, logits_bytes)
        hints |= {"NUM_STREAMS": str(streams)} if settings.apart else {"PERFORMANCE_HINT": "LATENCY"}
        self._compiled = compile_kept(core, model, hints, key, openvino.__version__)
        self._queue: Any = openvino.AsyncInferQueue(self._compiled, streams) if settings.apart else None
        self._turn = threading.Lock()  # held while a batch has the queue
        self._calls = Calls(self.name)
        self._own = threading.local()  # the request of each thread, which holds its results

    @classmethod
    def of_bundle(cls, bundle_dir: Path, spec: BundleSpec, settings: Settings) -> Self:
        model_file = model_path(bundle_dir, spec, settings.precision, cls.name)

        def read() -> Any:
            model = shared_core().read_model(str(model_file))
            _check_shapes(model, spec)
            batch, channels, *space = model.input(0).partial_shape
            if _is_for_patches(spec, settings) and (settings.apart or any(axis.is_dynamic for axis in space)):
                model.reshape([1 if settings.apart else batch, channels, *spec.patch_size])
            return model

        try:
            return cls(read, _logits_bytes(spec.num_heads, spec.patch_size), settings, _key(model_file, spec, settings))
        except (RuntimeError, OSError) as e:
            raise BackendError(f"openvino cannot load {model_file}: {e}") from e

    @classmethod
    def of_network(cls, network: LiveNetwork, settings: Settings) -> Self:
        openvino = import_openvino()
        shape = (1, network.channels, *network.patch_size)
        batch = 1 if settings.apart else -1
        with warnings.catch_warnings():  # notes of the tracer about itself
            warnings.simplefilter("ignore")
            model = openvino.convert_model(
                network.module.eval(), example_input=np.zeros(shape, np.float32), input=[batch, *shape[1:]]
            )
        return cls(lambda: model, _logits_bytes(network.num_heads, network.patch_size), settings)

    @property
    def overhead(self) -> float:
        return 0.8 if self.precision == "bf16" else 1.2

    def run(self, batch_NCX: Array) -> Array:
        with self._calls:
            try:
                return self._run_apart(batch_NCX) if self._queue else self._run_together(batch_NCX)
            except RuntimeError as e:
                raise batch_failed("openvino", batch_NCX.shape, e) from e

    def _run_together(self, batch_NCX: Array) -> Array:
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._compiled.create_infer_request()
        logits_NHX: Array = request.infer({0: batch_NCX}, share_inputs=True, share_outputs=True)[0]
        return logits_NHX

    def _run_apart(self, batch_NCX: Array) -> Array:
        logits: list[Array | None] = [None] * len(batch_NCX)

        def keep(request: Any, number: int) -> None:
            logits[number] = request.get_output_tensor(0).data.copy()

        with self._turn:
            self._queue.set_callback(keep)
            for number in range(len(batch_NCX)):
                self._queue.start_async({0: batch_NCX[number : number + 1]}, number)
            self._queue.wait_all()
        return np.concatenate(cast(list[Array], logits))


def _logits_bytes(num_heads: int, patch_size: Sequence[int]) -> int:
    return 4 * num_heads * math.prod(patch_size)


def _is_for_patches(spec: BundleSpec, settings: Settings) -> bool:
    """Whether kernels are made for the patch size. For one pass they are made for each shape when it first comes, which
    takes a tenth of compiling the model for it, and are as fast.
    """
    return settings.apart or spec.one_pass is None


def _key(model_file: Path, spec: BundleSpec, settings: Settings) -> dict[str, Any]:
    """All that decides what is compiled of a model file. Raises OSError where there is none."""
    files = [model_file, *([model_file.with_suffix(".bin")] if model_file.suffix == ".xml" else [])]
    channels = len(spec.channel_names) + len(spec.previous_labels)
    shape = [spec.batch_size, channels, spec.num_heads, *spec.patch_size]
    return {
        "files": [sha256_of_file(file) for file in files],
        "shape": shape,
        "for_patches": _is_for_patches(spec, settings),
        "apart": settings.apart,
    }


def _check_shapes(model: Any, spec: BundleSpec) -> None:
    """Of a quantised model, which nobody has looked into yet. Raises RuntimeError."""
    channels = len(spec.channel_names) + len(spec.previous_labels)
    for what, values, axis in (("input", model.inputs, channels), ("output", model.outputs, spec.num_heads)):
        space = spec.patch_size if spec.one_pass is None else [-1] * len(spec.patch_size)
        expected = [-1 if spec.batch_size is None else spec.batch_size, axis, *space]
        shapes = [value.partial_shape for value in values]
        if len(shapes) != 1 or not shapes[0].compatible(type(shapes[0])(expected)):
            raise RuntimeError(f"it has {what} {', '.join(map(str, shapes))}, expected one {what} {expected}")
