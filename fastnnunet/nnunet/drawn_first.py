"""What happens to a sample is drawn before it is read, so that no more is read than that takes.

nnU-Net's loader reads a patch that is large enough for every rotation and scaling, two to four times the voxels of the
training patch, and its spatial transform then draws neither of the two for most samples (64 of 100) and crops the
middle. Here the transforms draw right after nnU-Net's loader has chosen where the sample is. Reading draws nothing, so
every number comes from the same place of the same generators as without this module, and the samples are the same.
Shapes: ZYX (or YX) space.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from fastnnunet import native


def image_of(num_channels: int, space: Sequence[int]) -> torch.Tensor:
    """An image for transforms to look at the shape of; it takes no memory."""
    return torch.empty(1).expand(num_channels, *space)


def middle(patch_zyx: Sequence[int], loaded_zyx: Sequence[int]) -> tuple[slice, ...]:
    """Where a patch lies that nnU-Net crops from the middle of what was loaded."""
    starts = [n // 2 - p // 2 for n, p in zip(loaded_zyx, patch_zyx, strict=True)]
    return tuple(slice(s, s + p) for s, p in zip(starts, patch_zyx, strict=True))


# settings of nnU-Net's spatial transform that the compiled core samples with
SAMPLING = {
    "mode_seg": "bilinear",
    "border_mode_seg": "constant",
    "mode_image": "bilinear",
    "padding_mode_image": "zeros",
    "align_corners": False,
    "seg_tiebreak": "nearest",
}


class SpatialDrawnFirst(BasicTransform):  # type: ignore[misc]
    """nnU-Net's spatial transform, for patches that it does not crop at random.

    `draw`, called first, says which part of what would be loaded it takes; called with that part it does what was
    drawn. Called without having drawn it is nnU-Net's. With nnU-Net's settings image and label are sampled together by
    the compiled core, whose cost does not grow with the number of labels, to the same bits (planes to 1e-5).
    """

    def __init__(self, spatial: SpatialTransform) -> None:
        super().__init__()
        self._spatial = spatial
        self._by_core = all(getattr(spatial, name) == value for name, value in SAMPLING.items())
        self._drawn: dict[str, Any] | None = None

    def draw(self, loaded_zyx: Sequence[int]) -> tuple[slice, ...]:
        """Draw for the next sample: the part of the last axes of `loaded_zyx` to load."""
        patch = [int(n) for n in self._spatial.patch_size]
        space = loaded_zyx[-len(patch) :]
        self._drawn = self._spatial.get_parameters(image=image_of(1, space))
        return tuple(slice(0, n) for n in space) if self._drawn["grid"] is not None else middle(patch, space)

    def __call__(self, **sample: Any) -> dict[str, Any]:
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return dict(self._spatial(**sample))
        if drawn["grid"] is None:
            return sample
        return self._sampled(sample, drawn["grid"]) if self._by_core else dict(self._spatial.apply(sample, **drawn))

    def _sampled(self, sample: dict[str, Any], grid: torch.Tensor) -> dict[str, Any]:
        image, label = (
            t.reshape(len(t), *(1,) * (4 - t.ndim), *t.shape[1:]).numpy()
            for t in (sample["image"], sample["segmentation"])
        )
        points = np.ascontiguousarray(grid.reshape(-1, grid.shape[-1]).numpy())
        values, labels = native.sample(image, label, points, int(self._spatial.padding_value_seg), threads=1)
        patch = grid.shape[:-1]
        return sample | {
            "image": torch.from_numpy(values.reshape(-1, *patch)),
            "segmentation": torch.from_numpy(labels.reshape(-1, *patch)),
        }


def spatial_drawn_first(transforms: Sequence[Any]) -> tuple[list[Any], SpatialDrawnFirst | None]:
    """The same transforms, and the spatial one among them that can be drawn first."""
    out = list(transforms)
    for number, transform in enumerate(transforms):
        if type(transform) is SpatialTransform and not transform.random_crop:
            out[number] = SpatialDrawnFirst(transform)
            return out, out[number]
    return out, None


class DrawnBoxes:
    """Stands for `get_bbox` of nnU-Net's `loader`: the part of its box that the transforms say, once they have drawn.

    `loader.transforms.draw(shape)` returns that part of the last axes of an image of this shape.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        loader.get_bbox = self

    def __call__(self, *where: Any) -> tuple[list[int], list[int]]:
        """First and last voxel + 1 along each axis."""
        loader = self._loader
        lower, upper = type(loader).get_bbox(loader, *where)
        loaded = [u - k for k, u in zip(lower, upper, strict=True)]
        part = loader.transforms.draw(loaded[1:] if loader.patch_size_was_2d else loaded)
        fixed = len(lower) - len(part)
        starts = [k + s.start for k, s in zip(lower[fixed:], part, strict=True)]
        stops = [k + s.stop for k, s in zip(lower[fixed:], part, strict=True)]
        return [*lower[:fixed], *starts], [*upper[:fixed], *stops]
