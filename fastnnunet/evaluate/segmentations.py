"""Label files: which labels to expect, which files belong together, and whether they lie on the same grid.

Axes are (z, y, x) as SimpleITK gives arrays.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnnunet.errors import ImageError, MismatchError, NotFoundError, SpecError, printable
from fastnnunet.images.output import BESIDE, OF_FOLDER
from fastnnunet.images.pictures.natural import read_picture
from fastnnunet.images.sitk import read_itk
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.checks.listing import SIDE_FILES, passed_over, regular_files

_log = logging.getLogger(__name__)

ENDINGS = (".nii.gz", ".nrrd", ".mha", ".nii", ".tif", ".png", ".bmp")  # tried in this order without a dataset.json


@dataclass(frozen=True, slots=True)
class LabelSet:
    """What to score: name -> label values (several for a region), the ignore label, and the file ending."""

    names: dict[str, tuple[int, ...]]
    ignore: int | None
    file_ending: str


@dataclass(frozen=True, slots=True)
class Pairing:
    """Cases present in both folders, and those present in one only."""

    cases: tuple[str, ...]
    without_prediction: tuple[str, ...]
    without_label: tuple[str, ...]


def labels_from_dataset_json(path: Path) -> LabelSet:
    """Foreground labels or regions of an nnU-Net `dataset.json`. Raises NotFoundError or SpecError."""
    if not path.is_file():
        raise NotFoundError(f"dataset.json not found: {path}\ngive nnU-Net's description of the labels with -dj")
    try:
        raw = read_json_object(path)
        return make_label_set(raw["labels"], str(raw["file_ending"]))
    except (ValueError, KeyError, TypeError) as e:
        raise SpecError(
            f"{path} is not an nnU-Net dataset.json ({type(e).__name__}: {e})\n"
            'expected {"labels": {"background": 0, "organ": 1, ...}, "file_ending": ".nii.gz", ...}'
        ) from e


def make_label_set(labels: Mapping[str, Any], file_ending: str) -> LabelSet:
    """From labels as nnU-Net writes them: name -> value, or name -> values of a region; `ignore` is set apart.

    Raises TypeError or ValueError when they are written otherwise.
    """
    values = {
        str(name): tuple(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
        for name, value in dict(labels).items()
    }
    ignore = values.pop("ignore", None)
    return LabelSet({n: v for n, v in values.items() if v != (0,)}, ignore[0] if ignore else None, file_ending)


def find_dataset_json(prediction_folder: Path, label_folder: Path) -> Path | None:
    """The `dataset.json` that nnU-Net leaves beside predictions, in the label folder or one above it."""
    for folder in (prediction_folder, label_folder, label_folder.parent):
        if (folder / "dataset.json").is_file():
            return folder / "dataset.json"
    return None


def labels_from_files(label_folder: Path) -> LabelSet:
    """Without a dataset.json: every non-zero value that occurs in the label files, named by its number."""
    for ending in ENDINGS:
        files = _visible(label_folder, ending)
        if files:
            values = sorted({int(v) for f in files for v in np.unique(read_segmentation(f).labels_zyx)} - {0})
            return LabelSet({str(v): (v,) for v in values}, None, ending)
    raise NotFoundError(f"no segmentation in {label_folder}\nexpected files ending in {', '.join(ENDINGS)}")


def _visible(folder: Path, ending: str) -> list[Path]:
    """Files of an ending, without hidden ones (macOS leaves `._` twins)."""
    return [folder / name for name in regular_files(folder, ending)] if folder.is_dir() else []


def pair_cases(prediction_folder: Path, label_folder: Path, file_ending: str) -> Pairing:
    """Match files by name. Raises NotFoundError when a folder or every pair is missing."""
    cases = []
    for folder, what in ((prediction_folder, "prediction"), (label_folder, "label")):
        if folder.is_file():
            raise NotFoundError(f"{what} folder expected, got a file: {folder}\nname the folder that holds it")
        if not folder.is_dir():
            raise NotFoundError(f"{what} folder not found: {folder}")
        cases.append({f.name.removesuffix(file_ending) for f in _visible(folder, file_ending)})
    predicted, labelled = cases
    for folder in (prediction_folder, label_folder):
        for kind in passed_over(folder, _known(folder, file_ending), file_ending):
            _log.warning("%s: not compared: %s", printable(folder), kind)
    if not predicted & labelled:
        raise NotFoundError(
            f"nothing to compare: {len(predicted)} file(s) ending in {file_ending} in {prediction_folder}, "
            f"{len(labelled)} in {label_folder}, no name in common\nexpected CASE{file_ending} in both"
        )
    return Pairing(*(tuple(sorted(s)) for s in (predicted & labelled, labelled - predicted, predicted - labelled)))


def _known(folder: Path, file_ending: str) -> set[str]:
    """Label files and what predicting leaves beside them."""
    names = regular_files(folder, file_ending)
    return {*names, *OF_FOLDER, *(name.removesuffix(file_ending) + ending for name in names for ending in BESIDE)}


def files_read(folders: Iterable[Path], pairing: Pairing, file_ending: str) -> list[Path]:
    """All files in those folders that belong to a comparison."""
    endings = (file_ending, ".json")
    return [
        folder / name
        for folder in folders
        for name in (*SIDE_FILES, *(case + ending for case in pairing.cases for ending in endings))
    ]


def require_complete(pairing: Pairing) -> None:
    """Raise MismatchError naming every case that only one of the folders has."""
    problems = []
    for cases, what in ((pairing.without_prediction, "prediction"), (pairing.without_label, "label")):
        if cases:
            problems.append(f"{len(cases)} case(s) without a {what}: {', '.join(cases)}")
    if problems:
        raise MismatchError("\n".join([*problems, "add the files, or compare the common cases only with --chill"]))


@dataclass(frozen=True, slots=True)
class Segmentation:
    """Labels and geometry of one file; `spacing_mm` in the array's axis order, origin and direction as ITK has them."""

    labels_zyx: NDArray[np.integer]
    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


def read_segmentation(path: Path) -> Segmentation:
    """Read a label file; a 2d image gets a first axis of length 1. Raises ImageError when it is not a label map.

    PNG and BMP are read as nnU-Net does, and have a spacing of 1.
    """
    is_picture = path.suffix.lower() in (".png", ".bmp")
    if is_picture:
        array = read_picture(path)
        geometry = {"spacing": (1.0,) * array.ndim, "origin": (0.0,) * array.ndim}
        geometry["direction"] = tuple(np.eye(array.ndim).ravel())
    else:
        array, geometry = read_itk(path)
    if array.ndim not in ((2,) if is_picture else (2, 3)):
        raise ImageError(f"{path} is not a label map: got the shape {array.shape}, expected (y, x) or (z, y, x)")
    if not np.issubdtype(array.dtype, np.integer):
        if not np.isfinite(array).all() or (array != np.rint(array)).any():
            raise ImageError(f"{path} is not a label map: it holds values that are not whole numbers")
        array = array.astype(np.int32)
    spacing = tuple(geometry["spacing"][::-1])
    if array.ndim == 2:
        array, spacing = array[None], (1.0, *spacing)
    z, y, x = (float(s) for s in spacing)
    return Segmentation(array, (z, y, x), tuple(geometry["origin"]), tuple(geometry["direction"]))


def require_same_geometry(case: str, reference: Segmentation, prediction: Segmentation) -> None:
    """Raise MismatchError naming each of shape, spacing, origin and direction in which the two differ.

    Spacing may differ by 1e-3 and origin by 1e-2 of the smallest spacing, cosines by 1e-3: headers hold float32.
    """
    smallest = min(reference.spacing_mm)
    found = []
    if reference.labels_zyx.shape != prediction.labels_zyx.shape:
        found.append(f"shape: label {reference.labels_zyx.shape}, prediction {prediction.labels_zyx.shape}")
    for name, tolerance in (("spacing_mm", 1e-3 * smallest), ("origin", 1e-2 * smallest), ("direction", 1e-3)):
        left, right = getattr(reference, name), getattr(prediction, name)
        if len(left) != len(right) or not np.allclose(left, right, rtol=0, atol=tolerance):
            found.append(f"{name}: label {left}, prediction {right}")
    if found:
        raise MismatchError(
            f"case {case}: prediction and label do not lie on the same grid\n  " + "\n  ".join(found) + "\n"
            "expected a prediction written with the geometry of its image"
        )
