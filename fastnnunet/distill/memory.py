"""Training on a CPU allocates and frees the same activations in every step."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3), from malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory of this process instead of giving it back; False where there is no glibc.

    Otherwise tensors of 32 MB and more are new pages in each step, which the kernel fills with zeros first: a tenth of
    a student's step. After some steps the heap has grown so far that nothing is new any more. Resident memory of
    students peaked a few percent higher; between peaks it does not fall.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have no mallopt, Windows no such library
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
