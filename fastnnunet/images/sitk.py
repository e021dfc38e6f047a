"""nnU-Net's SimpleITKIO and SimpleITKIOWithReorient."""

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import FastnnUNetError, ImageError
from fastnnunet.images.checks import ImageSource, check_geometry, check_same, smallest_dtype, stack_channels
from fastnnunet.images.dicom.series import DicomSeries, read_series
from fastnnunet.images.itk import last_line
from fastnnunet.images.nifti import is_nifti, is_nifti_pair, read_nifti
from fastnnunet.images.plain import HEADER_BYTES, LONGEST_AXIS, plain_geometry, plain_header
from fastnnunet.images.stored import DEFLATE_RATIO, SMALL_BYTES, check_claim, new_gzip, open_stored
from fastnnunet.images.text_headers import Layout, read_layout
from fastnnunet.system.files import atomic_image

_GIPL_HEADER_BYTES = 256
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
        image = None
        if isinstance(file, DicomSeries):
            import SimpleITK as sitk

            image = read_series(file)
            voxels, geometry = sitk.GetArrayFromImage(image), _geometry_of(image)
            check_geometry(file, geometry)
        else:
            voxels, geometry = read_itk(file)
        if not 2 <= voxels.ndim <= 4:
            raise ImageError(
                f"{file} has {voxels.ndim} dimensions, expected a scalar image of 2 or 3 dimensions, or 4 where the "
                "last is the channel"
            )
        if self.orientation is None:
            return voxels, geometry
        import SimpleITK as sitk

        image = image or _to_sitk(voxels, geometry)
        try:
            original = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(image.GetDirection())
            image = sitk.DICOMOrient(image, self.orientation)
        except RuntimeError as e:
            raise ImageError(f"cannot turn {file} to {self.orientation}: {last_line(e)}") from e
        return sitk.GetArrayFromImage(image), {**_geometry_of(image), "original_orientation": original}

    def write(self, segmentation_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        self._write(smallest_dtype(segmentation_ZYX), file, properties)

    def write_channel(self, channel_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        self._write(channel_ZYX, file, properties)

    def _write(self, volume_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        voxels, geometry = self._on_file_axes(volume_ZYX, properties)
        with atomic_image(file) as partial:
            if is_nifti(file) and max(voxels.shape) <= LONGEST_AXIS:
                _write_nifti(voxels, geometry, partial, file)
            else:
                write_sitk(_to_sitk(voxels, geometry), partial, file)

    def _on_file_axes(
        self, volume_ZYX: npt.NDArray[Any], properties: dict[str, Any]
    ) -> tuple[npt.NDArray[Any], _Geometry]:
        geometry = properties["sitk_stuff"]
        dimensions = len(geometry["spacing"])
        if dimensions == 4:
            # nnU-Net stops here; a multi-channel 4d input has a three-dimensional segmentation
            geometry = _first_three_dimensions(geometry)
        voxels = volume_ZYX[0] if dimensions == 2 else volume_ZYX
        if self.orientation is None:
            return voxels, geometry
        import SimpleITK as sitk

        image = sitk.DICOMOrient(_to_sitk(voxels, geometry), geometry["original_orientation"])
        return sitk.GetArrayFromImage(image), _geometry_of(image)


def read_itk(file: Path) -> tuple[npt.NDArray[Any], _Geometry]:
    """Voxels (..., y, x) of a scalar image and ITK's `spacing`, `origin`, `direction` (axes x, y, ...).

    What the header claims is compared with the file before memory is allocated.
    Raises ImageError when the file is missing, damaged, truncated or no scalar image, or its geometry is none.
    """
    layout: Layout | str | None = None
    voxels = None
    if is_nifti(file) or is_nifti_pair(file):
        header, voxels = read_nifti(file)
        layout = "NiftiImageIO"
        # what is packed and not named so, and endings of which only a part is in capitals, ITK does not read
        is_named_so = file.name.endswith(".nii.gz" if header.packed else (".nii", ".nii.gz"))
        if is_named_so and voxels is not None and (plain := plain_geometry(header)) is not None:
            return voxels, plain
    else:
        layout = read_layout(file)
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    if layout is not None:
        # spares ITK from asking every format whether the file is its own
        reader.SetImageIO(layout if isinstance(layout, str) else layout.image_io)
    try:
        reader.ReadImageInformation()
        dtype = _scalar_dtype(file, reader)
        if isinstance(layout, Layout) and layout.describes(reader.GetSize(), dtype):
            voxels = layout.read()
        if voxels is not None:
            if math.prod(reader.GetSize()) != voxels.size:
                raise ImageError(f"{file}: size {reader.GetSize()} does not fit its voxels {voxels.shape[::-1]}")
            voxels = voxels.reshape(reader.GetSize()[::-1])
        if voxels is None:
            if layout is None:
                _check_claim_of(file, reader, dtype)
            voxels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as e:
        raise ImageError(f"cannot read {file}: {last_line(e)}\nexpected an image that SimpleITK can read") from e
    geometry = _geometry_of(reader)
    check_geometry(file, geometry)
    try:
        _to_sitk(np.zeros((1,) * voxels.ndim, np.uint8), geometry)  # ITK has the last word on directions
    except RuntimeError as e:
        raise ImageError(f"{file} has a damaged header: {last_line(e)}; export it again") from e
    return voxels, geometry


def _scalar_dtype(file: Path, reader: Any) -> np.dtype[Any]:
    """Type of the voxels that ITK is about to read. Raises ImageError unless that is one real number each."""
    import SimpleITK as sitk

    names = ("UInt8", "Int8", "UInt16", "Int16", "UInt32", "Int32", "UInt64", "Int64", "Float32", "Float64")
    kinds = {getattr(sitk, f"sitk{name}"): name.lower() for name in names}
    if reader.GetNumberOfComponents() == 1:  # a vector of one number is that number
        kinds |= {getattr(sitk, f"sitkVector{name}"): name.lower() for name in names}
    if (kind := kinds.get(reader.GetPixelID())) is None:
        got = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        raise ImageError(
            f"{file} has {reader.GetNumberOfComponents()} value(s) per voxel ({got}), expected one real number; "
            "make a file of each channel"
        )
    return np.dtype(kind)


def _check_claim_of(file: Path, reader: Any, dtype: np.dtype[Any]) -> None:
    """Of a format that only ITK knows, compressed perhaps. Raises ImageError."""
    claimed = math.prod(reader.GetSize()) * dtype.itemsize
    is_gipl = file.name.lower().endswith((".gipl", ".gipl.gz"))
    with open_stored(file, detect=True) as stored:
        slack = _GIPL_HEADER_BYTES if is_gipl else SMALL_BYTES
        ratio = DEFLATE_RATIO if stored.packed or not is_gipl else 1
        check_claim(file, claimed, stored.stored_bytes, ratio=ratio, slack=slack)
        if is_gipl:  # ITK leaves missing voxels as they are
            stored.check(_GIPL_HEADER_BYTES + claimed)


def _geometry_of(image: Any) -> _Geometry:
    """Of an image or a reader. A negative spacing becomes an axis that runs the other way, as in ITK's image reader."""
    spacing = image.GetSpacing()
    axes = len(spacing)
    signs = [-1.0 if s < 0 else 1.0 for s in spacing]
    return {
        "spacing": tuple(abs(s) for s in spacing),
        "origin": tuple(o + 0.0 for o in image.GetOrigin()),
        # plus zero: ITK's header reader leaves -0.0 where its image reader has 0.0
        "direction": tuple(cosine * signs[i % axes] + 0.0 for i, cosine in enumerate(image.GetDirection())),
    }


def _to_sitk(voxels: npt.NDArray[Any], geometry: _Geometry) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(voxels.astype(voxels.dtype.newbyteorder("="), copy=False), isVector=False)
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    return image


def write_sitk(image: Any, partial: Path, file: Path) -> None:
    """Write a SimpleITK image to `partial`, compressed where the format can. Errors are of `file`."""
    import SimpleITK as sitk

    try:
        sitk.WriteImage(image, str(partial), True)
    except RuntimeError as e:
        raise FastnnUNetError(f"cannot write {file}: {last_line(e)}") from e


def _write_nifti(voxels: npt.NDArray[Any], geometry: _Geometry, partial: Path, file: Path) -> None:
    """The header that ITK writes, then the voxels. Raises FastnnUNetError, whose message is of `file`, and OSError."""
    header = plain_header(voxels, geometry)
    if header is None:
        header = _header_of_itk(voxels, geometry, partial, file)
    is_packed = file.name.lower().endswith(".gz")
    with new_gzip(partial) if is_packed else partial.open("wb") as f:
        f.write(header)
        f.write(np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("<")).data)


def _header_of_itk(voxels: npt.NDArray[Any], geometry: _Geometry, partial: Path, file: Path) -> bytes:
    """Of an image of one voxel, which ITK writes to `partial`, with the sizes of `voxels`."""
    write_sitk(_to_sitk(np.zeros((1,) * voxels.ndim, voxels.dtype), geometry), partial, file)
    with open_stored(partial, detect=True) as stored:
        header = bytearray(stored.read(HEADER_BYTES))
    struct.pack_into(f"<{voxels.ndim}h", header, 42, *voxels.shape[::-1])
    return bytes(header)


def _spacing_zyx(spacing: Sequence[float]) -> list[float]:
    """ITK's spacing as nnU-Net orders it; a 2d image gets a slice distance that never invites resampling."""
    if len(spacing) == 2:
        return [max(spacing) * 999, *spacing[::-1]]
    return list(spacing[::-1])[-3:]


def _first_three_dimensions(geometry: _Geometry) -> _Geometry:
    direction = [geometry["direction"][row * 4 + column] for row in range(3) for column in range(3)]
    return {**geometry, "spacing": geometry["spacing"][:3], "origin": geometry["origin"][:3], "direction": direction}
