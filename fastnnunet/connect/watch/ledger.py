"""What became of each image of a watched folder, in files beside the results: what a restart goes on from.

OUTPUT/fastnnunet_watch/CASE.json   one record a case, written before it is predicted and after
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from fastnnunet.errors import CorruptError, FastnnUNetError, NotFoundError
from fastnnunet.specs.canonical import sha256_of
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.system.files import atomic_output, check_output_folder, make_folder
from fastnnunet.system.locks import locked

FOLDER = "fastnnunet_watch"
MOST_CRASHES = 2  # of one image, after which it is left alone
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A case as it stood: `state` of these files (`mark`) and this model with its settings (`made_by`)."""

    case: str
    mark: str
    made_by: str
    state: Literal["begun", "done", "failed"]
    message: str = ""
    crashes: int = 0  # how often a process ended while it predicted it


class Ledger:
    """The records of an output folder. One process at a time may have it."""

    def __init__(self, output: Path, made_by: str) -> None:
        """`made_by`: a digest of all that decides results but the image."""
        self.folder, self._made_by = output / FOLDER, made_by

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, no other process watches for this folder. Raises FastnnUNetError where one does."""
        check_output_folder(self.folder.parent)
        make_folder(self.folder)
        try:
            with locked(self.folder):
                yield
        except BlockingIOError as e:
            raise FastnnUNetError(
                f"another process writes results of a watched folder into {self.folder.parent}\nstop it, or give "
                "another folder with -o"
            ) from e

    def of(self, case: str, mark: str) -> Entry | None:
        """What is known of a case as it is now; None where nothing is."""
        try:
            entry = Entry(**read_json_object(self._file(case)))
        except (NotFoundError, CorruptError, TypeError):  # a damaged record is none
            return None
        return entry if (entry.case, entry.mark, entry.made_by) == (case, mark, self._made_by) else None

    def begin(self, case: str, mark: str, crashes: int = 0) -> Entry:
        """A case is about to be predicted, which a process did not survive `crashes` times."""
        return self._write(Entry(case=case, mark=mark, made_by=self._made_by, state="begun", crashes=crashes))

    def done(self, entry: Entry) -> None:
        """Its results are there."""
        self._write(replace(entry, state="done", crashes=0))

    def failed(self, entry: Entry, message: str) -> None:
        """It cannot be predicted, and is not tried again until it changes."""
        self._write(replace(entry, state="failed", message=message))

    def forget(self, entry: Entry) -> None:
        """It was not predicted after all."""
        self._file(entry.case).unlink(missing_ok=True)

    def began_ns(self, entry: Entry) -> int:
        """When its record was written, as the file system counts."""
        return self._file(entry.case).stat().st_mtime_ns

    def _file(self, case: str) -> Path:
        # names of cases may be as long as those of files, and nothing else may be called like two of them
        is_short = len(case.encode()) <= _LONGEST_NAME
        return self.folder / f"{case if is_short else f'{case[:20]}-{sha256_of(case)[:16]}'}.json"

    def _write(self, entry: Entry) -> Entry:
        with atomic_output(self._file(entry.case)) as partial:
            partial.write_text(json.dumps(asdict(entry), indent=1) + "\n")
        return entry
