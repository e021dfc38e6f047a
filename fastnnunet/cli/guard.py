"""Errors at the edge: one message on standard error and an exit code, never a traceback for what a user can mend."""

import contextlib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from fastnnunet.errors import LINES, NO_ROOM, FastnnUNetError, SpecError, printable

SAME_COMMAND = "the same command goes on where this one stopped"

# top-level modules that are no part of the base install
EXTRA_OF = {
    **dict.fromkeys(("torch", "nnunetv2", "zarr", "numcodecs", "google_crc32c", "dask", "distributed"), "train"),
    **dict.fromkeys(("onnx", "onnxscript", "matplotlib", "batchgenerators", "dynamic_network_architectures"), "train"),
    "tensorboard": "train",
    "fsspec": "train",
    "s3fs": "s3",
    "openvino": "openvino",
    "nibabel": "images",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "python_multipart"), "serve"),
    **dict.fromkeys(("highdicom", "pydicom"), "dicom"),
    "nncf": "quantize",
    **dict.fromkeys(("tensorrt_rtx", "cuda"), "rtx"),
    "tensorrt": "gpu",
}


# what the system says -> how to mend it
MENDED = {
    **dict.fromkeys(NO_ROOM, "free some space, or write to another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change the permissions, or give another folder"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "give a folder where one is asked for"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "mend the link, which leads in circles",
}


def refuse_empty(argv: Sequence[str]) -> None:
    """Raises SpecError for an empty argument: a variable that is not set would be taken for the current folder."""
    for before, token in zip(["the command", *argv], argv, strict=False):
        if token == "" or (token.startswith("--") and token.endswith("=")):
            where = f"behind {before}" if token == "" else f"in {token}"
            raise SpecError(
                f"an empty value {printable(where)}, expected something (a variable of the shell that is not set?)\n"
                "give a value, . for the current folder, or leave the option out"
            )


def quieten_torch() -> None:
    """Leave out what torch says about the decorators of libraries that nnU-Net imports; nothing a user can mend."""
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)


def guarded(command: Callable[[], None]) -> None:
    """Run `command`. Exit codes: its own, those of errors (2 for what a user can mend, also a full disk; 1 where some
    cases failed and the others are done), 130 when interrupted.
    """
    quieten_torch()
    try:
        command()
    except FastnnUNetError as e:
        # a name of a file may hold what a terminal obeys
        print(f"error: {printable(e, keep=LINES)}", file=sys.stderr)
        sys.exit(e.exit_code)
    except ModuleNotFoundError as e:
        module = (e.name or "").split(".")[0]
        if module not in EXTRA_OF:
            raise
        print(
            f"error: this command needs the package {module}, which the base install leaves out\n"
            f"install it: pip install 'fastnnunet[{EXTRA_OF[module]}]'",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as e:
        if e.errno not in MENDED:
            raise
        filled = e.filename2 if e.errno in NO_ROOM else None  # of a copy: what it was written to
        named = filled or e.filename
        where = f": {printable(named)}" if named else ""
        print(f"error: {e.strerror}{where}\n{MENDED[e.errno]}, and run the command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _leave_interrupted()
    except SystemExit as e:
        if isinstance(getattr(e.__context__, "__cause__", None), KeyboardInterrupt):  # typer made it of one
            _leave_interrupted()
        raise


@contextlib.contextmanager
def going_on(how: str) -> Iterator[None]:
    """End an interrupted command saying what goes on where it stopped."""
    try:
        yield
    except KeyboardInterrupt:
        _leave_interrupted(f"; {how}")


def leave(code: int) -> None:
    """End the process at once: taking down what an engine has loaded takes longer than to predict a small image.

    Nothing may be under way in another thread. Returns where what was printed cannot be written.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # said as Python says it
        return
    os._exit(code)


def _leave_interrupted(how: str = "") -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only spoil the way out
    print(f"interrupted{how}", file=sys.stderr)
    sys.exit(130)
