"""Reading images and writing segmentations exactly as nnU-Net 2.8's reader classes do, with damaged input refused.

Every reader also takes a DICOM series in place of a file, except those of formats without a geometry.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import SpecError
from fastnnunet.images.checks import ImageSource
from fastnnunet.images.nibabel import NibabelIO
from fastnnunet.images.pictures.natural import NaturalImage2DIO
from fastnnunet.images.pictures.tiff import Tiff3DIO
from fastnnunet.images.sitk import SimpleITKIO

WITHOUT_GEOMETRY = frozenset({"NaturalImage2DIO", "Tiff3DIO"})  # these take no DICOM


class ImageIO(Protocol):
    """What a reader class of the plans does."""

    def read(self, files: Sequence[ImageSource]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Image (C, z, y, x) and nnU-Net's properties: `spacing` (z, y, x) in mm and what `write` needs.

        Raises ImageError when a file is unreadable, truncated, empty or not finite, or the channels do not fit
        together.
        """

    def read_segmentation(self, file: Path) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """A label map (1, z, y, x), whose file name has no channel number, and its properties."""

    def write(self, segmentation_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        """Write a label map with the geometry in `properties`; the file is whole or not there."""


@runtime_checkable
class PlacedIO(ImageIO, Protocol):
    """A reader whose format knows where voxels lie in the patient."""

    def write_channel(self, channel_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        """Write one channel of an image as NIfTI, voxel for voxel on the grid on which `write` puts its label map."""


READERS: dict[str, Callable[[], ImageIO]] = {
    "SimpleITKIO": SimpleITKIO,
    "SimpleITKIOWithReorient": lambda: SimpleITKIO(orientation="RAS"),
    "NibabelIO": NibabelIO,
    "NibabelIOWithReorient": lambda: NibabelIO(reorient=True),
    "NaturalImage2DIO": NaturalImage2DIO,
    "Tiff3DIO": Tiff3DIO,
}


def image_io(reader_writer: str) -> ImageIO:
    """The reader of that nnU-Net class name. Raises SpecError for one this runtime does not have."""
    if reader_writer not in READERS:
        raise SpecError(
            f"the model's image reader is {reader_writer!r}, which this runtime does not have; "
            f"known: {', '.join(READERS)}\nread the images yourself and call Predictor.predict_array"
        )
    return READERS[reader_writer]()
