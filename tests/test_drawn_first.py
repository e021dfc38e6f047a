"""Samples drawn before they are read against nnU-Net's own loader, which reads and then draws."""

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from fastnnunet.nnunet.drawn_first import DrawnBoxes
from fastnnunet.nnunet.loading import generators_kept, seed_generators
from fastnnunet.nnunet.soft_channels import SampleTransforms

LABELS = LabelManager({"background": 0, "a": 1, "b": 2}, None)
KINDS = {  # patch, what nnU-Net loads for it, shape of the volume, whether planes are rotated
    "inside": ((16, 18, 20), (25, 26, 31), (40, 41, 43), False),
    "volume smaller than the patch": ((16, 18, 21), (25, 26, 31), (14, 40, 11), False),
    "odd": ((15, 17, 19), (24, 27, 30), (33, 28, 36), False),
    "planes": ((8, 20, 16), (8, 29, 24), (9, 22, 40), True),
    "2d": ((22, 18), (31, 28), (5, 30, 41), False),
}


class Array:
    """An array that is read piece by piece, as a file is, and counts what is read."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.read = values, values.shape, values.dtype, 0

    def __getitem__(self, index):
        out = self.values[index].copy()
        self.read += out.size
        return out


class Volumes:
    """An nnU-Net data set of one case in memory."""

    identifiers = ("case",)

    def __init__(self, shape, cascade):
        rng = np.random.default_rng(0)
        self.image = Array(rng.normal(size=(2, *shape)).astype(np.float32))
        self.label = rng.integers(0, 3, (1, *shape)).astype(np.int8)
        self.previous = rng.integers(0, 3, shape).astype(np.int8) if cascade else None
        self.properties = {"class_locations": {c: np.argwhere(self.label == c) for c in (1, 2)}}

    def load_case(self, _identifier):
        return self.image, self.label, self.previous, self.properties


def batches(kind, trainer, *, drawn_first, cascade, count=12):
    patch, loaded, shape, planes = KINDS[kind]
    transforms = trainer.get_training_transforms(
        patch,
        (-np.pi / 6, np.pi / 6),
        [[1.0] * len(patch), [0.5] * len(patch)],
        tuple(range(len(patch))),
        planes,
        is_cascaded=cascade,
        foreground_labels=[1, 2],
    )
    volumes = Volumes(shape, cascade)
    loader = nnUNetDataLoader(
        volumes,
        2,
        loaded,
        patch,
        LABELS,
        0.5,
        transforms=SampleTransforms(transforms, 0) if drawn_first else transforms,
    )
    if drawn_first:
        DrawnBoxes(loader)
    out = []
    for number in range(count):
        seed_generators(number)
        out.append(next(loader))
    return out, volumes.image.read


@pytest.mark.parametrize("trainer", [nnUNetTrainer, nnUNetTrainerDA5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cascade", [False, True])
def test_samples_are_nnunets_and_less_is_read(kind, trainer, cascade):
    with generators_kept():
        expected, everything = batches(kind, trainer, drawn_first=False, cascade=cascade)
        got, read = batches(kind, trainer, drawn_first=True, cascade=cascade)
    for ours, nnunets in zip(got, expected, strict=True):
        # means over a tensor are summed in another order where nnU-Net has a view into what it loaded
        torch.testing.assert_close(ours["data"], nnunets["data"], rtol=1e-5, atol=1e-5)
        assert len(ours["target"]) == len(nnunets["target"]) == 2
        assert all(torch.equal(a, b) for a, b in zip(ours["target"], nnunets["target"], strict=True))
    assert read < everything
