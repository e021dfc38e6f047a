"""Outlines of masks as closed polygons along the edges of pixels: what they enclose is the mask and nothing else.

A polygon has one outer ring. Its holes are joined to it by keyholes: a way in and the same way back out, which has no
width (PS3.3 C.8.8.6.3). Ways run through pixels of the mask, a quarter of a pixel beside their centres, so that no
centre lies on a line, and everyone who asks whether a centre is inside gets the same answer.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_DOWN, _UP = 1, 3  # right, down, left, up: clockwise on a screen, the mask at the right hand
_WAY = 0.25  # of a pixel below its upper edge
# of a pixel's four edges: where they begin, seen from its upper left corner (x, y), and where its neighbour is
_BEGINS = ((0, 0), (1, 0), (1, 1), (0, 1))
_BESIDE = ((0, -1), (1, 0), (0, 1), (-1, 0))


@dataclass(eq=False, slots=True)
class _Corner:
    x: float
    y: float
    after: "_Corner | None" = None


@dataclass(slots=True)
class _Ring:
    """A closed way along edges; x, y of corners of pixels."""

    first: _Corner
    component: int
    is_hole: bool
    entry: _Corner  # of a hole: where the topmost of its leftmost lines begins, which goes down


def polygons(mask_YX: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.float64]]:
    """Polygons (n, xy), in pixels from the centre of the first one; the last point is joined to the first.

    Pixels that touch at a corner alone are of different polygons.
    """
    from scipy.ndimage import label

    components_YX, _ = label(mask_YX)  # neighbours share an edge
    rings, edges_up = _rings(components_YX)
    ways: dict[int, list[tuple[float, _Corner]]] = {}
    for hole in rings:
        if hole.is_hole:
            _join(hole, components_YX, edges_up, ways)
    return [_points(ring.first) - 0.5 for ring in rings if not ring.is_hole]


def _join(
    hole: _Ring,
    components_YX: npt.NDArray[np.integer],
    edges_up: dict[tuple[int, int], _Corner],
    ways: dict[int, list[tuple[float, _Corner]]],
) -> None:
    """Put a hole into the ring at its left, which may be that of another hole.

    `ways`, by the corner at which a line begins: those that end on it, and the corner after which it goes on.
    """
    x, row = int(hole.entry.x), int(hole.entry.y)
    height = row + _WAY
    others = np.flatnonzero(components_YX[row, :x] != hole.component)
    end = int(others[-1]) + 1 if others.size else 0
    line = edges_up[end, row]
    on_line = ways.setdefault(id(line), [])
    # the line goes up: what ends on it further down comes first
    _, before = min(((y, corner) for y, corner in on_line if y > height), key=lambda w: w[0], default=(0.0, line))
    there, back = _Corner(end, height), _Corner(end, height, before.after)
    before.after = there
    there.after = _Corner(x, height, hole.entry.after)
    hole.entry.after = _Corner(x, height, back)
    on_line.append((height, back))


def _points(first: _Corner) -> npt.NDArray[np.float64]:
    found, corner = [(first.x, first.y)], first.after
    while corner is not None and corner is not first:
        found.append((corner.x, corner.y))
        corner = corner.after
    return np.array(found, np.float64)


def _rings(components_YX: npt.NDArray[np.integer]) -> tuple[list[_Ring], dict[tuple[int, int], _Corner]]:
    """All rings, and for every edge that goes up, by its pixel (x, y), the corner at which its straight line begins."""
    padded = np.pad(components_YX, 1)
    inside = padded[1:-1, 1:-1] > 0
    width, parts = components_YX.shape[1] + 1, []
    for direction, ((bx, by), (dx, dy)) in enumerate(zip(_BEGINS, _BESIDE, strict=True)):
        beside = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        y, x = np.nonzero(inside & (beside == 0))
        parts.append(np.stack([np.full(len(x), direction), x, y, x + bx, y + by]))
    direction, px, py, x, y = np.concatenate(parts, axis=1)
    step = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])[direction]
    begins, ends = y * width + x, (y + step[:, 1]) * width + x + step[:, 0]
    order = np.argsort(begins, kind="stable")
    place = np.searchsorted(begins[order], ends)
    first = order[place]
    second = order[np.minimum(place + 1, len(order) - 1)]
    # two edges begin where pixels touch at a corner: the way goes on along the same pixel
    pixel = py * width + px
    following = np.where((begins[second] == ends) & (pixel[second] == pixel), second, first)
    turns = direction[following] != direction
    rings: list[_Ring] = []
    edges_up: dict[tuple[int, int], _Corner] = {}
    seen = np.zeros(len(direction), bool)
    follows, is_turn, xs, ys, directions = (a.tolist() for a in (following, turns, x, y, direction))
    pixels_x, pixels_y = px.tolist(), py.tolist()
    for start in np.flatnonzero(turns).tolist():
        edge = follows[start]
        if seen[edge]:
            continue
        first_corner = corner = _Corner(xs[edge], ys[edge])
        component, area = int(components_YX[pixels_y[edge], pixels_x[edge]]), 0
        entry = None
        while True:
            seen[edge] = True
            if directions[edge] == _UP:
                edges_up[pixels_x[edge], pixels_y[edge]] = corner
            area += xs[edge] * (1 if directions[edge] == _DOWN else -1 if directions[edge] == _UP else 0)
            if is_turn[edge]:
                if directions[edge] == _DOWN and (entry is None or (corner.x, corner.y) < (entry.x, entry.y)):
                    entry = corner
                edge = follows[edge]
                if seen[edge]:
                    break
                corner.after = _Corner(xs[edge], ys[edge])
                corner = corner.after
            else:
                edge = follows[edge]
        corner.after = first_corner
        rings.append(_Ring(first_corner, component, area < 0, entry or first_corner))
    return rings, edges_up
