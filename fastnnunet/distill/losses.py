"""The distillation objective: (1 - a) * hard + a * soft with soft = T^2 * KL(p_T || q_T), or with Dice added to it.

KL is summed over classes and averaged over voxels (Hinton et al. 2015 for the T^2 that keeps the gradient's size;
`reduction="mean"` of torch's kl_div would divide by the class count as well, which is wrong).
With p from softmax(teacher / T) and q = softmax(z / T), d(T^2 KL)/dz = T (q - p) per voxel.
Shapes: N batch, C classes (or R regions), S = C - 1 stored channels, `...` space.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax, logsigmoid

SMOOTH = 1e-5  # of the Dice of a class that is absent, as in nnU-Net
SMALLEST = 1e-12  # clamps log(0); p * log p is 0 at p = 0


def full_simplex(soft_NS: torch.Tensor) -> torch.Tensor:
    """(N, C-1, ...) foreground probabilities -> (N, C, ...) with background = 1 - sum, first."""
    background = (1 - soft_NS.sum(1, keepdim=True)).clamp_(min=0)
    return torch.cat([background, soft_NS], 1)


def kl_classes(logits_NC: torch.Tensor, soft_NS: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(p || softmax(logits / T)), summed over classes, averaged over voxels: a scalar."""
    p_NC = full_simplex(soft_NS)
    log_q_NC = log_softmax(logits_NC / temperature, 1)
    return (p_NC * (p_NC.clamp(min=SMALLEST).log() - log_q_NC)).sum(1).mean()


def kl_regions(logits_NR: torch.Tensor, soft_NR: torch.Tensor, temperature: float) -> torch.Tensor:
    """Binary KL per region, summed over regions, averaged over voxels: a scalar."""
    z_NR = logits_NR / temperature
    q_NR = soft_NR.clamp(0, 1)
    cross = -(q_NR * logsigmoid(z_NR) + (1 - q_NR) * logsigmoid(-z_NR))
    entropy = -(torch.xlogy(q_NR, q_NR) + torch.xlogy(1 - q_NR, 1 - q_NR))
    return (cross - entropy).sum(1).mean()


def dice_semimetric(q_NC: torch.Tensor, p_NC: torch.Tensor) -> torch.Tensor:
    """1 - soft Dice with the intersection (p + q - |p - q|) / 2, averaged over samples and channels: a scalar.

    Wang et al. 2023, "Dice Semimetric Losses". The usual intersection p * q is smallest for a one-hot q even where the
    target p is soft; this one is 0 only at q = p, and equals the usual one where p is hard.
    """
    space = tuple(range(2, p_NC.ndim))
    total_NC = (p_NC + q_NC).sum(space)
    difference_NC = (p_NC - q_NC).abs().sum(space)
    return 1 - ((total_NC - difference_NC + SMOOTH) / (total_NC + SMOOTH)).mean()


@dataclass(frozen=True)
class DistillationObjective:
    """`(hard, logits, soft) -> (total, soft loss)`; the soft loss already carries T^2.

    `dice` adds the Dice semimetric loss of the tempered probabilities, of foreground classes or of regions, with the
    weight that nnU-Net's own Dice has beside its cross entropy.
    """

    alpha: float
    temperature: float
    regions: bool = False
    dice: bool = False

    def __call__(
        self, hard: torch.Tensor, logits_NC: torch.Tensor, soft_NS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kl = kl_regions if self.regions else kl_classes
        soft = self.temperature**2 * kl(logits_NC, soft_NS, self.temperature)
        if self.dice:
            z_NC = logits_NC / self.temperature
            soft = soft + dice_semimetric(z_NC.sigmoid() if self.regions else z_NC.softmax(1)[:, 1:], soft_NS)
        return (1 - self.alpha) * hard + self.alpha * soft, soft
