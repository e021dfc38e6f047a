"""Which devices there are, asked of the driver itself: the slim runtime has no package that would know."""

import ctypes
import sys
from functools import cache


@cache
def has_cuda_device() -> bool:
    """Whether the NVIDIA driver is there and offers a GPU to this process (CUDA_VISIBLE_DEVICES counts)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    # https://docs.nvidia.com/cuda/cuda-driver-api: 0 is CUDA_SUCCESS
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
