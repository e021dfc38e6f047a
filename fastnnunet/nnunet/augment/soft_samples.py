"""The soft label of a sample, and where there is one.

It is read once it is known which part of the case the sample takes (`drawn_first.py`), sampled on the grid of image and
label, and then is a `regression_target`, which mirroring moves and intensity transforms leave alone.

Beyond the volume no teacher said anything, and zeros there would read as certain background, far more certain than a
tempered teacher is inside. So a voxel that lies at least half inside the volume has the mean opinion of that part, and
any other has none.

Against the hard label: both are drawn, sampled and mirrored together, the soft label interpolated linearly, the label
by nnU-Net's argmax of linearly interpolated one-hot maps; neither sees a change of intensities. Beyond the volume the
label is background.
Shapes: S stored soft-label channels, ZYX (or YX) space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fastnnunet import native
from fastnnunet.nnunet.augment.drawn_first import Box, SpatialDraw, SpatialDrawnFirst, points_of, size_of
from fastnnunet.nnunet.v2 import ComposeTransforms, Convert2DTo3DTransform, Convert3DTo2DTransform, SpatialTransform

NO_OPINION = -1.0  # in all channels of a soft label, where there is none


class SoftLabels(Protocol):
    """Random access to soft labels of preprocessed cases; opened lazily in each loader process."""

    num_channels: int

    def read(self, case_id: str, lower_zyx: tuple[int, ...], upper_zyx: tuple[int, ...]) -> np.ndarray:
        """Float32 (S, z, y, x) probabilities inside the volume."""


@dataclass(frozen=True, slots=True)
class SoftBox:
    """The soft label of a box of `space_zyx` voxels: values (S, z, y, x) inside the volume, from `start_zyx` on."""

    values_SZYX: np.ndarray
    start_zyx: tuple[int, ...]
    space_zyx: tuple[int, ...]


def read_box(soft: SoftLabels, case_id: str, shape_zyx: Sequence[int], box: Box) -> SoftBox:
    """Read what of a box lies inside the volume of a case, which has `shape_zyx` voxels."""
    lower = tuple(min(max(0, k), n) for k, n in zip(box[0], shape_zyx, strict=True))
    upper = tuple(max(k, min(u, n)) for k, u, n in zip(lower, box[1], shape_zyx, strict=True))
    start = tuple(k - first for k, first in zip(lower, box[0], strict=True))
    size = [u - k for k, u in zip(lower, upper, strict=True)]
    if 0 in size:
        return SoftBox(np.empty((soft.num_channels, *size), np.float32), start, tuple(size_of(box)))
    return SoftBox(soft.read(case_id, lower, upper), start, tuple(size_of(box)))


def placed(soft: SoftBox, outside: float = NO_OPINION) -> np.ndarray:
    """The soft label of the whole box (S, space), `outside` where there is none."""
    out = np.full((len(soft.values_SZYX), *soft.space_zyx), outside, np.float32)
    where = (slice(s, s + n) for s, n in zip(soft.start_zyx, soft.values_SZYX.shape[1:], strict=True))
    out[(slice(None), *where)] = soft.values_SZYX
    return out


def sampled(soft: SoftBox, grid: torch.Tensor) -> np.ndarray:
    """The same at the points of a grid (z, y, x, 3), or (y, x, 2) for every plane alike: (S, z, y, x)."""
    points, patch, values, start, space = (
        points_of(grid),
        grid.shape[:-1],
        soft.values_SZYX,
        soft.start_zyx,
        soft.space_zyx,
    )
    if len(patch) == 3:
        return native.sample_inside(values, space, start, points, NO_OPINION, threads=1).reshape(-1, *patch)
    planes = values.reshape(-1, 1, *values.shape[2:])
    flat = native.sample_inside(planes, (1, *space[1:]), (0, *start[1:]), points, NO_OPINION, threads=1)
    of_planes = SoftBox(flat.reshape(*values.shape[:2], *patch), (start[0], 0, 0), (space[0], *patch))
    return placed(of_planes)


def opinions(stacked: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """Soft label and coverage (..., S + 1 at `axis`, ...), zeros beyond the volume, after sampling: (..., S, ...).

    Coverage is one inside the volume: where less than half of it is left the result is NO_OPINION, elsewhere the soft
    label is divided by it.
    """
    soft, coverage = stacked.split([stacked.shape[axis] - 1, 1], axis)
    return torch.where(coverage >= 0.5, soft / coverage.clamp(min=0.5), NO_OPINION)


def has_opinion(soft_NSZYX: torch.Tensor) -> torch.Tensor:
    """Where a soft label says something, bool (N, 1, space)."""
    return soft_NSZYX[:, :1] != NO_OPINION


class SampleTransforms:
    """nnU-Net's transforms, which make a sample; a soft label is appended to its targets."""

    def __init__(self, transforms: ComposeTransforms) -> None:
        together = _sampling_transforms(transforms.transforms)
        spatial = [t for t in transforms.transforms[:together] if isinstance(t, SpatialTransform)]
        self._spatial = SpatialDrawnFirst(spatial[0]) if spatial else None
        self._rest = ComposeTransforms(transforms.transforms[together:])

    def draw(self, loaded_zyx: Sequence[int]) -> SpatialDraw:
        """What to load of a box of `loaded_zyx` voxels for the next sample, and how to sample it."""
        if self._spatial is None:
            return SpatialDraw(tuple(slice(0, n) for n in loaded_zyx), None)
        return self._spatial.draw(loaded_zyx)

    def make(
        self, image: torch.Tensor, label: torch.Tensor, soft: SoftBox | None, drawn: SpatialDraw
    ) -> tuple[torch.Tensor, Any]:
        """Image and target of a sample, of what was loaded for it."""
        if self._spatial is not None:
            image, label = self._spatial.sample(image, label, drawn.grid)
        if soft is None:
            out = self._rest(image=image, segmentation=label)
            return out["image"], out["segmentation"]
        soft_SZYX = placed(soft) if drawn.grid is None else sampled(soft, drawn.grid)
        target = torch.from_numpy(soft_SZYX.reshape(-1, *label.shape[1:]))
        out = self._rest(image=image, segmentation=label, regression_target=target)
        targets = out["segmentation"] if isinstance(out["segmentation"], list) else [out["segmentation"]]
        return out["image"], [*targets, out["regression_target"]]

    def stack(self, samples: Sequence[tuple[torch.Tensor, Any]]) -> dict[str, Any]:
        """A batch: `data` float32 (N, C, patch) and `target`, a tensor or a list of them."""
        images, targets = zip(*samples, strict=True)
        listed = isinstance(targets[0], list)
        target = [torch.stack(t) for t in zip(*targets, strict=True)] if listed else torch.stack(targets)
        return {"data": torch.stack(images).float(), "target": target}


def _sampling_transforms(transforms: list[Any]) -> int:
    """How many of the first transforms resample an image and change no intensity."""
    kinds = [type(t) for t in transforms]
    for pipeline in ([SpatialTransform], [Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform]):
        if kinds[: len(pipeline)] == pipeline:
            return len(pipeline)
    return 0
