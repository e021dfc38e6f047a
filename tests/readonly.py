"""A folder that cannot be written, also for tests that run as root, whom file permissions do not stop."""

import ctypes
import os
from contextlib import contextmanager

CAP_DAC_OVERRIDE, VERSION_3 = 1, 0x20080522


@contextmanager
def read_only(folder):
    """Take the write permission from a folder and all below it, and from this thread the right to ignore that."""
    places = [folder, *folder.rglob("*")]
    modes = [place.stat().st_mode for place in places]
    for place, mode in zip(places, modes, strict=True):
        place.chmod(mode & ~0o222)
    try:
        with _without_override():
            assert not os.access(folder, os.W_OK, effective_ids=True)
            yield
    finally:
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode)


@contextmanager
def _without_override():
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the first three are of capabilities 0 to 31
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] = before & ~(1 << CAP_DAC_OVERRIDE)
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0
