"""What the losses of a training step are told of its batch.

Shapes: N batch, C channels, S stored soft-label channels, ZYX (or YX) space.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fastnnunet.nnunet.augment.soft_samples import has_opinion


class Objective(Protocol):
    """Combines nnU-Net's loss with the soft loss."""

    def __call__(
        self,
        hard: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        soft_NSZYX: torch.Tensor,
        valid_mask: torch.Tensor | None,
        progress: float,
        /,
        *,
        output_weights: Sequence[float],
        shares: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (total loss, soft loss), both scalars.

        `outputs`: logits float32, finest first; `output_weights`: nnU-Net's weight of each. `progress` is the share of
        the training's steps that came before this one. Means over voxels are multiplied by what `shares` makes of
        their weights, which is asked once a step in every process (`distributed.valid_share`).
        """


def valid_mask(target: Any, soft_NSZYX: torch.Tensor, labels: Any, *, on_ignored: bool) -> torch.Tensor:
    """Where the soft loss counts, bool (N, 1, space). `labels`: nnU-Net's label manager."""
    valid = has_opinion(soft_NSZYX)
    if on_ignored or not labels.has_ignore_label:
        return valid
    return valid & labelled(target[0] if isinstance(target, list) else target, labels)


def labelled(target: torch.Tensor, labels: Any) -> torch.Tensor:
    """Where a target of nnU-Net's loss does not say ignore, bool (N, 1, space). `labels`: nnU-Net's label manager."""
    if labels.has_regions:  # nnU-Net's transform puts the ignore label into the last channel
        return target[:, -1:] == 0
    return target != labels.ignore_label
