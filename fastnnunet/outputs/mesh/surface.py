"""The surface of a mask as closed triangles: the faces of its voxels, smoothed where that keeps the volume.

Smoothing is Taubin's (SIGGRAPH 1995), which does not shrink; no vertex leaves the cube between the centres of the eight
voxels around it, so the surface goes on separating the same voxels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastnnunet.outputs.labelled import LabelledImage, Structure

_ROUNDS, _INWARDS, _OUTWARDS = 10, 0.5, -0.53
_MOST_VOLUME_LOST = 0.05  # of what is smaller than some voxels the faces stay as they are


@dataclass(frozen=True, slots=True)
class Surface:
    """Closed; seen from outside, the corners of a triangle run against the clock."""

    vertices_mm: npt.NDArray[np.float64]  # (n, xyz), LPS
    triangles: npt.NDArray[np.int64]  # (m, 3)

    @property
    def volume_mm3(self) -> float:
        a, b, c = self._corners()
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)

    def normals(self) -> npt.NDArray[np.float64]:
        """Of triangles (m, xyz), of length 1 (or 0, where a triangle has no area)."""
        a, b, c = self._corners()
        return _of_length_1(np.cross(b - a, c - a))

    def vertex_normals(self) -> npt.NDArray[np.float64]:
        """Means of the triangles around a vertex by their areas, of length 1."""
        a, b, c = self._corners()
        across = np.cross(b - a, c - a)
        count = len(self.vertices_mm)
        around = self.triangles.ravel()
        sums = [np.bincount(around, np.repeat(across[:, axis], 3), count) for axis in range(3)]
        return _of_length_1(np.stack(sums, axis=-1))

    def _corners(self) -> tuple[npt.NDArray[np.float64], ...]:
        return tuple(self.vertices_mm[self.triangles[:, corner]] for corner in range(3))


def surface_of(labelled: LabelledImage, structure: Structure, *, smooth: bool = True) -> Surface | None:
    """The surface of a structure; None where it has no voxel. Unless `smooth`, that of its voxels."""
    box = labelled.box(structure)
    if box is None:
        return None
    mask_XYZ = np.isin(labelled.labels_ZYX[box], structure.values).transpose(2, 1, 0)
    points, quads = _faces(mask_XYZ)
    origin = np.array([axis.start for axis in box[::-1]]) - 0.5  # a voxel's corner is half a voxel before its centre
    plain = _placed(points + origin, quads, labelled)
    if not smooth:
        return plain
    smoothed = _placed(_smoothed(points, quads) + origin, quads, labelled)
    is_kept = abs(smoothed.volume_mm3 - plain.volume_mm3) <= _MOST_VOLUME_LOST * plain.volume_mm3
    return smoothed if is_kept else plain


def _placed(points: npt.NDArray[np.float64], quads: npt.NDArray[np.int64], labelled: LabelledImage) -> Surface:
    if np.linalg.det(labelled.affine[:3, :3]) < 0:  # what ran against the clock runs with it there
        quads = quads[:, ::-1]
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    return Surface(labelled.points_mm(points[:, ::-1]), triangles)


def _faces(mask_XYZ: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Corners (n, xyz) of faces between the mask and what is not in it, in voxels, and faces (m, 4) of them."""
    padded = np.pad(mask_XYZ, 1)
    shape = np.array(mask_XYZ.shape) + 1  # of corners
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    found = []
    for axis in range(3):
        second, third = strides[(axis + 1) % 3], strides[(axis + 2) % 3]
        around = np.array([0, second, second + third, third])  # against the clock, seen from further along the axis
        inner = tuple(slice(None) if a == axis else slice(1, -1) for a in range(3))
        lines = padded[inner]
        before, after = (lines[tuple(part if a == axis else slice(None) for a in range(3))] for part in _NEIGHBOURS)
        for begins, order in ((before & ~after, around), (after & ~before, around[::-1])):
            corners = np.argwhere(begins) @ strides  # a face lies at the corner after the voxel before it
            found.append(corners[:, None] + order)
    quads = np.concatenate(found)
    used, numbers = np.unique(quads, return_inverse=True)
    points = np.stack(np.unravel_index(used, shape), axis=-1).astype(np.float64)
    return points, numbers.reshape(quads.shape)


_NEIGHBOURS = (slice(None, -1), slice(1, None))


def _smoothed(points: npt.NDArray[np.float64], quads: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    edges = np.concatenate([quads[:, [i, (i + 1) % 4]] for i in range(4)])
    edges = np.unique(np.sort(edges, axis=1), axis=0)
    ends, others = np.concatenate([edges, edges[:, ::-1]]).T
    count = len(points)
    degree = np.bincount(ends, minlength=count)[:, None]
    moved = points
    for _ in range(_ROUNDS):
        for step in (_INWARDS, _OUTWARDS):
            sums = [np.bincount(ends, moved[others, axis], count) for axis in range(3)]
            moved = moved + step * (np.stack(sums, axis=-1) / degree - moved)
    return np.clip(moved, points - 0.5, points + 0.5)


def _of_length_1(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
