"""Bad scans in pictures: what speaks against each, and a slice of it with the teacher's labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastnnunet.bench.report.slices import CasePictures, case_pictures
from fastnnunet.system.files import atomic_output
from fastnnunet.teachers.screen import Screening, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class BadScan:
    """A scan that the rule speaks against."""

    verdict: Verdict
    pictures: CasePictures  # of the first channel


def bad_scans(screening: Screening, images: Mapping[str, Path], labels: Mapping[str, Path]) -> tuple[BadScan, ...]:
    """Draw every bad scan. `images`: the file of its first channel, `labels`: the teacher's label map on its grid.

    Raises ImageError, as `case_pictures` does.
    """
    return tuple(
        BadScan(
            verdict=verdict,
            pictures=case_pictures(
                verdict.case_id, images[verdict.case_id], {"the teacher's labels": labels[verdict.case_id]}
            ),
        )
        for verdict in screening.bad
    )


def write_bad_scans(scans: tuple[BadScan, ...], folder: Path) -> list[Path]:
    """A PNG for each scan, CASE.png in `folder`, which is made. Raises DiskSpaceError, FastnnUNetError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for scan in scans:
        file = folder / f"{scan.verdict.case_id}.png"
        with atomic_output(file) as partial:
            partial.write_bytes(scan.pictures.pictures[0].png)
        written.append(file)
    return written
