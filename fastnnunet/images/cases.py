"""Which files belong to which case, and where its prediction goes: nnU-Net's naming."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fastnnunet.errors import FastnnUNetError, ImageError, NotFoundError, SpecError, printable
from fastnnunet.images.dicom.series import DicomSeries, folders_below, is_dicom_folder
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.checks.listing import examples, passed_over, regular_files
from fastnnunet.system.files import longest_name

_log = logging.getLogger(__name__)
T = TypeVar("T")
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.DOTALL)  # a name may have a line break
DICOM_SEG_ENDING = ".dcm"
_IMAGE_ENDINGS = (
    *(".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff"),
    *(DICOM_SEG_ENDING, ".glb"),
)
_FILE_ENDINGS = (*_IMAGE_ENDINGS, ".stl", ".gltf", ".jpg", ".jpeg", ".npz", ".json", ".zip")  # no folder is named so
_COMPANION_ENDINGS = (".json", ".raw", ".zraw", ".img", ".hdr")


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

    def told(self, error: FastnnUNetError) -> FastnnUNetError:
        """The error of this case with control characters in the names of its files escaped."""
        message = str(error)
        for place in (*self.channels, *(place.name for place in self.channels), self.case_id):
            if (name := str(place)) != printable(name):
                message = message.replace(name, printable(name))
        return error if message == str(error) else type(error)(message)


def is_single_image(source: Path, spec: BundleSpec) -> bool:
    """Whether `source` is one image: a file, or a folder of DICOM files without images of the model's file ending."""
    # these two never raise, whatever the name
    is_file, is_folder = os.path.isfile(source), os.path.isdir(source)
    return is_file or (is_folder and not regular_files(source, spec.file_ending) and is_dicom_folder(source))


def find_cases(source: Path, spec: BundleSpec) -> list[Case]:
    """Cases of a folder (`NAME_0000.ending`, `NAME_0001.ending`, ... as nnU-Net wants them), sorted by name.

    Where there is no file of the model's ending, folders of DICOM files are the images: `NAME`, or `NAME_0000`,
    `NAME_0001`, ... for a model of several channels.
    Files of the model's ending that are not named so become a case with a problem, as do gaps in the channels; hidden
    files (macOS leaves `._` twins) are passed over. What else lies in the folder is logged as a warning.
    Raises NotFoundError when the folder is missing or has no image.
    """
    if not os.path.isdir(source):
        what = "is no file but a pipe, socket or device" if os.path.exists(source) else "not found"
        raise NotFoundError(f"input {what}: {printable(source)}\nexpected an image file or a folder of images")
    if names := regular_files(source, spec.file_ending):
        cases = _by_case(source, names, spec.file_ending, numbered=True)
        _tell(source, passed_over(source, {*names, *companions(names, cases, spec)}, spec.file_ending))
        return cases
    cases = dicom_cases(source, len(spec.channel_names))
    if not cases:
        _refuse_empty(source, spec)
    folders = [series.name for case in cases for series in case.series]
    _tell(source, [*passed_over(source, folders), *_deeper(source, folders)])
    return cases


def dicom_cases(source: Path, num_channels: int) -> list[Case]:
    """Cases of the folders of DICOM files in `source`, as of `find_cases`; empty where there are none."""
    folders = sorted(p.name for p in source.iterdir() if not p.name.startswith(".") and is_dicom_folder(p))
    return [_of_series(case) for case in _by_case(source, folders, "", numbered=num_channels > 1)]


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


def _refuse_empty(source: Path, spec: BundleSpec) -> None:
    """Raises NotFoundError saying what there is instead of images."""
    found = [*passed_over(source, (), spec.file_ending), *_deeper(source, ())]
    raise NotFoundError(
        f"no image in {printable(source)}: expected files named NAME_0000{spec.file_ending} or folders of DICOM files, "
        f"found {'; '.join(found) or 'nothing'}"
    )


def _tell(source: Path, kinds: list[str]) -> None:
    for kind in kinds:
        _log.warning("%s: not predicted: %s", printable(source), kind)


def _deeper(source: Path, taken: Sequence[str]) -> list[str]:
    """Where DICOM files lie below folders that hold none themselves, in words; nothing where there are none."""
    below = [folder for folder in folders_below(source) if folder.relative_to(source).parts[0] not in taken]
    if not below:
        return []
    return [
        f"DICOM files deeper in it, in {examples([str(folder.relative_to(source)) for folder in below])} "
        f"(predict them with -i {printable(below[0].parent)})"
    ]


def companions(names: list[str], cases: Sequence[Case], spec: BundleSpec) -> set[str]:
    """Files that belong to images without being one: the voxels of a header, the spacing of a TIFF file."""
    stems = [name[: len(name) - len(spec.file_ending)] for name in names]
    return {stem + ending for stem in (*stems, *(case.case_id for case in cases)) for ending in _COMPANION_ENDINGS}


def _by_case(source: Path, names: list[str], ending: str, *, numbered: bool) -> list[Case]:
    """Put the channels of each case together. `numbered`: a name without channel number is a problem."""
    channels: dict[str, dict[int, Path]] = {}
    cases = []
    for name in names:
        stem = name[: len(name) - len(ending)]
        match = _CHANNEL.fullmatch(stem)
        if (problem := _unusable_name(name)) is not None:
            cases.append(Case(printable(stem), (source / name,), problem))
        elif match is not None:
            channels.setdefault(match["case"], {})[int(match["channel"])] = source / name
        elif numbered:
            expected = f"expected a name such as {printable(stem)}_0000{ending}"
            cases.append(Case(stem, (source / name,), f"{printable(source / name)} has no channel number; {expected}"))
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
        return f"{printable(name)} is a file name that is not UTF-8; rename the file"
    return None


def take_part(cases: list[T], part_id: int, num_parts: int) -> list[T]:
    """Every `num_parts`-th case from `part_id` on, as nnU-Net shares a folder among machines. Raises SpecError."""
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise SpecError(
            f"-part_id {part_id} of -num_parts {num_parts}: parts are counted from 0, expected -part_id from 0 to "
            "-num_parts minus 1"
        )
    return cases[part_id::num_parts]


def with_output(case: Case, output: Path) -> Case:
    """A case as it is, or with the problem that no file `output` can be written, which the images cannot tell."""
    problem = None
    limit = longest_name(output.parent)
    # of the segmentation, or of what is written beside it
    if len(os.fsencode(output.name)) > limit or len(os.fsencode(output.stem)) + len(".json") > limit:
        problem = (
            f"the name of its output has {len(os.fsencode(output.name))} bytes ({printable(output.name[:20])}...), the "
            f"file system takes {limit} with every ending; rename the image"
        )
    elif os.path.isdir(output):
        problem = f"its output {printable(output)} is a folder; give another -o, or rename it"
    return case if problem is None or case.problem else replace(case, problem=problem)


def output_file(source: Path, output: Path, case: Case, spec: BundleSpec, ending: str | None = None) -> Path:
    """Where the segmentation of a case goes: into the folder `output`, or to that very file for a single image.

    `ending`: the model's file ending unless given.
    Raises SpecError when one file is asked for a folder of images, or one with another ending.
    """
    ending = ending or spec.file_ending
    if output.is_dir() or not output.name.lower().endswith(_FILE_ENDINGS):
        return output / f"{case.case_id}{ending}"
    if not is_single_image(source, spec):
        raise SpecError(f"output {output} is a file name but the input {source} is a folder; give a folder with -o")
    if not output.name.endswith(ending):
        raise SpecError(f"output {output}: this run writes {ending} files; name it so, or give a folder")
    return output
