"""What the ways to predict an image have in common: the sliding window, and one pass."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

from fastnnunet.errors import NoMemoryError
from fastnnunet.events import Listener
from fastnnunet.geometry.chunked_window import Bounds, Index
from fastnnunet.runtime.arithmetic import Arithmetic, Array
from fastnnunet.runtime.sliding_window import Network, Predict

_log = logging.getLogger(__name__)
Finished = Iterator[tuple[Index, Any]]  # float16 arrays of NumPy or of a GPU


class Chunks(Protocol):
    """Parts of an image's logits, layers of z in bands of y and whole along x.

    Each is handed out after those before it along z and along y.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the image."""

    @property
    def grid(self) -> tuple[int, int, int]: ...

    @property
    def bounds(self) -> tuple[Bounds, Bounds, Bounds]:
        """For each axis where chunks begin, and where the last one ends."""

    def chunk_slices(self, number: Index) -> tuple[slice, slice, slice]: ...


class Way(Protocol):
    """How the logits of an image come about."""

    def crop(self, shape_zyx: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> list[tuple[int, int]]:
        """What of a 3d image to predict by itself for the voxels from `begin` to `end`: where it begins and how long it
        is along each axis. It may reach into the zeros around the image. 2d networks are not cropped.
        """

    def smaller(self, shape_zyx: Sequence[int]) -> Self | None:
        """The same with smaller tiles for an image of that shape; None where they are the smallest already."""

    def begin(
        self,
        data_CZYX: Array,
        network: Network,
        *,
        whole: bool,
        margin: int,
        progress: Listener,
        threads: int | None,
    ) -> tuple[Chunks, Finished]:
        """The chunks of an image (one if `whole`), and number and logits (H, its voxels) of each when finished.

        Logits have `margin` more planes and rows before the chunk, left to their receiver. `network` maps (N, C, *tile)
        to (N, H, *tile), float32; what it returns is used before it is called again. `progress` hears of every tile.
        Raises SpecError before anything is computed, BackendError when the logits leave the range of float16.
        """


class WayElsewhere(Way, Protocol):
    """A way for images that lie elsewhere too."""

    def begin_tiles(
        self,
        shape: tuple[int, ...],
        predict: Predict,
        *,
        whole: bool,
        margin: int,
        progress: Listener,
        arithmetic: Arithmetic,
    ) -> tuple[Chunks, Finished]:
        """The same of an image of that shape which lies elsewhere, say on a GPU: its tiles are predicted there."""


W = TypeVar("W", bound=Way)
Made = TypeVar("Made")


def in_memory(way: W, shape_zyx: Sequence[int], attempt: Callable[[W], Made]) -> Made:
    """What `attempt` makes with a way, or with smaller tiles, as long as a network finds no memory for them.

    Each time tiles are half as large. Raises what `attempt` does of the smallest ones.
    """
    while True:
        try:
            return attempt(way)
        except NoMemoryError as error:
            smaller = way.smaller(shape_zyx)
            if smaller is None:
                raise
            _log.warning("%s\ngoing on with smaller tiles; a memory limit spares the attempt", error)
            way = smaller
