"""One image by nnU-Net's own reader and preprocessor, in any process."""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fastnnunet.errors import FastnnUNetError
from fastnnunet.images.io import READERS, image_io
from fastnnunet.nnunet.files.plans import configuration_of, num_image_channels
from fastnnunet.nnunet.unlabelled.image_folder import FileStamp, stamps_of
from fastnnunet.system.files import room_for
from fastnnunet.system.whole import is_whole

ENDINGS = ("_seg.b2nd", ".pkl", ".b2nd")  # files of a case; nnU-Net takes a case for being there by the last
PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTask:
    """One case, for any process."""

    case_id: str
    files: tuple[Path, ...]
    folder: Path
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]


def preprocess_case(task: ImageTask) -> dict[str, FileStamp]:
    """Preprocess a case and move it into place; returns the stamps of its image files."""
    stamps = stamps_of(task.files)
    manager, config = configuration_of(task.plans, task.configuration)
    read_image(task)  # nnU-Net would go on with NaN, and spread it or lose it
    folder = task.folder
    with TemporaryDirectory(prefix=PARTIAL, dir=folder.parent) as made, room_for(folder, Path(made)), _spoken():
        files = [str(f) for f in task.files]
        preprocessor = config.preprocessor_class(verbose=False)
        target = str(Path(made) / task.case_id)
        preprocessor.run_case_save(target, files, None, manager, config, task.dataset_json)
        folder.mkdir(exist_ok=True)
        for ending in ENDINGS:
            finished = Path(made) / f"{task.case_id}{ending}"
            with finished.open("rb") as f:
                os.fsync(f.fileno())
            finished.rename(folder / finished.name)
    return stamps


def shape_after(task: ImageTask) -> tuple[int, int, int]:
    """Shape (Z, Y, X) of a case after cropping and resampling, as nnU-Net's preprocessor works it out."""
    from fastnnunet.nnunet.v2 import compute_new_shape, crop_to_nonzero

    manager, config = configuration_of(task.plans, task.configuration)
    image_CZYX, properties = read_image(task)
    order = manager.transpose_forward
    spacing = [properties["spacing"][i] for i in order]
    cropped, _, _ = crop_to_nonzero(image_CZYX.transpose([0, *[i + 1 for i in order]]))
    wanted = [float(s) for s in config.spacing]
    z, y, x = compute_new_shape(cropped.shape[1:], spacing, [*spacing[: 3 - len(wanted)], *wanted])
    return int(z), int(y), int(x)


def read_channels(task: ImageTask) -> np.ndarray:
    """Image (C, and the axes as stored), float32, as prediction reads it.

    It refuses more than nnU-Net's readers, such as NaN in a NIfTI file, and what it refuses no student can be judged
    on. Raises ValueError, ImageError.
    """
    _require_whole(task.files)
    reader_writer = str(task.plans["image_reader_writer"])
    if reader_writer in READERS:
        return image_io(reader_writer).read(task.files)[0]
    return _read_any(task)[0]


def _require_whole(files: tuple[Path, ...]) -> None:
    for file in files:
        if is_whole(file) is False:  # ITK reads the beginning, and zeros
            raise ValueError(f"{file.name} is cut off or empty")


def _read_any(task: ImageTask) -> tuple[np.ndarray, dict[str, Any]]:
    _require_whole(task.files)
    manager, _ = configuration_of(task.plans, task.configuration)
    with _spoken():
        image, properties = manager.image_reader_writer_class().read_images([str(f) for f in task.files])
    return image, properties


def read_image(task: ImageTask) -> tuple[np.ndarray, dict[str, Any]]:
    """Image (C, and the axes as stored) and properties.

    Raises ValueError for values that are no numbers, and for other channels than the model takes.
    """
    image, properties = _read_any(task)
    if not np.isfinite(image).all():
        raise ValueError("it holds NaN or infinite values")
    if len(image) != (expected := num_image_channels(task.dataset_json)):  # nnU-Net would normalise those it expects
        raise ValueError(f"it has {len(image)} channel(s), expected {expected}")
    return image, properties


@contextlib.contextmanager
def _spoken() -> Iterator[None]:
    """nnU-Net's readers print what is wrong and raise an error without a word: give it their words."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except RuntimeError as e:
        if str(e) or not said.getvalue():
            raise
        raise ValueError(" ".join(said.getvalue().split())) from e


def reason_of(error: Exception) -> str:
    """What went wrong, on one line: ITK puts it into the last."""
    if isinstance(error, FastnnUNetError):
        return " ".join(str(error).splitlines())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
