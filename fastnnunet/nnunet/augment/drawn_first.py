"""What happens to a sample is drawn before it is read, so that no more is read than that takes.

nnU-Net's loader reads a patch that is large enough for every rotation and scaling, four times the voxels of a cubic
training patch, and its spatial transform then draws neither of the two for most samples (64 of 100) and crops the
middle. Here the transforms draw right after nnU-Net's loader has chosen where the sample is. Reading draws nothing, so
every number comes from the same place of the same generators as without this module, and the samples are the same.
Shapes: ZYX (or YX) space.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from fastnnunet import native
from fastnnunet.errors import MismatchError
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
    """An image for transforms to look at the shape of; it takes no memory."""
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


class SpatialDrawnFirst(BasicTransform):  # type: ignore[misc]
    """nnU-Net's spatial transform in two steps.

    `draw` says which part of what would be loaded the next sample takes; called with that part, this does what was
    drawn. Called without, it is nnU-Net's. Image and label are sampled together by the compiled core, whose cost does
    not grow with the number of labels, to the same bits (planes: images to 1e-5 of their range).
    Raises MismatchError for a transform with other settings than nnU-Net's trainers give it.
    """

    def __init__(self, spatial: SpatialTransform) -> None:
        super().__init__()
        check_settings(spatial, SAMPLING)
        self._spatial = spatial
        self._drawn: dict[str, Any] | None = None

    @property
    def grid(self) -> torch.Tensor | None:
        """Where the next sample is interpolated, (patch, D) in units of what is loaded; None: it is only cropped."""
        return None if self._drawn is None else self._drawn["grid"]

    def draw(self, loaded_zyx: Sequence[int]) -> tuple[slice, ...]:
        """Draw for the next sample: the part of the last axes of `loaded_zyx` to load."""
        patch = [int(n) for n in self._spatial.patch_size]
        space = loaded_zyx[-len(patch) :]
        self._drawn = self._spatial.get_parameters(image=image_of(1, space))
        return middle(patch, space) if self.grid is None else tuple(slice(0, n) for n in space)

    def __call__(self, **sample: Any) -> dict[str, Any]:
        if self._drawn is None:
            return dict(self._spatial(**sample))
        grid, self._drawn = self.grid, None
        if grid is None:
            return sample
        image, label = (
            t.reshape(len(t), *(1,) * (4 - t.ndim), *t.shape[1:]).numpy()
            for t in (sample["image"], sample["segmentation"])
        )
        outside = int(self._spatial.padding_value_seg)
        values, labels = native.sample(image, label, points_of(grid), outside, threads=1)
        patch = grid.shape[:-1]
        return sample | {
            "image": torch.from_numpy(values.reshape(-1, *patch)),
            "segmentation": torch.from_numpy(labels.reshape(-1, *patch)),
        }


class DrawnBoxes:
    """Stands for `get_bbox` of nnU-Net's `loader`: the part of its box that the transforms take, once they have drawn.

    `loader.transforms.begin(data set, box)` returns that part.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        loader.get_bbox = self

    def __call__(self, *where: Any) -> Box:
        """First and last voxel + 1 along each axis."""
        loader = self._loader
        lower, upper = type(loader).get_bbox(loader, *where)
        box: Box = loader.transforms.begin(loader._data, (list(lower), list(upper)))
        return box
