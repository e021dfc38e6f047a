"""A user's scans: a folder named as for nnU-Net's predict, or DICOM series; what the model cannot take is refused."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnnunet.errors import ImageError, NotFoundError, SpecError, printable
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.images.cases import Case, dicom_cases
from fastnnunet.images.dicom.series import DicomSeries, read_series, slice_files
from fastnnunet.images.sitk import write_sitk
from fastnnunet.nnunet.files.model import Model
from fastnnunet.nnunet.files.plans import num_image_channels
from fastnnunet.nnunet.unlabelled.image_folder import find_images, unusable
from fastnnunet.specs.checks.listing import regular_files
from fastnnunet.system.files import atomic_image, make_folder
from fastnnunet.teachers.intensities import require_modality, sample_of
from fastnnunet.teachers.measured import measure_scans

OPTION = "-i"
_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff")
_OF_ITK = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")  # read what ITK writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Scans:
    """Scans as they lie in a folder; make them with `find_scans`."""

    folder: Path
    cases: dict[str, tuple[Path, ...] | tuple[DicomSeries, ...]]  # what a reader reads, in the order of the channels
    is_dicom: bool

    def sizes(self) -> dict[str, dict[str, list[int]]]:
        """Of every case the names of its files or series, with the number of files and of bytes."""
        return {case: {place.name: _size(place) for place in places} for case, places in self.cases.items()}


def find_scans(folder: Path, model: Model) -> Scans:
    """The scans in a folder. Reads none of them.

    Raises NotFoundError (no folder, no scan), ImageError (names, channels), SpecError (two scans of one name; DICOM for
    a model of another kind of images).
    """
    ending, channels = str(model.dataset_json["file_ending"]), num_image_channels(model.dataset_json)
    if not os.path.isdir(folder):
        raise NotFoundError(f"{OPTION}: {folder} is not a folder\nexpected a folder of CASE_0000{ending} ...")
    series = dicom_cases(folder, channels)
    _refuse_twins(folder, ending, series)
    if not series or regular_files(folder, ending):
        return Scans(folder=folder, cases=dict(find_images(folder, ending, channels, option=OPTION)), is_dicom=False)
    reader = model.manager.plans.get("image_reader_writer")
    if reader not in _OF_ITK:
        raise SpecError(f"{OPTION}: {folder} holds DICOM series, and the model reads {ending} with {reader}")
    problems = {
        case.case_id: case.problem or f"got {len(case.series)} series, expected {channels}, one for each channel"
        for case in series
        if case.problem or len(case.series) != channels
    }
    if problems:
        raise unusable(folder, problems)
    return Scans(folder=folder, cases={case.case_id: case.series for case in series}, is_dicom=True)


def _refuse_twins(folder: Path, ending: str, series: Sequence[Case]) -> None:
    """Raises SpecError where two scans would be one case: files of several endings, or files and DICOM series."""
    places: dict[str, set[str]] = {}
    for name in regular_files(folder):
        known = next((e for e in (ending, *_ENDINGS) if name.lower().endswith(e.lower())), None)
        if known is not None:
            places.setdefault(name[: len(name) - len(known)], set()).add(name)
    for case in series:
        for number, place in enumerate(case.channels):
            places.setdefault(f"{case.case_id}_{number:04d}", set()).add(f"{Path(str(place)).name}/ (DICOM)")
    wanted = {name for names in places.values() for name in names if name.endswith((ending, "/ (DICOM)"))}
    twins = [" and ".join(sorted(names)) for names in places.values() if len(names) > 1 and names & wanted]
    ids = [case.case_id for case in series]
    twins += [f"{case} and {case}_0000, both DICOM" for case in sorted({i for i in ids if ids.count(i) > 1})]
    if twins:
        raise SpecError(
            f"{OPTION}: {len(twins)} scan(s) of {folder} are there twice under one name:\n"
            + "\n".join(f"  - {printable(twin)}" for twin in twins)
            + "\nrename or remove one of each"
        )


def require_known_intensities(scans: Scans, model: Model) -> None:
    """Read a few of the scans and refuse them when all lie far outside the model's fingerprint.

    DICOM is looked at once it is converted. Raises ImageError.
    """
    files = {case: tuple(p for p in places if isinstance(p, Path)) for case, places in scans.cases.items()}
    if not scans.is_dicom:
        require_modality(measure_scans(sample_of(files), model), model)


def as_files(
    scans: Scans, folder: Path, ending: str, progress: Listener = ignore
) -> tuple[Path, dict[str, tuple[Path, ...]]]:
    """The scans as files of the model's ending, and their folder: their own, or `folder`, where DICOM is converted to.

    What is there already is kept. Raises ImageError naming all series that cannot be read, DiskSpaceError.
    """
    if not scans.is_dicom:
        return scans.folder, {case: tuple(Path(str(p)) for p in places) for case, places in scans.cases.items()}
    make_folder(folder)
    problems: dict[str, str] = {}
    made: dict[str, tuple[Path, ...]] = {}
    for done, (case, series) in enumerate(scans.cases.items(), start=1):
        made[case] = tuple(folder / f"{case}_{channel:04d}{ending}" for channel in range(len(series)))
        try:
            for one, file in zip(series, made[case], strict=True):
                if isinstance(one, DicomSeries) and not file.is_file():
                    image = read_series(one)
                    with atomic_image(file) as partial:
                        write_sitk(image, partial, file)
        except ImageError as e:
            problems[case] = " ".join(str(e).splitlines())
        progress(Progress(what="reading DICOM", done=done, total=len(scans.cases), unit="cases"))
    if problems:
        raise unusable(scans.folder, problems)
    return folder, made


def hold_out(cases: Sequence[str], count: int | None = None) -> tuple[str, ...]:
    """The scans that a student never learns from: `count`, or a fifth of them but 3 where there are 9 or more.

    The same for the same names, evenly through their order. Raises SpecError when none would be left to learn from.
    """
    if count is None:
        count = max(1, round(len(cases) / 5), 3 if len(cases) >= 9 else 0)
    if not 0 < count < len(cases):
        raise SpecError(
            f"{len(cases)} scan(s) are too few to hold {count} out: got {len(cases)}, expected at least {count + 1}\n"
            "add scans; the student learns from the others and is judged on those held out"
            if count > 0
            else f"--hold-out: got {count}, expected at least 1, on which the student is judged"
        )
    places = (np.arange(count) + 0.5) * len(cases) / count
    return tuple(sorted(cases)[int(place)] for place in places)


def _size(place: Path | DicomSeries) -> list[int]:
    files = slice_files(place) if isinstance(place, DicomSeries) else (place,)
    return [len(files), sum(file.stat().st_size for file in files)]
