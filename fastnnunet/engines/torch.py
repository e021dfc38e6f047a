"""PyTorch: the reference the other backends are measured against. The one runtime file that imports torch.

The network is rebuilt from the bundle's architecture and gets its weights from the ONNX file, whose initializers are
named as in the state dict.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.base import Precision
from fastnnunet.engines.calls import Calls
from fastnnunet.engines.devices import Device
from fastnnunet.errors import BackendError, CorruptError, MismatchError
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.checks.networks import find_arguments, find_network

# Deep supervision's heads at lower resolutions are built but not run at inference, so ONNX does not have them.
_UNUSED_AT_INFERENCE = ("decoder.seg_layers.", "mask_token")  # and what Primus puts where patches were dropped


class TorchBackend:
    name = "torch"

    def __init__(
        self, bundle_dir: Path, spec: BundleSpec, threads: int, precision: Precision, device: Device = Device()
    ) -> None:
        import torch

        self.precision = precision
        self._threads = threads
        self._network = load_network(spec, bundle_dir / spec.model_file).eval()
        self._torch = torch
        self._calls = Calls(self.name)

    def run(self, batch_NCX: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        torch = self._torch
        threads = 1 if self._calls.is_forked else self._threads  # the others of OpenMP's pool are the parent's
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)  # of this thread
        with self._calls:
            try:
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                    return self._network(torch.from_numpy(batch_NCX)).float().numpy()
            except RuntimeError as e:
                raise BackendError(f"torch failed on a batch of shape {batch_NCX.shape}: {e}") from e


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
            if not names[0].startswith(_UNUSED_AT_INFERENCE):
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
