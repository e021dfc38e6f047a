"""nnU-Net's NaturalImage2DIO."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.runtime.dicom import DicomSeries
from fastnnunet.runtime.files import atomic_output
from fastnnunet.runtime.image_checks import ImageSource, check_same, smallest_dtype, stack_channels
from fastnnunet.runtime.image_sitk import write_sitk
from fastnnunet.runtime.itk import last_line


class NaturalImage2DIO:
    """PNG, BMP and TIFF pictures: one file may hold three (RGB) or four (RGBA) channels, spacing is 1."""

    def read(self, files: Sequence[ImageSource]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        import SimpleITK as sitk

        pictures = []
        for file in files:
            if isinstance(file, DicomSeries):
                raise ImageError(f"{file}: this model reads pictures (PNG, BMP, TIFF), not DICOM; convert it first")
            if not file.is_file():
                raise ImageError(f"image not found: {file}")
            try:
                pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            except RuntimeError as e:
                raise ImageError(f"cannot read {file}: {last_line(e)}\nexpected a PNG, BMP or TIFF picture") from e
            if pixels.ndim == 3 and _is_grey_bmp(file, pixels):
                pixels = pixels[..., 0]
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

    def to_file_axes(self, segmentation_ZYX: npt.NDArray[Any], properties: dict[str, Any]) -> npt.NDArray[Any]:
        return segmentation_ZYX


def _is_grey_bmp(picture: Path, pixels: npt.NDArray[Any]) -> bool:
    """BMP stores greys as a palette, which ITK turns into colours and nnU-Net's reader does not."""
    with picture.open("rb") as f:
        header = f.read(30)
    return header[:2] == b"BM" and header[28] <= 8 and bool((pixels == pixels[..., :1]).all())
