"""Where tiles and chunks of an image lie, so that a sliding window's result can leave chunk by chunk.

Tiles are visited in C order. A chunk is complete once the last tile that reaches it has been added, so memory need hold
only the chunks that are begun and not complete: about half a tile's depth of the image, whatever the image's size.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from fastnnunet import native
from fastnnunet.errors import SpecError

Index = tuple[int, int, int]
Bounds = tuple[int, ...]
ChunkedWindow = native.ChunkedWindow


def chunked_window(
    shape_zyx: Sequence[int], patch_size: Sequence[int], step_size: float, chunk_zyx: Sequence[int]
) -> ChunkedWindow:
    """The window over an image in chunks of one size (smaller at its end).

    A patch of two axes visits every slice. An image smaller than the patch is thought to lie in the middle of a padded
    one. Raises SpecError for a bad step.
    """
    try:
        return ChunkedWindow.of_chunks(shape_zyx, patch_size, step_size, chunk_zyx)
    except ValueError as error:
        raise SpecError(str(error)) from error


def own_part(window: ChunkedWindow, number: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The voxels of the image that lie nearer to the middle of this tile than of any other, where they have their
    greatest weight: as slices of the image and of the tile. Each voxel belongs to one tile, halfway to the earlier one;
    a tile that visits what another has visited may be left without any.
    """
    in_image, in_tile = [], []
    places = np.unravel_index(number, [len(starts) for starts in window.starts])
    for place, starts, size, extent in zip(places, window.starts, window.tile, window.shape, strict=True):
        # the weights' peak is at size // 2
        halfway = [(one + other) // 2 + size // 2 + 1 for one, other in itertools.pairwise(starts)]
        lower, upper = [0, *halfway][place], [*halfway, extent][place]
        in_image.append(slice(lower, upper))
        in_tile.append(slice(lower - starts[place], upper - starts[place]))
    return tuple(in_image), tuple(in_tile)


def streamed_window(shape_zyx: Sequence[int], patch_size: Sequence[int], step_size: float) -> ChunkedWindow:
    """The window in chunks that begin and end where tiles do along z and y, and are whole along x; as `chunked_window`.

    So each tile reaches all planes and rows of a chunk or none, and no part of a chunk is held for the sake of another.
    """
    try:
        return ChunkedWindow.streamed(shape_zyx, patch_size, step_size)
    except ValueError as error:
        raise SpecError(str(error)) from error
