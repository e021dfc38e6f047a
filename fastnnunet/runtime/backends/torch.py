"""PyTorch: the reference the other backends are measured against. The one runtime file that imports torch.

The network is rebuilt from the bundle's architecture and gets its weights from the ONNX file, whose initializers are
named as in the state dict.
"""

import pydoc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import BackendError, CorruptError, MismatchError
from fastnnunet.runtime.backends.base import Precision
from fastnnunet.runtime.backends.calls import Calls
from fastnnunet.runtime.backends.devices import Device
from fastnnunet.specs.bundle import BundleSpec

_TRUSTED_PACKAGE = "dynamic_network_architectures."
# what an architecture's arguments may name: layers, never arbitrary callables
_TRUSTED_ARGUMENTS = ("torch.nn.", _TRUSTED_PACKAGE)
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
        self._network = build_network(spec).eval()
        load_onnx_weights(self._network, bundle_dir / spec.model_file)
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

    Raises MismatchError when the class is not one of dynamic_network_architectures or cannot be built.
    """
    class_path = str(spec.architecture["network_class_name"])
    network_class = pydoc.locate(class_path) if class_path.startswith(_TRUSTED_PACKAGE) else None
    if network_class is None:
        raise MismatchError(
            f"the bundle's network class is {class_path!r}, expected one of the installed "
            f"{_TRUSTED_PACKAGE[:-1]}; use another backend"
        )
    arguments = dict(spec.architecture["arch_kwargs"])
    for name in spec.architecture["_kw_requires_import"]:
        if (path := arguments.get(name)) is None:
            continue
        arguments[name] = pydoc.locate(path) if str(path).startswith(_TRUSTED_ARGUMENTS) else None
        if arguments[name] is None:
            raise MismatchError(f"the bundle's architecture needs {name} = {path!r}, which is not a known layer")
    if not class_path.endswith(".Primus"):  # which has no deep supervision
        arguments["deep_supervision"] = False
    try:
        return network_class(  # type: ignore[operator]
            input_channels=len(spec.channel_names) + len(spec.previous_labels), num_classes=spec.num_heads, **arguments
        )
    except TypeError as e:
        raise MismatchError(f"the bundle's architecture does not fit the installed {class_path}: {e}") from e


def load_onnx_weights(network: Any, model_file: Path) -> None:
    """Fill every parameter and buffer of `network` from the ONNX initializers, matched by name.

    A tensor may have several names in a state dict (nnU-Net's layers keep aliases); ONNX has one of them.
    Raises MismatchError naming what is missing or of another shape, CorruptError when the file cannot be parsed.
    """
    import torch

    weights = _read_initializers(model_file)
    state = network.state_dict()
    aliases: dict[int, list[str]] = {}
    for name, tensor in state.items():
        aliases.setdefault(tensor.data_ptr(), []).append(name)
    problems = []
    for names in aliases.values():
        source = next((n for n in names if n in weights), None)
        if source is None:
            if not names[0].startswith(_UNUSED_AT_INFERENCE):
                problems.append(f"{names[0]} is missing")
            continue
        if weights[source].shape != tuple(state[names[0]].shape):
            problems.append(f"{source} has shape {weights[source].shape}, expected {tuple(state[names[0]].shape)}")
            continue
        for name in names:
            state[name] = torch.from_numpy(weights[source])
    if problems:
        raise MismatchError(
            f"the weights in {model_file} do not fit the bundle's architecture:\n"
            + "\n".join(f"  - {p}" for p in problems[:10])
            + "\nexport the bundle again"
        )
    network.load_state_dict(state, strict=True)


def _read_initializers(model_file: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        import onnx
    except ImportError as e:
        raise BackendError("backend torch needs the package onnx\ninstall it: pip install 'fastnnunet[train]'") from e
    try:
        graph = onnx.load(str(model_file)).graph
    except Exception as e:  # protobuf's DecodeError and onnx's own errors share no base class
        raise CorruptError(f"cannot read {model_file}: {e}") from e
    return {tensor.name: np.array(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
