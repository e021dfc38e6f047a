"""Weighted means of a sliding window's tiles, which leave in chunks: memory holds only what still waits for tiles."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.geometry.chunked_window import ChunkedWindow, Index
from fastnnunet.geometry.gaussian import gaussian_weights

Float32Array = npt.NDArray[np.float32]
Block = tuple[Index, Float32Array]  # chunk number (z, y, x) and its values (C, z, y, x)


class ChunkedMean:
    """Gaussian-weighted means of overlapping tiles, kept per chunk.

    A running mean rather than a sum: at the corners of a tile the weight is 1e-8 of its peak, and a product that small
    keeps no digits in half precision, in which large images are averaged.
    """

    def __init__(self, window: ChunkedWindow, dtype: npt.DTypeLike = np.float32) -> None:
        """`dtype` is that of the means while they wait."""
        self.window = window
        self.dtype = np.dtype(dtype)
        tile = window.tile[1:] if window.tile[0] == 1 else window.tile  # a slice has the weights of its two axes
        self._weights = gaussian_weights(tile).reshape(window.tile)
        self._left = window.tiles_per_chunk
        self._means: dict[Index, tuple[npt.NDArray[Any], Float32Array]] = {}

    def add(self, tile_number: int, values_CZYX: Float32Array) -> Iterator[Block]:
        """Add a tile's values (C, tile); yields the chunks it completes, as float32.

        Every tile must be added once, in order. The yielded arrays are the caller's.
        """
        window = self.window
        for number in window.chunks_of(tile_number):
            in_chunk, in_tile = window.overlap(tile_number, number)
            if number not in self._means:
                extent = [s.stop - s.start for s in window.chunk_slices(number)]
                self._means[number] = np.zeros((len(values_CZYX), *extent), self.dtype), np.zeros(extent, np.float32)
            mean, weight = self._means[number]
            mean, weight = mean[:, *in_chunk], weight[in_chunk]
            tile_weights = self._weights[in_tile]
            weight += tile_weights
            step = values_CZYX[:, *in_tile] - mean
            step *= tile_weights / weight
            step += mean
            mean[...] = step
            self._left[number] -= 1
            if self._left[number] == 0:
                yield number, self._means.pop(number)[0].astype(np.float32, copy=False)
