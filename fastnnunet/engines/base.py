"""What runs a network: the contract that every engine keeps, one small file per engine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.devices import CPU, Device
from fastnnunet.specs.bundle import BundleSpec

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Array: TypeAlias = npt.NDArray[np.float32]


class Engine(Protocol):
    """A loaded network."""

    name: str  # as in ENGINES
    precision: Precision

    def run(self, batch_NCX: Array) -> Array:
        """Logits (N, heads, *patch) float32 of a contiguous float32 batch (N, C, *patch), any N >= 1.

        May be called from several threads at once. The result may be the engine's own memory: it is valid until the
        same thread calls again, whatever others do meanwhile.
        Raises BackendError when the engine fails, or cannot be used in this forked process (see `Calls`).
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an engine computes."""

    threads: int
    precision: Precision = "fp32"
    device: Device = CPU  # of a kind that the engine's entry names
    # Rows of a batch are patches computed apart, several at once where that costs little memory: neither threads nor
    # the other rows change what comes out. Otherwise a batch is computed as one, as fast as it can be.
    apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveNetwork:
    """A network in the memory of PyTorch, and its shape."""

    module: Any  # torch.nn.Module in float32
    channels: int
    num_heads: int
    patch_size: tuple[int, ...]
    to_onnx: Callable[[], bytes]  # the same as ONNX: `image` (N, C, *patch) -> `logits` (N, heads, *patch)


class EngineClass(Protocol):
    """Constructors that every engine's class offers. Both raise BackendError where the engine cannot compute that."""

    def of_bundle(self, bundle_dir: Path, spec: BundleSpec, settings: Settings) -> Engine:
        """Load the model of a bundle (of an ensemble: its first), or its twin in the precision asked for."""

    def of_network(self, network: LiveNetwork, settings: Settings) -> Engine:
        """Take a network over from PyTorch."""
