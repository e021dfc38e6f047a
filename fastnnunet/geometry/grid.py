"""Where the tiles of a sliding window start."""

from collections.abc import Sequence
from itertools import product

from fastnnunet import native
from fastnnunet.errors import SpecError


def tile_starts(image_shape: Sequence[int], tile_shape: Sequence[int], step_size: float) -> list[list[int]]:
    """Start indices per axis, as nnU-Net 2.8 places them (`compute_steps_for_sliding_window`).

    `step_size` is the largest allowed step as a fraction of the tile; the steps actually taken are spread evenly so
    that the first tile starts at 0 and the last one ends at the border.
    Raises SpecError when a tile is larger than the image (pad first) or the step is outside (0, 1].
    """
    try:
        return native.tile_starts(image_shape, tile_shape, step_size)
    except ValueError as error:
        raise SpecError(str(error)) from error


def tile_slices(
    image_shape: Sequence[int], tile_shape: Sequence[int], step_size: float
) -> list[tuple[int | slice, ...]]:
    """All tiles in nnU-Net's order, each an index into the spatial axes (z, y, x).

    A 2d tile in a 3d image gives `(z, slice, slice)` for every slice z; otherwise one slice per axis.
    """
    if len(tile_shape) == len(image_shape) - 1:
        planes: list[list[int | slice]] = [[z] for z in range(image_shape[0])]
        starts = tile_starts(image_shape[1:], tile_shape, step_size)
    else:
        planes = [[]]
        starts = tile_starts(image_shape, tile_shape, step_size)
    return [
        (*plane, *(slice(s, s + t) for s, t in zip(corner, tile_shape, strict=True)))
        for plane in planes
        for corner in product(*starts)
    ]
