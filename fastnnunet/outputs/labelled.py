"""A label map, where it lies in the patient, and the image it was made from: what every output is made of.

Axes of arrays are (z, y, x) as the image was read; points are (x, y, z) in mm, to the left, back and head of the
patient (LPS), as DICOM and ITK have them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError, MismatchError
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.outputs.colours import colour_of

TO_RAS = np.diag((-1.0, -1.0, 1.0, 1.0))  # of LPS, or back


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What is segmented: a label, or a region of several."""

    number: int  # from 1 in the order of dataset.json: that of its segment, ROI and colour
    name: str
    values: tuple[int, ...]  # of its voxels

    @property
    def colour(self) -> str:
        """`#rrggbb`."""
        return colour_of(self.number)


def structures_of(labels: Mapping[str, Any]) -> tuple[Structure, ...]:
    """Foreground labels and regions of a dataset.json, whose `labels` are given, in their order."""
    values = {
        name: tuple(map(int, value)) if isinstance(value, list | tuple) else (int(value),)
        for name, value in labels.items()
        if name != "ignore"
    }
    foreground = [(name, value) for name, value in values.items() if value != (0,)]
    return tuple(Structure(number=n, name=name, values=v) for n, (name, v) in enumerate(foreground, 1))


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """A label map with its place, and what is known of how it came about."""

    case: str
    labels_ZYX: npt.NDArray[np.integer[Any]]
    affine: npt.NDArray[np.float64]  # (4, 4): index (x, y, z, 1) to the centre of a voxel in mm, LPS
    structures: tuple[Structure, ...]
    in_patient: bool = True  # the format knows places in the patient; else mm from the first voxel
    image_CZYX: npt.NDArray[np.float32] | None = None  # on the same grid
    channel_names: tuple[str, ...] = ()
    series: DicomSeries | None = None  # the image was read from it
    model: str = ""  # named as the algorithm

    def __post_init__(self) -> None:
        if self.labels_ZYX.ndim != 3 or not np.issubdtype(self.labels_ZYX.dtype, np.integer):
            got = f"{self.labels_ZYX.dtype} of shape {self.labels_ZYX.shape}"
            raise ImageError(f"{self.case}: the label map is {got}, expected whole numbers (z, y, x)")
        if self.image_CZYX is not None and self.image_CZYX.shape[1:] != self.labels_ZYX.shape:
            raise MismatchError(
                f"{self.case}: image of shape {self.image_CZYX.shape[1:]}, label map of shape {self.labels_ZYX.shape}; "
                "expected a label map on the grid of its image"
            )

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along z, y, x."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @cached_property
    def voxel_ml(self) -> float | None:
        """Volume of a voxel; None where an image is a picture, which has no thickness."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000 if self.in_patient or self.is_volume else None

    @property
    def is_volume(self) -> bool:
        return self.labels_ZYX.shape[0] > 1

    def points_mm(self, index_zyx: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points (n, xyz) of indices (n, zyx), which need not be whole."""
        index_NX = np.asarray(index_zyx, np.float64)[..., ::-1]
        return index_NX @ self.affine[:3, :3].T + self.affine[:3, 3]

    def mask(self, structure: Structure) -> npt.NDArray[np.bool_]:
        """Its voxels (z, y, x)."""
        if len(structure.values) == 1:
            return self.labels_ZYX == structure.values[0]
        return np.isin(self.labels_ZYX, structure.values)

    @cached_property
    def boxes(self) -> dict[int, tuple[slice, slice, slice]]:
        """Of every label value that occurs: the smallest box (z, y, x) around its voxels."""
        from scipy.ndimage import find_objects

        return {value: box for value, box in enumerate(find_objects(self.labels_ZYX), 1) if box is not None}

    def box(self, structure: Structure) -> tuple[slice, slice, slice] | None:
        """The smallest box around the voxels of a structure; None where it has none."""
        found = [self.boxes[value] for value in structure.values if value in self.boxes]
        if not found:
            return None
        z, y, x = (
            slice(min(box[axis].start for box in found), max(box[axis].stop for box in found)) for axis in range(3)
        )
        return z, y, x


def grid_of(properties: Mapping[str, Any]) -> tuple[npt.NDArray[np.float64], bool]:
    """`affine` and `in_patient` of a `LabelledImage`, of the properties that a reader of `images` returns."""
    affine = np.eye(4)
    if "nibabel_stuff" in properties:
        affines = properties["nibabel_stuff"]
        return TO_RAS @ np.asarray(affines.get("reoriented_affine", affines["original_affine"]), np.float64), True
    if "sitk_stuff" in properties:
        geometry = properties["sitk_stuff"]
        spacing, origin = (np.asarray(geometry[name], np.float64) for name in ("spacing", "origin"))
        direction = np.reshape(geometry["direction"], (len(spacing), len(spacing)))
        axes = min(3, len(spacing))  # of four, the last is the channel
        affine[:axes, :axes] = (direction * spacing)[:axes, :axes]
        affine[:axes, 3] = origin[:axes]
        return affine, axes == 3
    z, y, x = (abs(float(s)) for s in properties["spacing"])
    affine[:3, :3] = np.diag((x, y, 1.0 if z == 999 else z))  # nnU-Net's word for no distance of slices
    return affine, False


def read_labelled(
    label_map: Path,
    labels: Mapping[str, Any],
    *,
    image: tuple[Path, ...] | DicomSeries | None = None,
    reader_writer: str = "SimpleITKIO",
    channel_names: tuple[str, ...] = (),
    model: str = "",
    case: str | None = None,
) -> LabelledImage:
    """A label map from a file and, if given, its image: files of channels or a DICOM series.

    `labels`: those of dataset.json or of the bundle. `reader_writer`: nnU-Net's name of the reader class, as in the
    bundle. Raises ImageError for what cannot be read, MismatchError for an image on another grid.
    """
    from fastnnunet.images.io import image_io

    io = image_io(reader_writer)
    labels_CZYX, properties = io.read_segmentation(label_map)
    labels_ZYX = labels_CZYX[0].astype(np.uint16)
    if (labels_ZYX != labels_CZYX[0]).any():
        raise ImageError(f"{label_map} is not a label map: it holds values that are not whole numbers from 0 to 65535")
    affine, in_patient = grid_of(properties)
    image_CZYX = None
    if image is not None:
        image_CZYX, of_image = io.read([image] if isinstance(image, DicomSeries) else image)
        wanted, _ = grid_of(of_image)
        if image_CZYX.shape[1:] != labels_ZYX.shape or not same_grid(affine, wanted, labels_ZYX.shape):
            raise MismatchError(
                f"{label_map} does not lie on the grid of its image {image}\n"
                f"  label map {labels_ZYX.shape} (z, y, x), affine {affine[:3].round(4).tolist()}\n"
                f"  image     {image_CZYX.shape[1:]} (z, y, x), affine {wanted[:3].round(4).tolist()}\n"
                "give the image that was predicted"
            )
    return LabelledImage(
        case=case or label_map.name.split(".")[0],
        labels_ZYX=labels_ZYX,
        affine=affine,
        structures=structures_of(labels),
        in_patient=in_patient,
        image_CZYX=image_CZYX,
        channel_names=channel_names,
        series=image if isinstance(image, DicomSeries) else None,
        model=model,
    )


def same_grid(
    one: npt.NDArray[np.float64], other: npt.NDArray[np.float64], shape_zyx: tuple[int, ...], tolerance: float = 0.1
) -> bool:
    """Whether no corner of a grid lies farther from where the other has it than this part of a voxel.

    Headers hold float32, and quaternions.
    """
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)], np.float64)
    corners[:, :3] *= np.subtract(shape_zyx[::-1], 1)
    voxel = np.linalg.norm(one[:3, :3], axis=0).min()
    return bool(np.abs(corners @ (one - other)[:3].T).max() <= tolerance * voxel)
