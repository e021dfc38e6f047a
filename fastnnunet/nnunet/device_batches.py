"""Batches that are drawn and cropped in loader processes and augmented on the device.

The loader's part draws what is to happen to a sample before nnU-Net's loader cuts it out (`drawn_first.py`), so that no
more than that takes is read and sent to the device.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastnnunet.nnunet.device_augmentation import DeviceAugmentation, SampleDraws


class DrawnSamples:
    """Stands for the transforms of nnU-Net's loader, which makes a batch of them; `batch` puts the samples into it."""

    def __init__(self, augmentation: DeviceAugmentation, num_channels: int) -> None:
        self._augmentation, self._num_channels = augmentation, num_channels
        self._samples: list[tuple[Any, ...]] = []
        self._draws: SampleDraws | None = None  # of the next sample

    def draw(self, loaded_zyx: Sequence[int]) -> tuple[slice, ...]:
        """Draw for the next sample: the part of the last axes of `loaded_zyx` to load."""
        draws = self._draws = self._augmentation.draw(self._num_channels, loaded_zyx)
        return self._augmentation.needed(loaded_zyx, draws.affine)

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keep one sample. nnU-Net's loader wants samples of one shape, and gets empty ones."""
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
