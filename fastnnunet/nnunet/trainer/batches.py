"""A batch: cases and boxes are chosen by nnU-Net's loader, samples drawn, read, made and stacked.

This is nnU-Net's `generate_train_batch` with two differences: what happens to a sample is drawn before it is read, so
that no more than that takes is read, and generators are seeded for each sample, so that the processes of a distributed
training make only their own samples of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fastnnunet.nnunet.augment.drawn_first import Box, size_of, within
from fastnnunet.nnunet.augment.soft_samples import SoftBox
from fastnnunet.nnunet.trainer.distributed import Share
from fastnnunet.nnunet.trainer.mixing import Unlabelled
from fastnnunet.nnunet.trainer.seeds import BatchNumber
from fastnnunet.nnunet.v2 import crop_and_pad_nd

ALONE = Share()
OUTSIDE = -1  # nnU-Net's label beyond the volume


class Drawn(Protocol):
    """What was drawn for a sample before it is read."""

    @property
    def part(self) -> tuple[slice, ...]:
        """The part to load of what nnU-Net would load, along its last axes."""


class Samples(Protocol):
    """How samples are made: SampleTransforms here, DrawnSamples for the device."""

    def draw(self, loaded_zyx: Sequence[int], /) -> Any:
        """What is `Drawn` for the next sample, from the global generators of NumPy and torch."""

    def make(self, image: torch.Tensor, label: torch.Tensor, soft: SoftBox | None, drawn: Any, /) -> Any:
        """One sample, of what was loaded for it."""

    def stack(self, samples: Sequence[Any], /) -> dict[str, Any]:
        """A batch of samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledBatches:
    """Batches of `cases`, chosen by nnU-Net's `loader`, which has the size of the whole batch; `share` of it is made.

    Without `soft` no soft labels are read. Some samples are `unlabelled` cases, where given.
    """

    loader: Any  # nnUNetDataLoader
    cases: Any  # cases.Cases, with soft labels cases.SoftCases
    samples: Samples
    soft: bool
    share: Share = ALONE
    unlabelled: Unlabelled | None = None

    def make(self, number: BatchNumber, is_loading: Callable[[str], None]) -> dict[str, Any]:
        """`data`, `target` and `keys` of a batch; `is_loading` is told the case that is being loaded, '' for none."""
        number.begin()
        keys = list(self.loader.get_indices())
        if self.unlabelled is not None:
            keys = self.unlabelled.mixed(keys, number.number)
        made = []
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            for place in (mine := self.share.of(self.loader.batch_size)):
                is_loading(keys[place])
                number.begin(place)
                made.append(self._sample(keys[place], self.loader.get_do_oversample(place)))
            is_loading("")
            batch = self.samples.stack(made)
        ours = keys[mine.start : mine.stop]
        return {"data": batch.pop("data"), "target": batch.pop("target"), "keys": ours, **batch}

    def _sample(self, key: str, show_foreground: bool) -> Any:
        image, label, previous, properties = self.cases.load_case(key)
        space = image.shape[1:]
        lower, upper = self.loader.get_bbox(space, show_foreground, properties["class_locations"])
        box: Box = (list(lower), list(upper))
        drawn: Drawn = self.samples.draw(size_of(box))
        box = within(box, drawn.part)
        image_CZYX = torch.from_numpy(crop_and_pad_nd(image, _pairs(box), 0)).float()
        label_KZYX = _read_label(label, box)
        if previous is not None:
            label_KZYX = torch.cat([label_KZYX, _read_label(previous, box)[None]])
        if self.loader.patch_size_was_2d:
            image_CZYX, label_KZYX = image_CZYX[:, 0], label_KZYX[:, 0]
        soft = self.cases.read_soft(key, space, box) if self.soft else None
        return self.samples.make(image_CZYX, label_KZYX, soft, drawn)


def _pairs(box: Box) -> list[list[int]]:
    return [list(along) for along in zip(*box, strict=True)]


def _read_label(label: Any, box: Box) -> torch.Tensor:
    return torch.from_numpy(crop_and_pad_nd(label, _pairs(box), OUTSIDE, cast_cropped_to=np.int16)).to(torch.int16)
