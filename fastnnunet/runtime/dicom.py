"""A DICOM series as one image: found in a folder, read by ITK's GDCM reader, refused where its slices form no grid.

Compressed transfer syntaxes and rescaling are GDCM's business. Positions are millimetres, axes x to the left, y to the
back, z to the head of the patient (LPS). Attributes: DICOM PS3.3 C.7.6.2 (image plane module).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.runtime.itk import last_line, no_warnings

_OFF_GRID = 0.05  # of the spacing: how far a slice may lie from where a regular grid has it
_HALF_PIXEL = 0.5  # how far the last slice may be shifted sideways against the first
# segmentations and registrations, radiotherapy objects: they refer to a series, and may lie beside it
_NO_IMAGES = ("1.2.840.10008.5.1.4.1.1.66.", "1.2.840.10008.5.1.4.1.1.481.")
_STORAGE_CLASS = re.compile(rb"\x02\x00\x02\x00UI(..)", re.DOTALL)  # (0002,0002), explicit little endian
_HEAD_BYTES = 1024
_PREAMBLE_BYTES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomSeries:
    """The image series of a folder; `uid`, its SeriesInstanceUID, is needed where the folder holds several."""

    folder: Path
    uid: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def parent(self) -> Path:
        return self.folder.parent

    def __str__(self) -> str:
        return str(self.folder)


def is_dicom_folder(folder: Path) -> bool:
    """Whether some file directly in `folder` is DICOM, whatever its name."""
    return folder.is_dir() and any(_storage_class(file) is not None for file in _files(folder))


def slice_files(series: DicomSeries) -> tuple[Path, ...]:
    """The files of a series in the order of their positions along the normal of the slices.

    Raises ImageError when the folder holds no image series, several and no `uid` says which, or not that one; and when
    a file of the series is damaged.
    """
    import SimpleITK as sitk

    folder = series.folder
    classes = {file: _storage_class(file) for file in _files(folder)}
    with no_warnings():
        found = {
            uid: tuple(map(Path, sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)))
            for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        }
    found = {uid: files for uid, files in found.items() if not (classes.get(files[0]) or "").startswith(_NO_IMAGES)}
    if not found:
        raise ImageError(f"{folder} holds no DICOM images that can be read; copy or export the series again")
    uid = series.uid
    if uid is None and len(found) == 1:
        (uid,) = found
    if uid is None or uid not in found:
        listing = "\n".join(f"  {_describe(uid, files)}" for uid, files in found.items())
        if uid is not None:
            raise ImageError(f"{folder} holds no series {uid}, expected one of\n{listing}")
        raise ImageError(
            f"{folder} holds {len(found)} DICOM series, expected one:\n{listing}\n"
            "predict one with -i FOLDER --series UID, or give each a folder of its own"
        )
    files = found[uid]
    listed = {file for one in found.values() for file in one}
    suffix, of_series = files[0].suffix, classes.get(files[0])
    lost = [
        file
        for file, kind in classes.items()
        if file not in listed and (kind == of_series or (kind is None and _may_be_a_slice(file, suffix)))
    ]
    if lost:
        names = ", ".join(file.name for file in lost[:3])
        raise ImageError(f"{folder}: {len(lost)} file(s) cannot be read as DICOM ({names}); copy or export them again")
    return files


def _may_be_a_slice(file: Path, suffix: str) -> bool:
    """Whether a file without a DICOM header may have lost it: named as slices are, empty, or begun as they are."""
    with file.open("rb") as f:
        begins_empty = not f.read(_PREAMBLE_BYTES).strip(b"\0")
    return begins_empty or (suffix != "" and file.suffix == suffix)


def read_series(series: DicomSeries) -> Any:
    """The series as a three-dimensional SimpleITK image of float32, rescale slope and intercept applied.

    Raises ImageError when a slice is damaged, missing, doubled or of another size, or when they do not lie straight
    above each other (gantry tilt).
    """
    import SimpleITK as sitk

    files = slice_files(series)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(file) for file in files])
    # each slice has its own slope: with the type of the first, later ones could be rounded
    reader.SetOutputPixelType(sitk.sitkFloat32)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        with no_warnings():
            image = reader.Execute()
    except RuntimeError as e:
        raise ImageError(
            f"cannot read the DICOM series in {series.folder}: {last_line(e)}\nexpected slices of one size, all whole; "
            "export the series again"
        ) from e

    def values(tag: str, slice_index: int) -> tuple[float, ...]:
        if not reader.HasMetaDataKey(slice_index, tag):
            return ()
        text = str(reader.GetMetaData(slice_index, tag)).strip("\0 ")
        return tuple(float(part) for part in text.split("\\")) if text else ()

    slices = range(len(files))
    for index in slices:
        for tag, what in (("0028|0008", "frames"), ("0028|0002", "colour samples per pixel")):
            number = (values(tag, index) or (1,))[0]
            if number > 1:
                raise ImageError(
                    f"{files[index]} has {number:g} {what}, expected a grey image of one slice; convert it first"
                )
    if len(slices) > 1:
        _check_grid(
            series.folder,
            files,
            positions_mm=[values("0020|0032", i) for i in slices],
            orientations=[values("0020|0037", i) for i in slices],
            pixel_spacings_mm=[values("0028|0030", i) for i in slices],
        )
    return image


def _check_grid(
    folder: Path,
    files: tuple[Path, ...],
    *,
    positions_mm: list[tuple[float, ...]],
    orientations: list[tuple[float, ...]],
    pixel_spacings_mm: list[tuple[float, ...]],
) -> None:
    """Raises ImageError unless the slices are parallel, straight above each other and evenly spaced."""
    for what, found, size in (("position", positions_mm, 3), ("orientation", orientations, 6)):
        for file, value in zip(files, found, strict=True):
            if len(value) != size:
                raise ImageError(f"{file} does not say its {what} in the patient; export the series again")
    for what, found in (("orientation", orientations), ("pixel spacing", pixel_spacings_mm)):
        for file, value in zip(files, found, strict=True):
            if len(value) != len(found[0]) or not np.allclose(value, found[0], atol=1e-4):
                raise ImageError(
                    f"{folder}: the {what} is {found[0]} in {files[0].name} and {value} in {file.name}, "
                    "expected parallel slices of one kind (is a scout among them?)"
                )
    row, column = np.reshape(orientations[0], (2, 3))
    normal = np.cross(row, column)
    positions = np.asarray(positions_mm)
    offsets = positions - positions[0]
    heights = offsets @ normal
    gaps = np.diff(heights)
    spacing = heights[-1] / len(gaps)
    if (np.abs(gaps) < 0.01 * abs(spacing)).any() or spacing == 0:
        index = int(np.argmin(np.abs(gaps)))
        raise ImageError(
            f"{folder}: {files[index].name} and {files[index + 1].name} are at the same position, "
            "expected one image per position (several time points or echoes?); give each a folder of its own"
        )
    sideways = np.linalg.norm(offsets[-1] - heights[-1] * normal)
    if sideways > _HALF_PIXEL * min(pixel_spacings_mm[0] or (1.0,)):
        tilt = np.degrees(np.arctan2(sideways, abs(heights[-1])))
        raise ImageError(
            f"{folder}: the slices are shifted against each other, {sideways:.2f} mm from first to last (a gantry tilt "
            f"of {tilt:.1f} degrees), expected them straight above each other\n"
            "resample the series to a rectangular grid first (dcm2niix does)"
        )
    off = np.abs(heights - spacing * np.arange(len(heights)))
    if off.max() > _OFF_GRID * abs(spacing):
        raise ImageError(f"{folder}: {_uneven(files, gaps)}\nexport the whole series, or resample it evenly first")


def _uneven(files: tuple[Path, ...], gaps_mm: npt.NDArray[np.float64]) -> str:
    usual = float(np.median(gaps_mm))
    index = int(np.argmax(np.abs(gaps_mm - usual)))
    between = f"between {files[index].name} and {files[index + 1].name}"
    steps = gaps_mm / usual
    missing = np.rint(steps) - 1
    if np.abs(steps - np.rint(steps)).max() < 0.1 and missing.sum() < len(gaps_mm):
        return (
            f"{int(missing.sum())} slice(s) are missing: {gaps_mm[index]:.2f} mm {between}, expected {usual:.2f} mm as "
            "elsewhere"
        )
    return (
        f"the slices are not evenly spaced: {gaps_mm.min():.2f} to {gaps_mm.max():.2f} mm, the odd one {between}, "
        "expected one distance"
    )


def _files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if not p.name.startswith(".") and p.name.upper() != "DICOMDIR" and p.is_file()
    )


def _storage_class(file: Path) -> str | None:
    """SOP class of a DICOM file from its first bytes; "" where it is not stated, None for any other file."""
    try:
        with file.open("rb") as f:
            head = f.read(_HEAD_BYTES)
    except OSError as e:
        raise ImageError(f"cannot read {file}: {e}") from e
    if head[128:132] != b"DICM":
        return None
    match = _STORAGE_CLASS.search(head, 132)
    if match is None:
        return ""
    return (
        head[match.end() : match.end() + int.from_bytes(match[1], "little")].rstrip(b"\0 ").decode("ascii", "replace")
    )


def _describe(uid: str, files: tuple[Path, ...]) -> str:
    """One line for a choice: UID, modality, number of images, description."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(files[0]))
    parts = []
    try:
        with no_warnings():
            reader.ReadImageInformation()
        parts = [reader.GetMetaData(t).strip("\0 ") for t in ("0008|0060", "0008|103e") if reader.HasMetaDataKey(t)]
    except RuntimeError as e:
        parts = [last_line(e)]
    return ", ".join([uid or "(no UID)", f"{len(files)} image(s)", *filter(None, parts)])
