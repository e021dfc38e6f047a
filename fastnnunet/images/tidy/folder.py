"""Tidying a folder of label maps with the reader its predictions were written with."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnnunet.errors import DiskSpaceError, FastnnUNetError, ImageError, NotFoundError, SpecError, printable
from fastnnunet.events import Listener, Result, ignore
from fastnnunet.images.io import ImageIO, image_io
from fastnnunet.images.output import BESIDE, OF_FOLDER, files_of_case, sibling
from fastnnunet.images.overlap import refuse_overlap
from fastnnunet.images.tidy.cleanup import Cleanup, clean
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.checks.listing import passed_over, regular_files
from fastnnunet.system.files import check_output_folder, make_folder

_log = logging.getLogger(__name__)
MAX_LABEL = 2**16 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSource:
    """How the label maps of a folder are stored and what is in them."""

    labels: dict[str, Any]  # as in dataset.json
    file_ending: str
    reader_writer: str
    channel_names: tuple[str, ...] = ()


def read_label_source(folder: Path, plans_json: Path | None = None, dataset_json: Path | None = None) -> LabelSource:
    """From plans.json and dataset.json, which predicting leaves beside the label maps.

    Raises NotFoundError when one is missing, SpecError when it lacks what is needed.
    """
    plans = _read_json(plans_json or folder / "plans.json", "-plans_json")
    dataset = _read_json(dataset_json or folder / "dataset.json", "-dataset_json")
    try:
        return LabelSource(
            labels=dict(dataset["labels"]),
            file_ending=str(dataset["file_ending"]),
            reader_writer=str(plans["image_reader_writer"]),
            channel_names=tuple(map(str, dict(dataset.get("channel_names") or {}).values())),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise SpecError(
            f"plans.json or dataset.json of {folder} is not nnU-Net's: {e!r}\n"
            "expected image_reader_writer in the one, labels and file_ending in the other"
        ) from e


def postprocess_folder(
    folder: Path,
    output: Path,
    source: LabelSource,
    cleanup: Cleanup,
    *,
    workers: int = 1,
    progress: Listener = ignore,
) -> int:
    """Clean every label map of `folder` into `output` under the same name; returns how many there were.

    A label map that fails is left out and reported: `progress` gets a `Result` of every file, its error
    or None; what else lies in the
    folder is logged as a warning.
    Raises NotFoundError when there is none, SpecError when a result would replace a label map, DiskSpaceError when
    there is no room for the results.
    """
    names = regular_files(folder, source.file_ending) if os.path.isdir(folder) else []
    files = [folder / name for name in names]
    beside = {file.name for name in names for file in _files_beside(folder / name, source.file_ending)}
    others = passed_over(folder, {*names, *beside, *OF_FOLDER}, source.file_ending) if os.path.isdir(folder) else []
    if not files:
        found = "; ".join(others) or "nothing"
        raise NotFoundError(f"no label map in {folder}: expected files ending in {source.file_ending}, found {found}")
    for kind in others:
        _log.warning("%s: not postprocessed: %s", printable(folder), kind)
    check_output_folder(output)
    refuse_overlap(
        [place for file in files for place in (file, *_files_beside(file, source.file_ending))],
        [place for file in files for place in files_of_case(output / file.name, source.file_ending)],
    )
    io = image_io(source.reader_writer)
    make_folder(output)
    with ThreadPoolExecutor(workers) as pool:
        pending = {pool.submit(_clean_file, io, file, output / file.name, cleanup): file for file in files}
        for done in as_completed(pending):
            error = done.exception()
            if isinstance(error, DiskSpaceError) or not isinstance(error, FastnnUNetError | None):
                pool.shutdown(cancel_futures=True)
                raise error
            progress(Result(what=pending[done].name, value=error))
    return len(files)


def _files_beside(label_map: Path, file_ending: str) -> list[Path]:
    """What predicting leaves beside a label map: probabilities, the spacing of a TIFF file, other outputs."""
    return [sibling(label_map, file_ending, ending) for ending in BESIDE]


def _clean_file(io: ImageIO, file: Path, output: Path, cleanup: Cleanup) -> None:
    labels_CZYX, properties = io.read_segmentation(file)
    if not ((labels_CZYX >= 0) & (labels_CZYX <= MAX_LABEL) & (labels_CZYX % 1 == 0)).all():
        raise ImageError(
            f"{file} is not a label map: it holds values that are not whole numbers from 0 to {MAX_LABEL}\n"
            "give a folder of predicted segmentations"
        )
    # float32 holds every label exactly
    cleaned = clean(labels_CZYX[0].astype("uint16"), cleanup, properties["spacing"])
    io.write(cleaned, output, properties)


def _read_json(path: Path, option: str) -> dict[str, Any]:
    if not path.is_file():
        raise NotFoundError(
            f"{path} not found; predicting writes it beside the label maps\n"
            f"name one with {option} (of an ensemble: that of any member)"
        )
    try:
        return read_json_object(path)
    except (ValueError, TypeError) as e:
        raise SpecError(f"{path} is not JSON of nnU-Net: {e}") from e
