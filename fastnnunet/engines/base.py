"""What runs a network: the contract that every engine keeps, one small file per engine."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.devices import CPU, Device
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.run.precision import Precision as Precision

Array: TypeAlias = npt.NDArray[np.float32]
APART_BYTES = 64 << 20  # of the logits of all patches that are computed at once, unless one alone has more


class Engine(Protocol):
    """A loaded network."""

    name: str  # as in ENGINES
    precision: Precision

    @property
    def overhead(self) -> float:
        """Memory that a tile takes, measured, as a multiple of the float32 numbers that its network holds at once."""

    @property
    def largest_tile(self) -> tuple[int, ...] | None:
        """The longest axes it was made for; None: any. Only bundles of one pass have other shapes than the patch."""

    def run(self, batch_NCX: Array) -> Array:
        """Logits (N, heads, *patch) float32 of a contiguous float32 batch (N, C, *patch), any N >= 1.

        May be called from several threads at once. The result may be the engine's own memory: it is valid until the
        same thread calls again, whatever others do meanwhile.
        Raises BackendError when the engine fails (see `batch_failed`: NoMemoryError where a smaller batch may do), or
        cannot be used in this forked process (see `Calls`).
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


def side_by_side(threads: int, logits_bytes: int) -> int:
    """How many patches apart an engine computes at once, each of one thread where their logits are small enough."""
    return max(1, min(threads, APART_BYTES // logits_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveNetwork:
    """A network in the memory of PyTorch, and its shape."""

    module: Any  # torch.nn.Module in float32
    channels: int
    num_heads: int
    patch_size: tuple[int, ...]
    to_onnx: Callable[[], bytes]  # the same as ONNX: `image` (N, C, *patch) -> `logits` (N, heads, *patch)


class DeviceNetwork(Protocol):
    """A network whose batches are in the memory of a GPU already, and whose logits stay there.

    It belongs to one caller at a time: `turn` is held from the first batch that is written to the last logits read.
    """

    device: int  # as CUDA counts GPUs
    stream: int  # CUDA's handle: batches are written, and logits read, by work on this stream
    most: int  # patches in a batch

    @property
    def turn(self) -> AbstractContextManager[Any]: ...

    def addresses(self, shape_NCX: tuple[int, ...]) -> tuple[int, int]:
        """Where a contiguous float32 batch of that shape is to be, and where its logits (N, heads, *X) will be."""

    def run(self, shape_NCX: tuple[int, ...]) -> None:
        """Put the network on the stream for the batch that lies there. Raises BackendError when that fails."""


@runtime_checkable
class RunsOnDevice(Protocol):
    """An engine that computes on a GPU."""

    def on_device(self) -> DeviceNetwork | None:
        """Its network for callers whose data are on the same GPU; None where it computes on the CPU."""


class EngineClass(Protocol):
    """Constructors that every engine's class offers. Both raise BackendError where the engine cannot compute that."""

    def of_bundle(self, bundle_dir: Path, spec: BundleSpec, settings: Settings) -> Engine:
        """Load the model of a bundle (of an ensemble: its first), or its twin in the precision asked for."""

    def of_network(self, network: LiveNetwork, settings: Settings) -> Engine:
        """Take a network over from PyTorch."""
