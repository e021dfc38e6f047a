"""Soft labels of one case in memory, and one sample of it as a batch is made of."""

import numpy as np

from fastnnunet.nnunet.augment.drawn_first import within
from fastnnunet.nnunet.augment.soft_samples import read_box

NNUNETS = {"border_mode_seg": "constant", "padding_value_seg": -1}  # settings nnU-Net gives its spatial transform


class SoftLabel:
    """Soft labels (S, Z, Y, X) of one case."""

    def __init__(self, soft_SZYX):
        self.soft_SZYX = np.asarray(soft_SZYX)
        self.num_channels = len(self.soft_SZYX)

    def read(self, _case_id, lower, upper):
        return self.soft_SZYX[(slice(None), *map(slice, lower, upper))]


def transformed(samples, image, label, soft):
    """A sample for which nnU-Net would load the whole case (C, Z, Y, X), or (C, Y, X)."""
    planes = (1,) * (4 - image.ndim)
    volume = np.asarray(soft).reshape(len(soft), *planes, *soft.shape[1:])
    space = volume.shape[1:]
    drawn = samples.draw(space)
    box = within(([0] * 3, list(space)), drawn.part)
    part = (..., *[slice(k, u) for k, u in zip(*box, strict=True)][len(planes) :])
    soft_box = read_box(SoftLabel(volume), "case", space, box)
    return samples.make(image[part].clone(), label[part].clone(), soft_box, drawn)
