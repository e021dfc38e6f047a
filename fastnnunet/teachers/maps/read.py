"""Soft maps in files: a NIfTI with a channel per class, or what nnU-Net writes with `--save_probabilities`.

Shape suffixes: C = channels (network heads), Z, Y, X = space in the order of nnU-Net's readers, before its transpose.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.interfaces import Float32Array
from fastnnunet.errors import ImageError, NotFoundError
from fastnnunet.images.nifti import read_nifti
from fastnnunet.specs.checks.pickles import load_plain

NIFTI = (".nii.gz", ".nii")
ARCHIVE = ".npz"
ARRAY = "probabilities"
_VECTOR_AXES = 5  # x, y, z, time and the components of a vector
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where voxels are. `origin_xyz` and `direction` (rows x, y, z; LPS) are None where a reader knows neither."""

    spacing_zyx: tuple[float, ...]
    origin_xyz: tuple[float, ...] | None = None
    direction: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftMap:
    """One file: values as they are there, and where they are."""

    values_CZYX: Float32Array
    geometry: Geometry

    def digest(self) -> str:
        """Hex SHA-256 of shape and values; how they are stored does not matter."""
        digest = hashlib.sha256(f"{self.values_CZYX.shape}".encode())
        digest.update(np.ascontiguousarray(self.values_CZYX).data)
        return digest.hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """Case id -> its file. Beside CASE.npz nnU-Net writes a label map CASE.nii.gz, which is passed over.

    Raises NotFoundError when there is none, ImageError when a case has two.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no folder\nexpected a folder with a soft map for each case")
    archives = {path.name.removesuffix(ARCHIVE): path for path in sorted(folder.glob(f"*{ARCHIVE}"))}
    found: dict[str, Path] = dict(archives)
    for path in sorted(folder.iterdir()):
        ending = next((ending for ending in NIFTI if path.name.endswith(ending)), None)
        if ending is None or (case := path.name.removesuffix(ending)) in archives:
            continue
        if case in found:
            raise ImageError(f"case {case} has two soft maps: {found[case]} and {path}\nremove one of them")
        found[case] = path
    if not found:
        raise NotFoundError(
            f"no soft maps in {folder}\nexpected CASE.nii.gz with a channel per class, or CASE.npz and CASE.pkl as "
            "nnUNetv2_predict --save_probabilities writes them"
        )
    return found


def read_map(path: Path) -> SoftMap:
    """Raises ImageError when a file cannot be read or is no soft map, NotFoundError when CASE.pkl is missing."""
    try:
        return _read_archive(path) if path.name.endswith(ARCHIVE) else _read_nifti(path)
    except (ImageError, NotFoundError):
        raise
    except Exception as e:  # a damaged file raises nearly anything
        raise ImageError(f"{path} cannot be read: {type(e).__name__}: {' '.join(str(e).split())}") from e


def geometry_of(properties: Mapping[str, Any]) -> Geometry:
    """Of what nnU-Net's readers note beside an image."""
    spacing = tuple(float(s) for s in properties["spacing"])
    if "sitk_stuff" in properties:
        noted = properties["sitk_stuff"]
        return Geometry(
            spacing_zyx=spacing,
            origin_xyz=tuple(map(float, noted["origin"])),
            direction=tuple(map(float, noted["direction"])),
        )
    noted = properties.get("nibabel_stuff", {})
    affine = noted.get("reoriented_affine", noted.get("original_affine"))
    if affine is None:
        return Geometry(spacing_zyx=spacing)
    axes = LPS_TO_RAS @ np.asarray(affine, float)[:3, :3]
    return Geometry(
        spacing_zyx=spacing,
        origin_xyz=tuple((LPS_TO_RAS @ np.asarray(affine, float)[:3, 3]).tolist()),
        direction=tuple((axes / np.linalg.norm(axes, axis=0)).ravel().tolist()),
    )


def _read_archive(path: Path) -> SoftMap:
    beside = path.with_name(path.name.removesuffix(ARCHIVE) + ".pkl")
    if not beside.is_file():
        raise NotFoundError(f"{beside} is missing, which nnU-Net writes beside {path.name}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if ARRAY not in archive:
                raise ImageError(f"{path} has no array {ARRAY!r}; it has {', '.join(archive) or 'none'}")
            values = archive[ARRAY]
    except zipfile.BadZipFile as e:
        raise ImageError(f"{path} is truncated or no .npz ({e})") from e
    if values.ndim != 4 or values.dtype.kind not in "fiub":
        raise ImageError(f"{path}: got {values.dtype} {values.shape}, expected numbers (classes, z, y, x)")
    with beside.open("rb") as file:
        properties = load_plain(file)
    return SoftMap(values_CZYX=np.ascontiguousarray(values, np.float32), geometry=geometry_of(properties))


def _read_nifti(path: Path) -> SoftMap:
    import SimpleITK as sitk

    from fastnnunet.images.itk import no_warnings

    # whole, or it is refused: ITK reads what is cut off as zeros, and NaN too
    header, voxels = read_nifti(path, most_axes=_VECTOR_AXES)
    if voxels is None and not header.is_integer:
        raise ImageError(f"{path}: its values are rescaled floating point numbers; write it again as float32")
    itk = sitk.ImageFileReader()
    itk.SetFileName(str(path))
    with no_warnings():
        itk.ReadImageInformation()
        axes, channels = itk.GetDimension(), itk.GetNumberOfComponents()
        if (axes, channels > 1) not in ((3, False), (3, True), (4, False)):
            raise ImageError(f"{path}: got {axes} axes, expected x, y, z and one of classes, the last")
        if voxels is None:
            voxels = sitk.GetArrayFromImage(itk.Execute())
            if channels > 1:
                voxels = np.moveaxis(voxels, -1, 0)
    size_zyx = itk.GetSize()[:3][::-1]
    direction = np.reshape(itk.GetDirection(), (axes, axes))[:3, :3]
    return SoftMap(
        values_CZYX=np.ascontiguousarray(voxels.reshape(-1, *size_zyx), np.float32),
        geometry=Geometry(
            spacing_zyx=tuple(itk.GetSpacing()[:3][::-1]),
            origin_xyz=tuple(itk.GetOrigin()[:3]),
            direction=tuple(direction.ravel().tolist()),
        ),
    )
