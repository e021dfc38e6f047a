"""Pictures of single scans: the teacher's contours, the students', and where they differ.

Images and label maps are read as the model reads them, so that they lie on the same grid however a reader turns them.
Slices are those of the first array axis, shown as radiologists hang them (the patient's left on the right, front or
head above) where ITK knows directions, else as stored. RGB arrays are (y, x, 3) uint8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnnunet.bench.report.slices import Picture
from fastnnunet.errors import MismatchError
from fastnnunet.evaluate.fidelity import Fidelity
from fastnnunet.images.checks import ImageSource
from fastnnunet.images.io import image_io
from fastnnunet.outputs.colours import colour_of, rgb_of
from fastnnunet.outputs.picture import edges, grey_bytes, grey_window, png_of

TEACHER_ONLY, STUDENT_ONLY, OTHER_LABEL = "#2f9bff", "#ff5147", "#c98bff"  # no label has one of them
MOST_STUDENTS = 3  # with contours of their own
_PIXELS = 480  # of the longer side
_MARGIN, _LEAST_MARGIN_PIXELS = 0.3, 16  # around what is labelled
_ALPHA = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanFiles:
    """One held-out scan: its channels as `images.cases.Case.channels` has them, and label maps on its grid."""

    case: str
    channels: tuple[ImageSource, ...]
    teacher: Path
    students: Mapping[str, Path]  # tag -> label map; the first one decides which slice is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCase:
    """Pictures of one slice of a held-out scan: teacher, students, where the first student differs."""

    case: str
    place: str  # best, median, worst, only
    dice: float  # its fidelity
    where: str
    pictures: tuple[Picture, ...]
    values: tuple[int, ...]  # label values seen in them


def cases_to_show(fidelity: Fidelity) -> dict[str, str]:
    """The best, median and worst case by their mean fidelity: case -> which it is.

    Cases without a label say nothing. Of two cases none is the median, a single one is the `only` one; of none there
    is nothing to show. Of an even number the median is the worse of the two in the middle.
    """
    known = {case: dice for case, dice in fidelity.of_cases().items() if dice == dice}
    order = sorted(known, key=lambda case: (-known[case], case))
    if len(order) < 2:
        return dict.fromkeys(order, "only")
    middle = {order[len(order) // 2]: "median"} if len(order) > 2 else {}
    return {order[0]: "best", **middle, order[-1]: "worst"}


def judged_case(files: ScanFiles, place: str, dice: float, *, reader_writer: str, is_ct: bool) -> JudgedCase:
    """Pictures of the slice where the first student differs most from its teacher, or sees most where it does not.

    `place`, `dice`: see `JudgedCase`. `reader_writer`: nnU-Net's class name, as in plans and bundles. `is_ct`: the
    first channel is in HU. Raises ImageError when a file cannot be read, MismatchError when a label map lies on another
    grid than its image.
    """
    scan = _read_image(files.channels, reader_writer)
    base_ZYX3 = scan.base_ZYX3
    teacher_ZYX = _read_labels(files.teacher, reader_writer, files.case, scan)
    students = {
        tag: _read_labels(file, reader_writer, files.case, scan)
        for tag, file in list(files.students.items())[:MOST_STUDENTS]
    }
    tag, first_ZYX = next(iter(students.items()))
    differ_Z = (teacher_ZYX != first_ZYX).sum(axis=(1, 2))
    seen_Z = ((teacher_ZYX > 0) | (first_ZYX > 0)).sum(axis=(1, 2))
    z = int(np.argmax(differ_Z if differ_Z.any() else seen_Z)) if seen_Z.any() else len(seen_Z) // 2
    box = _around(np.any([m[z] > 0 for m in (teacher_ZYX, *students.values())], axis=0))
    view = scan.view(teacher_ZYX > 0, is_ct)
    grey_YX3, teacher_YX, first_YX = (m[z][box] for m in (base_ZYX3, teacher_ZYX, first_ZYX))
    where = f"slice {z + 1} of {len(base_ZYX3)}" if len(base_ZYX3) > 1 else f"{base_ZYX3.shape[1]} rows"
    if grey_YX3.shape[:2] != base_ZYX3.shape[1:3]:
        where += ", cut to what is labelled"
    size = f"{int(differ_Z[z])} of {teacher_ZYX[z].size} pixels"
    pictures = [
        Picture(
            png=view.with_contours(grey_YX3, labels_ZYX[z][box]),
            caption=f"contours of {name}",
            alt=f"{files.case}, {where}, with the contours of {name}",
        )
        for name, labels_ZYX in {"teacher": teacher_ZYX, **students}.items()
    ]
    pictures.append(
        Picture(
            png=view.with_differences(grey_YX3, teacher_YX, first_YX),
            caption=f"where {tag} and teacher differ: {size}",
            alt=f"{files.case}, {where}: {size} differ between {tag} and its teacher",
        )
    )
    values = {int(v) for m in (teacher_ZYX, *students.values()) for v in np.unique(m[z])} - {0}
    return JudgedCase(
        case=files.case,
        place=place,
        dice=dice,
        where=where,
        pictures=tuple(pictures),
        values=tuple(sorted(values)),
    )


def scan_picture(
    channels: Sequence[ImageSource], *, reader_writer: str, is_ct: bool, labels: Path | None = None
) -> bytes:
    """A PNG of a scan: its slice with most labels and their contours, or its middle slice.

    Raises as `judged_case`.
    """
    scan = _read_image(channels, reader_writer)
    labels_ZYX = np.zeros(scan.base_ZYX3.shape[:3], np.int64)
    if labels is not None:
        labels_ZYX = _read_labels(labels, reader_writer, channels[0].name, scan)
    seen_Z = (labels_ZYX > 0).sum(axis=(1, 2))
    z = int(np.argmax(seen_Z)) if seen_Z.any() else len(seen_Z) // 2
    return scan.view(labels_ZYX > 0, is_ct).with_contours(scan.base_ZYX3[z], labels_ZYX[z])


@dataclass(frozen=True, slots=True)
class _View:
    """How slices become pictures: which values are black and white, the height of a pixel over its width, and in which
    order rows and columns come."""

    window: tuple[float, float]
    aspect: float
    turned: tuple[slice, slice]

    def with_contours(self, base_YX3: NDArray[np.float32], labels_YX: NDArray[np.integer]) -> bytes:
        rgb, labels = self._resized(base_YX3, labels_YX)
        at_border = (labels > 0) & edges(labels)
        for value in np.unique(labels[at_border]):
            rgb[at_border & (labels == value)] = rgb_of(colour_of(int(value)))
        return png_of(rgb)

    def with_differences(
        self, base_YX3: NDArray[np.float32], teacher_YX: NDArray[np.integer], student_YX: NDArray[np.integer]
    ) -> bytes:
        kinds_YX = np.select(
            [teacher_YX == student_YX, student_YX == 0, teacher_YX == 0], [0, 1, 2], default=3
        )  # 0 none, 1 teacher alone, 2 student alone, 3 another label
        rgb, kinds = self._resized(base_YX3, kinds_YX)
        for kind, colour in enumerate((TEACHER_ONLY, STUDENT_ONLY, OTHER_LABEL), start=1):
            mixed = (1 - _ALPHA) * rgb[kinds == kind] + _ALPHA * np.array(rgb_of(colour))
            rgb[kinds == kind] = mixed.astype(np.uint8)
        return png_of(rgb)

    def _resized(
        self, base_YX3: NDArray[np.float32], labels_YX: NDArray[np.integer]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Grey values in the window and labels, in the pixels of the picture."""
        from PIL import Image

        base_YX3, labels_YX = base_YX3[self.turned], labels_YX[self.turned]
        grey = grey_bytes(base_YX3, self.window)
        rows, columns = labels_YX.shape
        height, width = rows * self.aspect, float(columns)
        scale = _PIXELS / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        smooth = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
        rgb = np.array(Image.fromarray(grey).resize(size, smooth))
        labels = np.array(Image.fromarray(labels_YX.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
        return rgb, labels


@dataclass(frozen=True, slots=True)
class _Scan:
    """The first channel three times, or the colours of a picture, and what its reader says of the grid."""

    base_ZYX3: NDArray[np.float32]
    properties: dict[str, Any]

    @property
    def geometry(self) -> dict[str, Any]:
        """Spacing and, where ITK reads, origin and direction (x, y, z); {} where a format has none."""
        return dict(self.properties.get("sitk_stuff", {}))

    def view(self, seen_ZYX: NDArray[np.bool_], is_ct: bool) -> _View:
        y, x = (abs(float(s)) for s in self.properties["spacing"][-2:])
        direction = np.reshape(self.geometry.get("direction", ()), -1)
        turned = _hung(direction.reshape(3, 3)) if direction.size == 9 else (slice(None), slice(None))
        return _View(grey_window(self.base_ZYX3[..., 0], seen_ZYX, is_ct), y / x, turned)


def _read_image(channels: Sequence[ImageSource], reader_writer: str) -> _Scan:
    image_CZYX, properties = image_io(reader_writer).read(channels)
    colours = len(channels) == 1 and len(image_CZYX) in (3, 4)
    base_ZYX3 = np.moveaxis(image_CZYX[:3], 0, -1) if colours else np.repeat(image_CZYX[0][..., None], 3, axis=-1)
    return _Scan(base_ZYX3, properties)


def _read_labels(file: Path, reader_writer: str, case: str, scan: _Scan) -> NDArray[np.int64]:
    """Raises ImageError, MismatchError for a label map on another grid than the image."""
    labels_CZYX, properties = image_io(reader_writer).read_segmentation(file)
    if labels_CZYX.shape[1:] != scan.base_ZYX3.shape[:3]:
        shapes = f"image of shape {scan.base_ZYX3.shape[:3]}, label map of shape {labels_CZYX.shape[1:]}"
        raise MismatchError(f"{case}: {shapes}; expected a label map of this image: {file}")
    of_image, of_labels = scan.geometry, properties.get("sitk_stuff", {})
    if of_image and of_labels:
        voxel = min(of_image["spacing"])
        for name, tolerance in (("spacing", 0.01 * voxel), ("origin", 0.5 * voxel), ("direction", 0.01)):
            if not np.allclose(of_image[name], of_labels[name], rtol=0, atol=tolerance):
                raise MismatchError(
                    f"{case}: {name} of the image is {of_image[name]}, of its label map {of_labels[name]}; expected a "
                    f"label map on the grid of the image: {file}"
                )
    return labels_CZYX[0].astype(np.int64)


def _hung(direction: NDArray[np.float64]) -> tuple[slice, slice]:
    """Order of rows and columns; column j of `direction` is where the index of axis j (x, y, z) goes in LPS."""
    turned = []
    for axis in (1, 0):
        along = direction[:, axis]
        main = int(np.argmax(np.abs(along)))
        to_end = along[main] < 0 if main == 2 else along[main] > 0  # inferior, left and posterior are the ends
        turned.append(slice(None) if to_end else slice(None, None, -1))
    return turned[0], turned[1]


def _around(seen_YX: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The rows and columns of what is labelled with a margin, the same in both; all of them where nothing is."""
    if not seen_YX.any():
        return slice(None), slice(None)
    rows, columns = (np.flatnonzero(seen_YX.any(axis=axis)) for axis in (1, 0))
    (top, bottom), (left, right) = ((int(along[0]), int(along[-1])) for along in (rows, columns))
    margin = max(_LEAST_MARGIN_PIXELS, round(_MARGIN * max(bottom - top, right - left)))
    return slice(max(0, top - margin), bottom + margin + 1), slice(max(0, left - margin), right + margin + 1)
