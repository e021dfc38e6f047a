"""The three services of an archive: search (QIDO-RS), retrieve (WADO-RS) and store (STOW-RS), for whole series."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnnunet.connect.dicomweb.spec import is_uid
from fastnnunet.connect.http import HttpAnswer, WebServer
from fastnnunet.connect.multipart import SentPart, multipart_body, read_parts
from fastnnunet.errors import CorruptError, ServerError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.specs.checks.json_text import parse_json

_JSON = "application/dicom+json"
_DICOM = "application/dicom"
_STUDY, _SERIES, _INSTANCE = "0020000D", "0020000E", "00080018"
_MODALITY, _DESCRIPTION, _NUMBER, _COUNT = "00080060", "0008103E", "00200011", "00201209"
_FAILED, _STORED, _REFERENCED, _REASON = "00081198", "00081199", "00081155", "00081197"
# PS3.4 table CC.2.3-1 and PS3.18 section 10.5: what an archive says of an object that it does not take
_REASONS = {
    0x0110: "it failed to process it",
    0x0122: "it does not take objects of this kind",
    0x0124: "it is not allowed to store it",
    0xA700: "it has no room left",
    0xA900: "the object does not fit its kind",
    0xC000: "it does not understand the object",
    0x0117: "the UID of the object is not valid",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSeries:
    """What an archive says of one series; empty, or None, for what it does not."""

    uid: str
    modality: str = ""
    description: str = ""
    number: str = ""
    count: int | None = None  # of its instances


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """An archive that speaks DICOMweb."""

    server: WebServer

    def study_of(self, accession: str) -> str:
        """UID of the one study of an accession number. Raises ServerError where there is none, or several."""
        found = {_text(item, _STUDY) for item in self._search("/studies", ("AccessionNumber", accession))}
        if len(found) != 1 or not is_uid(next(iter(found))):
            listing = "".join(f"\n  {uid}" for uid in sorted(filter(is_uid, found)))
            raise ServerError(
                f"{self.server.url} has {len(found)} studies of that accession number, expected one{listing}"
                + ("\ngive its UID with --study" if listing else "")
            )
        return found.pop()

    def series_of(self, study: str) -> list[FoundSeries]:
        """All series of a study, sorted by number. Raises ServerError where it has none."""
        wanted = [("includefield", field) for field in (_MODALITY, _DESCRIPTION, _NUMBER, _COUNT)]
        found = []
        for item in self._search(f"/studies/{study}/series", *wanted):
            count = _text(item, _COUNT)
            found.append(
                FoundSeries(
                    uid=_text(item, _SERIES),
                    modality=_text(item, _MODALITY),
                    description=_text(item, _DESCRIPTION),
                    number=_text(item, _NUMBER),
                    count=int(count) if count.isdecimal() else None,
                )
            )
        found = [series for series in found if is_uid(series.uid)]
        if not found:
            raise ServerError(f"{self.server.url} has no series of the study {study}; is it in this archive?")
        return sorted(found, key=lambda s: (int(s.number) if s.number.isdecimal() else 0, s.uid))

    def has(self, study: str, series: str, instance: str) -> bool:
        """Whether an object is in the archive."""
        try:
            items = self._search(f"/studies/{study}/series/{series}/instances", ("SOPInstanceUID", instance))
        except ServerError as e:
            if e.status == 404:  # of archives that find no series
                return False
            raise
        return any(_text(item, _INSTANCE) == instance for item in items)

    def _search(self, path: str, *query: tuple[str, str]) -> list[dict[str, Any]]:
        def read(answer: HttpAnswer) -> list[dict[str, Any]]:
            found = answer.json()
            if found is None:
                return []
            if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
                raise ServerError(
                    f"{answer.what} answered no list of DICOM objects, expected one; is the address right?"
                )
            return found

        return self.server.ask(path, read, query=query, headers={"Accept": _JSON})

    def fetch(
        self,
        study: str,
        series: FoundSeries,
        folder: Path,
        *,
        most_bytes: int,
        most_files: int,
        progress: Listener = ignore,
    ) -> int:
        """Write every instance of a series into a new folder, as files `slice-00001.dcm` and so on. Returns how many.

        Raises ServerError where the archive sends something else, or more; CorruptError where it sends fewer than it
        says that there are.
        """
        folder.mkdir()

        def read(answer: HttpAnswer) -> int:
            for file in folder.iterdir():  # of a try that was broken off
                file.unlink()
            count = 0
            for content in _dicom_parts(answer):
                count += 1
                if count > most_files:
                    raise ServerError(f"the series {series.uid} has more than {most_files} files, the limit (--slices)")
                with (folder / f"slice-{count:05d}.dcm").open("wb") as f:
                    for piece in content:
                        f.write(piece)
                progress(Progress(what="fetching", done=count, total=series.count, unit="slices"))
            return count

        accept = f'multipart/related; type="{_DICOM}"'
        path = f"/studies/{study}/series/{series.uid}"
        count = self.server.ask(path, read, headers={"Accept": accept}, most_bytes=most_bytes)
        if count == 0 or (series.count is not None and count < series.count):
            raise CorruptError(
                f"{self.server.url} sent {count} of the {series.count} instances of the series {series.uid}\n"
                "see whether it has them all, and run the command again"
            )
        return count

    def store(self, study: str, files: Sequence[tuple[str, Path]]) -> bool:
        """Store objects, given as UID and file, in a study. Returns whether the archive says that it has them all; some
        say nothing. Raises ServerError where it says that it has not.
        """
        parts = [SentPart(headers=(("Content-Type", _DICOM),), content=file) for _, file in files]
        body = multipart_body(f'multipart/related; type="{_DICOM}"', parts)

        def read(answer: HttpAnswer) -> set[str] | None:
            if "json" not in answer.media_type:  # XML, of archives that know nothing else
                answer.content()
                return None
            found = answer.json()
            found = found[0] if isinstance(found, list) and len(found) == 1 else found
            if found is None:
                return None
            if not isinstance(found, dict):
                raise ServerError(f"{answer.what} answered something else than what became of the objects")
            if failed := _items(found, _FAILED):
                raise ServerError(f"{self.server.url} did not store {len(failed)} object(s): {_reasons(failed)}")
            return {_text(item, _REFERENCED) for item in _items(found, _STORED)}

        stored = self.server.ask(
            f"/studies/{study}", read, headers={"Accept": _JSON}, method="POST", body=body, refused=_not_stored
        )
        missing = [uid for uid, _ in files if stored is not None and uid not in stored]
        if missing:
            raise ServerError(f"{self.server.url} does not say that it stored {', '.join(missing)}; look there")
        return stored is not None


def _not_stored(status: int, said: bytes) -> str | None:
    """What 409 means: none of the objects was stored, and the answer has the reason."""
    if status != 409:
        return None
    try:
        found = parse_json(said, "the answer")
    except CorruptError:  # then the status has to do
        return None
    failed = _items(found, _FAILED) if isinstance(found, dict) else []
    return f"the archive did not store {len(failed)} object(s): {_reasons(failed)}" if failed else None


def _reasons(failed: Sequence[dict[str, Any]]) -> str:
    codes = {_text(item, _REASON) for item in failed}
    words = {_REASONS.get(int(code), f"reason {code}") if code.isdecimal() else "it does not say why" for code in codes}
    return ", ".join(sorted(words))


def _dicom_parts(answer: HttpAnswer) -> Iterator[Iterator[bytes]]:
    """The DICOM files of an answer. Raises ServerError where it is none of DICOM files."""
    boundary = answer.parameter("boundary")
    if answer.media_type != "multipart/related" or not boundary:
        got = answer.media_type or "something without a type"
        raise ServerError(f"{answer.what} answered {got}, expected multipart/related with DICOM files")
    for headers, content in read_parts(answer.pieces(), boundary):
        if "Content-Type" in headers and headers.get_content_type() != _DICOM:
            raise ServerError(f"{answer.what} sent a part of {headers.get_content_type()}, expected {_DICOM}")
        yield content


def _items(found: dict[str, Any], tag: str) -> list[dict[str, Any]]:
    """The items of a sequence in DICOM JSON."""
    element = found.get(tag)
    value = element.get("Value") if isinstance(element, dict) else None
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(item: dict[str, Any], tag: str) -> str:
    """The first value of an attribute in DICOM JSON, as text; empty where there is none."""
    element = item.get(tag)
    value = element.get("Value") if isinstance(element, dict) else None
    first = value[0] if isinstance(value, list) and value else None
    return str(first).strip() if isinstance(first, str | int | float) and not isinstance(first, bool) else ""
