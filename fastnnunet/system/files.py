"""Files that are whole or not there."""

import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fastnnunet.errors import NO_ROOM, DiskSpaceError, FastnnUNetError
from fastnnunet.system.whole import is_whole

_USUAL_LONGEST_NAME = 255
_PROBE = bytes(2**16)
_IN_TWO_FILES = (".hdr", ".img", ".mhd", ".nhdr")  # formats that keep voxels in a file beside that of the header
_under_way: dict[Path, int] = {}  # partial files of this process -> the thread that writes them


class _Together(threading.local):
    """Of each thread: files that are complete and not in their places yet, or None outside `files_together`."""

    waiting: dict[Path, Path] | None = None  # partial file -> its place


_together = _Together()


@contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` with the same file ending; rename it on success, remove it on failure.

    Its name is of this call alone, so that threads and processes, also of other machines, may write the same file.
    Raises DiskSpaceError when the disk is full, FastnnUNetError for any other reason that `path` cannot be written.
    """
    # writers choose the format by the ending, and ITK by any `.nii` or `.img` in a name, hence none of the rest of it
    ending = path.name[-len(".nii.gz") :] if path.name.lower().endswith(".nii.gz") else path.suffix
    partial = path.with_name(f".partial-{secrets.token_hex(8)}{ending}")
    _under_way[partial] = threading.get_ident()
    is_waiting = False
    try:
        yield partial
        if partial.is_file() and is_whole(partial) is False:
            raise FastnnUNetError(f"cannot write {path}: not all of it was written")
        if _together.waiting is None:
            _put([(partial, path)])
        else:
            _together.waiting[partial] = path
            is_waiting = True
    except FastnnUNetError as e:  # of a library that does not say why
        reason = None if isinstance(e, OSError) else _why_no_room(partial)
        if reason is None:
            raise
        raise _cannot_write(path, reason) from e
    except OSError as e:
        raise _cannot_write(path, e) from e
    finally:
        if not is_waiting:
            _remove([partial])


def replace_folder(finished: Path, place: Path) -> None:
    """Rename a finished folder to its place. What is there is set aside for that and removed last, so that it is back
    where the renaming fails, and beside its place where the process is killed. Raises OSError.
    """
    aside = place.with_name(f".replaced-{secrets.token_hex(8)}")
    is_taken = place.exists()
    if is_taken:
        os.replace(place, aside)
    try:
        os.replace(finished, place)
    except OSError:
        if is_taken:
            os.replace(aside, place)
        raise
    if is_taken:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def atomic_image(path: Path) -> Iterator[Path]:
    """As `atomic_output`, for an image that its writer may put into two files which name each other.

    Raises what `atomic_output` raises.
    """
    if path.suffix.lower() not in _IN_TWO_FILES:
        with atomic_output(path) as partial:
            yield partial
        return
    try:
        with TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            whole = Path(folder) / path.name
            yield whole
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == whole):  # what is asked for comes last
                with atomic_output(path.with_name(file.name)) as partial:
                    file.replace(partial)
    except FastnnUNetError:
        raise
    except OSError as e:
        raise _cannot_write(path, e) from e


@contextmanager
def files_together() -> Iterator[None]:
    """What `atomic_output` completes inside is put into place at the end, in order: all of it or, on failure, nothing.

    Raises what `atomic_output` raises.
    """
    waiting = _together.waiting = {}
    try:
        yield
        _put(list(waiting.items()))
    finally:
        _together.waiting = None
        _remove(waiting)


@contextmanager
def room_for(place: Path, unfinished: Path) -> Iterator[None]:
    """While a library writes into the folder `unfinished`, for `place`: some do not say why they fail.

    Raises DiskSpaceError in the place of whatever they raise when there is no room left.
    """
    try:
        yield
    except Exception as e:
        full = e if isinstance(e, OSError) and e.errno in NO_ROOM else _why_no_room(unfinished / "room")
        if full is None:
            raise
        raise _cannot_write(place, full) from e


def _put(files: Sequence[tuple[Path, Path]]) -> None:
    """Rename partial files to their places, unless one was abandoned. Raises FastnnUNetError."""
    for partial, path in files:
        if partial not in _under_way:
            raise FastnnUNetError(f"cannot write {path}: interrupted")
    for partial, path in files:
        try:
            partial.replace(path)
        except OSError as e:
            raise _cannot_write(path, e) from e


def _cannot_write(path: Path, error: OSError) -> FastnnUNetError:
    if error.errno in NO_ROOM:
        return DiskSpaceError(
            f"no room left to write {path} ({os.strerror(error.errno)}); free some space, or raise the limit (quota, "
            "ulimit -f), and run again"
        )
    return FastnnUNetError(f"cannot write {path}: {error}")


def _why_no_room(partial: Path) -> OSError | None:
    """The system's error where not even a little more can be written to a partial file."""
    try:
        with partial.open("ab") as f:
            f.write(_PROBE)
    except OSError as e:
        return e if e.errno in NO_ROOM else None
    return None


def _remove(partials: Iterable[Path]) -> None:
    for partial in partials:
        partial.unlink(missing_ok=True)
        _under_way.pop(partial, None)


def abandon_output(thread: int) -> None:
    """Remove what another thread (its identifier) has not finished writing; it cannot finish that then."""
    for partial, writer in list(_under_way.items()):
        if writer == thread:
            _remove([partial])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_under_way.clear)  # they are the parent's


def check_output_folder(folder: Path, called: str = "output folder") -> None:
    """Find out before any work that nothing can be written into a folder, which need not exist yet.

    Raises FastnnUNetError saying why.
    """
    # os.path answers False where Path raises, for names that are too long
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(existing):
        what = "a file" if os.path.exists(existing) else "a link that leads nowhere"
        raise FastnnUNetError(f"cannot create the {called} {folder}: {existing} is {what}; give another one")
    limit = longest_name(existing)
    for name in folder.absolute().parts[len(existing.parts) :]:
        if len(os.fsencode(name)) > limit:
            raise FastnnUNetError(
                f"cannot create the {called} {folder}: a name in it has {len(os.fsencode(name))} bytes, the file "
                f"system takes {limit}; give another one"
            )
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise FastnnUNetError(f"cannot write to the {called} {folder}: no permission; give another one")


def longest_name(folder: Path) -> int:
    """How many bytes a file name in a folder may have; the folder need not exist yet."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(place))
    try:
        return os.pathconf(existing, "PC_NAME_MAX") if hasattr(os, "pathconf") else _USUAL_LONGEST_NAME
    except (OSError, ValueError):  # not told there
        return _USUAL_LONGEST_NAME


def make_folder(path: Path) -> None:
    """Create a folder with its parents. Raises FastnnUNetError saying why it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FastnnUNetError(f"cannot create the output folder {path}: {e}") from e
