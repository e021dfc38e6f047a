"""The scan that a label map was predicted from, as one NIfTI file on the same grid: what viewers draw under labels."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import FastnnUNetError
from fastnnunet.images.io import ImageIO, PlacedIO
from fastnnunet.images.stored import new_gzip
from fastnnunet.outputs.labelled import TO_RAS, LabelledImage
from fastnnunet.system.files import atomic_output

ENDING = "_scan.nii.gz"
_RGB = np.dtype([("R", np.uint8), ("G", np.uint8), ("B", np.uint8)])  # NIfTI's type 128


def write_scan(labelled: LabelledImage, file: Path, io: ImageIO, properties: dict[str, Any], file_ending: str) -> None:
    """Write the first channel; of a picture of three or four channels in 8 bits the colours, without transparency.

    Whole numbers that fit are stored in 8 or 16 bits, others as float32: no value changes.
    `io`: the reader of the image, with the `properties` that it gave of it. `file_ending`: the model's, of label maps.
    Raises FastnnUNetError where it cannot be written.
    """
    image_CZYX = labelled.image_CZYX
    assert image_CZYX is not None
    if isinstance(io, PlacedIO) and (labelled.in_patient or file_ending == ".nii.gz"):  # its label maps are these
        io.write_channel(smallest(image_CZYX[0]), file, properties)
        return
    import nibabel

    voxels_ZYX: npt.NDArray[Any] = smallest(image_CZYX[0])
    if not labelled.is_volume and len(image_CZYX) in (3, 4):
        colours_ZYXC = smallest(np.ascontiguousarray(np.moveaxis(image_CZYX[:3], 0, -1)))
        if colours_ZYXC.dtype == np.uint8:
            voxels_ZYX = colours_ZYXC.view(_RGB)[..., 0]
    with atomic_output(file) as partial:
        try:
            image = nibabel.Nifti1Image(voxels_ZYX.transpose(2, 1, 0), TO_RAS @ labelled.affine)
        except ValueError as e:  # of sizes that a header does not hold
            raise FastnnUNetError(f"cannot write {file}: {e}") from e
        with new_gzip(partial) as packed:
            image.to_stream(packed)


def smallest(voxels: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """The same values as uint8 or int16 where these hold them, else as they are."""
    for kind in (np.uint8, np.int16):
        limits = np.iinfo(kind)
        if voxels.size and limits.min <= voxels.min() and voxels.max() <= limits.max:
            stored = voxels.astype(kind)
            return stored if np.array_equal(stored, voxels) else voxels
    return voxels
