"""nnU-Net's rotation and scaling as torch code for any device: one grid for image, label and soft label.

nnU-Net's `SpatialTransform` on a patch whose middle is the middle of what was loaded, without elastic deformation.
Shapes: C channels, ZYX (or YX) space, D its number of axes; nothing here waits for the device.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import grid_sample

MARGIN = 2  # voxels beyond the outermost sample point: its interpolation partner and one for rounding
SCORE = 1000  # nnU-Net compares label weights as half floats of up to this, so that near ties become ties


def reach(affine: np.ndarray, patch_zyx: Sequence[int], loaded_zyx: Sequence[int]) -> tuple[slice, ...]:
    """The middle part of what was loaded that the patch is interpolated from.

    As much is left out below as above, so that the middle stays where it is; never more than what was loaded.
    """
    half_zyx = np.abs(affine) @ ((np.asarray(patch_zyx) - 1) / 2)
    spare = [max(0, int((n - 1) / 2 - half - MARGIN)) for n, half in zip(loaded_zyx, half_zyx, strict=True)]
    return tuple(slice(k, n - k) for k, n in zip(spare, loaded_zyx, strict=True))


def sampling_grid(
    affine: np.ndarray, patch_zyx: Sequence[int], loaded_zyx: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The grid (patch, D) that `grid_sample` wants, around the middle of what was loaded.

    Coordinates are sums of products, not a matrix product, which might be computed in TF32.
    """
    axes = range(len(patch_zyx))
    along = [
        torch.linspace((1 - n) / 2, (n - 1) / 2, n, device=device).view([-1 if a == axis else 1 for a in axes])
        for axis, n in enumerate(patch_zyx)
    ]
    coordinates = []
    for axis in reversed(axes):  # grid_sample counts from the last axis
        row = [float(v) for v in affine[axis] / (loaded_zyx[axis] / 2)]
        coordinates.append(sum(x * v for x, v in zip(along, row, strict=True)))
    return torch.stack(torch.broadcast_tensors(*coordinates), -1)


def sample_linear(values_CZYX: torch.Tensor, grid_ZYXD: torch.Tensor) -> torch.Tensor:
    """Float values interpolated linearly, zeros outside."""
    out_1CZYX = grid_sample(values_CZYX[None], grid_ZYXD[None], mode="bilinear", align_corners=False)
    return out_1CZYX[0]


def sample_labels(labels_CZYX: torch.Tensor, grid_ZYXD: torch.Tensor, outside: int) -> torch.Tensor:
    """The label with the largest interpolation weight; the label `outside` continues beyond the border.

    Ties, which include differences that half floats do not tell, go to the nearest neighbour if its label is among the
    tied ones, else to the smallest label. Only the 2^D neighbours of a point can win, so the number of labels does not
    matter.
    """
    corners_KCZYX, weights_KZYX = _corners(labels_CZYX, grid_ZYXD, outside)

    def score(candidates_CZYX: torch.Tensor) -> torch.Tensor:
        agreeing = torch.where(corners_KCZYX == candidates_CZYX, weights_KZYX[:, None], 0.0)
        return agreeing.sum(0).to(torch.float16)

    winner_CZYX = corners_KCZYX[0]
    best_CZYX = score(winner_CZYX)
    for candidate_CZYX in corners_KCZYX[1:]:
        its_CZYX = score(candidate_CZYX)
        better = (its_CZYX > best_CZYX) | ((its_CZYX == best_CZYX) & (candidate_CZYX < winner_CZYX))
        winner_CZYX = torch.where(better, candidate_CZYX, winner_CZYX)
        best_CZYX = torch.maximum(best_CZYX, its_CZYX)
    shifted_1CZYX = (labels_CZYX[None] - outside).float()  # grid_sample pads with 0
    nearest_1CZYX = grid_sample(shifted_1CZYX, grid_ZYXD[None], mode="nearest", align_corners=False)
    nearest_CZYX = nearest_1CZYX[0].to(labels_CZYX.dtype) + outside
    return torch.where(score(nearest_CZYX) == best_CZYX, nearest_CZYX, winner_CZYX)


def _corners(labels_CZYX: torch.Tensor, grid_ZYXD: torch.Tensor, outside: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (K, C, patch) of the K = 2^D neighbours of every point, and their weights (K, patch) times SCORE."""
    space = labels_CZYX.shape[1:]
    below, weights = [], []
    for axis, n in enumerate(space):
        position = ((grid_ZYXD[..., -1 - axis] + 1) * n - 1) / 2
        floor = position.floor()
        below.append(floor.long())
        weights.append((floor + 1 - position, position - floor))
    flat_CV = labels_CZYX.reshape(len(labels_CZYX), -1)
    corner_labels, corner_weights = [], []
    for steps in itertools.product((0, 1), repeat=len(space)):
        index = torch.zeros_like(below[0])
        inside = torch.ones_like(index, dtype=torch.bool)
        weight = torch.full_like(weights[0][0], SCORE)
        for n, floor, step, of_axis in zip(space, below, steps, weights, strict=True):
            at = floor + step
            inside &= (at >= 0) & (at < n)
            index = index * n + at.clamp(0, n - 1)
            weight = weight * of_axis[step]
        corner_labels.append(torch.where(inside, flat_CV[:, index], outside))
        corner_weights.append(weight)
    return torch.stack(corner_labels), torch.stack(corner_weights)
