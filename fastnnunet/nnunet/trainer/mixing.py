"""Unlabelled cases in the batches of a training: which samples they are, and what the losses see of them.

Of batch n (B samples, share s) floor((n + 1) B s) - floor(n B s) samples are unlabelled: the same number in every batch
up to one, and the share s over the whole training: none where s is 0, all where it is 1. Their places in the batch are
drawn, because nnU-Net oversamples foreground by place. The hard loss passes over them, unless they have pseudo labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnnunet.errors import CorruptError, NotFoundError
from fastnnunet.nnunet.trainer.distributed import LossOverValidVoxels
from fastnnunet.nnunet.trainer.loading_errors import remake, unreadable
from fastnnunet.nnunet.unlabelled.foreground import SEGMENTATION, open_segmentation, read_locations
from fastnnunet.nnunet.unlabelled.image_case import ENDINGS
from fastnnunet.nnunet.unlabelled.sets import UnlabelledCases


@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """The unlabelled part of a training."""

    cases: UnlabelledCases
    foreground: Path  # folder of foreground voxels and label maps according to the cache
    soft_labels: Any  # soft_samples.SoftLabels of these cases
    key: str  # of their cache
    share: float
    pseudo_labels: bool = False  # the hard loss sees them with the teacher's labels
    command: str  # what a person types to bring images and cache up to date

    def require_foreground(self, command: str) -> None:
        """Raise NotFoundError with the command that lists the foreground when some case lacks a file of it."""
        needed: dict[str, Callable[[str], Path]] = {"list of foreground voxels": self._locations_file}
        if self.pseudo_labels:
            needed["label map of the teacher"] = self._label_file
        for what, file_of in needed.items():
            if missing := [c for c in self.cases.case_ids if not file_of(c).is_file()]:
                raise NotFoundError(
                    f"{len(missing)} unlabelled case(s) have no {what} in {self.foreground}, first "
                    f"{missing[0]!r}\nfinish it with: {command}"
                )

    @property
    def identifiers(self) -> list[str]:
        """Ids of the unlabelled cases."""
        return list(self.cases.case_ids)

    @cached_property
    def _ids(self) -> frozenset[str]:
        return frozenset(self.cases.case_ids)

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        """As nnU-Net's data set class, with the teacher's foreground in the place of the labels', and its labels too
        where they are `pseudo_labels`."""
        try:
            image, segmentation, previous, properties = self.cases.load(identifier)
            locations = read_locations(self._locations_file(identifier))
            if self.pseudo_labels:
                segmentation = open_segmentation(self._label_file(identifier))
        except (NotFoundError, CorruptError) as e:
            raise unreadable(identifier, e.__cause__ or e, self.repair(identifier)) from e
        return image, segmentation, previous, properties | {"class_locations": locations}

    def repair(self, identifier: str) -> str:
        """The commands that make the files of a case again."""
        files = [self.cases.folder / f"{identifier}{ending}" for ending in ENDINGS]
        of_teacher = [self._locations_file(identifier), *([self._label_file(identifier)] if self.pseudo_labels else ())]
        return remake([*map(str, files), *map(str, of_teacher)], self.command)

    def _locations_file(self, case_id: str) -> Path:
        return self.foreground / f"{case_id}.npz"

    def _label_file(self, case_id: str) -> Path:
        return self.foreground / f"{case_id}{SEGMENTATION}"

    def count(self, number: int, batch_size: int) -> int:
        """How many samples of batch `number` are unlabelled."""
        each = batch_size * self.share
        return math.floor((number + 1) * each) - math.floor(number * each)

    def mixed(self, cases: Sequence[str], number: int) -> list[str]:
        """The cases of batch `number` with some places, drawn from NumPy's generator, given to unlabelled ones."""
        mixed = list(cases)
        places = np.random.choice(len(mixed), self.count(number, len(mixed)), replace=False)
        for place in places:
            mixed[place] = self.cases.case_ids[np.random.choice(len(self.cases.case_ids))]
        return mixed

    def hard_loss(
        self,
        loss: Callable[[Any, Any], torch.Tensor],
        outputs: Any,
        target: Any,
        keys: Sequence[str],
        number: int,
        batch_size: int,
    ) -> torch.Tensor:
        """nnU-Net's `loss` over the labelled samples among `keys`, which are this process's part of batch `number`.

        Weighted so that the mean over processes, each with the weight of its part of the batch, is the mean over the
        labelled samples of the whole batch. 0 where there are none. With pseudo labels it is over all samples.
        """
        if self.pseudo_labels:
            return loss(outputs, target)
        labelled = [place for place, key in enumerate(keys) if key not in self._ids]
        value = loss_of_samples(loss, outputs, target, labelled, len(keys))
        in_batch = batch_size - self.count(number, batch_size)
        return value * (len(labelled) * batch_size / (max(1, in_batch) * len(keys)))


def loss_of_samples(
    loss: Callable[[Any, Any], torch.Tensor], outputs: Any, target: Any, places: Sequence[int], batch_size: int
) -> torch.Tensor:
    """`loss` of these samples of a batch alone; outputs and target are tensors, or lists with deep supervision.

    Without a sample it is 0 with a gradient of zeros, so that optimiser and processes find a gradient where they always
    find one.
    """
    if not places:
        return (
            loss.of_no_sample(outputs, target) if isinstance(loss, LossOverValidVoxels) else loss(outputs, target) * 0
        )
    if len(places) == batch_size:
        return loss(outputs, target)
    return loss(_samples(outputs, places), _samples(target, places))


def _samples(tensors: Any, places: Sequence[int]) -> Any:
    if isinstance(tensors, list | tuple):
        return [_samples(t, places) for t in tensors]
    return tensors[list(places)]
