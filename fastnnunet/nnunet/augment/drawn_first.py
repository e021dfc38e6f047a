"""What happens to a sample is drawn before it is read, so that no more is read than that takes.

nnU-Net's loader reads a patch that is large enough for every rotation and scaling, four times the voxels of a cubic
training patch, and its spatial transform then draws neither of the two for most samples (64 of 100) and crops the
middle. Here the transforms draw right after nnU-Net's `get_bbox` has chosen where the sample is. Reading draws nothing,
so every number comes from the same place of the same generators as in nnU-Net, and the samples are the same.
Shapes: C channels, K label channels, ZYX (or YX) space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastnnunet import native
from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.v2 import SpatialTransform
from fastnnunet.nnunet.versions import OLDEST

Box = tuple[list[int], list[int]]  # first voxel, and last + 1, along each axis; may reach beyond the volume

# settings of nnU-Net's spatial transform that sampling here takes for granted
SAMPLING = {
    "random_crop": False,
    "mode_seg": "bilinear",
    "border_mode_seg": "constant",
    "mode_image": "bilinear",
    "padding_mode_image": "zeros",
    "align_corners": False,
    "seg_tiebreak": "nearest",
}


def check_settings(transform: Any, settings: Mapping[str, Any]) -> None:
    """Raise MismatchError where a transform of nnU-Net does not have these settings, or is too old to know them."""
    for name, expected in settings.items():
        kind = type(transform).__name__
        if not hasattr(transform, name):
            raise MismatchError(
                f"{kind} has no {name}, expected {expected!r}: batchgeneratorsv2 is too old\n"
                f"update: pip install 'batchgeneratorsv2>={OLDEST['batchgeneratorsv2']}'"
            )
        if (got := getattr(transform, name)) != expected:
            raise MismatchError(f"{kind} has {name}={got!r}, expected {expected!r}")


def image_of(num_channels: int, space: Sequence[int]) -> torch.Tensor:
    """An image for transforms, which draw for its shape, to look at; it takes no memory."""
    return torch.empty(1).expand(num_channels, *space)


def middle(patch_zyx: Sequence[int], loaded_zyx: Sequence[int]) -> tuple[slice, ...]:
    """Where a patch lies that nnU-Net crops from the middle of what was loaded."""
    starts = [n // 2 - p // 2 for n, p in zip(loaded_zyx, patch_zyx, strict=True)]
    return tuple(slice(s, s + p) for s, p in zip(starts, patch_zyx, strict=True))


def size_of(box: Box) -> list[int]:
    """Voxels along each axis."""
    return [upper - lower for lower, upper in zip(*box, strict=True)]


def within(box: Box, part: Sequence[slice]) -> Box:
    """The part of a box, given for its last axes."""
    lower, upper = map(list, box)
    for axis, where in enumerate(part, start=len(lower) - len(part)):
        lower[axis], upper[axis] = lower[axis] + where.start, lower[axis] + where.stop
    return lower, upper


def points_of(grid: torch.Tensor) -> np.ndarray:
    """A grid (space, D) as the compiled core takes it: (points, D)."""
    return np.ascontiguousarray(grid.reshape(-1, grid.shape[-1]).numpy())


@dataclass(frozen=True, slots=True)
class SpatialDraw:
    """What was drawn for a sample: the part of the last axes to load, and where in it the sample is interpolated.

    `grid` (patch, D) counts in units of what is loaded; None: the part is the sample.
    """

    part: tuple[slice, ...]
    grid: torch.Tensor | None


class SpatialDrawnFirst:
    """nnU-Net's spatial transform in two steps: `draw` says what to load for a sample, `sample` does what was drawn.

    Image and label are sampled together by the compiled core, whose cost does not grow with the number of labels, to
    the same bits (planes: images to 1e-5 of their range).
    Raises MismatchError for a transform with other settings than nnU-Net's trainers give it.
    """

    def __init__(self, spatial: SpatialTransform) -> None:
        check_settings(spatial, SAMPLING)
        self._spatial = spatial

    @property
    def _dims(self) -> int:
        return len(self._spatial.patch_size)

    def draw(self, loaded_zyx: Sequence[int]) -> SpatialDraw:
        """Draw for a sample of a box of `loaded_zyx` voxels from the global generators of NumPy and torch."""
        space = loaded_zyx[-self._dims :]
        grid = self._spatial.get_parameters(image=image_of(1, space))["grid"]
        patch = [int(n) for n in self._spatial.patch_size]
        return SpatialDraw(middle(patch, space) if grid is None else tuple(slice(0, n) for n in space), grid)

    def sample(
        self, image_CZYX: torch.Tensor, label_KZYX: torch.Tensor, grid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and label of the part that was drawn at the points of its grid; planes of a volume all alike."""
        leading = [t.shape[: -self._dims] for t in (image_CZYX, label_KZYX)]
        image, label = (t.reshape(-1, *t.shape[-self._dims :]) for t in (image_CZYX, label_KZYX))
        if grid is not None:
            values, labels = (t.reshape(len(t), *(1,) * (3 - self._dims), *t.shape[1:]).numpy() for t in (image, label))
            outside = int(self._spatial.padding_value_seg)
            sampled = native.sample(values, labels, points_of(grid), outside, threads=1)
            image, label = map(torch.from_numpy, sampled)
        space = image.shape[1:] if grid is None else grid.shape[:-1]
        return image.reshape(*leading[0], *space), label.reshape(*leading[1], *space)
