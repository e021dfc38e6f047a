"""Where tiles and chunks of an image lie, so that a sliding window's result can leave chunk by chunk.

Tiles are visited in C order. A chunk is complete once the last tile that reaches it has been added, so memory need hold
only the chunks that are begun and not complete: about half a tile's depth of the image, whatever the image's size.
"""

from collections.abc import Sequence

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


def streamed_window(shape_zyx: Sequence[int], patch_size: Sequence[int], step_size: float) -> ChunkedWindow:
    """The window in chunks that begin and end where tiles do along z and y, and are whole along x; as `chunked_window`.

    So each tile reaches all planes and rows of a chunk or none, and no part of a chunk is held for the sake of another.
    """
    try:
        return ChunkedWindow.streamed(shape_zyx, patch_size, step_size)
    except ValueError as error:
        raise SpecError(str(error)) from error
