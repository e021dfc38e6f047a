"""nnU-Net's intensity augmentation of one channel, in place, on whatever device it lies.

`x` is one float32 channel (space: 2 or 3 axes). Numbers are plain Python, and nothing here waits for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate, pad

SMALLEST = 1e-7  # nnU-Net's guard against dividing by zero
LINEAR = {2: "bilinear", 3: "trilinear"}


def device_generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator of the device; the only random numbers that depend on it."""
    return torch.Generator(device).manual_seed(seed)


def add_noise(x: torch.Tensor, sigma: float, seed: int) -> None:
    """Gaussian noise with standard deviation `sigma`."""
    x.add_(torch.empty_like(x).normal_(0, sigma, generator=device_generator(x.device, seed)))


def blur(x: torch.Tensor, sigmas: Sequence[float]) -> None:
    """Gaussian blur with one sigma (voxels) per axis, mirrored at the border.

    A sum of shifted slices: convolutions may be computed in TF32.
    """
    blurred = x
    for axis, sigma in enumerate(sigmas):
        weights = gaussian_weights(sigma)
        half = len(weights) // 2
        padding = [0] * (2 * x.ndim)
        padding[2 * (x.ndim - 1 - axis) : 2 * (x.ndim - axis)] = half, half
        padded = pad(blurred[None], padding, mode="reflect")[0]
        blurred = torch.zeros_like(x)
        for start, weight in enumerate(weights):
            blurred.add_(padded.narrow(axis, start, x.shape[axis]), alpha=weight)
    x.copy_(blurred)


def gaussian_weights(sigma: float, truncate: float = 6) -> list[float]:
    """Weights of nnU-Net's kernel, whose odd length is the one nearest to truncate * sigma + 0.5."""
    length = truncate * sigma + 0.5
    size = round(length)
    if size % 2 == 0:
        size += 1 if length >= size else -1
    weights = [math.exp(-0.5 * ((i - (size - 1) / 2) / sigma) ** 2) for i in range(size)]
    return [w / sum(weights) for w in weights]


def scale_brightness(x: torch.Tensor, multiplier: float) -> None:
    """Multiply."""
    x.mul_(multiplier)


def scale_contrast(x: torch.Tensor, multiplier: float) -> None:
    """Move values away from or towards their mean, within their range."""
    mean = x.mean()
    low, high = torch.aminmax(x)
    x.sub_(mean).mul_(multiplier).add_(mean).clamp_(low, high)


def lower_resolution(x: torch.Tensor, shape: Sequence[int]) -> None:
    """Sample down to `shape` (nearest) and up again (linear)."""
    small = interpolate(x[None, None], list(shape), mode="nearest-exact")
    x.copy_(interpolate(small, list(x.shape), mode=LINEAR[x.ndim])[0, 0])


def change_gamma(x: torch.Tensor, gamma: float, retain_stats: bool, invert: bool) -> None:
    """Raise values, scaled to 0 to 1, to a power; `retain_stats` restores mean and standard deviation."""
    if invert:
        x.neg_()
    mean, std = x.mean(), x.std()
    low, high = torch.aminmax(x)
    extent = high - low
    x.sub_(low).div_(extent.clamp(min=SMALLEST)).pow_(gamma).mul_(extent).add_(low)
    if retain_stats:
        mean_now, std_now = x.mean(), x.std()
        x.sub_(mean_now).mul_(std / std_now.clamp(min=SMALLEST)).add_(mean)
    if invert:
        x.neg_()
