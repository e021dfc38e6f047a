"""Batches that are drawn and cropped in loader processes and augmented on the device.

What is to happen to a sample is drawn before it is read (`drawn_first.py`), so that no more than that takes is read and
sent to the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastnnunet.nnunet.augment.device import DeviceAugmentation, SampleDraws
from fastnnunet.nnunet.augment.soft_samples import SoftBox, placed


def stacked(image: torch.Tensor, soft: SoftBox) -> torch.Tensor:
    """Image (C, box), and under it the soft label and its coverage, zeros beyond the volume: (C + S + 1, box)."""
    values = soft.values_SZYX
    covered = SoftBox(np.concatenate([values, np.ones_like(values[:1])]), soft.start_zyx, soft.space_zyx)
    return torch.cat([image, torch.from_numpy(placed(covered, outside=0)).reshape(-1, *image.shape[1:])])


@dataclass(frozen=True, slots=True)
class PartDraws:
    """The part of the last axes to load for a sample, and what is done to it on the device."""

    part: tuple[slice, ...]
    draws: SampleDraws


@dataclass(frozen=True, slots=True)
class DrawnSamples:
    """Samples as they are read, and what was drawn for them; a batch has lists of them, as their sizes differ."""

    augmentation: DeviceAugmentation
    num_channels: int

    def draw(self, loaded_zyx: Sequence[int]) -> PartDraws:
        """What to load of a box of `loaded_zyx` voxels for the next sample, and what happens to it."""
        draws = self.augmentation.draw(self.num_channels, loaded_zyx)
        return PartDraws(self.augmentation.needed(loaded_zyx, draws.affine), draws)

    def make(
        self, image: torch.Tensor, label: torch.Tensor, soft: SoftBox | None, drawn: PartDraws
    ) -> tuple[torch.Tensor, torch.Tensor, SampleDraws]:
        """One sample: what was loaded for it, the soft label under the image."""
        return image if soft is None else stacked(image, soft), label, drawn.draws

    def stack(self, samples: Sequence[tuple[torch.Tensor, torch.Tensor, SampleDraws]]) -> dict[str, Any]:
        """A batch for AugmentedBatches."""
        images, labels, draws = map(list, zip(*samples, strict=True))
        return {"data": images, "target": labels, "draws": draws}


class AugmentedBatches:
    """An endless iterator of batches as nnU-Net's loader gives them, augmented on the device."""

    def __init__(
        self, batches: Any, augmentation: DeviceAugmentation, device: torch.device, stacked_channels: int
    ) -> None:
        self._batches, self._augmentation, self._device = batches, augmentation, device
        self._stacked_channels = stacked_channels

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = dict(next(self._batches))
        draws = batch.pop("draws")
        stacked, labels = ([t.to(self._device, non_blocking=True) for t in batch[k]] for k in ("data", "target"))
        with torch.no_grad():
            data, target = self._augmentation.apply(stacked, labels, draws, self._stacked_channels)
        return {**batch, "data": data, "target": target}

    def _finish(self) -> None:
        """Stop the loader processes, as nnU-Net's augmenter of this name does."""
        if hasattr(self._batches, "_finish"):
            self._batches._finish()
