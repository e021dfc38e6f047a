"""A teacher beside a training: in its last epochs the soft label of a sample is what the teacher says of that patch.

A cache holds what the teacher says of the image as it is, and the training moves that along with the patch. Intensities
that were changed, and what was rotated or cut off, only a teacher that is asked anew can answer to.
Shapes: N batch, C channels, S stored soft-label channels, X space (z, y, x; y, x).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fastnnunet.nnunet.augment.soft_samples import NO_OPINION, has_opinion


class PatchTeacher(Protocol):
    """A loaded ensemble that answers on patches."""

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels of a patch, zyx or yx."""

    def soft_labels(self, patches_NCX: np.ndarray, cases: Sequence[str], /) -> np.ndarray:
        """Float32 (N, S, *patch), as a cache of the same teacher has them, of float32 patches; `cases`: of which."""


@dataclass(frozen=True, slots=True)
class LastEpochs:
    """`teacher` answers in the last `share` of the epochs, at least one."""

    teacher: PatchTeacher
    share: float

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether an epoch, counted from 0, is one of them."""
        return epoch >= epochs - max(1, round(self.share * epochs))

    def answered(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of training with the teacher's answers in the place of the cache's.

        Where the cache has no opinion, beyond the volume, there is none now either: the losses of all epochs are of the
        same voxels.
        """
        *hard, cached_NSX = batch["target"]
        patches_NCX = batch["data"].float().cpu().numpy()
        soft_NSX = torch.from_numpy(self.teacher.soft_labels(patches_NCX, batch["keys"])).to(cached_NSX)
        return {**batch, "target": [*hard, torch.where(has_opinion(cached_NSX), soft_NSX, NO_OPINION)]}
