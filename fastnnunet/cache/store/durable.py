"""Writes that survive a kill and a power cut: temporary sibling, fsync, rename, fsync of the folder."""

import errno
import os
import secrets
import sys
from pathlib import Path

from fastnnunet.errors import NO_ROOM, BuildError, DiskSpaceError, FastnnUNetError


def fsync_file(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk; some network file systems, and Windows, flush no folders."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at any moment it is absent or whole; an existing file is replaced."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_file(path.parent)


def write_error(error: OSError, path: object) -> FastnnUNetError:
    """The error a user should see for a failed write."""
    if error.errno in NO_ROOM:
        return DiskSpaceError(
            f"no room left while writing {path} ({error.strerror})\n"
            "free some space and run the same command again; finished cases are kept"
        )
    return BuildError(
        f"cannot write {path}: {error.strerror or error}\n"
        "make the folder writable or choose another with --root, and run the same command again; "
        "finished cases are kept"
    )
