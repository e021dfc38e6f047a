"""One case in memory as a data set, and one sample of it through transforms as a loader would ask for it."""

import numpy as np

from fastnnunet.nnunet.augment.soft_samples import SoftLabelDataset

NNUNETS = {"border_mode_seg": "constant", "padding_value_seg": -1}  # settings nnU-Net gives its spatial transform


class SoftLabel:
    """Soft labels (S, Z, Y, X) of one case."""

    def __init__(self, soft_SZYX):
        self.soft_SZYX = np.asarray(soft_SZYX)
        self.num_channels = len(self.soft_SZYX)

    def read(self, _case_id, lower, upper):
        return self.soft_SZYX[(slice(None), *map(slice, lower, upper))]


class Images:
    identifiers = ("case",)

    def __init__(self, image_CZYX):
        self.image_CZYX = image_CZYX

    def load_case(self, _identifier):
        return (self.image_CZYX,)


def dataset_of(image_CZYX, soft_SZYX):
    """A data set that has loaded its only case."""
    dataset = SoftLabelDataset(Images(image_CZYX), SoftLabel(soft_SZYX))
    dataset.load_case("case")
    return dataset


def transformed(transforms, image, label, soft):
    """What `transforms` make of a sample for which nnU-Net would load the whole case (C, Z, Y, X), or (C, Y, X)."""
    planes = (1,) * (4 - image.ndim)
    volumes = (v.reshape(len(v), *planes, *v.shape[1:]) for v in (image, soft))
    lower, upper = transforms.begin(dataset_of(*volumes), ([0] * 3, [*planes, *image.shape[1:]]))
    part = (..., *[slice(k, u) for k, u in zip(lower, upper, strict=True)][len(planes) :])
    return transforms(image[part].clone(), label[part].clone())
