"""Labels of a batch as nnU-Net's losses want them: regions, and one label per output of deep supervision."""

from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate


def regions_of(label_NKZYX: torch.Tensor, regions: Sequence[Sequence[int]]) -> torch.Tensor:
    """Bool (N, R, space): where the first channel of the label is one of a region's values."""
    label_NZYX = label_NKZYX[:, 0]
    return torch.stack([torch.stack([label_NZYX == v for v in values]).any(0) for values in regions], 1)


def downsampled(label_NKZYX: torch.Tensor, scales: Sequence[float | Sequence[float]]) -> list[torch.Tensor]:
    """The label at each scale of its resolution, nearest voxel, in its own type."""
    space = label_NKZYX.shape[2:]
    out = []
    for scale in scales:
        per_axis = scale if isinstance(scale, list | tuple) else [scale] * len(space)
        if all(s == 1 for s in per_axis):
            out.append(label_NKZYX)
            continue
        shape = [round(n * s) for n, s in zip(space, per_axis, strict=True)]
        out.append(interpolate(label_NKZYX.float(), shape, mode="nearest-exact").to(label_NKZYX.dtype))
    return out
