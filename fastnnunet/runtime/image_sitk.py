"""nnU-Net's SimpleITKIO and SimpleITKIOWithReorient."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import FastnnUNetError, ImageError
from fastnnunet.runtime.dicom import DicomSeries, read_series
from fastnnunet.runtime.files import atomic_output
from fastnnunet.runtime.image_checks import ImageSource, check_same, check_spacing, smallest_dtype, stack_channels
from fastnnunet.runtime.itk import last_line
from fastnnunet.runtime.nifti import is_nifti, read_nifti_voxels

_Geometry = dict[str, Any]


class SimpleITKIO:
    """nnU-Net's default reader. With `orientation` images are turned to it, and segmentations back."""

    def __init__(self, orientation: str | None = None) -> None:
        self.orientation = orientation

    def read(self, files: Sequence[ImageSource]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        volumes: list[npt.NDArray[Any]] = []
        geometries: list[_Geometry] = []
        for file in files:
            voxels, geometry = self._read_one(file)
            volumes.append(voxels if voxels.ndim == 4 else voxels[(None,) * (4 - voxels.ndim)])
            check_spacing(file, geometry["spacing"])
            geometries.append(geometry)
        compared = ("spacing", "origin", "direction")
        check_same(
            files,
            [{"shape": v.shape[1:], **{k: g[k] for k in compared}} for v, g in zip(volumes, geometries, strict=True)],
        )
        return stack_channels(files, volumes), {
            "sitk_stuff": geometries[0],
            "spacing": list(np.abs(_spacing_zyx(geometries[0]["spacing"]))),
        }

    def read_segmentation(self, file: Path) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        return self.read([file])

    def _read_one(self, file: ImageSource) -> tuple[npt.NDArray[Any], _Geometry]:
        import SimpleITK as sitk

        if not isinstance(file, DicomSeries) and not file.is_file():
            raise ImageError(f"image not found: {file}")
        voxels = None
        if isinstance(file, DicomSeries):
            image: Any = read_series(file)
        else:
            image = sitk.ImageFileReader()
            image.SetFileName(str(file))
            if is_nifti(file):
                voxels = read_nifti_voxels(file)
                image.SetImageIO("NiftiImageIO")  # spares ITK from asking every format whether the file is its own
        original_orientation = None
        try:
            if voxels is not None and self.orientation is None:
                image.ReadImageInformation()
                if image.GetSize() != voxels.shape[::-1]:
                    raise ImageError(f"{file}: size {image.GetSize()} does not fit its voxels {voxels.shape[::-1]}")
            else:
                image = image if isinstance(file, DicomSeries) else image.Execute()
                if self.orientation is not None:
                    original_orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(
                        image.GetDirection()
                    )
                    image = sitk.DICOMOrient(image, self.orientation)
                voxels = sitk.GetArrayFromImage(image)
        except RuntimeError as e:
            raise ImageError(f"cannot read {file}: {last_line(e)}\nexpected an image that SimpleITK can read") from e
        if not 2 <= voxels.ndim <= 4 or voxels.ndim != len(image.GetSpacing()):
            raise ImageError(
                f"{file} has {len(image.GetSpacing())} dimensions and voxels of shape {voxels.shape}, expected a "
                "scalar image of 2 or 3 dimensions, or 4 where the last is the channel"
            )
        geometry = {
            "spacing": image.GetSpacing(),
            "origin": image.GetOrigin(),
            # plus zero: ITK's header reader leaves -0.0 where its image reader has 0.0
            "direction": tuple(cosine + 0.0 for cosine in image.GetDirection()),
        }
        if original_orientation is not None:
            geometry["original_orientation"] = original_orientation
        return voxels, geometry

    def write(self, segmentation_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        with atomic_output(file) as partial:
            write_sitk(self._file_image(segmentation_ZYX, properties), partial, file)

    def to_file_axes(self, segmentation_ZYX: npt.NDArray[Any], properties: dict[str, Any]) -> npt.NDArray[Any]:
        import SimpleITK as sitk

        return sitk.GetArrayFromImage(self._file_image(segmentation_ZYX, properties))

    def _file_image(self, segmentation_ZYX: npt.NDArray[Any], properties: dict[str, Any]) -> Any:
        import SimpleITK as sitk

        geometry = properties["sitk_stuff"]
        dimensions = len(geometry["spacing"])
        if dimensions == 4:
            # nnU-Net stops here; a multi-channel 4d input has a three-dimensional segmentation
            geometry = _first_three_dimensions(geometry)
        labels = segmentation_ZYX[0] if dimensions == 2 else segmentation_ZYX
        image = sitk.GetImageFromArray(smallest_dtype(labels))
        image.SetSpacing(geometry["spacing"])
        image.SetOrigin(geometry["origin"])
        image.SetDirection(geometry["direction"])
        return image if self.orientation is None else sitk.DICOMOrient(image, geometry["original_orientation"])


def write_sitk(image: Any, partial: Path, file: Path) -> None:
    """Write a SimpleITK image to `partial`, compressed where the format can. Errors are of `file`."""
    import SimpleITK as sitk

    try:
        sitk.WriteImage(image, str(partial), True)
    except RuntimeError as e:
        raise FastnnUNetError(f"cannot write {file}: {last_line(e)}") from e


def _spacing_zyx(spacing: Sequence[float]) -> list[float]:
    """ITK's spacing as nnU-Net orders it; a 2d image gets a slice distance that never invites resampling."""
    if len(spacing) == 2:
        return [max(spacing) * 999, *spacing[::-1]]
    return list(spacing[::-1])[-3:]


def _first_three_dimensions(geometry: _Geometry) -> _Geometry:
    direction = [geometry["direction"][row * 4 + column] for row in range(3) for column in range(3)]
    return {**geometry, "spacing": geometry["spacing"][:3], "origin": geometry["origin"][:3], "direction": direction}
