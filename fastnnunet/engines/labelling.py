"""Which engine labels a cache, in which precision and where: what a recipe leaves open, settled on this machine."""

from fastnnunet.engines.base import Precision
from fastnnunet.engines.devices import CPU, Device, cuda_device_count
from fastnnunet.engines.registry import ENGINES, is_installed, why_no_cuda
from fastnnunet.errors import BackendError, SpecError

OPENVINO_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")  # those whose deviation was measured


def resolve_engine(requested: str, network_class: str) -> str:
    """`auto` -> PyTorch on a CUDA device, OpenVINO on a CPU where it is installed and knows the network, else PyTorch.

    Raises SpecError when the engine asked for is not installed.
    """
    if requested not in ("auto", "torch"):
        if not is_installed(requested):
            packages = " or ".join(ENGINES[requested].requires)
            raise SpecError(
                f"engine: got {requested}, which is not installed; pip install {packages}, or use engine: torch"
            )
        return requested
    if requested == "torch" or not is_installed("openvino") or why_no_cuda("torch") is None:
        return "torch"
    return "openvino" if network_class.rsplit(".", 1)[-1] in OPENVINO_NETWORKS else "torch"


def labelling_precisions(engine: str) -> tuple[Precision, ...]:
    """What an engine computes teachers in: nobody quantises them."""
    return tuple(precision for precision in ENGINES[engine].precisions if precision != "int8")


def resolve_precision(requested: str, engine: str = "torch") -> Precision:
    """`auto` -> the fastest that keeps labels: bf16 where the CPU has it or a CUDA device is there, fp16 in TensorRT.

    Raises SpecError for one that the engine does not have.
    """
    known = labelling_precisions(engine)
    if requested == "auto":
        if "bf16" not in known:
            return "fp16" if "fp16" in known else "fp32"
        from fastnnunet.engines.torch import has_bf16

        return "bf16" if has_bf16() else "fp32"
    if requested not in known:
        raise SpecError(f"precision: got {requested} with engine: {engine}, expected auto or {' or '.join(known)}")
    return requested


def resolve_device(engine: str) -> Device:
    """The first GPU where the engine can use one, else the CPU. Raises BackendError when the engine needs a GPU."""
    entry = ENGINES[engine]
    if entry.needs_gpu:
        if cuda_device_count() == 0:
            raise BackendError(
                f"engine {engine} needs an NVIDIA GPU, and there is no driver here, or it offers no device\n"
                "label the cases where there is one, or with engine: auto"
            )
        return Device("cuda")
    asked = engine == "torch" or cuda_device_count() > 0  # PyTorch knows other GPUs than NVIDIA's
    return Device("cuda") if "cuda" in entry.devices and asked and why_no_cuda(engine) is None else CPU
