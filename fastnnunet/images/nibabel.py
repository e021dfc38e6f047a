"""nnU-Net's NibabelIO and NibabelIOWithReorient: NIfTI files with the affine that nibabel finds in them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.images.checks import ImageSource, check_same, check_spacing, smallest_dtype, stack_channels
from fastnnunet.images.dicom.series import DicomSeries, read_series
from fastnnunet.images.nifti import is_nifti, read_nifti
from fastnnunet.images.stored import new_gzip, no_memory
from fastnnunet.system.files import atomic_image


class NibabelIO:
    """With `reorient` images are turned to RAS (nearest axes), and segmentations back."""

    def __init__(self, *, reorient: bool = False) -> None:
        self.reorient = reorient

    def read(self, files: Sequence[ImageSource]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        from nibabel.orientations import io_orientation

        volumes: list[npt.NDArray[Any]] = []
        geometries: list[dict[str, Any]] = []
        original_affines: list[npt.NDArray[np.float64]] = []
        for file in files:
            image = _load(file)
            original_affines.append(image.affine)
            if self.reorient:
                image = image.as_reoriented(io_orientation(image.affine))
            # get_fdata would make a float64 copy of what needs no rescaling
            voxels_XYZ = image.dataobj if isinstance(image.dataobj, np.ndarray) else _voxels(image, file)
            volumes.append(voxels_XYZ.transpose(2, 1, 0)[None])
            spacing_zyx = [float(s) for s in image.header.get_zooms()[::-1]]
            check_spacing(file, spacing_zyx, signed=True)
            geometries.append({"shape": volumes[-1].shape[1:], "spacing": spacing_zyx, "affine": image.affine})
        check_same(files, geometries)
        affines = {"original_affine": original_affines[0]}
        if self.reorient:
            affines["reoriented_affine"] = geometries[0]["affine"]
        return stack_channels(files, volumes), {"nibabel_stuff": affines, "spacing": geometries[0]["spacing"]}

    def read_segmentation(self, file: Path) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        return self.read([file])

    def write(self, segmentation_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        self._write(smallest_dtype(segmentation_ZYX), file, properties)

    def write_channel(self, channel_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        self._write(channel_ZYX, file, properties)

    def _write(self, volume_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        import nibabel

        image = self._file_image(volume_ZYX, properties)
        with atomic_image(file) as partial:
            if not file.name.lower().endswith(".nii.gz"):
                nibabel.save(image, partial)
                return
            with new_gzip(partial) as packed:
                image.to_stream(packed)

    def _file_image(self, volume_ZYX: npt.NDArray[Any], properties: dict[str, Any]) -> Any:
        import nibabel
        from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

        affines = properties["nibabel_stuff"]
        affine = affines["reoriented_affine" if self.reorient else "original_affine"]
        image = nibabel.Nifti1Image(volume_ZYX.transpose(2, 1, 0), affine=affine)
        if not self.reorient:
            return image
        return image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), io_orientation(affines["original_affine"])))


def _load(file: ImageSource) -> Any:
    """A three-dimensional nibabel image whose affine is finite. Raises ImageError."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if isinstance(file, DicomSeries):
        return _from_sitk(read_series(file))
    if not file.is_file():
        raise ImageError(f"image not found: {file}")
    if not is_nifti(file):
        raise ImageError(f"{file}: this model reads NIfTI files (.nii, .nii.gz); convert the image first")
    voxels_ZYX = read_nifti(file)[1]
    try:
        image = nibabel.load(file)
        if voxels_ZYX is not None and voxels_ZYX.ndim == image.ndim == 3:
            image = type(image)(voxels_ZYX.transpose(2, 1, 0), image.affine, image.header)
    except (ImageFileError, HeaderDataError, OSError, ValueError) as e:
        raise ImageError(f"cannot read {file}: {e}\nexpected a NIfTI image") from e
    if image.ndim != 3:
        raise ImageError(f"{file} has shape {image.shape}, expected three dimensions (x, y, z)")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) == 0:
        raise ImageError(f"{file} has a damaged header: its affine is {image.affine.tolist()}; export it again")
    return image


def _voxels(image: Any, file: ImageSource) -> npt.NDArray[np.float64]:
    try:
        voxels_XYZ: npt.NDArray[np.float64] = image.get_fdata()
    except MemoryError as e:
        raise no_memory(file, 8 * math.prod(image.shape)) from e
    except (OSError, ValueError) as e:
        raise ImageError(f"cannot read {file}: {e}\ncopy or export it again") from e
    return voxels_XYZ


def _from_sitk(image: Any) -> Any:
    """The same voxels and place; ITK's axes point left and back (LPS) where NIfTI's point right and front (RAS)."""
    import nibabel
    import SimpleITK as sitk

    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1
    return nibabel.Nifti1Image(sitk.GetArrayFromImage(image).transpose(2, 1, 0), affine)
