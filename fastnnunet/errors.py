"""The error tree: every error a user can cause is a `FastnnUNetError`.

The CLI prints it as one message and exits with its `exit_code`, nearly always 2.

Each subclass is also the builtin a library user would expect, so `except FileNotFoundError` works as usual.
A message says what was wrong, what was got, what was expected and how to mend it.
"""

import errno
from collections.abc import Mapping, Sequence
from typing import Any

# what an OSError says of a full disk, a quota, or a limit on the size of a file
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

LINES = "\n\t"  # what may stand in a message of several lines


def printable(text: object, keep: str = "") -> str:
    """A text as a terminal may be given it: control characters, which it would obey, escaped but those to `keep`."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )


class FastnnUNetError(Exception):
    """Base of all errors raised on purpose by this package."""

    results: Sequence[Any] | None = None  # of several images of which some failed: one entry each, None where it failed
    exit_code = 2  # 1 where some cases failed and the others are done


class SpecError(FastnnUNetError, ValueError):
    """A spec, flag or YAML file is wrong; all problems are listed at once."""


class NotFoundError(FastnnUNetError, FileNotFoundError):
    """A data set, model folder, fold, cache or file is missing."""


class CorruptError(FastnnUNetError, ValueError):
    """Something stored was changed, truncated or damaged."""


class NewerFormatError(CorruptError):
    """Something stored is whole, but of a later version of this package."""


class MismatchError(FastnnUNetError, ValueError):
    """Two things that must belong together do not (cache and data, plans and checkpoint, bundle and image)."""


class ImageError(FastnnUNetError, ValueError):
    """An input image cannot be used (unreadable, wrong channels, NaN, inconsistent geometry)."""


class SeveralSeriesError(ImageError):
    """A folder holds several DICOM series and nothing says which is meant.

    `series`: what each is, by its SeriesInstanceUID; those without one are left out.
    """

    def __init__(self, message: str, series: Mapping[str, str]) -> None:
        super().__init__(message, series)
        self.series = dict(series)

    def __str__(self) -> str:
        return str(self.args[0])


class UnexpectedError(FastnnUNetError, RuntimeError):
    """Something that nobody thought of happened to one image: a fault of this package, or of a library under it."""


class ParityError(FastnnUNetError, ArithmeticError):
    """An exported model does not compute what the original computes."""


class BackendError(FastnnUNetError, RuntimeError):
    """An inference backend is not installed or cannot run here."""


class NoMemoryError(BackendError):
    """A network found no memory for a batch of that size; smaller ones may."""


class DiskSpaceError(FastnnUNetError, OSError):
    """Not enough room for what is about to be written."""


class StorageError(FastnnUNetError, RuntimeError):
    """An object store cannot be used: no connection, no permission, no such bucket, no package for it.

    Not an OSError: a lost connection must never be taken for a missing or damaged file.
    """


class ServerError(FastnnUNetError, RuntimeError):
    """A server that was asked cannot be reached, refuses, or answers something else than was asked for.

    Not an OSError, as StorageError. `status`: as HTTP counts, None where there was no answer.
    """

    status: int | None = None


class BuildError(FastnnUNetError, RuntimeError):
    """A cache build or a training stopped before its end; what was committed is kept."""
