"""Batches that are drawn and cropped in loader processes and augmented on the device.

The loader's part draws what is to happen to a sample, right after nnU-Net's loader has cut it out, and crops it to what
that takes. Hence every number a sample depends on is drawn where it is without this module, from the same generators,
and no more than necessary is sent to the device.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fastnnunet.nnunet.device_augmentation import DeviceAugmentation


class DrawnSamples:
    """Stands for the transforms of nnU-Net's loader, which makes a batch of them; `batch` puts the samples into it."""

    def __init__(self, augmentation: DeviceAugmentation, stacked_channels: int) -> None:
        self._augmentation, self._stacked_channels = augmentation, stacked_channels
        self._samples: list[tuple[Any, ...]] = []

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Draw and crop one sample. nnU-Net's loader wants samples of one shape, and gets empty ones."""
        augmentation = self._augmentation
        draws = augmentation.draw(len(image) - self._stacked_channels, image.shape[1:])
        stacked = augmentation.needed(image, draws.affine, 0).clone(memory_format=torch.contiguous_format)
        label = augmentation.needed(segmentation, draws.affine, augmentation.outside)
        self._samples.append((stacked, label.clone(memory_format=torch.contiguous_format), draws))
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
