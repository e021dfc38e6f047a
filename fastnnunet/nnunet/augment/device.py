"""nnU-Net's default training augmentation on the device a batch lies on.

What happens to a sample is drawn by nnU-Net's own transforms, on the CPU and in the order in which nnU-Net draws, so
that probabilities and ranges are nnU-Net's by construction. Only the arithmetic is written anew here: nnU-Net's
makes kernels and index tensors on the CPU, and chooses by the clock how to blur.
Shapes: N batch, C image channels, S soft-label channels, K label channels, ZYX (or YX) space.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.augment.drawn_first import SAMPLING, check_settings, image_of, middle
from fastnnunet.nnunet.augment.intensity import (
    add_noise,
    blur,
    change_gamma,
    lower_resolution,
    scale_brightness,
    scale_contrast,
)
from fastnnunet.nnunet.augment.label import downsampled, regions_of
from fastnnunet.nnunet.augment.soft_samples import opinions
from fastnnunet.nnunet.augment.spatial import reach, sample_labels, sample_linear, sampling_grid
from fastnnunet.nnunet.v2 import (
    ContrastTransform,
    Convert2DTo3DTransform,
    Convert3DTo2DTransform,
    ConvertSegmentationToRegionsTransform,
    DownsampleSegForDSTransform,
    GammaTransform,
    GaussianBlurTransform,
    GaussianNoiseTransform,
    MaskImageTransform,
    MirrorTransform,
    MultiplicativeBrightnessTransform,
    RandomTransform,
    RemoveLabelTransform,
    SimulateLowResolutionTransform,
    SpatialTransform,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the intensities of one channel: `apply(channel, *numbers)`."""

    channel: int
    apply: Callable[..., None]
    numbers: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDraws:
    """What is done to one sample. `affine` (axes, axes) maps the patch to what was loaded; None: only cropped."""

    affine: np.ndarray | None
    changes: tuple[Change, ...]
    mirror_axes: tuple[int, ...]


def _noise(drawn: dict[str, Any], _space: Sequence[int]) -> list[Change]:
    channels = drawn["apply_idx"].tolist()
    return [Change(c, add_noise, (float(drawn["sigmas"]), int(torch.randint(2**63 - 1, ())))) for c in channels]


def _blur(drawn: dict[str, Any], _space: Sequence[int]) -> list[Change]:
    channels = drawn["apply_to_channel"].nonzero().flatten().tolist()
    return [Change(c, blur, (tuple(map(float, s)),)) for c, s in zip(channels, drawn["sigmas"], strict=True)]


def _brightness(drawn: dict[str, Any], _space: Sequence[int]) -> list[Change]:
    return _multiplied(scale_brightness, drawn)


def _contrast(drawn: dict[str, Any], _space: Sequence[int]) -> list[Change]:
    return _multiplied(scale_contrast, drawn)


def _multiplied(apply: Callable[..., None], drawn: dict[str, Any]) -> list[Change]:
    if drawn["multipliers"] is None:  # no channel
        return []
    channels, multipliers = drawn["apply_to_channel"].tolist(), drawn["multipliers"].tolist()
    return [Change(c, apply, (m,)) for c, m in zip(channels, multipliers, strict=True)]


def _low_resolution(drawn: dict[str, Any], space: Sequence[int]) -> list[Change]:
    shapes = [tuple(round(n * s) for n, s in zip(space, scales, strict=True)) for scales in drawn["scales"].tolist()]
    channels = map(int, drawn["apply_to_channel"])
    return [Change(c, lower_resolution, (shape,)) for c, shape in zip(channels, shapes, strict=True)]


def _gamma(drawn: dict[str, Any], _space: Sequence[int]) -> list[Change]:
    if drawn["gamma"] is None:
        return []
    names = ("apply_to_channel", "gamma", "retain_stats", "invert_image")
    columns = [drawn[name].tolist() for name in names]
    return [Change(c, change_gamma, tuple(numbers)) for c, *numbers in zip(*columns, strict=True)]


# nnU-Net's parameters of a transform, as drawn, and the shape of the patch -> changes
CHANGES: dict[type, Callable[[dict[str, Any], Sequence[int]], list[Change]]] = {
    GaussianNoiseTransform: _noise,
    GaussianBlurTransform: _blur,
    MultiplicativeBrightnessTransform: _brightness,
    ContrastTransform: _contrast,
    SimulateLowResolutionTransform: _low_resolution,
    GammaTransform: _gamma,
}
# settings of transforms that the arithmetic here takes for granted
SETTINGS: dict[type, dict[str, Any]] = {
    SpatialTransform: {"p_elastic_deform": 0, **SAMPLING},
    GaussianNoiseTransform: {"synchronize_channels": True},
    GaussianBlurTransform: {"synchronize_channels": False},
    ContrastTransform: {"preserve_range": True},
    RemoveLabelTransform: {"segmentation_channels": None},
    ConvertSegmentationToRegionsTransform: {"channel_in_seg": 0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAugmentation:
    """nnU-Net's transforms, recognised; `draw` for each sample, `apply` for a batch."""

    spatial: SpatialTransform
    planes: bool  # planes of a volume are rotated and scaled, all alike (nnU-Net's dummy-2d)
    intensity: tuple[RandomTransform, ...]
    mirror: MirrorTransform | None
    mask: MaskImageTransform | None
    remove: RemoveLabelTransform
    regions: tuple[tuple[int, ...], ...] | None  # labels of each
    downsample: DownsampleSegForDSTransform | None

    @property
    def sampled_patch(self) -> tuple[int, ...]:
        """The axes that are rotated and scaled: the patch, or a plane of it."""
        return tuple(int(n) for n in self.spatial.patch_size)

    def draw(self, num_channels: int, loaded_zyx: Sequence[int]) -> SampleDraws:
        """Draw for one sample from the global generators of NumPy and torch (CPU), as nnU-Net would."""
        small = copy.copy(self.spatial)  # nnU-Net's draws the numbers and makes the grid of the whole patch
        small.patch_size = (1,) * len(self.sampled_patch)
        affine = small.get_parameters(image=image_of(1, loaded_zyx[-len(self.sampled_patch) :]))["affine"]
        unsampled = loaded_zyx[: -len(self.sampled_patch)] if self.planes else ()
        space = (*unsampled, *self.sampled_patch)
        image = image_of(num_channels, space)
        changes: list[Change] = []
        for randomly in self.intensity:
            if randomly.get_parameters()["apply_transform"]:
                transform = randomly.transform
                changes += CHANGES[type(transform)](transform.get_parameters(image=image), space)
        axes = [] if self.mirror is None else self.mirror.get_parameters()["axes"]
        return SampleDraws(affine=affine, changes=tuple(changes), mirror_axes=tuple(axes))

    def needed(self, loaded_zyx: Sequence[int], affine: np.ndarray | None) -> tuple[slice, ...]:
        """The part of what nnU-Net would load that `apply` wants: without rotation or scaling the patch itself."""
        space = loaded_zyx[-len(self.sampled_patch) :]
        return middle(self.sampled_patch, space) if affine is None else reach(affine, self.sampled_patch, space)

    @property
    def outside(self) -> int:
        """The label beyond the border of what was loaded; nnU-Net removes it again."""
        return int(self.spatial.padding_value_seg)

    def apply(
        self,
        stacked_NCZYX: Sequence[torch.Tensor],
        label_NKZYX: Sequence[torch.Tensor],
        draws: Sequence[SampleDraws],
        stacked_channels: int,
    ) -> tuple[torch.Tensor, Any]:
        """Augment what `needed` left of each sample; under its image lie `stacked_channels`, soft label and coverage.

        Returns images float32 (N, C, patch) and what nnU-Net's loader gives as target: the label (N, K, patch) or with
        deep supervision a list of labels; with soft labels always a list, whose last entry they are.
        """
        samples = [self._sampled(*sample) for sample in zip(stacked_NCZYX, label_NKZYX, draws, strict=True)]
        stacked, label = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
        image, soft = stacked.split([stacked.shape[1] - stacked_channels, stacked_channels], 1)
        image = image.contiguous()
        for image_CZYX, draw in zip(image, draws, strict=True):
            for change in draw.changes:
                change.apply(image_CZYX[change.channel], *change.numbers)
        image, soft, label = (_mirrored(t, draws) for t in (image, soft, label))
        if self.mask is not None:
            outside_NZYX = label[:, self.mask.channel_idx_in_seg] < 0
            for c in self.mask.apply_to_channels:
                image[:, c].masked_fill_(outside_NZYX, self.mask.set_outside_to)
        label.masked_fill_(label == self.remove.label_value, self.remove.set_to)
        if self.regions is not None:
            label = regions_of(label, self.regions)
        targets = [label] if self.downsample is None else downsampled(label, self.downsample.ds_scales)
        if stacked_channels:
            return image, [*targets, opinions(soft, 1)]
        return image, targets if self.downsample is not None else label

    def _sampled(
        self, stacked_CZYX: torch.Tensor, label_KZYX: torch.Tensor, draw: SampleDraws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if draw.affine is None:
            return stacked_CZYX, label_KZYX
        dims = len(self.sampled_patch)
        stacked, label = (t.reshape(-1, *t.shape[-dims:]) for t in (stacked_CZYX, label_KZYX))  # planes as channels
        grid = sampling_grid(draw.affine, self.sampled_patch, stacked.shape[1:], stacked.device)
        stacked, label = sample_linear(stacked, grid), sample_labels(label, grid, self.outside)
        return (
            stacked.reshape(*stacked_CZYX.shape[:-dims], *self.sampled_patch),
            label.reshape(*label_KZYX.shape[:-dims], *self.sampled_patch),
        )


def _mirrored(tensor_NCZYX: torch.Tensor, draws: Sequence[SampleDraws]) -> torch.Tensor:
    return torch.stack([t.flip([a + 1 for a in d.mirror_axes]) for t, d in zip(tensor_NCZYX, draws, strict=True)])


def recognise(transforms: Sequence[Any]) -> DeviceAugmentation:
    """Read nnU-Net's default training transforms. Raises MismatchError naming the first that is not known here."""
    rest = list(transforms)

    def take(kind: type) -> Any:
        if not rest or type(rest[0]) is not kind:
            return None
        check_settings(rest[0], SETTINGS.get(type(rest[0]), {}))
        return rest.pop(0)

    planes = take(Convert3DTo2DTransform) is not None
    spatial = take(SpatialTransform)
    if planes and take(Convert2DTo3DTransform) is None:
        raise _unknown(rest)
    intensity = []
    while (randomly := take(RandomTransform)) is not None:
        if type(randomly.transform) not in CHANGES:
            raise _unknown([randomly.transform])
        check_settings(randomly.transform, SETTINGS.get(type(randomly.transform), {}))
        intensity.append(randomly)
    mirror, mask, remove = take(MirrorTransform), take(MaskImageTransform), take(RemoveLabelTransform)
    regions, downsample = take(ConvertSegmentationToRegionsTransform), take(DownsampleSegForDSTransform)
    if rest or spatial is None or remove is None:
        raise _unknown(rest)
    return DeviceAugmentation(
        spatial=spatial,
        planes=planes,
        intensity=tuple(intensity),
        mirror=mirror,
        mask=mask,
        remove=remove,
        regions=None if regions is None else tuple(tuple(r.int().tolist()) for r in regions.regions),
        downsample=downsample,
    )


def _unknown(rest: Sequence[Any]) -> MismatchError:
    got = type(rest[0]).__name__ if rest else "the end"
    return MismatchError(f"{got} is not where nnU-Net's default augmentation has it")


def device_augmentation(transforms: Sequence[Any]) -> DeviceAugmentation | None:
    """What is needed to run these transforms on the device; None, with a line in the log, where they are not known."""
    try:
        return recognise(transforms)
    except MismatchError as error:
        log.warning("augmenting in the loader processes, not on the device: %s", error)
        return None
