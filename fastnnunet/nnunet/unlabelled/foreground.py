"""Where an unlabelled case shows foreground, so that nnU-Net's loader can oversample it there as well.

nnU-Net's preprocessor lists voxels of every class in `class_locations`. Unlabelled cases have no labels, but the
teacher has an opinion: its label map takes their place, and nnU-Net's own function draws the list. The label map is
kept beside the list, for trainings whose hard loss sees it.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fastnnunet.errors import CorruptError
from fastnnunet.specs.checks.json_text import parse_json
from fastnnunet.system.files import atomic_output, room_for

Locations = dict[Any, np.ndarray]  # label, or tuple of labels of a region -> voxels (n, 4): channel 0, z, y, x

SEGMENTATION = ".b2nd"  # ending of a label map, beside the .npz of its list


def sample_foreground(label_1ZYX: np.ndarray, label_manager: Any) -> Locations:
    """nnU-Net's `class_locations` of a label map as `as_segmentation` makes it."""
    from fastnnunet.nnunet.v2 import DefaultPreprocessor

    kinds = [*(label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels)]
    if label_manager.has_ignore_label:  # as nnU-Net does, which then draws every patch from labelled voxels
        kinds.append([-1, *label_manager.all_labels])
    locations: Locations = DefaultPreprocessor._sample_foreground_locations(label_1ZYX, kinds, verbose=False)
    return locations


def as_segmentation(label_ZYX: np.ndarray, outside_ZYX: np.ndarray) -> np.ndarray:
    """A label map as nnU-Net's preprocessor leaves it: int16 (1, Z, Y, X), -1 for background outside the image."""
    return np.where(outside_ZYX & (label_ZYX == 0), -1, label_ZYX).astype(np.int16)[None]


def write_segmentation(file: Path, label_1ZYX: np.ndarray, like: Any) -> None:
    """Store a label map atomically, in the chunks of the preprocessed segmentation `like`."""
    from fastnnunet.nnunet.v2 import nnUNetDatasetBlosc2

    file.parent.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix=".segmentation-", dir=file.parent) as made, room_for(file, Path(made)):
        partial = Path(made) / "label"
        nnUNetDatasetBlosc2.save_seg(label_1ZYX, str(partial), chunks_seg=like.chunks, blocks_seg=like.blocks)
        os.replace(partial.with_suffix(SEGMENTATION), file)


def open_segmentation(file: Path) -> Any:
    """What `write_segmentation` stored: int16 (1, Z, Y, X), opened, not read. Raises CorruptError."""
    import blosc2

    try:
        return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
    except (OSError, RuntimeError, ValueError) as e:
        raise CorruptError(f"{file} cannot be read: {e}\nremove it and run the same cache build --images again") from e


def write_locations(file: Path, locations: Locations) -> None:
    """Store as .npz without pickle, whole or not at all. Raises FastnnUNetError where it cannot be written."""
    file.parent.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {
        json.dumps(kind): np.asarray(voxels, np.int32).reshape(-1, 4) for kind, voxels in locations.items()
    }
    with atomic_output(file) as partial:
        np.savez_compressed(partial, **arrays)


def read_locations(file: Path) -> Locations:
    """What `write_locations` stored. Raises CorruptError."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {_kind(parse_json(name, file)): arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise CorruptError(f"{file} cannot be read: {e}\nremove it and run the same cache build --images again") from e


def _kind(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
