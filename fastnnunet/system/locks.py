"""Advisory locks that the system releases when their process dies, and file systems that have none.

NFS without its lock service, Lustre mounted without `-o flock`, and some FUSE and SMB mounts refuse `flock`. What is
safe without a lock goes on there; whoever asks for one is told that there is none. On Windows, where no folder can be
opened, nothing is locked either.
"""

import errno
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})

log = logging.getLogger(__name__)
_warned = False


@contextmanager
def locked(path: Path, *, wait: bool = False, quiet: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a file or folder that exists; gives False where the file system has no locks.

    With `wait` until whoever holds it is done. Raises BlockingIOError when another process holds it, FileNotFoundError
    when the path is gone.
    """
    if sys.platform == "win32":
        path.stat()
        if not quiet:
            _warn(path, OSError(errno.ENOSYS, "Windows locks no folders"))
        yield False
    else:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks files that are written only
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as e:
                if e.errno not in NO_LOCKS:
                    raise
                if not quiet:
                    _warn(path, e)
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)


def has_locks(folder: Path, *, quiet: bool = False) -> bool:
    """Whether the file system of a folder has locks; warns where it has none, unless `quiet`."""
    try:
        with locked(folder, quiet=quiet) as has:
            return has
    except BlockingIOError:
        return True


def _warn(path: Path, error: OSError) -> None:
    """Once, and by the process that a person has started: its workers would only repeat it."""
    global _warned
    if _warned or multiprocessing.parent_process() is not None:
        return
    _warned = True
    log.warning(
        "the file system of %s has no file locks (%s): this goes on without them. Do not run two commands that write "
        "there at the same time, and leave unfinished cases of other computers alone; mounting it with locks (Lustre: "
        "-o flock, NFS: lockd) lifts that",
        path,
        error.strerror,
    )
