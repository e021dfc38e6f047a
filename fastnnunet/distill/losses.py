"""The distillation objective: (1 - a) * hard + a * soft with soft = T^2 * KL(p_T || q_T), or with Dice added to it.

KL is summed over classes and averaged over voxels (Hinton et al. 2015 for the T^2 that keeps the gradient's size;
`reduction="mean"` of torch's kl_div would divide by the class count as well, which is wrong).
With p from softmax(teacher / T) and q = softmax(z / T), d(T^2 KL)/dz = T (q - p) per voxel.
Shapes: N batch, C classes (or R regions), S = C - 1 stored channels, `...` space.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from fastnnunet import native
from fastnnunet.specs.distill import DistillSpec

SMOOTH = 1e-5  # of the Dice of a class that is absent, as in nnU-Net
SMALLEST = 1e-12  # clamps log(0); p * log p is 0 at p = 0


def full_simplex(soft_NS: torch.Tensor) -> torch.Tensor:
    """(N, C-1, ...) foreground probabilities -> (N, C, ...) with background = 1 - sum, first."""
    background = (1 - soft_NS.sum(1, keepdim=True)).clamp_(min=0)
    return torch.cat([background, soft_NS], 1)


def _mean(values_N: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over all voxels (N, ...), or over those where `mask` (N, 1, ...) is true; 0 where it is true nowhere."""
    if mask is None:
        return values_N.mean()
    weights_N = mask[:, 0].to(values_N.dtype)
    return (values_N * weights_N).sum() / weights_N.sum().clamp(min=1)


def kl_classes(
    logits_NC: torch.Tensor, soft_NS: torch.Tensor, temperature: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(p || softmax(logits / T)), summed over classes, averaged over (valid) voxels: a scalar."""
    kl: torch.Tensor = _KLClasses.apply(logits_NC, soft_NS, temperature, mask)
    return kl


class _KLClasses(torch.autograd.Function):  # type: ignore[misc]
    """`kl_classes` with its derivative (q - p) / T per voxel written out: fewer passes over large tensors."""

    @staticmethod
    def forward(
        ctx: Any, logits_NC: torch.Tensor, soft_NS: torch.Tensor, temperature: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        by_core = logits_NC.device.type == "cpu" and logits_NC.dtype == soft_NS.dtype == torch.float32
        compute = kl_and_difference_by_core if by_core else kl_and_difference
        kl, difference_NC, voxels = compute(logits_NC, soft_NS, temperature, mask)
        ctx.save_for_backward(difference_NC)
        ctx.scale = 1 / (temperature * voxels)
        return kl / voxels

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (difference_NC,) = ctx.saved_tensors
        return difference_NC * (gradient * ctx.scale), None, None, None


KL = tuple[torch.Tensor, torch.Tensor, torch.Tensor | int]  # summed over voxels; q - p (N, C, ...); how many voxels


def kl_and_difference(
    logits_NC: torch.Tensor, soft_NS: torch.Tensor, temperature: float, mask: torch.Tensor | None
) -> KL:
    """On any device. The last is at least 1."""
    p_NC = full_simplex(soft_NS)
    log_q_NC = torch.log_softmax((logits_NC * (1 / temperature)).contiguous(), 1)
    kl_NC = p_NC.clamp(min=SMALLEST).log_().sub_(log_q_NC).mul_(p_NC)
    difference_NC = log_q_NC.exp_().sub_(p_NC)
    if mask is None:
        return kl_NC.sum(), difference_NC, p_NC[:, 0].numel()
    difference_NC *= mask
    kl_NC *= mask
    return kl_NC.sum(), difference_NC, mask.sum().clamp(min=1)


def kl_and_difference_by_core(
    logits_NC: torch.Tensor, soft_NS: torch.Tensor, temperature: float, mask: torch.Tensor | None
) -> KL:
    """For float32 on the CPU, in one pass.

    The difference is contiguous, whatever the logits are: it is added to the gradient of the hard loss, which is too.
    """
    difference_NC = torch.empty(logits_NC.shape)
    kl, count = native.kl_classes(
        logits_NC.detach().movedim(1, -1).flatten(1, -2).movedim(-1, 1).numpy(),  # a view, also of channels last
        soft_NS.contiguous().flatten(2).numpy(),
        temperature,
        None if mask is None else mask.contiguous().flatten(1).numpy(),
        difference_NC.flatten(2).numpy(),
        threads=torch.get_num_threads(),
    )
    return logits_NC.new_tensor(kl), difference_NC, max(1, count)


def kl_regions(
    logits_NR: torch.Tensor, soft_NR: torch.Tensor, temperature: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary KL per region, summed over regions, averaged over (valid) voxels: a scalar."""
    z_NR = logits_NR / temperature
    q_NR = soft_NR.clamp(0, 1)
    cross = -(q_NR * logsigmoid(z_NR) + (1 - q_NR) * logsigmoid(-z_NR))
    entropy = -(torch.xlogy(q_NR, q_NR) + torch.xlogy(1 - q_NR, 1 - q_NR))
    return _mean((cross - entropy).sum(1), mask)


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

    `valid_mask`, bool (N, 1, space), restricts the soft loss to some voxels; its mean over them is multiplied by
    `valid_share`, what several processes need whose voxels are not equally many.

    `dice` adds the Dice semimetric loss of the tempered probabilities, of foreground classes or of regions, with the
    weight that nnU-Net's own Dice has beside its cross entropy.

    `anneal` lets alpha fall linearly to 0 with `progress`, the share of the training that is done (teacher annealing,
    Clark et al. 2019, "BAM! Born-Again Multi-Task Networks"): a student can become better than its teacher.
    """

    alpha: float
    temperature: float
    regions: bool = False
    dice: bool = False
    anneal: bool = False

    @classmethod
    def of(cls, spec: DistillSpec, *, regions: bool) -> "DistillationObjective":
        """What a training with these settings minimises."""
        return cls(spec.alpha, spec.temperature, regions, dice=spec.loss == "kl_dice", anneal=spec.anneal)

    def __call__(
        self,
        hard: torch.Tensor,
        logits_NC: torch.Tensor,
        soft_NS: torch.Tensor,
        valid_mask: torch.Tensor | None = None,
        valid_share: torch.Tensor | float = 1.0,
        progress: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kl = kl_regions if self.regions else kl_classes
        soft = self.temperature**2 * kl(logits_NC, soft_NS, self.temperature, valid_mask) * valid_share
        if self.dice:
            z_NC = logits_NC / self.temperature
            q_NS = z_NC.sigmoid() if self.regions else z_NC.softmax(1)[:, 1:]
            if valid_mask is not None:
                q_NS, soft_NS = q_NS * valid_mask, soft_NS * valid_mask
            soft = soft + dice_semimetric(q_NS, soft_NS)
        alpha = self.alpha * (1 - progress) if self.anneal else self.alpha
        return (1 - alpha) * hard + alpha * soft, soft
