"""What every image reader makes sure of before an image goes on, and what its writers share."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.images.stored import no_memory

ImageSource = Path | DicomSeries  # one channel of an image: a file, or a DICOM series

_log = logging.getLogger(__name__)


def stack_channels(files: Sequence[ImageSource], volumes: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """Volumes (c, z, y, x) of the files below each other as float32.

    Raises ImageError when there are no voxels at all, or some are complex, NaN or infinite, or memory is short.
    Shapes must agree already.
    """
    for file, volume in zip(files, volumes, strict=True):
        if 0 in volume.shape:
            raise ImageError(f"{file} has no voxels: its shape is {volume.shape[1:]} (z, y, x); export it again")
        if np.iscomplexobj(volume):
            raise ImageError(f"{file} holds complex numbers, expected one real number per voxel; convert it first")
    try:
        image_CZYX = np.vstack(volumes, dtype=np.float32, casting="unsafe")
    except MemoryError as e:
        raise no_memory(files[0], 4 * sum(volume.size for volume in volumes)) from e
    if all(np.issubdtype(volume.dtype, np.integer) for volume in volumes):
        return image_CZYX
    # float32 values cannot overflow a float64 sum, so it is finite exactly when every voxel is
    if math.isfinite(float(image_CZYX.sum(dtype=np.float64))):
        return image_CZYX
    bad = int(np.count_nonzero(~np.isfinite(image_CZYX)))
    names = ", ".join(f.name for f in files)
    raise ImageError(
        f"{names}: {bad} of {image_CZYX.size} voxels are NaN or infinite, expected numbers; repair the image "
        f"(folder {files[0].parent})"
    )


def check_same(files: Sequence[ImageSource], channels: Sequence[dict[str, Any]]) -> None:
    """Channels must have the same shape and spacing; another place or direction is nnU-Net's warning.

    `channels`: per file `shape` and, where the format has them, `spacing`, `origin`, `direction` or `affine`.
    Raises ImageError naming the first channel that does not fit.
    """
    first = channels[0]
    for file, other in zip(files[1:], channels[1:], strict=True):
        for name, value in first.items():
            if name == "shape":
                if other[name] == value:
                    continue
            elif np.allclose(value, other[name], rtol=1e-5, atol=1e-6):
                continue
            text = (
                f"the channels do not fit together: {name} is {value} in {files[0].name} and {other[name]} in "
                f"{file.name}"
            )
            if name in ("shape", "spacing"):
                raise ImageError(f"{text}\nresample them to the same grid first (folder {files[0].parent})")
            _log.warning("%s; the first one is used", text)


def check_spacing(file: ImageSource, spacing: Sequence[float], *, signed: bool = False) -> None:
    """Raises ImageError when a voxel has no size, or a negative one where the format's writer would refuse it.

    `signed`: negative ones are nnU-Net's business, which takes their absolute.
    """
    if not all(math.isfinite(s) and (s != 0 if signed else s > 0) for s in spacing):
        got = ", ".join(f"{s:g}" for s in spacing)
        raise ImageError(f"{file} has a damaged header: its spacing is ({got}), expected millimetres; export it again")


def check_geometry(file: ImageSource, geometry: dict[str, Any]) -> None:
    """Raises ImageError when `spacing` is no length, or `origin` or `direction` no number."""
    check_spacing(file, geometry["spacing"])
    for name in ("origin", "direction"):
        if not all(map(math.isfinite, geometry[name])):
            got = ", ".join(f"{v:g}" for v in geometry[name])
            raise ImageError(f"{file} has a damaged header: its {name} is ({got}), expected numbers; export it again")


def smallest_dtype(labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Labels in the type nnU-Net stores them in: 8 bits for labels below 255, 16 bits otherwise."""
    return labels.astype(np.uint8 if labels.max(initial=0) < 255 else np.uint16, copy=False)
