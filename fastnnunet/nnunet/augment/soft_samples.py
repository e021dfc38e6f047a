"""The soft label of a sample that nnU-Net's loader makes, and where there is one.

It is read once it is known which part of the case the sample takes (`drawn_first.py`), sampled on the grid of image and
label, and then is a `regression_target`, which mirroring moves and intensity transforms leave alone.

Beyond the volume no teacher said anything, and zeros there would read as certain background, far more certain than a
tempered teacher is inside. So a voxel that lies at least half inside the volume has the mean opinion of that part, and
any other has none.
Shapes: S stored soft-label channels, ZYX (or YX) space.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform

from fastnnunet import native
from fastnnunet.nnunet.augment.drawn_first import Box, SpatialDrawnFirst, points_of, size_of, within

NO_OPINION = -1.0  # in all channels of a soft label, where there is none


class SoftLabels(Protocol):
    """Random access to soft labels of preprocessed cases; opened lazily in each loader process."""

    num_channels: int

    def read(self, case_id: str, lower_zyx: tuple[int, ...], upper_zyx: tuple[int, ...]) -> np.ndarray:
        """Float32 (S, z, y, x) probabilities inside the volume."""


class SoftLabelDataset:
    """An nnU-Net data set, and the soft label of the case it has loaded last."""

    def __init__(self, base: Any, soft: SoftLabels) -> None:
        self._base, self._soft = base, soft
        self.identifiers = base.identifiers
        self._latest: tuple[str, tuple[int, ...]]

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        """As nnU-Net's data sets."""
        case: tuple[Any, ...] = self._base.load_case(identifier)
        self._latest = identifier, case[0].shape[1:]
        return case

    def read_soft(self, lower_zyx: Sequence[int], upper_zyx: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """What of a box lies inside the volume (S, z, y, x), and where in the box it starts."""
        case_id, shape = self._latest
        lower = tuple(min(max(0, k), n) for k, n in zip(lower_zyx, shape, strict=True))
        upper = tuple(max(k, min(u, n)) for k, u, n in zip(lower, upper_zyx, shape, strict=True))
        start = [k - first for k, first in zip(lower, lower_zyx, strict=True)]
        size = [u - k for k, u in zip(lower, upper, strict=True)]
        if 0 in size:
            return np.empty((self._soft.num_channels, *size), np.float32), start
        return self._soft.read(case_id, lower, upper), start


def placed(
    soft_SZYX: np.ndarray, start_zyx: Sequence[int], space_zyx: Sequence[int], outside: float = NO_OPINION
) -> np.ndarray:
    """The soft label of a box (S, space) that has one from `start` on, and `outside` elsewhere."""
    out = np.full((len(soft_SZYX), *space_zyx), outside, np.float32)
    where = (slice(s, s + n) for s, n in zip(start_zyx, soft_SZYX.shape[1:], strict=True))
    out[(slice(None), *where)] = soft_SZYX
    return out


def sampled(
    soft_SZYX: np.ndarray, start_zyx: Sequence[int], space_zyx: Sequence[int], grid: torch.Tensor
) -> np.ndarray:
    """The same at the points of a grid (z, y, x, 3), or (y, x, 2) for every plane alike: (S, z, y, x)."""
    points, patch = points_of(grid), grid.shape[:-1]
    if len(patch) == 3:
        return native.sample_inside(soft_SZYX, space_zyx, start_zyx, points, NO_OPINION, threads=1).reshape(-1, *patch)
    planes = soft_SZYX.reshape(-1, 1, *soft_SZYX.shape[2:])
    flat = native.sample_inside(planes, (1, *space_zyx[1:]), (0, *start_zyx[1:]), points, NO_OPINION, threads=1)
    return placed(flat.reshape(*soft_SZYX.shape[:2], *patch), (start_zyx[0], 0, 0), (space_zyx[0], *patch))


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
    """nnU-Net's transforms of a sample; the soft label, where the data set has one, is appended to the targets.

    `begin` comes before each sample and says what to load for it. Without it, as in the batch that nnU-Net loads and
    throws away when it makes its loaders, there is no soft label.
    """

    def __init__(self, transforms: ComposeTransforms, *, soft: bool) -> None:
        together = _sampling_transforms(transforms.transforms)
        sampling = list(transforms.transforms[:together])
        self._spatial: SpatialDrawnFirst | None = None
        for number, transform in enumerate(sampling):
            if isinstance(transform, SpatialTransform):
                self._spatial = sampling[number] = SpatialDrawnFirst(transform)
        self._soft = soft
        self._place: tuple[Any, Box] | None = None
        self._sample = ComposeTransforms(sampling)
        self._rest = ComposeTransforms(transforms.transforms[together:])

    def begin(self, dataset: Any, box: Box) -> Box:
        """The part of `box` of the case that `dataset` has loaded last that the next sample takes."""
        if self._spatial is not None:
            box = within(box, self._spatial.draw(size_of(box)))
        self._place = dataset, box
        return box

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, Any]:
        place, self._place = self._place, None
        grid = None if self._spatial is None else self._spatial.grid
        sample = self._sample(image=image, segmentation=segmentation)
        sample = {name: sample[name] for name in ("image", "segmentation")}
        if not self._soft or place is None:
            return dict(self._rest(**sample))
        dataset, box = place
        soft_SZYX, start = dataset.read_soft(*box)
        space = size_of(box)
        soft_SZYX = placed(soft_SZYX, start, space) if grid is None else sampled(soft_SZYX, start, space, grid)
        soft = torch.from_numpy(soft_SZYX.reshape(-1, *sample["segmentation"].shape[1:]))
        out = self._rest(**sample, regression_target=soft)
        targets = out["segmentation"] if isinstance(out["segmentation"], list) else [out["segmentation"]]
        return {"image": out["image"], "segmentation": [*targets, out["regression_target"]]}


def _sampling_transforms(transforms: list[Any]) -> int:
    """How many of the first transforms resample an image and change no intensity."""
    kinds = [type(t) for t in transforms]
    for pipeline in ([SpatialTransform], [Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform]):
        if kinds[: len(pipeline)] == pipeline:
            return len(pipeline)
    return 0
