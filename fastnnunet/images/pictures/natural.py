"""nnU-Net's NaturalImage2DIO."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.images.checks import ImageSource, check_same, smallest_dtype, stack_channels
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.images.pictures.tiff import TIFF_ENDINGS, read_tiff
from fastnnunet.images.sitk import write_sitk
from fastnnunet.images.stored import PICTURE_RATIO, SMALL_BYTES, check_claim, open_stored
from fastnnunet.system.files import atomic_output

_FORMATS = ("PNG", "BMP", "DIB", "JPEG", "TIFF", "WEBP", "JPEG2000", "PPM")  # none that runs another program
_BYTES_OF = {"1": 1, "I": 4, "F": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
_unlimited = threading.Lock()


class NaturalImage2DIO:
    """PNG, BMP and TIFF pictures: one file may hold three (RGB) or four (RGBA) channels, spacing is 1."""

    def read(self, files: Sequence[ImageSource]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        pictures = []
        for file in files:
            if isinstance(file, DicomSeries):
                raise ImageError(f"{file}: this model reads pictures (PNG, BMP, TIFF), not DICOM; convert it first")
            pixels = read_picture(file)
            if pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
                pictures.append(pixels.transpose(2, 0, 1)[:, None])
            elif pixels.ndim == 2:
                pictures.append(pixels[None, None])
            else:
                raise ImageError(f"{file} has shape {pixels.shape}, expected (y, x) or (y, x, 3 or 4 channels)")
        check_same(files, [{"shape": p.shape[1:]} for p in pictures])
        return stack_channels(files, pictures), {"spacing": (999, 1, 1)}

    def read_segmentation(self, file: Path) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        return self.read([file])

    def write(self, segmentation_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        import SimpleITK as sitk

        with atomic_output(file) as partial:
            write_sitk(sitk.GetImageFromArray(smallest_dtype(segmentation_ZYX[0])), partial, file)


def read_picture(file: Path) -> npt.NDArray[Any]:
    """Pixels as `skimage.io.imread` gives them: (y, x), (y, x, channels), or more for several pages.

    That is tifffile for names ending in .tif or .tiff, and Pillow for all others, whatever their content is.
    Raises ImageError when the file is missing, damaged, truncated or of another format.
    """
    pixels = read_tiff(file) if file.name.lower().endswith(TIFF_ENDINGS) else _read_with_pillow(file)
    if pixels.ndim > 2 and pixels.shape[-1] not in (3, 4) and pixels.shape[-3] in (3, 4):
        return np.moveaxis(pixels, -3, -1)
    return pixels


def _read_with_pillow(file: Path) -> npt.NDArray[Any]:
    """As imageio's plugin does, which is what skimage calls."""
    with open_stored(file) as stored:
        stored_bytes = stored.stored_bytes
    try:
        with _open(file) as picture:
            if picture.format == "PNG":
                picture.verify()  # the checksums, which decoding passes over; nothing can be decoded after that
        with _open(file) as picture:
            claimed = picture.width * picture.height * _BYTES_OF.get(picture.mode, len(picture.getbands()))
            check_claim(file, claimed, stored_bytes, ratio=PICTURE_RATIO, slack=SMALL_BYTES)
            if getattr(picture, "custom_mimetype", None) == "image/apng":
                raise ImageError(f"{file} is an animation of {picture.n_frames} pictures, expected one")
            if picture.mode == "P":
                return np.asarray(picture.convert(picture.palette.mode))
            if picture.format == "PNG" and picture.mode == "I":
                return np.asarray(picture.convert("I;16"))
            return np.asarray(picture)
    except ImageError:
        raise
    # what Pillow raises of damaged files is of many kinds (SyntaxError, struct.error, EOFError ...)
    except Exception as e:
        raise ImageError(f"cannot read {file}: {e}\nexpected a PNG, BMP or TIFF picture; export it again") from e


def _open(file: Path) -> Any:
    """A picture of which the header is read."""
    from PIL import Image

    with _unlimited:  # the limit is one of the whole process; here sizes are compared with the file instead
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
