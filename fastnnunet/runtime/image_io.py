"""Reading images and writing segmentations exactly as nnU-Net 2.8's reader classes do, with damaged input refused."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import FastnnUNetError, ImageError, SpecError
from fastnnunet.runtime.files import atomic_output
from fastnnunet.runtime.nifti import read_nifti_voxels

_log = logging.getLogger(__name__)
_Geometry = dict[str, Any]


class ImageIO(Protocol):
    """What a reader class of the plans does."""

    def read(self, files: Sequence[Path]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Image (C, z, y, x) and nnU-Net's properties: `spacing` (z, y, x) in mm and what `write` needs.

        Raises ImageError when a file is unreadable, truncated or not finite, or the channels do not fit together.
        """

    def write(self, segmentation_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        """Write a label map with the geometry in `properties`; the file is whole or not there."""


def image_io(reader_writer: str) -> ImageIO:
    """The reader of that nnU-Net class name. Raises SpecError for one this runtime does not have."""
    readers: dict[str, Callable[[], ImageIO]] = {
        "SimpleITKIO": SimpleITKIO,
        "SimpleITKIOWithReorient": lambda: SimpleITKIO(orientation="RAS"),
        "NaturalImage2DIO": NaturalImage2DIO,
    }
    if reader_writer not in readers:
        raise SpecError(
            f"the bundle's image reader is {reader_writer!r}, which this runtime does not have; "
            f"known: {', '.join(readers)}\nread the images yourself and call Predictor.predict_array"
        )
    return readers[reader_writer]()


class SimpleITKIO:
    """nnU-Net's default reader. With `orientation` images are turned to it, and segmentations back."""

    def __init__(self, orientation: str | None = None) -> None:
        self.orientation = orientation

    def read(self, files: Sequence[Path]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        volumes: list[npt.NDArray[Any]] = []
        geometries: list[_Geometry] = []
        for file in files:
            voxels, geometry = self._read_one(file)
            volumes.append(voxels if voxels.ndim == 4 else voxels[(None,) * (4 - voxels.ndim)])
            geometries.append(geometry)
        _check_same(files, [{"shape": v.shape[1:], **g} for v, g in zip(volumes, geometries, strict=True)])
        image_CZYX = np.vstack(volumes, dtype=np.float32, casting="unsafe")
        _check_finite(files, image_CZYX)
        return image_CZYX, {
            "sitk_stuff": geometries[0],
            "spacing": list(np.abs(_spacing_zyx(geometries[0]["spacing"]))),
        }

    def _read_one(self, file: Path) -> tuple[npt.NDArray[Any], _Geometry]:
        import SimpleITK as sitk

        if not file.is_file():
            raise ImageError(f"image not found: {file}")
        is_nifti = file.name.lower().endswith((".nii", ".nii.gz"))
        voxels = read_nifti_voxels(file) if is_nifti else None
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(file))
        if is_nifti:
            reader.SetImageIO("NiftiImageIO")  # spares ITK from asking every format whether the file is its own
        image: Any = reader
        original_orientation = None
        try:
            if voxels is not None and self.orientation is None:
                reader.ReadImageInformation()
                if reader.GetSize() != voxels.shape[::-1]:
                    raise ImageError(f"{file}: size {reader.GetSize()} does not fit its voxels {voxels.shape[::-1]}")
            else:
                image = reader.Execute()
                if self.orientation is not None:
                    original_orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(
                        image.GetDirection()
                    )
                    image = sitk.DICOMOrient(image, self.orientation)
                voxels = sitk.GetArrayFromImage(image)
        except RuntimeError as e:
            raise ImageError(f"cannot read {file}: {_last_line(e)}\nexpected an image that SimpleITK can read") from e
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
        import SimpleITK as sitk

        geometry = properties["sitk_stuff"]
        dimensions = len(geometry["spacing"])
        if dimensions == 4:
            # nnU-Net stops here; a multi-channel 4d input has a three-dimensional segmentation
            geometry = _first_three_dimensions(geometry)
        labels = segmentation_ZYX[0] if dimensions == 2 else segmentation_ZYX
        image = sitk.GetImageFromArray(_smallest_dtype(labels))
        image.SetSpacing(geometry["spacing"])
        image.SetOrigin(geometry["origin"])
        image.SetDirection(geometry["direction"])
        if self.orientation is not None:
            image = sitk.DICOMOrient(image, geometry["original_orientation"])
        with atomic_output(file) as partial:
            _write_sitk(image, partial, file)


class NaturalImage2DIO:
    """PNG, BMP and TIFF pictures: one file may hold three (RGB) or four (RGBA) channels, spacing is 1."""

    def read(self, files: Sequence[Path]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        import SimpleITK as sitk

        pictures = []
        for file in files:
            if not file.is_file():
                raise ImageError(f"image not found: {file}")
            try:
                pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            except RuntimeError as e:
                raise ImageError(f"cannot read {file}: {_last_line(e)}\nexpected a PNG, BMP or TIFF picture") from e
            if pixels.ndim == 3 and _is_grey_bmp(file, pixels):
                pixels = pixels[..., 0]
            if pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
                pictures.append(pixels.transpose(2, 0, 1)[:, None])
            elif pixels.ndim == 2:
                pictures.append(pixels[None, None])
            else:
                raise ImageError(f"{file} has shape {pixels.shape}, expected (y, x) or (y, x, 3 or 4 channels)")
        _check_same(files, [{"shape": p.shape[1:]} for p in pictures])
        image_CZYX = np.vstack(pictures, dtype=np.float32, casting="unsafe")
        _check_finite(files, image_CZYX)
        return image_CZYX, {"spacing": (999, 1, 1)}

    def write(self, segmentation_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        import SimpleITK as sitk

        with atomic_output(file) as partial:
            _write_sitk(sitk.GetImageFromArray(_smallest_dtype(segmentation_ZYX[0])), partial, file)


def _is_grey_bmp(picture: Path, pixels: npt.NDArray[Any]) -> bool:
    """BMP stores greys as a palette, which ITK turns into colours and nnU-Net's reader does not."""
    with picture.open("rb") as f:
        header = f.read(30)
    return header[:2] == b"BM" and header[28] <= 8 and bool((pixels == pixels[..., :1]).all())


def _write_sitk(image: Any, partial: Path, file: Path) -> None:
    import SimpleITK as sitk

    try:
        sitk.WriteImage(image, str(partial), True)
    except RuntimeError as e:
        raise FastnnUNetError(f"cannot write {file}: {_last_line(e)}") from e


def _smallest_dtype(labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return labels.astype(np.uint8 if labels.max(initial=0) < 255 else np.uint16, copy=False)


def _spacing_zyx(spacing: Sequence[float]) -> list[float]:
    """ITK's spacing as nnU-Net orders it; a 2d image gets a slice distance that never invites resampling."""
    if len(spacing) == 2:
        return [max(spacing) * 999, *spacing[::-1]]
    return list(spacing[::-1])[-3:]


def _first_three_dimensions(geometry: _Geometry) -> _Geometry:
    direction = [geometry["direction"][row * 4 + column] for row in range(3) for column in range(3)]
    return {**geometry, "spacing": geometry["spacing"][:3], "origin": geometry["origin"][:3], "direction": direction}


def _check_same(files: Sequence[Path], channels: list[dict[str, Any]]) -> None:
    """Channels must have the same shape and spacing; another origin or direction is nnU-Net's warning."""
    first = channels[0]
    for file, other in zip(files[1:], channels[1:], strict=True):
        for name, value in first.items():
            if other[name] == value:
                continue
            text = (
                f"the channels do not fit together: {name} is {value} in {files[0].name} and {other[name]} in "
                f"{file.name}"
            )
            if name == "shape" or (name == "spacing" and not _close(value, other[name])):
                raise ImageError(f"{text}\nresample them to the same grid first (folder {files[0].parent})")
            if name in ("origin", "direction") and not _close(value, other[name]):
                _log.warning("%s; the first one is used", text)


def _close(left: Sequence[float], right: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(left, right, strict=True))


def _check_finite(files: Sequence[Path], image_CZYX: npt.NDArray[np.float32]) -> None:
    # float32 values cannot overflow a float64 sum, so it is finite exactly when every voxel is
    if math.isfinite(float(image_CZYX.sum(dtype=np.float64))):
        return
    bad = int(np.count_nonzero(~np.isfinite(image_CZYX)))
    names = ", ".join(f.name for f in files)
    raise ImageError(
        f"{names}: {bad} of {image_CZYX.size} voxels are NaN or infinite, expected numbers; repair the image "
        f"(folder {files[0].parent})"
    )


def _last_line(error: Exception) -> str:
    """The line that says what is wrong; SimpleITK's messages begin with source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ") if lines else type(error).__name__
