"""What a prediction over DICOMweb is asked for."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from fastnnunet.errors import SpecError, printable
from fastnnunet.specs.one_pass import parse_memory
from fastnnunet.specs.option import Option

StoredKind = Literal["dicom-seg", "rtstruct"]
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")


def is_uid(text: str) -> bool:
    """Whether a text can be a UID, which then may stand in an address."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomWebSpec:
    """An archive, the study and series in it, what is stored, and limits. Times are seconds, sizes such as `800M`."""

    url: Annotated[
        str, Option("--url", "Root of the archive's DICOMweb service, such as https://host/dicom-web.", True)
    ]
    study: Annotated[str | None, Option("--study", "StudyInstanceUID.", True)] = None
    accession: Annotated[str | None, Option("--accession", "Or its accession number.", True)] = None
    series: Annotated[
        tuple[str, ...],
        Option("--series", "SeriesInstanceUID; of several channels, one for each in their order.", True),
    ] = ()
    modality: Annotated[str | None, Option("--modality", "Or the one series of this modality, such as CT.", True)] = (
        None
    )
    description: Annotated[
        str | None, Option("--description", "Or the one whose description has this text in it.", True)
    ] = None
    store: Annotated[tuple[StoredKind, ...], Option("--store", "What is stored: dicom-seg, rtstruct, or both.")] = (
        "dicom-seg",
    )
    timeout_s: Annotated[float, Option("--timeout", "Seconds that the archive may be silent.")] = 60.0
    tries: Annotated[int, Option("--tries", "How often a request is made that fails for a moment.")] = 4
    largest: Annotated[str, Option("--largest", "Most bytes of a series.")] = "4G"
    slices: Annotated[int, Option("--slices", "Most files of a series.")] = 10000
    ca_file: Annotated[Path | None, Option("--ca-file", "Certificates (PEM) to trust instead of the system's.")] = None

    def __post_init__(self) -> None:
        """Raises SpecError with all problems."""
        problems = []
        if (self.study is None) == (self.accession is None):
            problems.append("which study? give either --study or --accession")
        for name, uid in [("--study", self.study), *(("--series", uid) for uid in self.series)]:
            if uid is not None and not is_uid(uid):
                problems.append(f"{name}: got {printable(uid)!r}, expected a UID: digits and dots, 64 at most")
        if len(set(self.series)) < len(self.series):
            problems.append("--series: the same one twice, expected one for each channel")
        if self.series and (self.modality is not None or self.description is not None):
            problems.append("--series says which series; leave out --modality and --description")
        if self.accession is not None and (not self.accession.strip() or {*"*?\\"} & {*self.accession}):
            problems.append("--accession: expected one number without * and ?")
        unknown = [kind for kind in self.store if kind not in get_args(StoredKind)]
        if unknown or not self.store or len(set(self.store)) < len(self.store):
            problems.append(
                f"--store: got {', '.join(self.store) or 'nothing'}, expected some of {', '.join(get_args(StoredKind))}"
            )
        if not self.timeout_s > 0:
            problems.append(f"--timeout: got {self.timeout_s}, expected seconds above 0")
        for name in ("tries", "slices"):
            if getattr(self, name) < 1:
                problems.append(f"--{name}: got {getattr(self, name)}, expected at least 1")
        try:
            parse_memory(self.largest)
        except SpecError:
            problems.append(f"--largest: got {self.largest!r}, expected a size such as 800M or 2G")
        if problems:
            raise SpecError("\n".join(problems))

    @property
    def largest_bytes(self) -> int:
        """Most bytes of a series."""
        return parse_memory(self.largest)
