"""The soft label on its way through nnU-Net's loader and transforms, and where there is one.

As channels under the image it is cropped and padded by nnU-Net's loader and sampled by its spatial transform on one
grid with the image; then it is a `regression_target`, which mirroring moves and intensity transforms leave alone.

Beyond the volume no teacher said anything, and the zeros that nnU-Net pads with would read as certain background, far
more certain than a tempered teacher is inside. So a channel of ones, the coverage, goes along. In the end a voxel that
lies at least half inside the volume has the mean opinion of that part, and any other has none.
Shapes: C image channels, S stored soft-label channels, ZYX (or YX) space.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform

from fastnnunet.nnunet.drawn_first import spatial_drawn_first

NO_OPINION = -1.0  # in all channels of a soft label, where there is none


class SoftLabels(Protocol):
    """Random access to soft labels of preprocessed cases; opened lazily in each loader process."""

    num_channels: int

    def read(self, case_id: str, lower_zyx: tuple[int, ...], upper_zyx: tuple[int, ...]) -> np.ndarray:
        """Float32 (S, z, y, x) probabilities inside the volume."""


def stacked_channels(soft: SoftLabels | None) -> int:
    """How many channels lie under the image: soft label and coverage."""
    return 0 if soft is None else soft.num_channels + 1


class _StackedCase:
    """Image, soft label and coverage of one case, one array-like (C + S + 1, Z, Y, X) read only where it is sliced."""

    dtype = np.dtype(np.float32)

    def __init__(self, image: Any, soft: SoftLabels, case_id: str) -> None:
        self._image, self._soft, self._case_id = image, soft, case_id
        self.shape = (image.shape[0] + stacked_channels(soft), *image.shape[1:])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        lower, upper = zip(
            *((s.indices(n)[0], s.indices(n)[1]) for s, n in zip(index[1:], self.shape[1:], strict=True)), strict=True
        )
        soft_SZYX = self._soft.read(self._case_id, lower, upper)
        return np.concatenate([self._image[index], soft_SZYX, np.ones_like(soft_SZYX, shape=(1, *soft_SZYX.shape[1:]))])


class SoftLabelDataset:
    """An nnU-Net data set whose images carry their soft label and its coverage as extra channels."""

    def __init__(self, base: Any, soft: SoftLabels) -> None:
        self._base, self._soft = base, soft
        self.identifiers = base.identifiers

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        """As nnU-Net's data sets."""
        image, *rest = self._base.load_case(identifier)
        return (_StackedCase(image, self._soft, identifier), *rest)


def opinions(stacked: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """Soft label and coverage (..., S + 1 at `axis`, ...) after sampling -> soft label (..., S, ...).

    NO_OPINION where less than half lies inside the volume; divided by the coverage elsewhere.
    """
    soft, coverage = stacked.split([stacked.shape[axis] - 1, 1], axis)
    return torch.where(coverage >= 0.5, soft / coverage.clamp(min=0.5), NO_OPINION)


def has_opinion(soft_NSZYX: torch.Tensor) -> torch.Tensor:
    """Where a soft label says something, bool (N, 1, space)."""
    return soft_NSZYX[:, :1] != NO_OPINION


class SampleTransforms:
    """nnU-Net's transforms on an image with `stacked` channels of soft label under it, appended to the targets then.

    `draw` may be called before each sample; see `drawn_first.py`.
    """

    def __init__(self, transforms: ComposeTransforms, stacked: int) -> None:
        together = _sampling_transforms(transforms.transforms)
        sampling, self._spatial = spatial_drawn_first(transforms.transforms[:together])
        self._stacked = stacked
        self._sample = ComposeTransforms(sampling)
        self._rest = ComposeTransforms(transforms.transforms[together:])

    def draw(self, loaded_zyx: Sequence[int]) -> tuple[slice, ...]:
        """The part of an image of this shape that the next sample takes."""
        return tuple(slice(0, n) for n in loaded_zyx) if self._spatial is None else self._spatial.draw(loaded_zyx)

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, Any]:
        sampled = self._sample(image=image, segmentation=segmentation)
        if self._stacked == 0:
            return dict(self._rest(**sampled))
        image, soft = sampled["image"].split([len(sampled["image"]) - self._stacked, self._stacked])
        out = self._rest(image=image, segmentation=sampled["segmentation"], regression_target=soft)
        targets = out["segmentation"] if isinstance(out["segmentation"], list) else [out["segmentation"]]
        return {"image": out["image"], "segmentation": [*targets, opinions(out["regression_target"])]}


def _sampling_transforms(transforms: list[Any]) -> int:
    """How many of the first transforms resample an image and change no intensity."""
    kinds = [type(t) for t in transforms]
    for pipeline in ([SpatialTransform], [Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform]):
        if kinds[: len(pipeline)] == pipeline:
            return len(pipeline)
    return 0
