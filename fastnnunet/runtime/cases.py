"""Which files belong to which case, and where its prediction goes: nnU-Net's naming."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastnnunet.errors import ImageError, NotFoundError, SpecError
from fastnnunet.runtime.dicom import DicomSeries, is_dicom_folder, slice_files
from fastnnunet.specs.bundle import BundleSpec

T = TypeVar("T")
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
DICOM_SEG_ENDING = ".dcm"
_IMAGE_ENDINGS = (
    *(".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff"),
    DICOM_SEG_ENDING,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One image to predict: its files or DICOM series in channel order, or the reason why they cannot be one image."""

    case_id: str
    files: tuple[Path, ...]
    problem: str | None = None
    series: tuple[DicomSeries, ...] = ()

    @property
    def channels(self) -> tuple[Path, ...] | tuple[DicomSeries, ...]:
        """What a reader reads."""
        return self.series or self.files


def is_single_image(source: Path, spec: BundleSpec) -> bool:
    """Whether `source` is one image: a file, or a folder of DICOM files without images of the model's file ending."""
    return source.is_file() or (source.is_dir() and not _images(source, spec) and is_dicom_folder(source))


def find_cases(source: Path, spec: BundleSpec) -> list[Case]:
    """Cases of a folder (`NAME_0000.ending`, `NAME_0001.ending`, ... as nnU-Net wants them), sorted by name.

    Where there is no file of the model's ending, folders of DICOM files are the images: `NAME`, or `NAME_0000`,
    `NAME_0001`, ... for a model of several channels.
    Files of the model's ending that are not named so become a case with a problem, as do gaps in the channels; hidden
    files (macOS leaves `._` twins) are passed over.
    Raises NotFoundError when the folder is missing or has no image.
    """
    if not source.is_dir():
        raise NotFoundError(f"input not found: {source}\nexpected an image file or a folder of images")
    if names := _images(source, spec):
        return _by_case(source, names, spec.file_ending, numbered=True)
    folders = sorted(p.name for p in source.iterdir() if not p.name.startswith(".") and is_dicom_folder(p))
    if not folders:
        others = sorted(p.name for p in source.iterdir())[:3]
        raise NotFoundError(
            f"no image in {source}: expected files named NAME_0000{spec.file_ending} or folders of DICOM files, "
            f"found {', '.join(others) or 'nothing'}"
        )
    cases = _by_case(source, folders, "", numbered=len(spec.channel_names) > 1)
    return [_of_series(case) for case in cases]


def single_case(image: Path, spec: BundleSpec, series_uid: str | None = None) -> Case:
    """The case of one image (see `is_single_image`); its siblings `_0001`, `_0002`, ... are its further channels.

    `series_uid` chooses among the series of a DICOM folder.
    Raises ImageError when the image is not the first channel, SpecError when there is no series to choose.
    """
    is_folder = image.is_dir()
    if series_uid is not None and (not is_folder or len(spec.channel_names) > 1):
        raise SpecError(f"--series chooses one series of one DICOM folder of a single channel, {image} is none")
    image = image.resolve() if is_folder else image  # `.` has no name
    name = image.name.lower()
    known = next((e for e in (spec.file_ending.lower(), *_IMAGE_ENDINGS) if name.endswith(e)), image.suffix)
    ending = "" if is_folder else image.name[len(name) - len(known) :]
    if (problem := _unusable_name(image.name)) is not None:
        raise ImageError(problem)
    stem = image.name[: len(image.name) - len(ending)]
    match = _CHANNEL.fullmatch(stem)
    case = Case(stem, (image,))
    if match is not None:
        if int(match["channel"]) != 0 and len(spec.channel_names) > 1:
            raise ImageError(
                f"{image} is channel {int(match['channel'])} of an image; give the one ending in _0000{ending}"
            )
        siblings = [
            image.with_name(f"{match['case']}_{channel:04d}{ending}") for channel in range(1, len(spec.channel_names))
        ]
        case = Case(match["case"], (image, *(s for s in siblings if s.exists())))
    if not is_folder:
        return case
    return _of_series(case, series_uid)


def _of_series(case: Case, uid: str | None = None) -> Case:
    """A case of folders as one of DICOM series."""
    return Case(case.case_id, (), case.problem, tuple(DicomSeries(folder=folder, uid=uid) for folder in case.files))


def _images(folder: Path, spec: BundleSpec) -> list[str]:
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.name.endswith(spec.file_ending) and not p.name.startswith(".") and p.is_file()
    )


def _by_case(source: Path, names: list[str], ending: str, *, numbered: bool) -> list[Case]:
    """Put the channels of each case together. `numbered`: a name without channel number is a problem."""
    channels: dict[str, dict[int, Path]] = {}
    cases = []
    for name in names:
        stem = name[: len(name) - len(ending)]
        match = _CHANNEL.fullmatch(stem)
        if (problem := _unusable_name(name)) is not None:
            printable = stem.encode("utf-8", "backslashreplace").decode()
            cases.append(Case(printable, (source / name,), problem))
        elif match is not None:
            channels.setdefault(match["case"], {})[int(match["channel"])] = source / name
        elif numbered:
            expected = f"expected a name such as {stem}_0000{ending}"
            cases.append(Case(stem, (source / name,), f"{source / name} has no channel number; {expected}"))
        else:
            cases.append(Case(stem, (source / name,)))
    for case_id, files in channels.items():
        gap = next((i for i, channel in enumerate(sorted(files)) if channel != i), None)
        problem = None
        if gap is not None:
            problem = f"{case_id} has no {case_id}_{gap:04d}{ending} in {source} but later channels"
        cases.append(Case(case_id, tuple(files[channel] for channel in sorted(files)), problem))
    return sorted(cases, key=lambda case: case.case_id)


def _unusable_name(name: str) -> str | None:
    """Why ITK, which takes names in UTF-8, cannot open a file of this name."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return f"{name!r} is a file name that is not UTF-8; rename the file"
    return None


def take_part(cases: list[T], part_id: int, num_parts: int) -> list[T]:
    """Every `num_parts`-th case from `part_id` on, as nnU-Net shares a folder among machines. Raises SpecError."""
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise SpecError(
            f"-part_id {part_id} of -num_parts {num_parts}: parts are counted from 0, expected -part_id from 0 to "
            "-num_parts minus 1"
        )
    return cases[part_id::num_parts]


def refuse_input_as_output(case: Case, output: Path) -> None:
    """Raises SpecError when the segmentation would be written over the image it is made from."""
    if not output.is_file():
        return
    place = output.resolve()
    beside = [series for series in case.series if series.folder.resolve() == place.parent]
    images = [*case.files, *(file for series in beside for file in slice_files(series))]
    if place in {image.resolve() for image in images}:
        raise SpecError(f"{output} is an input image and would be replaced by its segmentation; give another -o")


def output_file(source: Path, output: Path, case: Case, spec: BundleSpec, ending: str | None = None) -> Path:
    """Where the segmentation of a case goes: into the folder `output`, or to that very file for a single image.

    `ending`: the model's file ending unless given.
    Raises SpecError when one file is asked for a folder of images, or one with another ending.
    """
    ending = ending or spec.file_ending
    if output.is_dir() or not output.name.lower().endswith(_IMAGE_ENDINGS):
        return output / f"{case.case_id}{ending}"
    if not is_single_image(source, spec):
        raise SpecError(f"output {output} is a file name but the input {source} is a folder; give a folder with -o")
    if not output.name.endswith(ending):
        raise SpecError(f"output {output}: this run writes {ending} files; name it so, or give a folder")
    return output
