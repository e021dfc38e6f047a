"""PyTorch on the CPU or an NVIDIA GPU: the reference of the others. The one file of the runtime that imports torch.

bf16 is that of autocast, which keeps the statistics of InstanceNorm in float32. On a GPU, fp32 is what PyTorch takes it
for: convolutions may round their factors to TF32.
The network of a bundle is rebuilt from its architecture and gets its weights from the ONNX file, whose initializers are
named as in the state dict.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.base import Array, LiveNetwork, Precision, Settings
from fastnnunet.engines.calls import Calls
from fastnnunet.engines.failures import batch_failed
from fastnnunet.errors import BackendError, CorruptError, MismatchError
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.checks.networks import find_arguments, find_network

# Deep supervision's heads at lower resolutions are built but not run at inference, so ONNX does not have them.
_UNUSED_AT_INFERENCE = ("decoder.seg_layers.", "mask_token")  # and what Primus puts where patches were dropped
_COUNTER = ".num_batches_tracked"  # of a batch norm, for training


LARGEST_BATCH = 16  # rows a GPU sees at once; halved where its memory is too small


class TorchEngine:
    name = "torch"
    overhead = 2.0
    largest_tile: tuple[int, ...] | None = None

    def __init__(self, network: Any, settings: Settings) -> None:
        """`network`: a torch.nn.Module in float32, which is taken over."""
        import torch

        device = settings.device
        if device.kind == "cuda" and (problem := why_no_cuda()) is not None:
            raise BackendError(f"backend torch cannot compute on {device}: {problem}")
        self.precision: Precision = settings.precision
        self._threads = settings.threads
        self._device = torch.device(device.kind, device.index) if device.kind == "cuda" else torch.device("cpu")
        self._network = network.eval().to(self._device)
        self._torch = torch
        # a CPU gains nothing from a batch and would hold the activations of all of it
        self._most = LARGEST_BATCH if device.kind == "cuda" else 1 if settings.apart else None
        self._calls = Calls(self.name, survives_fork=device.kind == "cpu")

    @classmethod
    def of_bundle(cls, bundle_dir: Path, spec: BundleSpec, settings: Settings) -> Self:
        return cls(load_network(spec, bundle_dir / spec.model_file), settings)

    @classmethod
    def of_network(cls, network: LiveNetwork, settings: Settings) -> Self:
        return cls(network.module, settings)

    def run(self, batch_NCX: Array) -> Array:
        torch = self._torch
        threads = 1 if self._calls.is_forked else self._threads  # the others of OpenMP's pool are the parent's
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)  # of this thread
        kind, bf16 = self._device.type, self.precision == "bf16"
        with self._calls:
            try:
                with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=bf16):
                    return self._in_parts(torch.from_numpy(batch_NCX).to(self._device))
            except RuntimeError as e:  # torch.OutOfMemoryError is one
                raise batch_failed("torch", batch_NCX.shape, e) from e

    def _in_parts(self, batch_NCX: Any) -> Array:
        torch = self._torch
        while True:
            size = min(self._most or len(batch_NCX), len(batch_NCX))
            try:
                parts = [self._network(part).float() for part in batch_NCX.split(size)]
                logits_NHX: Array = (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()
                return logits_NHX
            except torch.OutOfMemoryError:  # of the device; for good, since the next batch will be as large
                if size == 1:
                    raise
                self._most = size // 2
                torch.cuda.empty_cache()


def why_no_cuda() -> str | None:
    """None when PyTorch has a GPU to compute on."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA\ninstall the other build: https://pytorch.org"
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU\nnvidia-smi lists them"


def has_bf16() -> bool:
    """Whether bfloat16 is multiplied natively: by a GPU, or by this CPU."""
    import torch

    return bool(torch.cuda.is_available()) or cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX); emulated bf16 would be slower than fp32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def build_network(spec: BundleSpec) -> Any:
    """The bundle's network without deep supervision, weights not yet loaded.

    Raises MismatchError when it names code that is on no list (see `specs/checks/networks.py`) or cannot be built.
    """
    network_class, arguments = find_network(spec.architecture["network_class_name"]), find_arguments(spec.architecture)
    if network_class.__name__ != "Primus":  # which has no deep supervision
        arguments["deep_supervision"] = False
    try:
        return network_class(
            input_channels=len(spec.channel_names) + len(spec.previous_labels), num_classes=spec.num_heads, **arguments
        )
    except Exception as e:  # what an architecture raises for arguments it cannot take shares no base class
        raise MismatchError(
            f"the bundle's architecture does not fit the installed {network_class.__module__}."
            f"{network_class.__qualname__}: {type(e).__name__}: {e}\nexport the bundle again, or use another backend"
        ) from e


def load_network(spec: BundleSpec, model_file: Path) -> Any:
    """The bundle's network with the weights of one of its model files.

    They are compared before any memory is taken for the network. Raises as `build_network` and `load_onnx_weights`.
    """
    import torch

    weights = _read_initializers(model_file)
    with torch.device("meta"):
        _sources(build_network(spec), weights, model_file)
    network = build_network(spec)
    _fill(network, weights, model_file)
    return network


def load_onnx_weights(network: Any, model_file: Path) -> None:
    """Fill every parameter and buffer of `network` from the ONNX initializers, matched by name.

    Raises MismatchError naming what is missing or of another shape, CorruptError when the file cannot be parsed.
    """
    _fill(network, _read_initializers(model_file), model_file)


def _fill(network: Any, weights: dict[str, npt.NDArray[Any]], model_file: Path) -> None:
    import torch

    state = network.state_dict()
    for names, source in _sources(network, weights, model_file):
        for name in names:
            state[name] = torch.from_numpy(weights[source])
    network.load_state_dict(state, strict=True)


def _sources(network: Any, weights: dict[str, npt.NDArray[Any]], model_file: Path) -> list[tuple[list[str], str]]:
    """For each tensor of a network its names and the one that ONNX has. Raises MismatchError.

    A tensor may have several names in a state dict (nnU-Net's layers keep aliases); ONNX has one of them.
    """
    state = network.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, tensor in state.items():
        aliases.setdefault(id(tensor), []).append(name)
    found, problems = [], []
    for names in aliases.values():
        source = next((n for n in names if n in weights), None)
        if source is None:
            if not names[0].startswith(_UNUSED_AT_INFERENCE) and not names[0].endswith(_COUNTER):
                problems.append(f"{names[0]} is missing")
        elif weights[source].shape != tuple(state[names[0]].shape):
            problems.append(f"{source} has shape {weights[source].shape}, expected {tuple(state[names[0]].shape)}")
        else:
            found.append((names, source))
    if problems:
        raise MismatchError(
            f"the weights in {model_file} do not fit the bundle's architecture:\n"
            + "\n".join(f"  - {p}" for p in problems[:10])
            + "\nexport the bundle again"
        )
    return found


def _read_initializers(model_file: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        import onnx
    except ImportError as e:
        raise BackendError("backend torch needs the package onnx\ninstall it: pip install 'fastnnunet[train]'") from e
    try:
        graph = onnx.load(str(model_file), load_external_data=False).graph
    except Exception as e:  # protobuf's DecodeError and onnx's own errors share no base class
        raise CorruptError(f"cannot read {model_file}: {e}") from e
    return {tensor.name: np.array(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
