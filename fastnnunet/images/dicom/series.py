"""A DICOM series as one image: found in a folder, read by ITK's GDCM reader, refused where its slices form no grid.

Compressed transfer syntaxes and rescaling are GDCM's business. Files without preamble are DICOM too.
"""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.errors import ImageError, SeveralSeriesError, printable
from fastnnunet.images.dicom.grid import check_grid, in_order, slice_spacing_mm
from fastnnunet.images.dicom.head import Head, numbers, read_head
from fastnnunet.images.itk import last_line, no_warnings
from fastnnunet.images.stored import DEFLATE_RATIO, SMALL_BYTES, check_claim
from fastnnunet.specs.checks.listing import examples, passed_over, regular_files

_log = logging.getLogger(__name__)
# segmentations and registrations, radiotherapy objects: they refer to a series, and may lie beside it
_NO_IMAGES = ("1.2.840.10008.5.1.4.1.1.66.", "1.2.840.10008.5.1.4.1.1.481.")
_PREAMBLE_BYTES = 128
_DEEPEST_FOLDER = 5  # patient, study, series, and what archives put above them
_FOLDERS_SHOWN, _FOLDERS_LOOKED_AT = 3, 200


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


@dataclass(frozen=True, slots=True)
class _Slices:
    """The slices of a series in their order, and what was left out or assumed."""

    heads: dict[Path, Head]
    notes: list[str] = field(default_factory=list)


def is_dicom_folder(folder: Path) -> bool:
    """Whether some file directly in `folder` is DICOM, whatever its name."""
    return folder.is_dir() and any(_seems_dicom(file) for file in _files(folder))


def _seems_dicom(file: Path) -> bool:
    try:
        return is_dicom_file(file)
    except ImageError:  # of a file that cannot be opened; said when the series is read that others make it part of
        return False


def folders_below(folder: Path) -> list[Path]:
    """Folders of DICOM files two or more levels below a folder; only the first few that there are. Links are not
    followed, since they may lead in circles.
    """
    found: list[Path] = []
    level = [folder]
    looked_at = 0
    for depth in range(_DEEPEST_FOLDER):
        below = []
        for parent in level:
            with contextlib.suppress(PermissionError):  # cannot be predicted either
                below += sorted(p for p in parent.iterdir() if p.is_dir() and not p.is_symlink())
        level = [p for p in below if not p.name.startswith(".")]
        for place in level if depth else ():
            looked_at += 1
            if len(found) > _FOLDERS_SHOWN or looked_at > _FOLDERS_LOOKED_AT:
                return found
            if is_dicom_folder(place):
                found.append(place)
    return found


def is_dicom_file(file: Path) -> bool:
    """Whether a file is DICOM, by its content."""
    head = read_head(file)
    return head is not None and (head.has_preamble or head.is_whole)


def slice_files(series: DicomSeries) -> tuple[Path, ...]:
    """The files of a series in the order of their positions along the normal of the slices.

    A copy of a slice is left out, as are scouts among slices. Raises ImageError when the folder holds no image series,
    several and no `uid` says which, or not that one; and when a file of the series is damaged.
    """
    return tuple(slice_heads(series))


def slice_heads(series: DicomSeries) -> dict[Path, Head]:
    """`slice_files` with what each says of itself."""
    return _find(series).heads


def read_series(series: DicomSeries) -> Any:
    """The series as a three-dimensional SimpleITK image of float32, rescale slope and intercept applied.

    What was left out of the folder is logged as a warning.
    Raises ImageError when a slice is damaged, missing, doubled or of another size, or when they do not lie straight
    above each other (gantry tilt).
    """
    import SimpleITK as sitk

    found = _find(series)
    for note in found.notes:
        _log.warning("%s: %s", printable(series.folder), note)
    check_grid(series.folder, found.heads)
    claimed = sum(head.rows * head.columns for head in found.heads.values())  # a byte a pixel, or more
    stored = sum(file.stat().st_size for file in found.heads)
    check_claim(series.folder, claimed, stored, ratio=DEFLATE_RATIO, slack=SMALL_BYTES)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(file) for file in found.heads])
    # each slice has its own slope: with the type of the first, later ones could be rounded
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        with no_warnings():
            image = reader.Execute()
    except RuntimeError as e:
        culprit, reason = _first_unreadable(tuple(found.heads))
        raise ImageError(
            f"cannot read the DICOM series in {series.folder}: {culprit}{reason or last_line(e)}\n"
            "expected whole slices of one size; export the series again"
        ) from e
    _set_geometry(image, series.folder, found.heads)
    return image


def _set_geometry(image: Any, folder: Path, heads: Mapping[Path, Head]) -> None:
    """The reader takes the pixel spacing of some kinds of images from elsewhere, or for 1 mm where it is not there, and
    reads no decimal commas.
    """
    first = next(iter(heads.values()))
    x, y, z = image.GetSpacing()
    if len(heads) > 1 and not first.pixel_spacing and (x, y) == (1, 1):
        raise ImageError(f"{folder}: the slices do not say their pixel spacing; export the series again")
    in_plane = first.pixel_spacing[::-1] if len(first.pixel_spacing) == 2 else (x, y)
    wanted = (*in_plane, slice_spacing_mm(heads) if len(heads) > 1 else z)
    if not np.allclose((x, y, z), wanted, rtol=1e-4):
        image.SetSpacing(wanted)
    if len(first.position) != 3 or len(first.orientation) != 6:
        return
    if not np.allclose(image.GetOrigin(), first.position, atol=1e-3):
        image.SetOrigin(first.position)
    row, column = np.reshape(first.orientation, (2, 3))
    direction = np.stack([row, column, np.cross(row, column)], axis=1).ravel()
    if not np.allclose(image.GetDirection(), direction, atol=1e-3):
        image.SetDirection(direction.tolist())


def _find(series: DicomSeries) -> _Slices:
    folder = series.folder
    if not folder.is_dir():
        raise ImageError(f"{folder} is no folder any more")
    heads = {file: read_head(file) for file in _files(folder)}
    heads = {file: _by_reader(file) or head if head and head.is_deflated else head for file, head in heads.items()}
    found: dict[str, dict[Path, Head]] = {}
    for file, head in heads.items():
        if head is not None and head.is_image and not head.storage_class.startswith(_NO_IMAGES):
            found.setdefault(head.series_uid, {})[file] = head
    if not found:
        raise ImageError(f"{folder} holds no DICOM images that can be read; copy or export the series again")
    uid, notes = _choose(series, found)
    slices = found[uid]
    _refuse_damaged(folder, heads, slices)
    scouts = [file for file, head in slices.items() if head.is_localizer]
    if scouts and len(scouts) < len(slices):
        slices = {file: head for file, head in slices.items() if file not in scouts}
        notes.append(f"left out {len(scouts)} scout(s) among the slices ({_names(scouts)})")
    copies = _copies(folder, slices)
    if copies:
        slices = {file: head for file, head in slices.items() if file not in copies}
        notes.append(f"left out {len(copies)} file(s) that hold a slice a second time ({_names(copies)})")
    dicom = {file.name for file, head in heads.items() if head}
    notes += [f"passed over {note}" for note in passed_over(folder, dicom)]
    return _Slices({file: slices[file] for file in in_order(slices)}, notes)


def _choose(series: DicomSeries, found: Mapping[str, Mapping[Path, Head]]) -> tuple[str, list[str]]:
    """SeriesInstanceUID of the series that is meant, and what to say about the others."""
    folder, uid = series.folder, series.uid
    listing = "\n".join(f"  {printable(uid) or '(no UID)'}, {_describe(heads)}" for uid, heads in found.items())
    if uid is not None:
        if uid not in found:
            raise ImageError(f"{folder} holds no series {printable(uid)}, expected one of:\n{listing}")
        return uid, []
    volumes = [uid for uid, heads in found.items() if not all(head.is_localizer for head in heads.values())]
    if len(found) > 1 and len(volumes) != 1:
        raise SeveralSeriesError(
            f"{folder} holds {len(found)} DICOM series, expected one:\n{listing}\n"
            "predict one with -i FOLDER --series UID, or give each a folder of its own",
            {printable(uid): _describe(heads) for uid, heads in found.items() if uid},
        )
    if len(found) == 1:
        return next(iter(found)), []
    scouts = [file for uid, heads in found.items() if uid != volumes[0] for file in heads]
    return volumes[0], [f"left out {len(found) - 1} series of scouts only ({_names(scouts)})"]


def _refuse_damaged(folder: Path, heads: Mapping[Path, Head | None], slices: Mapping[Path, Head]) -> None:
    """Raises ImageError when a file that may be a slice cannot be read: a series without it would be another image."""
    example = next(iter(slices))
    suffix, storage_class = example.suffix, slices[example].storage_class
    lost = [
        file
        for file, head in heads.items()
        if (head is None and _may_be_a_slice(file, suffix))
        or (head is not None and not head.is_image and head.storage_class in ("", storage_class))
        or (head is not None and head.pixel_bytes and (head.pixels_at or 0) + head.pixel_bytes > file.stat().st_size)
    ]
    # a link that leads nowhere (data not fetched yet) is a slice when it is called so
    lost += [p for p in folder.iterdir() if p.is_symlink() and not p.exists() and suffix and p.suffix == suffix]
    if lost:
        raise ImageError(
            f"{folder}: {len(lost)} file(s) cannot be read as DICOM ({_names(lost)}); copy or export them again"
        )


def _may_be_a_slice(file: Path, suffix: str) -> bool:
    """Whether a file without a DICOM header may have lost it: named as slices are, empty, or begun as they are."""
    with file.open("rb") as f:
        begins_empty = not f.read(_PREAMBLE_BYTES).strip(b"\0")
    return begins_empty or (suffix != "" and file.suffix == suffix)


def _copies(folder: Path, slices: Mapping[Path, Head]) -> list[Path]:
    """Files that hold the same slice as another one, which comes first by name: same identity, place and pixels.

    Raises ImageError where two with the same identity and place have different pixels.
    """
    first_of: dict[tuple[object, ...], Path] = {}
    copies = []
    # `a.dcm` before `a (1).dcm` and `copy of a.dcm`
    for file in sorted(slices, key=lambda file: (len(file.name), file.name)):
        head = slices[file]
        identity = (head.sop_uid, head.position, head.orientation, head.rows, head.columns)
        first = first_of.setdefault(identity, file)
        if first == file:
            continue
        if _pixels(first, slices[first]) == _pixels(file, head):
            copies.append(file)
        elif head.sop_uid and head.position:
            raise ImageError(
                f"{folder}: {first.name} and {file.name} are different slices with the same identity "
                f"(SOPInstanceUID {printable(head.sop_uid)}) and position; take the wrong one out of the folder"
            )
    return copies


def _pixels(file: Path, head: Head) -> bytes:
    with file.open("rb") as f:
        f.seek(head.pixels_at or 0)
        return f.read()


def _first_unreadable(files: tuple[Path, ...]) -> tuple[str, str]:
    """Name and fault of the first file that cannot be read by itself; empty where each can."""
    import SimpleITK as sitk

    for file in files:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(file))
        try:
            with no_warnings():
                reader.Execute()
        except RuntimeError as e:
            return f"{file.name}: ", last_line(e)
    return "", ""


def _by_reader(file: Path) -> Head | None:
    """The header of a deflated file as ITK's reader has it; None where it cannot read it. Of damaged files it may never
    return.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    try:
        with no_warnings():
            reader.ReadImageInformation()
    except RuntimeError:  # the caller goes by what it read itself
        return None

    def text(tag: str) -> str:
        return str(reader.GetMetaData(tag)).strip("\0 ") if reader.HasMetaDataKey(tag) else ""

    def count(tag: str) -> int:
        return int((numbers(text(tag)) or (1,))[0])

    columns, rows = reader.GetSize()[:2]
    return Head(
        is_whole=True,
        storage_class=text("0008|0016"),
        sop_uid=text("0008|0018"),
        study_uid=text("0020|000d"),
        series_uid=text("0020|000e"),
        frame_uid=text("0020|0052"),
        image_type=tuple(part.strip().upper() for part in text("0008|0008").split("\\") if part),
        modality=text("0008|0060"),
        description=text("0008|103e"),
        samples=count("0028|0002"),
        frames=count("0028|0008"),
        rows=rows,
        columns=columns,
        position=numbers(text("0020|0032")),
        orientation=numbers(text("0020|0037")),
        pixel_spacing=numbers(text("0028|0030")),
        pixels_at=0,
    )


def _files(folder: Path) -> list[Path]:
    try:
        names = regular_files(folder)
    except PermissionError:  # as good as empty; whoever lists the folder above names it
        return []
    return [folder / name for name in names if name.upper() != "DICOMDIR"]


def _names(files: list[Path]) -> str:
    return examples([file.name for file in files])


def _describe(heads: Mapping[Path, Head]) -> str:
    """One line for a choice: number of images, modality, description."""
    head = next(iter(heads.values()))
    words = [f"{len(heads)} image(s)", *map(printable, (head.modality, head.description))]
    return ", ".join(filter(None, words))
