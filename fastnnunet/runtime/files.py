"""Files that are whole or not there."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastnnunet.errors import NO_ROOM, DiskSpaceError, FastnnUNetError

_USUAL_LONGEST_NAME = 255
_under_way: set[Path] = set()  # partial files of this process


@contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` with the same file ending; rename it on success, remove it on failure.

    Raises DiskSpaceError when the disk is full, FastnnUNetError for any other reason that `path` cannot be written.
    """
    # writers choose the format by the ending, and ITK by any `.nii` or `.img` in a name, hence none of the rest of it
    ending = path.name[-len(".nii.gz") :] if path.name.lower().endswith(".nii.gz") else path.suffix
    stem = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    partial = path.with_name(f".partial-{os.getpid()}-{stem}{ending}")
    _under_way.add(partial)
    try:
        yield partial
        partial.replace(path)
    except OSError as e:
        if e.errno in NO_ROOM:
            raise DiskSpaceError(f"no room left to write {path}; free some space and run again") from e
        raise FastnnUNetError(f"cannot write {path}: {e}") from e
    finally:
        partial.unlink(missing_ok=True)
        _under_way.discard(partial)


def abandon_output() -> None:
    """Remove what another thread has written of files that are not finished; it cannot finish them then."""
    for partial in list(_under_way):
        partial.unlink(missing_ok=True)


def check_output_folder(folder: Path) -> None:
    """Find out before any work that nothing can be written into a folder, which need not exist yet.

    Raises FastnnUNetError saying why.
    """
    # os.path answers False where Path raises, for names that are too long
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(existing):
        what = "a file" if os.path.exists(existing) else "a link that leads nowhere"
        raise FastnnUNetError(f"cannot create the output folder {folder}: {existing} is {what}; give another one")
    limit = longest_name(existing)
    for name in folder.absolute().parts[len(existing.parts) :]:
        if len(os.fsencode(name)) > limit:
            raise FastnnUNetError(
                f"cannot create the output folder {folder}: a name in it has {len(os.fsencode(name))} bytes, the file "
                f"system takes {limit}; give another one"
            )
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise FastnnUNetError(f"cannot write to the output folder {folder}: no permission; give another one")


def longest_name(folder: Path) -> int:
    """How many bytes a file name in a folder may have; the folder need not exist yet."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(place))
    try:
        return os.pathconf(existing, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # not told there, or no POSIX system
        return _USUAL_LONGEST_NAME


def make_folder(path: Path) -> None:
    """Create a folder with its parents. Raises FastnnUNetError saying why it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FastnnUNetError(f"cannot create the output folder {path}: {e}") from e
