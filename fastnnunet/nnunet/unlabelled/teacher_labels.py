"""Scans with their teacher's labels as an ordinary data set: preprocessed cases, label maps, a split.

nnU-Net's preprocessor made the cases of a set of images; here each gets a label map beside the same image, with the
foreground voxels that nnU-Net would list of it, and its label map on the grid of the scan for `gt_segmentations`.
"""

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fastnnunet.errors import CorruptError, NotFoundError
from fastnnunet.nnunet.files.cases import PreprocessedCases
from fastnnunet.nnunet.files.model import Model
from fastnnunet.nnunet.unlabelled.foreground import as_segmentation, sample_foreground
from fastnnunet.nnunet.unlabelled.image_case import ENDINGS, PARTIAL
from fastnnunet.system.files import atomic_image, atomic_output, make_folder, room_for

LABELLED_BY = "fastnnunet_labelled_by"  # in a case's properties: key of the cache that its labels are of


def is_labelled(images: PreprocessedCases, case_id: str, folder: Path, key: str) -> bool:
    """Whether the case in `folder` is of the image that it has in `images` and of the labels of the cache `key`."""
    if not all((folder / f"{case_id}{ending}").is_file() for ending in ENDINGS):
        return False
    here, there = (f / f"{case_id}.b2nd" for f in (folder, images.folder))
    if _marks(here) != _marks(there):
        return False
    try:
        return bool(PreprocessedCases(folder).load(case_id)[3].get(LABELLED_BY) == key)
    except (CorruptError, NotFoundError):  # to be made again
        return False


def write_labelled(
    images: PreprocessedCases, case_id: str, folder: Path, label_ZYX: np.ndarray, key: str, model: Model
) -> None:
    """Put the case with the label map (Z, Y, X) of the cache `key` into `folder`; its image is the same file.

    Each file is whole or not there, and the image, by which nnU-Net knows a case, comes last.
    """
    from fastnnunet.nnunet.v2 import nnUNetDatasetBlosc2

    _, segmentation, _, properties = images.load(case_id)
    label_1ZYX = as_segmentation(label_ZYX, np.asarray(segmentation[0]) < 0)
    properties = properties | {
        "class_locations": sample_foreground(label_1ZYX, model.labels),
        LABELLED_BY: key,
    }
    make_folder(folder)
    with TemporaryDirectory(prefix=PARTIAL, dir=folder.parent) as made, room_for(folder, Path(made)):
        nnUNetDatasetBlosc2.save_seg(
            label_1ZYX,
            str(Path(made, f"{case_id}_seg")),
            chunks_seg=segmentation.chunks,
            blocks_seg=segmentation.blocks,
        )
        Path(made, f"{case_id}.pkl").write_bytes(pickle.dumps(properties))
        _same_file(images.folder / f"{case_id}.b2nd", Path(made, f"{case_id}.b2nd"))
        for ending in ENDINGS:
            os.replace(Path(made, f"{case_id}{ending}"), folder / f"{case_id}{ending}")


def write_scan_label(
    images: PreprocessedCases, case_id: str, file: Path, logits_HZYX: np.ndarray, model: Model
) -> None:
    """Write the label map that nnU-Net makes of these logits (heads, Z, Y, X) on the grid of the scan."""
    from fastnnunet.nnunet.v2 import convert_predicted_logits_to_segmentation_with_correct_shape

    properties = images.load(case_id)[3]
    label_zyx = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits_HZYX, model.manager, model.config, model.labels, properties
    )
    make_folder(file.parent)
    with atomic_image(file) as partial:
        model.manager.image_reader_writer_class().write_seg(label_zyx, str(partial), properties)


def remove_leftovers(folder: Path, cases: Sequence[str]) -> None:
    """Remove what killed processes left, and files of cases that are no longer among these."""
    for leftover in folder.parent.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    keep = {f"{case}{ending}" for case in cases for ending in ENDINGS}
    for file in folder.glob("*") if folder.is_dir() else ():
        if file.name not in keep:
            file.unlink()


def write_split(base: Path, train: Sequence[str], held_out: Sequence[str]) -> None:
    """The one split of the data set in `base`, as nnU-Net reads it."""
    with atomic_output(base / "splits_final.json") as partial:
        partial.write_text(json.dumps([{"train": list(train), "val": list(held_out)}], indent=1))


def _same_file(file: Path, other: Path) -> None:
    """A second name for a file; where the file system has none, a copy."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)


def _marks(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
