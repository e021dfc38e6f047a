"""Surfaces of binary masks and the distances between them, in millimetres.

Follows the definition of S. Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and
neck anatomy for radiotherapy" (arXiv:1809.04430, 2018), section "Performance metrics": the surface of a mask is its
half-way isosurface; it is sampled at the corners of the voxel grid, where eight voxels meet, and every sample weighs as
much as the area (mm^2) of the isosurface in the cell spanned by the centres of those eight voxels. A structure that
touches the border of the image is closed there.

The area of each of the 256 possible cells is not read from a table of triangles but computed from the geometry: the
isosurface crosses a cell edge at its middle, a face with two crossings holds the segment between them, a face with four
crossings cuts off its two set corners, and the closed polygons made of those segments are filled from their centroid.
(The authors' own implementation reads marching-cubes triangles instead: the same samples and distances, with areas that
differ by a few percent in cells whose polygon is not flat.)
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastnnunet.errors import MismatchError

Corner = tuple[int, int, int]
Edge = tuple[Corner, Corner]
CORNERS: tuple[Corner, ...] = tuple((i >> 2 & 1, i >> 1 & 1, i & 1) for i in range(8))  # bit i of a code is CORNERS[i]


@dataclass(frozen=True, slots=True)
class SurfaceDistances:
    """Both directed distance samples with their weights; all four arrays are one-dimensional float64."""

    reference_mm: NDArray[np.float64]  # from each sample of the reference surface to the predicted surface
    reference_area_mm2: NDArray[np.float64]
    prediction_mm: NDArray[np.float64]
    prediction_area_mm2: NDArray[np.float64]


def surface_distances(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
    ignore: NDArray[np.bool_] | None = None,
) -> SurfaceDistances | None:
    """Distances between the surfaces of two masks (z, y, x), or None when either mask is empty.

    A single slice (z = 1) is treated as a plane figure: its outline counts, not its two flat faces.
    Samples that touch an `ignore` voxel get no weight. Raises MismatchError when the shapes differ.
    """
    if reference.shape != prediction.shape or reference.ndim != 3:
        raise MismatchError(
            f"surface distances need two masks of one 3d shape; got {reference.shape} and {prediction.shape}"
        )
    if ignore is not None:
        reference, prediction = reference & ~ignore, prediction & ~ignore
    if not reference.any() or not prediction.any():
        return None
    from scipy.ndimage import distance_transform_edt

    planar = reference.shape[0] == 1
    box = _bounding_box(reference | prediction)
    areas = cell_areas_mm2(spacing_mm)
    codes_ref = _cell_codes(reference[box], planar)
    codes_pred = _cell_codes(prediction[box], planar)
    border_ref, border_pred = (areas[c] > 0 for c in (codes_ref, codes_pred))
    weights = np.float64(1.0) if ignore is None else (_cell_codes(ignore[box], planar) == 0).astype(np.float64)
    to_ref = distance_transform_edt(~border_ref, sampling=spacing_mm)
    to_pred = distance_transform_edt(~border_pred, sampling=spacing_mm)
    return SurfaceDistances(
        to_pred[border_ref],
        (areas[codes_ref] * weights)[border_ref],
        to_ref[border_pred],
        (areas[codes_pred] * weights)[border_pred],
    )


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    ranges = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        ranges.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(ranges)


def _cell_codes(mask: NDArray[np.bool_], planar: bool) -> NDArray[np.uint8]:
    """Code of each cell between voxels, with background around the image (planar: one layer of cells along z)."""
    around = np.pad(np.repeat(mask, 2, axis=0) if planar else mask, [(0, 0) if planar else (1, 1), (1, 1), (1, 1)])
    shape = tuple(n - 1 for n in around.shape)
    codes = np.zeros(shape, np.uint8)
    for bit, corner in enumerate(CORNERS):
        window = tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))
        codes |= around[window].astype(np.uint8) << bit
    return codes


@lru_cache(maxsize=64)
def cell_areas_mm2(spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """Isosurface area in a cell for each of the 256 codes; 0 for the empty and the full cell."""
    scale = np.asarray(spacing_mm, np.float64)
    areas = np.zeros(256)
    for code in range(1, 255):
        for loop in _loops(code):
            points = np.array([(np.add(*edge)) / 2 for edge in loop]) * scale
            spokes = points - points.mean(axis=0)
            areas[code] += np.linalg.norm(np.cross(spokes, np.roll(spokes, -1, axis=0)), axis=1).sum() / 2
    areas.flags.writeable = False
    return areas


def _loops(code: int) -> list[list[Edge]]:
    """Closed polygons of the isosurface in one cell, each as the cell edges it crosses in order."""
    value = {corner: bool(code >> bit & 1) for bit, corner in enumerate(CORNERS)}
    neighbours: dict[Edge, list[Edge]] = {}
    for axis in range(3):
        for side in (0, 1):
            ring = [_on_face(axis, side, u, v) for u, v in ((0, 0), (0, 1), (1, 1), (1, 0))]
            for a, b in _face_segments(ring, value):
                neighbours.setdefault(a, []).append(b)
                neighbours.setdefault(b, []).append(a)
    loops = []
    while neighbours:
        edge = next(iter(neighbours))
        loop = []
        while edge in neighbours:  # every crossed edge belongs to two faces, so each point has two neighbours
            loop.append(edge)
            ahead = neighbours.pop(edge)
            edge = next((e for e in ahead if e in neighbours), edge)
        loops.append(loop)
    return loops


def _on_face(axis: int, side: int, u: int, v: int) -> Corner:
    free = iter((u, v))
    z, y, x = (side if a == axis else next(free) for a in range(3))
    return z, y, x


def _face_segments(ring: list[Corner], value: dict[Corner, bool]) -> list[tuple[Edge, Edge]]:
    edges: list[Edge] = [_edge(ring[i], ring[(i + 1) % 4]) for i in range(4)]
    crossed = [e for e in edges if value[e[0]] != value[e[1]]]
    if len(crossed) == 2:
        return [(crossed[0], crossed[1])]
    if len(crossed) == 4:  # diagonal: cut off the two set corners; edges[i - 1] and edges[i] meet at ring[i]
        return [(edges[i - 1], edges[i]) for i in range(4) if value[ring[i]]]
    return []


def _edge(a: Corner, b: Corner) -> Edge:
    return (a, b) if a < b else (b, a)
