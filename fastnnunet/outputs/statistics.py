"""How large every structure of a case is, where it lies and how bright it is; as JSON and as a table."""

import csv
import io
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import CorruptError, printable
from fastnnunet.outputs.labelled import LabelledImage, Structure
from fastnnunet.specs.checks.listing import regular_files

_log = logging.getLogger(__name__)
ENDING = "_statistics.json"
TABLE_FILE, TABLE_ENDING = "statistics.csv", "_statistics.csv"  # of a folder; beside a single output
PATIENT, ARRAY = "LPS: mm to the left, back and head of the patient", "mm from the first voxel along x, y, z"
_OF_INTENSITY = ("mean", "std", "min", "max", "median")


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensity:
    """Of the voxels of a structure, in the units of the image; `std` is that of these voxels (divided by n)."""

    mean: float
    std: float
    min: float
    max: float
    median: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureStatistics:
    """Of one label or region; without a voxel there is neither place nor intensity."""

    label: str
    values: tuple[int, ...]
    voxels: int
    volume_ml: float | None  # None for pictures, which have no thickness
    centroid_mm: tuple[float, float, float] | None  # x, y, z
    touches_border: bool  # of the image: part of it may lie outside
    intensity: dict[str, Intensity]  # by channel


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseStatistics:
    """Of one case, as it is stored in CASE_statistics.json."""

    case: str
    model: str
    shape_zyx: tuple[int, ...]
    spacing_mm_zyx: tuple[float, ...]
    coordinates: str  # which points `centroid_mm` are
    structures: tuple[StructureStatistics, ...]


def statistics(labelled: LabelledImage) -> CaseStatistics:
    """Of every structure, those without a voxel included; intensities where `labelled` has its image."""
    return CaseStatistics(
        case=labelled.case,
        model=labelled.model,
        shape_zyx=labelled.labels_ZYX.shape,
        spacing_mm_zyx=labelled.spacing_mm,
        coordinates=PATIENT if labelled.in_patient else ARRAY,
        structures=tuple(_of_structure(labelled, structure) for structure in labelled.structures),
    )


def _of_structure(labelled: LabelledImage, structure: Structure) -> StructureStatistics:
    box, voxel_ml = labelled.box(structure), labelled.voxel_ml
    voxels, centroid, touches, intensity = 0, None, False, {}
    if box is not None:
        mask_ZYX = np.isin(labelled.labels_ZYX[box], structure.values)
        voxels = int(np.count_nonzero(mask_ZYX))
        # axes of one voxel, of pictures, are all border
        touches = any(
            length > 1 and (axis.start == 0 or axis.stop == length)
            for axis, length in zip(box, labelled.labels_ZYX.shape, strict=True)
        )
        weights = [mask_ZYX.sum(axis=tuple({0, 1, 2} - {axis}), dtype=np.int64) for axis in range(3)]
        centre = [
            axis.start + float(np.average(np.arange(len(w)), weights=w)) for axis, w in zip(box, weights, strict=True)
        ]
        x, y, z = (float(v) for v in labelled.points_mm([centre])[0])
        centroid = (x, y, z)
        if labelled.image_CZYX is not None:
            intensity = {
                name: _intensity(channel_ZYX[box][mask_ZYX])
                for name, channel_ZYX in zip(_channels(labelled), labelled.image_CZYX, strict=True)
            }
    return StructureStatistics(
        label=structure.name,
        values=structure.values,
        voxels=voxels,
        volume_ml=None if voxel_ml is None else voxels * voxel_ml,
        centroid_mm=centroid,
        touches_border=touches,
        intensity=intensity,
    )


def _channels(labelled: LabelledImage) -> list[str]:
    """A name for every channel, each once; its number where the model has none, or not for all."""
    count = 0 if labelled.image_CZYX is None else len(labelled.image_CZYX)
    names = labelled.channel_names
    return list(names) if len(set(names)) == len(names) == count else [str(number) for number in range(count)]


def _intensity(values: npt.NDArray[np.float32]) -> Intensity:
    return Intensity(
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        min=float(values.min()),
        max=float(values.max()),
        median=float(np.median(values.astype(np.float64))),
    )


def write_statistics(found: CaseStatistics, file: Path) -> None:
    """As JSON. Raises FastnnUNetError where it cannot be written."""
    from fastnnunet.specs.provenance import write_json

    write_json(file, found)


def read_statistics(file: Path) -> CaseStatistics:
    """What `write_statistics` wrote. Raises CorruptError for anything else."""
    from fastnnunet.specs.checks.json_text import read_json_object

    try:
        raw = read_json_object(file)
        structures = tuple(_stored_structure(entry) for entry in raw["structures"])
        lists = {name: tuple(raw[name]) for name in ("shape_zyx", "spacing_mm_zyx")}
        return CaseStatistics(**{**raw, **lists, "structures": structures})
    except (CorruptError, KeyError, TypeError, ValueError) as e:
        raise CorruptError(
            f"{file} is no record of `predict --statistics` ({type(e).__name__}: {e}); remove it, or predict its case "
            "again"
        ) from e


def _stored_structure(raw: Mapping[str, Any]) -> StructureStatistics:
    intensity = {str(name): Intensity(**values) for name, values in raw["intensity"].items()}
    x_y_z = raw["centroid_mm"]
    centroid = None if x_y_z is None else tuple(x_y_z)
    kept = {"values": tuple(raw["values"]), "centroid_mm": centroid, "intensity": intensity}
    found = StructureStatistics(**{**raw, **kept})
    if not (isinstance(found.label, str) and isinstance(found.voxels, int)):
        raise ValueError(f"label {found.label!r} with {found.voxels!r} voxels")
    return found


def table(cases: Iterable[CaseStatistics]) -> str:
    """CSV with a row for every case and label; what there is not is left empty. Numbers have a decimal point."""
    cases = list(cases)
    channels = list(dict.fromkeys(c for case in cases for s in case.structures for c in s.intensity))
    head = ["case", "label", "values", "voxels", "volume_ml", *(f"centroid_{axis}_mm" for axis in "xyz")]
    head += ["touches_border", *(f"{channel}_{what}" for channel in channels for what in _OF_INTENSITY)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for case in cases:
        for found in case.structures:
            intensities = [
                getattr(found.intensity[channel], what) if channel in found.intensity else ""
                for channel in channels
                for what in _OF_INTENSITY
            ]
            writer.writerow(
                [
                    *(case.case, found.label, "+".join(map(str, found.values)), found.voxels),
                    "" if found.volume_ml is None else found.volume_ml,
                    *(found.centroid_mm or ("", "", "")),
                    *(found.touches_border, *intensities),
                ]
            )
    return text.getvalue()


def write_table(cases: Iterable[CaseStatistics], file: Path) -> None:
    """`table` as a file, whole or not there. Raises FastnnUNetError where it cannot be written."""
    from fastnnunet.system.files import atomic_output

    with atomic_output(file) as partial:
        partial.write_text(table(cases), encoding="utf-8", errors="backslashreplace", newline="")


def gather(folder: Path) -> list[CaseStatistics]:
    """The statistics of all cases in a folder, those of earlier runs included, by name.

    A file that is none of them is left out and named in a warning.
    """
    found = []
    for name in regular_files(folder, ENDING):
        try:
            found.append(read_statistics(folder / name))
        except CorruptError as e:
            _log.warning("left out of %s: %s", TABLE_FILE, printable(e, keep="\n"))
    return found
