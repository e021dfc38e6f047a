"""What the soft loss compares a student with: targets, sharpened and at coarser resolutions, and weights of voxels.

All of it is computed of the soft label as it is compared, that is tempered. With regions (sigmoid heads) every region
is a distribution of its own, over inside and outside.
Shapes: N batch, S stored channels (all classes but the background, or R regions), `...` space, two or three axes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

Voxels = Literal["all", "uncertain", "entropy", "boundary"]

CERTAIN = 0.99  # a voxel is uncertain where no class has more
NEAR = 2  # voxels on each axis from a change of the target's label that count as its boundary


def full_simplex(soft_NS: torch.Tensor) -> torch.Tensor:
    """(N, C-1, ...) foreground probabilities -> (N, C, ...) with background = 1 - sum, first."""
    background = (1 - soft_NS.sum(1, keepdim=True)).clamp_(min=0)
    return torch.cat([background, soft_NS], 1)


def sharpened(soft_NS: torch.Tensor, above: float, power: float, *, regions: bool) -> torch.Tensor:
    """p^power, normalised, where the largest probability exceeds `above`; at an infinite power the target's own label.

    The label does not change, and small probabilities, which rounding in the store moves most, only shrink.
    """
    if regions:
        p_NS = soft_NS.clamp(0, 1)
        certain = torch.maximum(p_NS, 1 - p_NS) > above
        inside, outside = p_NS**power, (1 - p_NS) ** power
        sharp_NS = (p_NS > 0.5).to(p_NS.dtype) if math.isinf(power) else inside / (inside + outside)
        return torch.where(certain, sharp_NS, soft_NS)
    p_NC = full_simplex(soft_NS).clamp_(min=0)
    largest, label = p_NC.max(1, keepdim=True)
    if math.isinf(power):
        sharp_NC = torch.zeros_like(p_NC).scatter_(1, label, 1)
    else:
        sharp_NC = p_NC**power
        sharp_NC = sharp_NC / sharp_NC.sum(1, keepdim=True)
    return torch.where(largest > above, sharp_NC[:, 1:], soft_NS)


def pooled(
    soft_NS: torch.Tensor, mask: torch.Tensor | None, shapes: Sequence[Sequence[int]]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The target and its mask, bool (N, 1, ...), at each of these shapes of space, none finer than the one before.

    A coarse voxel's target is the mean over its valid fine voxels, and is valid where at least half of them are, as in
    a soft label beyond a volume's border. A fine voxel belongs to the coarse one that it lies in; to both where a
    border runs through it (adaptive average pooling).
    """
    counted = soft_NS if mask is None else torch.cat([torch.where(mask, soft_NS, 0), mask.to(soft_NS.dtype)], 1)
    pool = adaptive_avg_pool2d if counted.ndim == 4 else adaptive_avg_pool3d
    out: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    finest = last = counted
    for shape in shapes:
        if tuple(shape) == tuple(soft_NS.shape[2:]):
            out.append((soft_NS, mask))
            continue
        # of means over blocks of one size the mean is that of all: only the first step looks at every voxel
        whole = all(n % m == 0 for n, m in zip(last.shape[2:], shape, strict=True))
        last = pool(last if whole else finest, list(shape))
        if mask is None:
            out.append((last, None))
            continue
        soft, share = last.split([soft_NS.shape[1], 1], 1)
        out.append((soft / torch.where(share > 0, share, 1), share >= 0.5))
    return out


def voxel_weights(
    voxels: Voxels, logits: torch.Tensor, soft_NS: torch.Tensor, mask: torch.Tensor | None, *, regions: bool
) -> torch.Tensor | None:
    """The weight of each voxel in the soft loss, (N, 1, ...), bool or of the target's type; 0 where `mask` is false.

    all        1
    uncertain  1 where no class has more than 0.99, or where the student's label is another; else 0
    entropy    entropy of the target over its largest value, log C (regions: the mean of theirs)
    boundary   1 up to two voxels, on each axis, from where the target's label changes; else 0

    None: all count, and all alike.
    """
    if voxels == "all":
        return mask
    if voxels == "uncertain":
        weights = _uncertain(logits.detach(), soft_NS, regions)
    else:
        weights = _entropy(soft_NS, regions) if voxels == "entropy" else _boundary(soft_NS, mask, regions)
    return weights if mask is None else weights * mask  # bool times bool is bool


# torch.max in the place of argmax, which takes ten times as long on a CPU
def _uncertain(logits: torch.Tensor, soft_NS: torch.Tensor, regions: bool) -> torch.Tensor:
    if regions:
        unsure = torch.maximum(soft_NS, 1 - soft_NS) <= CERTAIN
        return (unsure | ((logits > 0) != (soft_NS > 0.5))).any(1, keepdim=True)
    largest, label = full_simplex(soft_NS).max(1, keepdim=True)
    return (largest <= CERTAIN) | (logits.max(1, keepdim=True).indices != label)


def _entropy(soft_NS: torch.Tensor, regions: bool) -> torch.Tensor:
    if regions:
        p_NS = soft_NS.clamp(0, 1)
        nats = -(torch.xlogy(p_NS, p_NS) + torch.xlogy(1 - p_NS, 1 - p_NS)).mean(1, keepdim=True)
        return nats / math.log(2)
    p_NC = full_simplex(soft_NS).clamp_(0, 1)
    return -torch.xlogy(p_NC, p_NC).sum(1, keepdim=True) / math.log(p_NC.shape[1])


def _boundary(soft_NS: torch.Tensor, mask: torch.Tensor | None, regions: bool) -> torch.Tensor:
    label = (soft_NS > 0.5) if regions else full_simplex(soft_NS).max(1, keepdim=True).indices
    highest = lowest = label.to(soft_NS.dtype)
    if mask is not None:  # what is no target is no other label either
        highest, lowest = torch.where(mask, highest, -math.inf), torch.where(mask, lowest, math.inf)
    return (_highest_near(highest) > -_highest_near(-lowest)).any(1, keepdim=True)


def _highest_near(values: torch.Tensor) -> torch.Tensor:
    """The largest value up to NEAR voxels away on each axis, by shifts: torch's pooling takes longer on a CPU."""
    for axis in range(2, values.ndim):
        n, highest = values.shape[axis], values.clone()
        for shift in range(1, min(NEAR, n - 1) + 1):
            first, last = (highest.narrow(axis, start, n - shift) for start in (0, shift))
            torch.maximum(first, values.narrow(axis, shift, n - shift), out=first)
            torch.maximum(last, values.narrow(axis, 0, n - shift), out=last)
        values = highest
    return values
