"""Which devices there are, asked of the driver itself: the slim runtime has no package that would know."""

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fastnnunet.errors import SpecError

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Device:
    """The CPU or one GPU."""

    kind: DeviceKind = "cpu"
    index: int = 0  # among the GPUs that CUDA_VISIBLE_DEVICES leaves

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind


CPU = Device()


def parse_device(text: str) -> Device:
    """`cpu`, `cuda` or, for another GPU than the first, `cuda:1` and so on. Raises SpecError for anything else."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if match is None:
        raise SpecError(f"device: got {text!r}, expected cpu, cuda, or cuda:1, cuda:2, ... for another GPU")
    return Device("cpu" if text == "cpu" else "cuda", int(match[1] or 0))


@cache
def cuda_device_count() -> int:
    """How many GPUs the NVIDIA driver, if there is one, offers to this process (CUDA_VISIBLE_DEVICES counts)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    # https://docs.nvidia.com/cuda/cuda-driver-api: 0 is CUDA_SUCCESS
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
