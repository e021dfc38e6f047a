"""Samples drawn before they are read against nnU-Net's own loader, which reads and then draws."""

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from fastnnunet import native
from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.augment.drawn_first import SpatialDrawnFirst, points_of
from fastnnunet.nnunet.augment.soft_samples import SampleTransforms
from fastnnunet.nnunet.trainer.batches import SampledBatches
from fastnnunet.nnunet.trainer.seeds import generators_kept, seed_generators

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


class Once:
    """The number of a batch for which generators are seeded once, as for nnU-Net's loader, and not for each sample."""

    def __init__(self, number):
        self.number = number

    def begin(self, *sample):
        if not sample:
            seed_generators(self.number)


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
    loader = nnUNetDataLoader(volumes, 2, loaded, patch, LABELS, 0.5, transforms=transforms)
    maker = SampledBatches(loader=loader, cases=volumes, samples=SampleTransforms(transforms), soft=False)
    out = []
    for number in map(Once, range(count)):
        number.begin()
        out.append(maker.make(number, lambda _case: None) if drawn_first else next(loader))
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


class TestSampling:
    """Image and label in one pass against nnU-Net's transform, which samples each label for itself."""

    SPACES = (((16, 18, 20), (25, 26, 31)), ((16, 18, 20), (17, 18, 20)), ((24, 30), (33, 40)))

    def problem(self, patch, space, labels, seed, deform=0):
        spatial = nnUNetTrainer.get_training_transforms(patch, (-0.5, 0.5), None, (0,), False).transforms[0]
        spatial.p_rotation, spatial.p_scaling, spatial.p_elastic_deform = 1, 1, deform
        rng = np.random.default_rng(seed)
        blocks = rng.choice(labels, (2, *[-(-n // 3) for n in space])).astype(np.int16)
        for axis in range(1, blocks.ndim):
            blocks = blocks.repeat(3, axis)
        label = np.ascontiguousarray(blocks[(slice(None), *map(slice, space))])
        image = torch.from_numpy(rng.random((3, *space), np.float32))
        seed_generators(seed)
        return spatial, image, torch.from_numpy(label), spatial.get_parameters(image=image)

    @pytest.mark.parametrize(("patch", "space"), SPACES)
    @pytest.mark.parametrize("labels", [(0, 1), (0, 1, 2), (-1, 0, 1), (4,), tuple(range(-1, 30))])
    @pytest.mark.parametrize("deform", [0, 1])
    def test_against_nnunet(self, patch, space, labels, deform):
        with generators_kept():
            for seed in range(3):
                spatial, image, label, drawn = self.problem(patch, space, labels, seed, deform)
                planes = (1,) * (3 - len(space))
                values, ours = native.sample(
                    image.reshape(-1, *planes, *space).numpy(),
                    label.reshape(-1, *planes, *space).numpy(),
                    points_of(drawn["grid"]),
                    -1,
                )
                expected = spatial._apply_to_image(image, **drawn)
                if len(space) == 3:
                    np.testing.assert_array_equal(values.reshape(expected.shape), expected.numpy())
                else:
                    np.testing.assert_allclose(values.reshape(expected.shape), expected.numpy(), rtol=0, atol=1e-5)
                nnunets = spatial._apply_to_segmentation(label, **drawn)
                np.testing.assert_array_equal(ours.reshape(nnunets.shape), nnunets.numpy())

    def test_exact_ties(self):
        """Points half way between voxels, where two, four or eight labels tie."""
        with generators_kept():
            spatial, _, label, _ = self.problem((10, 12, 14), (10, 12, 14), (-1, 0, 1, 2, 3), 0)
        for shift in ((0, 0, 0), (0.5, 0, 0), (0, 0.5, 0.5), (0.5, 0.5, 0.5)):
            axes = [(2 * (np.arange(n) + s) + 1) / n - 1 for n, s in zip(label.shape[1:], shift, strict=True)]
            grid = torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij")[::-1], -1).astype(np.float32))
            expected = spatial._apply_to_segmentation(label, grid=grid, center_location_in_pixels=None)
            values = label.numpy().astype(np.float32)
            _, ours = native.sample(values, label.numpy(), points_of(grid), -1)
            assert (ours.reshape(expected.shape) != expected.numpy()).mean() < 0.001

    def test_a_box_of_the_volume(self):
        """The same as sampling what surrounds the box with zeros, divided by what ones in the box leave."""
        with generators_kept():
            _, image, _, drawn = self.problem((16, 18, 20), (25, 26, 31), (0,), 1)
        lower, upper = (3, 0, 10), (20, 26, 31)
        box = (slice(None), *map(slice, lower, upper))
        values, there = np.zeros((2, *image.shape), np.float32)
        values[box], there[box] = image.numpy()[box], 1
        points, none = points_of(drawn["grid"]), np.zeros((0, 25, 26, 31), np.int16)
        values, there = (native.sample(v, none, points, -1)[0] for v in (values, there))
        ours = native.sample_inside(image.numpy()[box], (25, 26, 31), lower, points, -7.0)
        expected = np.where(there >= 0.5, values / np.maximum(there, 0.5), -7)
        clear = abs(there - 0.5) > 1e-5
        assert 0.1 < (there < 0.5).mean() < 0.9
        np.testing.assert_allclose(ours[clear], expected[clear], atol=1e-6)

    def test_threads_change_no_bit(self):
        with generators_kept():
            _, image, label, drawn = self.problem((16, 18, 20), (25, 26, 31), (0, 1, 2), 1)
        one, many = (
            native.sample(image.numpy(), label.numpy(), points_of(drawn["grid"]), -1, threads=n) for n in (1, 4)
        )
        np.testing.assert_array_equal(one[0], many[0])
        np.testing.assert_array_equal(one[1], many[1])

    def test_a_transform_that_is_too_old(self):
        """As those of batchgeneratorsv2 before 0.3.6, which know no tie-break."""
        spatial = nnUNetTrainer.get_training_transforms((8, 8, 8), (0, 0), None, (0,), False).transforms[0]
        del spatial.seg_tiebreak
        with pytest.raises(MismatchError, match=r"(?s)has no seg_tiebreak.*'batchgeneratorsv2>=0\.3\.6'"):
            SpatialDrawnFirst(spatial)

    def test_other_settings_are_refused(self):
        spatial = nnUNetTrainer.get_training_transforms((8, 8, 8), (0, 0), None, (0,), False).transforms[0]
        SpatialDrawnFirst(spatial)
        spatial.mode_seg = "nearest"
        with pytest.raises(MismatchError, match="SpatialTransform has mode_seg='nearest', expected 'bilinear'"):
            SpatialDrawnFirst(spatial)

    def test_arrays_that_do_not_fit(self):
        values, labels, grid = np.zeros((1, 4, 5, 6), np.float32), np.zeros((1, 4, 5, 6), np.int16), np.zeros((7, 3))
        grid = grid.astype(np.float32)
        with pytest.raises(ValueError, match="do not fit"):
            native.sample(values, labels[:, 1:], grid, -1)
        with pytest.raises(ValueError, match="3 axes, or 2 for one plane"):
            native.sample(values, labels, np.ascontiguousarray(grid[:, :2]), -1)
