"""What a client is told: one sentence and a status, never more."""

from collections.abc import Mapping
from pathlib import Path

from fastnnunet.errors import (
    BackendError,
    CorruptError,
    DiskSpaceError,
    FastnnUNetError,
    ImageError,
    MismatchError,
    SeveralSeriesError,
    SpecError,
)

_ON_COMMAND_LINE = "send a zip of one whole series, or choose one with ?series=UID"


class RefusedError(Exception):
    """An answer that is none: `status` as HTTP counts, and why.

    `series`: those of which the client has to choose one, see `SeveralSeriesError`.
    """

    def __init__(
        self, status: int, sentence: str, *, retry_after_s: int | None = None, series: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after_s = status, sentence, retry_after_s
        self.series = series or {}


def no_room() -> RefusedError:
    """The disk is full."""
    return RefusedError(507, "the service has no room left on its disk")


def refusal_of(error: FastnnUNetError, folder: Path) -> RefusedError:
    """An error of the library as a refusal: the image's fault, or ours. Names of our own files are left out."""
    if isinstance(error, DiskSpaceError):
        return no_room()
    if isinstance(error, BackendError | CorruptError | MismatchError):
        return RefusedError(500, "the model cannot predict this image; the log of the service says more")
    if isinstance(error, ImageError | SpecError):
        series = error.series if isinstance(error, SeveralSeriesError) else None
        return RefusedError(422, sentence(str(error), folder), series=series)
    return RefusedError(500, "the prediction failed; the log of the service says more")


def sentence(text: str, folder: Path) -> str:
    """A message as one line without the places of our files."""
    text = text.replace(f" (folder {folder})", "").replace(f"{folder}/", "").replace(str(folder), "the upload")
    parts = [_ON_COMMAND_LINE if "-i FOLDER" in part else part.strip() for part in text.splitlines() if part.strip()]
    line = "; ".join(parts).replace(":; ", ": ")  # a list that begins in the next line
    return "".join(c for c in line if c.isprintable())[:1000]
