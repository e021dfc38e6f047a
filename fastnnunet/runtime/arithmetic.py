"""What the window and the labelling of chunks do to arrays, so that they are one code for the CPU and for GPUs.

Axes: H head, Z Y X space. Logits and sums may be float16 arrays of NumPy or of a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.geometry.chunked_window import ChunkedWindow
from fastnnunet.geometry.gaussian import gaussian_weights
from fastnnunet.geometry.grid import tile_slices
from fastnnunet.geometry.half import check_half_limits
from fastnnunet.geometry.padding import centre_padding, inner_slices
from fastnnunet.geometry.resample import ResamplePlan
from fastnnunet.runtime.logits import LabelRule, label_locally

Array = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """How the tiles of a window weigh."""

    patch_size: tuple[int, ...]  # zyx; yx for 2d
    step_size: float
    use_gaussian: bool


class Arithmetic(Protocol):
    """Arrays are whatever `empty` makes: they have `shape`, `nbytes`, and views by NumPy's rules."""

    def empty(self, shape: Sequence[int], *, zero: bool = False) -> Any:
        """A float16 array."""

    def weights(self, chunks: ChunkedWindow, weighting: Weighting) -> tuple[Any, Any]:
        """The weights (Z, Y, X) of a tile, and float16 sums of those of all tiles, of the shape of the image."""

    def add_weighted(self, logits_HZYX: Any, weights_ZYX: Any, sums_HZYX: Any, *, is_first: bool) -> None:
        """sums = half(sums + logits * weights); `is_first`: half(logits * weights). Weights None: all one."""

    def divide(self, sums_HZYX: Any, total_ZYX: Any) -> None:
        """sums = half(sums / total), of an array or a number.

        Raises BackendError, here or when the labels are fetched, where values leave the range of float16.
        """

    def assign(self, target: Any, source: Any) -> None:
        """Copy float16 values between views of equal shapes."""

    def label(
        self, logits_HZYX: Any, plan: ResamplePlan | None, rule: LabelRule, labels_ZYX: Any, part: native.Part
    ) -> None:
        """See `label_locally`."""


@dataclass(frozen=True, slots=True)
class HostArithmetic:
    """On the CPU, by the core."""

    threads: int | None = None

    def empty(self, shape: Sequence[int], *, zero: bool = False) -> HalfArray:
        return np.zeros(shape, np.float16) if zero else np.empty(shape, np.float16)

    def weights(self, chunks: ChunkedWindow, weighting: Weighting) -> tuple[Array, HalfArray]:
        weights_ZYX = tile_weights(weighting.patch_size, weighting.use_gaussian).reshape(chunks.tile)
        padding = centre_padding(chunks.shape, chunks.tile)
        padded_shape = tuple(n + below + above for n, (below, above) in zip(chunks.shape, padding, strict=True))
        return weights_ZYX, _summed_weights(padded_shape, weighting)[inner_slices(chunks.shape, padding)]

    def add_weighted(
        self, logits_HZYX: Array, weights_ZYX: Array | None, sums_HZYX: HalfArray, *, is_first: bool
    ) -> None:
        if weights_ZYX is None:
            weights_ZYX = np.broadcast_to(np.ones(sums_HZYX.shape[-1], np.float32), sums_HZYX.shape[1:])
        native.add_weighted(logits_HZYX, weights_ZYX, sums_HZYX, is_first=is_first, threads=self.threads)

    def divide(self, sums_HZYX: HalfArray, total_ZYX: HalfArray | int) -> None:
        what = "the weighted logits"
        if isinstance(total_ZYX, int):
            what = "the logits"
            total_ZYX = np.broadcast_to(np.full(sums_HZYX.shape[-1], total_ZYX, np.float16), sums_HZYX.shape[1:])
        sum_limits, quotient_limits = native.divide(sums_HZYX, total_ZYX, threads=self.threads)
        check_half_limits(sum_limits, what)
        check_half_limits(quotient_limits, "the logits")

    def assign(self, target: HalfArray, source: HalfArray) -> None:
        target[...] = source

    def label(
        self,
        logits_HZYX: native.Logits,
        plan: ResamplePlan | None,
        rule: LabelRule,
        labels_ZYX: npt.NDArray[Any],
        part: native.Part,
    ) -> None:
        label_locally(logits_HZYX, plan, rule, labels_ZYX, self.threads, part)


def tile_weights(patch_size: tuple[int, ...], use_gaussian: bool) -> Array:
    """Of each voxel of a tile."""
    return gaussian_weights(patch_size) if use_gaussian else np.ones(patch_size, np.float32)


@lru_cache(maxsize=2)
def _summed_weights(image_shape: tuple[int, ...], weighting: Weighting) -> HalfArray:
    """The sum of the weights of all tiles at every voxel, rounded after each one."""
    patch_size = weighting.patch_size
    weights = tile_weights(patch_size, weighting.use_gaussian).astype(np.float16)  # exact
    planes = weights[None] if len(patch_size) == 2 else weights
    total = np.zeros((1, *image_shape), np.float16)
    for tile in tile_slices(image_shape, patch_size, weighting.step_size):
        at = (slice(tile[0], tile[0] + 1), *tile[1:]) if isinstance(tile[0], int) else tile
        native.add_halves(planes[None], total[:, *at])
    total.setflags(write=False)
    return total[0]
