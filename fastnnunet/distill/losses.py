"""The distillation objective: (1 - a) * hard + a * soft with soft = T^2 * KL(p_T || q_T), or with Dice added to it.

Targets, their resolutions and weights of voxels come from `soft_targets.py`.

KL is summed over classes and averaged over voxels (Hinton et al. 2015 for the T^2 that keeps the gradient's size;
`reduction="mean"` of torch's kl_div would divide by the class count as well, which is wrong).
With p from softmax(teacher / T) and q = softmax(z / T), d(T^2 KL)/dz = T (q - p) per voxel.
Shapes: N batch, C classes (or R regions), S = C - 1 stored channels, `...` space.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from fastnnunet import native
from fastnnunet.distill.soft_targets import Voxels, full_simplex, pooled, sharpened, voxel_weights
from fastnnunet.specs.distill import DistillSpec

SMOOTH = 1e-5  # of the Dice of a class that is absent, as in nnU-Net
LIGHTEST = 1e-6  # sum of weights of voxels, in voxels, that is not taken for 0
SMALLEST = 1e-12  # clamps log(0); p * log p is 0 at p = 0


def _mean(values_N: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean over voxels (N, ...), or their mean with `weights` (N, 1, ...); 0 where all of these are 0."""
    if weights is None:
        return values_N.mean()
    weights_N = weights[:, 0].to(values_N.dtype)
    return (values_N * weights_N).sum() / _sum_of(weights_N)


def _sum_of(weights: torch.Tensor) -> torch.Tensor:
    """What a sum with these weights is divided by for their mean."""
    return weights.sum().clamp(min=LIGHTEST if weights.is_floating_point() else 1)


def kl_classes(
    logits_NC: torch.Tensor, soft_NS: torch.Tensor, temperature: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(p || softmax(logits / T)), summed over classes, mean over voxels: a scalar.

    `weights` (N, 1, ...) of voxels: a mask, which makes it the mean over some, or floating point, for a weighted mean.
    """
    kl: torch.Tensor = _KLClasses.apply(logits_NC, soft_NS, temperature, weights)
    return kl


class _KLClasses(torch.autograd.Function):  # type: ignore[misc]
    """`kl_classes` with its derivative (q - p) / T per voxel written out: fewer passes over large tensors."""

    @staticmethod
    def forward(
        ctx: Any, logits_NC: torch.Tensor, soft_NS: torch.Tensor, temperature: float, weights: torch.Tensor | None
    ) -> torch.Tensor:
        by_core = logits_NC.device.type == "cpu" and logits_NC.dtype == soft_NS.dtype == torch.float32
        by_core = by_core and (weights is None or weights.dtype == torch.bool)  # the core counts voxels, or does not
        compute = kl_and_difference_by_core if by_core else kl_and_difference
        kl, difference_NC, voxels = compute(logits_NC, soft_NS, temperature, weights)
        ctx.save_for_backward(difference_NC)
        ctx.scale = 1 / (temperature * voxels)
        return kl / voxels

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (difference_NC,) = ctx.saved_tensors
        return difference_NC * (gradient * ctx.scale), None, None, None


KL = tuple[torch.Tensor, torch.Tensor, torch.Tensor | int]  # weighted sum; q - p (N, C, ...), weighted; sum of weights


def kl_and_difference(
    logits_NC: torch.Tensor, soft_NS: torch.Tensor, temperature: float, weights: torch.Tensor | None
) -> KL:
    """On any device. The last is at least 1 for a mask."""
    p_NC = full_simplex(soft_NS)
    log_q_NC = torch.log_softmax((logits_NC * (1 / temperature)).contiguous(), 1)
    kl_NC = p_NC.clamp(min=SMALLEST).log_().sub_(log_q_NC).mul_(p_NC)
    difference_NC = log_q_NC.exp_().sub_(p_NC)
    if weights is None:
        return kl_NC.sum(), difference_NC, p_NC[:, 0].numel()
    difference_NC *= weights
    kl_NC *= weights
    return kl_NC.sum(), difference_NC, _sum_of(weights)


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
    logits_NR: torch.Tensor, soft_NR: torch.Tensor, temperature: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary KL per region, summed over regions, mean over voxels as in `kl_classes`: a scalar."""
    z_NR = logits_NR / temperature
    q_NR = soft_NR.clamp(0, 1)
    cross = -(q_NR * logsigmoid(z_NR) + (1 - q_NR) * logsigmoid(-z_NR))
    entropy = -(torch.xlogy(q_NR, q_NR) + torch.xlogy(1 - q_NR, 1 - q_NR))
    return _mean((cross - entropy).sum(1), weights)


def dice_semimetric(q_NC: torch.Tensor, p_NC: torch.Tensor) -> torch.Tensor:
    """1 - soft Dice with the intersection (p + q - |p - q|) / 2, averaged over samples and channels: a scalar.

    Wang et al. 2023, "Dice Semimetric Losses". The usual intersection p * q is smallest for a one-hot q even where the
    target p is soft; this one is 0 only at q = p, and equals the usual one where p is hard.
    """
    space = tuple(range(2, p_NC.ndim))
    total_NC = (p_NC + q_NC).sum(space)
    difference_NC = (p_NC - q_NC).abs().sum(space)
    return 1 - ((total_NC - difference_NC + SMOOTH) / (total_NC + SMOOTH)).mean()


Shares = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor | float] | torch.Tensor]


@dataclass(frozen=True)
class DistillationObjective:
    """`(hard, outputs, soft) -> (total, soft loss)`; the soft loss already carries T^2.

    `outputs`: logits as the network gives them, one tensor or with deep supervision a list, finest first.
    `valid_mask`, bool (N, 1, space), restricts the soft loss to some voxels.

    `voxels` chooses which of those count in KL, and how much (`soft_targets.voxel_weights`). There is one rule for all
    choices: the sum over the voxels of a batch with these weights is divided by the sum of the weights, so that the
    size of the loss does not depend on how many voxels say something. Dice counts every valid voxel, as background
    drowns nothing there. `shares` makes of the weights, a tensor for each resolution, a factor for each mean: what
    several processes need whose weights do not sum to the same.

    `sharpen_above` below 1: targets more certain than that are raised to `sharpen_power` and normalised, first of all.

    `deep_supervision` adds the loss at every coarser output whose weight among `output_weights`, those of nnU-Net's own
    loss, is not 0; its target is the mean over the fine voxels of a coarse one, its voxels are weighted by that target.

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
    deep_supervision: bool = False
    voxels: Voxels = "all"
    sharpen_above: float = 1.0
    sharpen_power: float = 2.0

    @classmethod
    def of(cls, spec: DistillSpec, *, regions: bool) -> "DistillationObjective":
        """What a training with these settings minimises."""
        return cls(
            spec.alpha,
            spec.temperature,
            regions,
            dice=spec.loss == "kl_dice",
            anneal=spec.anneal,
            deep_supervision=spec.soft_deep_supervision,
            voxels=spec.soft_voxels,
            sharpen_above=spec.sharpen_above,
            sharpen_power=spec.sharpen_power,
        )

    def __call__(
        self,
        hard: torch.Tensor,
        outputs: torch.Tensor | Sequence[torch.Tensor],
        soft_NS: torch.Tensor,
        valid_mask: torch.Tensor | None = None,
        progress: float = 0.0,
        *,
        output_weights: Sequence[float] = (1.0,),
        shares: Shares | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sharpen_above < 1:
            soft_NS = sharpened(soft_NS, self.sharpen_above, self.sharpen_power, regions=self.regions)
        levels = self._levels(outputs, soft_NS, valid_mask, output_weights)
        weights = [
            voxel_weights(self.voxels, level.logits_NC, level.soft_NS, level.mask, regions=self.regions)
            for level in levels
        ]
        given = [w for w in weights if w is not None]
        factors = shares(given) if shares is not None and given else [1.0] * len(levels)
        soft: Any = sum(
            level.weight * self._soft(level, w, factor)
            for level, w, factor in zip(levels, weights, factors, strict=True)
        )
        alpha = self.alpha * (1 - progress) if self.anneal else self.alpha
        return (1 - alpha) * hard + alpha * soft, soft

    def _levels(
        self,
        outputs: torch.Tensor | Sequence[torch.Tensor],
        soft_NS: torch.Tensor,
        mask: torch.Tensor | None,
        output_weights: Sequence[float],
    ) -> "list[_Level]":
        if isinstance(outputs, torch.Tensor):
            outputs = [outputs]
        if not self.deep_supervision:
            return [_Level(outputs[0], soft_NS, mask, 1.0)]
        used = [(z, w) for z, w in zip(outputs, output_weights, strict=True) if w != 0]
        targets = pooled(soft_NS, mask, [z.shape[2:] for z, _ in used])
        return [_Level(z, p, m, w) for (z, w), (p, m) in zip(used, targets, strict=True)]

    def _soft(self, level: "_Level", weights: torch.Tensor | None, factor: torch.Tensor | float) -> torch.Tensor:
        kl = kl_regions if self.regions else kl_classes
        soft = self.temperature**2 * kl(level.logits_NC, level.soft_NS, self.temperature, weights) * factor
        if not self.dice:
            return soft
        z_NC, p_NS = level.logits_NC / self.temperature, level.soft_NS
        q_NS = z_NC.sigmoid() if self.regions else z_NC.softmax(1)[:, 1:]
        if level.mask is not None:
            q_NS, p_NS = q_NS * level.mask, p_NS * level.mask
        return soft + dice_semimetric(q_NS, p_NS)


class _Level(NamedTuple):
    """One resolution of the soft loss: logits, target, where it is valid, and the weight of this resolution."""

    logits_NC: torch.Tensor
    soft_NS: torch.Tensor
    mask: torch.Tensor | None
    weight: float
