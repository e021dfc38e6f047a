"""What is written of a prediction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from fastnnunet.errors import SpecError
from fastnnunet.specs.option import Option

Kind = Literal["image", "nifti", "dicom-seg", "rtstruct", "mesh"]
SegmentationType = Literal["binary", "labelmap"]
OF_SERIES = frozenset({"dicom-seg", "rtstruct"})  # they refer to a DICOM series, so the image must be one


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """Formats of the label map, the first of which says whether a case is done, and what goes beside it."""

    formats: Annotated[
        tuple[Kind, ...],
        Option(
            "--output-format",
            "image: the model's file ending; nifti; of DICOM input dicom-seg: CASE.dcm, rtstruct: CASE.rtstruct.dcm; "
            "mesh: CASE.glb and CASE_stl. May be several.",
        ),
    ] = ("image",)
    statistics: Annotated[
        bool, Option("--statistics", "Volumes, places and intensities: CASE_statistics.json, statistics.csv.")
    ] = False
    preview: Annotated[bool, Option("--preview", "CASE_preview.png: three planes with the labels in colour.")] = False
    scan: bool = False  # CASE_scan.nii.gz: the image on the grid of its label map, see `outputs/scan.py`
    label_codes: Annotated[
        Path | None,
        Option("--label-codes", "YAML of codes for DICOM (default: label_codes.yaml in the bundle, then a table)."),
    ] = None
    segmentation_type: Annotated[
        SegmentationType, Option("--segmentation-type", "Of dicom-seg: binary, or labelmap, a newer kind.")
    ] = "binary"

    def __post_init__(self) -> None:
        problems = []
        unknown = [kind for kind in self.formats if kind not in get_args(Kind)]
        if unknown or not self.formats:
            got = ", ".join(map(repr, unknown)) or "none"
            problems.append(f"--output-format: got {got}, expected some of {', '.join(get_args(Kind))}")
        if len(set(self.formats)) < len(self.formats):
            problems.append(f"--output-format: got {', '.join(self.formats)}, expected each once")
        if self.segmentation_type not in get_args(SegmentationType):
            expected = ", ".join(get_args(SegmentationType))
            problems.append(f"--segmentation-type: got {self.segmentation_type!r}, expected one of {expected}")
        if problems:
            raise SpecError("; ".join(problems))

    @property
    def needs_image(self) -> bool:
        """Some of it is made of the image as it was read."""
        return self.statistics or self.preview or self.scan

    @property
    def of_series(self) -> tuple[str, ...]:
        """The formats that refer to a DICOM series."""
        return tuple(kind for kind in self.formats if kind in OF_SERIES)
