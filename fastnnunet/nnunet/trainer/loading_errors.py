"""What went wrong while a batch was loaded, in words a user can act on: the case, and the command that mends it."""

import errno
import logging
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastnnunet.errors import BuildError, CorruptError, DiskSpaceError, FastnnUNetError, NotFoundError

Repair = Callable[[str], str]  # case id -> the commands that make its files again

_FEWER = (
    "use fewer loader processes (the environment variable nnUNet_n_proc_DA) or end other programs, and go on with "
    "--continue"
)
_SHARED_MEMORY = "give shared memory more room (docker run --shm-size=8g), and go on with --continue"
_FILES = "allow more open files (ulimit -n 65536), and go on with --continue"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Repairs:
    """A `Repair` for labelled cases, and for those of `unlabelled` where there are any; goes to loader processes."""

    labelled: str
    unlabelled: Any = None  # mixing.Unlabelled

    def __call__(self, case: str) -> str:
        if self.unlabelled is not None and case in self.unlabelled.identifiers:
            return str(self.unlabelled.repair(case))
        return self.labelled


def loading_error(error: Exception, case: str, repair: Repair | None) -> FastnnUNetError:
    """The error to hand over for what loading `case` raised; '' where it was no case's fault."""
    log.debug("loading %s", case, exc_info=error)
    said = said_by(error)
    if isinstance(error, MemoryError):
        return BuildError(f"no memory is left for loading case {case}: {said}\n{_FEWER}")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return BuildError(f"case {case} cannot be loaded: {said}\n{_FILES}")
    if not case:
        return BuildError(f"a batch cannot be loaded: {said}")
    return unreadable(case, error, repair(case) if repair is not None else "preprocess it again")


def reading(dataset_class: Any, repair: Repair) -> Any:
    """nnU-Net's data set class, reading a case when it is asked for; raises what `loading_error` makes of errors."""

    class Reading(dataset_class):  # type: ignore[misc]
        def load_case(self, identifier: str) -> tuple[Any, ...]:
            try:
                image, segmentation, previous, properties = super().load_case(identifier)
                return image[:], segmentation, None if previous is None else previous[:], properties
            except FastnnUNetError:
                raise
            except Exception as e:
                raise loading_error(e, identifier, repair) from e

    return Reading


def unreadable(case: str, error: BaseException, repair: str) -> FastnnUNetError:
    """A case whose files are missing or damaged."""
    kind = NotFoundError if isinstance(error, FileNotFoundError) else CorruptError
    what = "is incomplete" if kind is NotFoundError else "cannot be read"
    return kind(f"preprocessed case {case} {what}: {said_by(error)}\nmake it again with: {repair}")


def not_handed_over(error: Exception) -> FastnnUNetError:
    """For a batch that was made and could not be put where this process would find it."""
    log.debug("handing a batch over", exc_info=error)
    what = f"a loader process cannot hand over its batch: {said_by(error)}"
    if not isinstance(error, OSError | RuntimeError):
        return BuildError(what)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return BuildError(f"{what}\n{_FILES}")
    return DiskSpaceError(f"{what}\nshared memory may be full: {_SHARED_MEMORY}")


def loader_ended(exit_code: int | None, case: str, repair: Repair | None) -> BuildError:
    """For a loader process that ended without a word while it loaded `case` ('' for none)."""
    at = f" while it loaded case {case}" if case else ""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        how = f"was ended by {name}"
    else:
        name, how = "", f"ended with exit code {exit_code}"
    mend = _FEWER
    if name == "SIGKILL":
        how = f"was killed ({name}), usually because memory is short,"
    elif name == "SIGBUS":
        mend = f"{_SHARED_MEMORY}; or a file was shortened"
    elif name not in ("SIGTERM", "SIGINT", "SIGHUP", "") or exit_code:
        mend = "a damaged file or library does that"
    if case and repair is not None and name not in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"):
        mend += f"\nif that case is damaged, make it again with: {repair(case)}"
    return BuildError(f"a loader process {how}{at}\n{mend}")


def said_by(error: BaseException) -> str:
    """One line of what an error says, with its kind where it does not explain itself."""
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = f"{text[:300]}..."
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def remake(files: list[str], command: str) -> str:
    """Shell commands that remove files and run `command`."""
    return f"rm -f {shlex.join(files)} && {command}"
