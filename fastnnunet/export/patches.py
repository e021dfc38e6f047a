"""What an exported model is compared with PyTorch on: real preprocessed patches, or noise where there are none."""

from typing import Any

import numpy as np

from fastnnunet.nnunet.cases import open_cases

PARITY_PATCHES = 2
_NOISE_SCALES = (1.0, 4.0)  # voxels: texture and shapes


def real_patches(
    plans: dict[str, Any], configuration: str, patch_size: tuple[int, ...], previous_labels: tuple[int, ...] = ()
) -> np.ndarray:
    """Centre patches of the first preprocessed cases, zero padded: float32 (N, C, *patch).

    In a cascade the label of the case stands in for the previous stage's segmentation.
    Raises NotFoundError when there are no preprocessed cases.
    """
    cases = open_cases(plans, configuration)
    size = patch_size if len(patch_size) == 3 else (1, *patch_size)
    patches = []
    for case_id in cases.case_ids[:PARITY_PATCHES]:
        image_CZYX = cases.image_CZYX(case_id)
        if previous_labels:
            label_ZYX = cases.label_ZYX(case_id)
            one_hot = np.stack([label_ZYX == label for label in previous_labels])
            image_CZYX = np.concatenate([image_CZYX, one_hot.astype(np.float32)])
        patch = np.zeros((image_CZYX.shape[0], *size), np.float32)
        source, target = zip(*(_centred(n, p) for n, p in zip(image_CZYX.shape[1:], size, strict=True)), strict=True)
        patch[(slice(None), *target)] = image_CZYX[(slice(None), *source)]
        patches.append(patch.reshape(image_CZYX.shape[0], *patch_size))
    return np.stack(patches)


def noise_patches(num_channels: int, patch_size: tuple[int, ...], num_previous: int = 0) -> np.ndarray:
    """Noise with structure at several scales, as normalised images have it: float32 (N, C, *patch), always the same.

    `num_previous`: of a cascade, the one-hot channels among `num_channels`; each is a random region.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    patches = np.zeros((PARITY_PATCHES, num_channels, *patch_size), np.float32)
    for patch in patches:
        for channel in patch:
            for scale in _NOISE_SCALES:
                layer = gaussian_filter(rng.standard_normal(patch_size), scale)
                channel += layer / layer.std()
        if num_previous:
            previous = patch[-num_previous:]
            previous[...] = (previous == previous.max(axis=0)) & (previous > 0)  # no voxel has two labels
    return patches


def _centred(length: int, window: int) -> tuple[slice, slice]:
    """Slices (in the image, in the window) that put the image's centre into the window's centre."""
    common = min(length, window)
    start, offset = (length - common) // 2, (window - common) // 2
    return slice(start, start + common), slice(offset, offset + common)
