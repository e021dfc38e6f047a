"""Batches that are drawn and cropped in loader processes and augmented on the device.

The loader's part draws what is to happen to a sample before nnU-Net's loader cuts it out (`drawn_first.py`), so that no
more than that takes is read and sent to the device.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastnnunet.nnunet.augment.device import DeviceAugmentation, SampleDraws
from fastnnunet.nnunet.augment.drawn_first import Box, size_of, within
from fastnnunet.nnunet.augment.soft_samples import placed


def stacked(image: torch.Tensor, dataset: Any, box: Box) -> torch.Tensor:
    """Image (C, box), and under it the soft label and its coverage, zeros beyond the volume: (C + S + 1, box)."""
    soft_SZYX, start = dataset.read_soft(*box)
    covered = np.concatenate([soft_SZYX, np.ones_like(soft_SZYX[:1])])
    under = placed(covered, start, size_of(box), outside=0)
    return torch.cat([image, torch.from_numpy(under).reshape(-1, *image.shape[1:])])


class DrawnSamples:
    """Stands for the transforms of nnU-Net's loader, which makes a batch of them; `batch` puts the samples into it."""

    def __init__(self, augmentation: DeviceAugmentation, num_channels: int, *, soft: bool) -> None:
        self._augmentation, self._num_channels, self._soft = augmentation, num_channels, soft
        self._samples: list[tuple[Any, ...]] = []
        self._place: tuple[Any, Box] | None = None
        self._draws: SampleDraws | None = None  # of the next sample

    def begin(self, dataset: Any, box: Box) -> Box:
        """Draw for the next sample: the part of `box` of the case that `dataset` has loaded last that it takes."""
        loaded = size_of(box)
        draws = self._draws = self._augmentation.draw(self._num_channels, loaded)
        box = within(box, self._augmentation.needed(loaded, draws.affine))
        self._place = dataset, box
        return box

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keep one sample. nnU-Net's loader wants samples of one shape, and gets empty ones."""
        if self._soft and self._place is not None:
            image = stacked(image, *self._place)
        self._samples.append((image, segmentation, self._draws))
        return {"image": torch.empty(0), "segmentation": torch.empty(0, dtype=segmentation.dtype)}

    def batch(self, **batch: Any) -> dict[str, Any]:
        """The batch nnU-Net's loader has made, with lists of samples and their draws in the place of tensors."""
        stacked, labels, draws = map(list, zip(*self._samples[-len(batch["keys"]) :], strict=True))
        self._samples.clear()
        return {**batch, "data": stacked, "target": labels, "draws": draws}


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
