"""Graphs that torch traces, remembered for the session: of two networks that differ in weights alone one is traced.

A trace takes seconds and sees the structure alone, which is how the folds of an ensemble come to one graph too. What
`to_onnx` and `export_bundle` check of a graph they check of a remembered one too. All processes share a folder.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

PACKAGES = ("torch.nn.", "dynamic_network_architectures.", "timm.", "fastnnunet.")
MOST_VALUES = 2_000_000  # of weights: larger networks are rare, and their files large


class UnknownError(Exception):
    """A network has something whose part in a trace cannot be told from outside."""


def structure_of(network: Any, example: Any, options: dict[str, Any]) -> str:
    """A digest of all that a trace can see but the values of the weights.

    Raises UnknownError for networks of classes that tests define, with hooks, or with tensors that are not registered.
    """
    import torch

    told: list[Any] = [torch.__version__, tuple(example.shape), str(example.dtype), _plain(options)]
    for name, module in network.named_modules(remove_duplicate=False):
        kind = type(module)
        known = kind.__module__.startswith(PACKAGES)
        if not known or module._forward_hooks or module._forward_pre_hooks:
            raise UnknownError(name)
        for constant in sorted(module._non_persistent_buffers_set):  # in no state_dict: its values are the graph's
            values = getattr(module, constant)
            told.append(None if values is None else hashlib.sha256(values.numpy().tobytes()).hexdigest())
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        told.append((name, kind.__module__, kind.__qualname__, module.extra_repr(), _plain(own)))
    first: dict[int, str] = {}  # tensors that two names share
    for name, tensor in network.state_dict().items():
        told.append((name, tuple(tensor.shape), str(tensor.dtype), first.setdefault(tensor.data_ptr(), name)))
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _plain(value: Any) -> Any:
    import torch

    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(_plain, value)]
    if isinstance(value, dict):
        return [(_plain(key), _plain(item)) for key, item in value.items()]
    if type(value).__name__ in ("Dim", "_DerivedDim", "DerivedDim"):
        return (repr(value), getattr(value, "min", None), getattr(value, "max", None))
    if isinstance(value, FunctionType) and value.__closure__ is None and value.__module__.startswith(PACKAGES):
        return (value.__module__, value.__qualname__, value.__code__.co_firstlineno)
    if isinstance(value, type | BuiltinFunctionType) and "<" not in value.__qualname__:
        return (value.__module__, value.__qualname__)
    raise UnknownError(type(value).__name__)


def remembering(export: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`torch.onnx.export` as `to_onnx` calls it; its result has `model_proto` alone."""

    @functools.wraps(export)
    def remembered(network: Any, example: tuple[Any], **options: Any) -> Any:
        import onnx

        weights = network.state_dict()
        try:
            if sum(tensor.numel() for tensor in weights.values()) > MOST_VALUES:
                raise UnknownError("a large network")
            file = folder / f"{structure_of(network, example[0], options)}.onnx"
        except UnknownError:
            return export(network, example, **options)
        if not file.is_file():
            model = export(network, example, **options).model_proto
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_bytes(model.SerializeToString())
            partial.replace(file)
            return SimpleNamespace(model_proto=model)
        model = onnx.load(str(file))
        for tensor in model.graph.initializer:
            if tensor.name in weights:
                values = weights[tensor.name].detach().contiguous().numpy()
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return SimpleNamespace(model_proto=model)

    return remembered
