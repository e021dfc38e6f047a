"""What runs the teachers' networks: PyTorch anywhere, OpenVINO on CPUs, where its fused kernels are faster.

Shapes: B = mirrored copies of one tile, C = channels (of a tile: modalities; of logits: heads), Z, Y, X = space; a two-
dimensional network sees (B, C, Y, X).
"""

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from fastnnunet.errors import SpecError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
EngineName = Literal["torch", "openvino"]
Fold = int | str

OPENVINO_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")  # those whose deviation was measured
LARGEST_BATCH = 8  # mirrored copies a GPU sees at once; halved where its memory is too small
STREAM_BYTES = 64 << 20  # every thread has a stream of its own while the logits of all stay below this


class Engine(Protocol):
    """All folds of an ensemble, loaded."""

    def logits(self, fold: Fold, tiles_BC: np.ndarray) -> np.ndarray:
        """Logits of a batch of tiles: float32 (B, C, space) -> float32 (B, heads, space)."""
        ...


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX); emulated bf16 would be slower than fp32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(requested: str) -> Precision:
    """`auto` -> bf16 where the CPU has it or a CUDA device is there, else fp32."""
    import torch

    if requested in ("fp32", "bf16"):
        return cast(Precision, requested)
    return "bf16" if torch.cuda.is_available() or cpu_has_bf16() else "fp32"


def resolve_engine(requested: str, network_class: str) -> EngineName:
    """`auto` -> PyTorch on a CUDA device, OpenVINO on a CPU where it is installed and knows the network, else PyTorch.

    Raises SpecError when OpenVINO is asked for and not installed.
    """
    import torch

    installed = importlib.util.find_spec("openvino") is not None
    if requested == "openvino" and not installed:
        raise SpecError("engine: got openvino, which is not installed; pip install openvino, or use engine: torch")
    if requested in ("torch", "openvino"):
        return cast(EngineName, requested)
    known = network_class.rsplit(".", 1)[-1] in OPENVINO_NETWORKS
    return "openvino" if installed and known and not torch.cuda.is_available() else "torch"


class TorchEngine:
    """PyTorch; bf16 through autocast, which keeps the statistics of InstanceNorm in float32."""

    def __init__(self, networks: "Mapping[Fold, torch.nn.Module]", precision: Precision, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._networks = {fold: network.eval().to(self._device) for fold, network in networks.items()}
        self._bf16 = precision == "bf16"
        # a CPU gains nothing from a batch and would hold the activations of all of it
        self._batch = LARGEST_BATCH if self._device.type == "cuda" else 1

    def logits(self, fold: Fold, tiles_BC: np.ndarray) -> np.ndarray:
        import torch

        x = torch.from_numpy(tiles_BC).to(self._device)
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            while True:
                try:
                    return torch.cat([self._networks[fold](p).float() for p in x.split(self._batch)]).cpu().numpy()
                except torch.OutOfMemoryError:  # of the device; for good, since the next tile will be as large
                    if self._batch == 1:
                        raise
                    self._batch //= 2
                    torch.cuda.empty_cache()


class OpenVINOEngine:
    """OpenVINO on the CPU; one stream a thread where memory allows, so that threads do not change what it gives."""

    def __init__(
        self,
        networks: "Mapping[Fold, torch.nn.Module]",
        precision: Precision,
        threads: int,
        tile_C: Sequence[int],
        heads: int,
    ) -> None:
        """`tile_C` is the shape of a tile, (C, space)."""
        import openvino as ov
        import torch

        logits_bytes = 4 * heads * int(np.prod(tile_C[1:]))
        self._streams = max(1, min(threads, STREAM_BYTES // logits_bytes))
        core = ov.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "NUM_STREAMS": str(self._streams),
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # every process would pin its threads to the same first cores
        }
        self._queues: dict[Fold, Any] = {}
        for fold, network in networks.items():
            example = torch.zeros(1, *tile_C)
            with warnings.catch_warnings():  # notes of the tracer about itself
                warnings.simplefilter("ignore")
                model = ov.convert_model(network.eval(), example_input=example, input=[1, *tile_C])
            self._queues[fold] = ov.AsyncInferQueue(core.compile_model(model, "CPU", settings), self._streams)

    def logits(self, fold: Fold, tiles_BC: np.ndarray) -> np.ndarray:
        out: list[np.ndarray | None] = [None] * len(tiles_BC)

        def keep(request: Any, number: int) -> None:
            out[number] = request.get_output_tensor(0).data.copy()

        queue = self._queues[fold]
        queue.set_callback(keep)
        for number in range(len(tiles_BC)):
            queue.start_async({0: tiles_BC[number : number + 1]}, number)
        queue.wait_all()
        return np.concatenate(cast(list[np.ndarray], out))
