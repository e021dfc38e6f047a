"""Augmentation on the device of the batch against nnU-Net's own transforms given the same numbers."""

import copy
import logging

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.intensity.inversion import InvertImageTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from scipy.ndimage import map_coordinates
from scipy.stats import binom
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.augment import intensity as device_intensity
from fastnnunet.nnunet.augment.batches import AugmentedBatches, DrawnSamples
from fastnnunet.nnunet.augment.device import CHANGES, device_augmentation, recognise
from fastnnunet.nnunet.augment.soft_samples import opinions
from fastnnunet.nnunet.augment.spatial import sample_labels, sampling_grid
from fastnnunet.nnunet.trainer.seeds import generators_kept, seed_generators
from tests.samples import transformed

ROTATION = (-np.pi / 6, np.pi / 6)
KINDS = {  # patch, what is loaded for it, whether planes are rotated
    "3d": ((16, 18, 20), (25, 26, 31), False),
    "3d, barely loaded": ((16, 18, 20), (17, 18, 20), False),
    "planes": ((4, 20, 16), (4, 29, 24), True),
    "2d": ((22, 18), (31, 28), False),
}
CHANNELS = 2
STACKED = 3  # under the image: two soft channels and their coverage


def nnunet_transforms(kind, trainer=nnUNetTrainer, scales=None, **options):
    patch, _, planes = KINDS[kind]
    mirror_axes = tuple(range(len(patch)))
    return trainer.get_training_transforms(patch, ROTATION, scales, mirror_axes, planes, **options)


def always(transforms):
    """The same transforms, each of which does something to every sample."""
    transforms = copy.deepcopy(transforms)
    for transform in transforms:
        if isinstance(transform, SpatialTransform):
            transform.p_rotation = transform.p_scaling = 1
        if isinstance(transform, RandomTransform):
            transform.apply_probability = transform.transform.p_per_channel = 1
    return transforms


def without_noise(transforms):
    """nnU-Net draws its noise from the generator that the numbers after it come from."""
    for transform in transforms:
        if isinstance(transform, RandomTransform) and isinstance(transform.transform, GaussianNoiseTransform):
            transform.apply_probability = 0
    return transforms


@pytest.fixture(autouse=True)
def _own_generators():
    with generators_kept():
        yield


def sample(kind, seed=0, labels=(-1, 0, 1, 2, 3)):
    """Image, label in blocks of 3, so that several labels meet, and a soft label of two channels with its coverage."""
    _, space, _ = KINDS[kind]
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(CHANNELS, *space)).astype(np.float32)
    blocks = rng.choice(labels, [-(-n // 3) for n in space])
    for axis in range(len(space)):
        blocks = blocks.repeat(3, axis)
    label = blocks[tuple(slice(n) for n in space)].astype(np.int16)
    soft = rng.dirichlet([0.3] * 3, space).astype(np.float32)
    soft = np.concatenate([soft[..., 1:], np.ones_like(soft[..., :1])], -1)
    return (
        torch.from_numpy(image),
        torch.from_numpy(label[None].copy()),
        torch.from_numpy(np.moveaxis(soft, -1, 0).copy()),
    )


def on_device(transforms, samples, seeds, device="cpu"):
    """The way of a training: drawn and cropped by the loader, the rest with the whole batch."""
    augmentation = recognise(transforms)
    loader, drawn = DrawnSamples(augmentation, CHANNELS), []
    for (image, label, soft), seed in zip(samples, seeds, strict=True):
        seed_generators(seed)
        drawn.append(transformed(loader, image, label, soft[:-1]))
    batch = loader.stack(drawn)
    return next(AugmentedBatches(iter([batch]), augmentation, torch.device(device), STACKED))


def by_nnunet(transforms, sample, seed):
    image, label, soft = (t.clone() for t in sample)
    seed_generators(seed)
    for transform in transforms:
        out = transform(image=image, segmentation=label, regression_target=soft)
        image, label, soft = out["image"], out["segmentation"], out["regression_target"]
        if "nchannels_img" in out:  # planes as channels, which the next two transforms have to know
            break
    else:
        return image, label, soft
    spatial, back = transforms[1:3]
    out = back(**spatial(**out))
    image, label, soft = out["image"], out["segmentation"], out["regression_target"]
    for transform in transforms[3:]:
        out = transform(image=image, segmentation=label, regression_target=soft)
        image, label, soft = out["image"], out["segmentation"], out["regression_target"]
    return image, label, soft


class TestSpatial:
    @pytest.mark.parametrize("kind", ["3d", "3d, barely loaded", "2d"])
    @pytest.mark.parametrize("seed", range(4))
    def test_one_grid_for_image_label_and_soft_label(self, kind, seed):
        transforms = always(nnunet_transforms(kind).transforms)
        spatial, augmentation = transforms[0], recognise(transforms)
        image, label, soft = sample(kind, seed)
        image /= image.abs().max()  # coordinates in single precision: an error in units of the range
        seed_generators(seed)
        drawn = spatial.get_parameters(image=image)
        seed_generators(seed)
        draws = augmentation.draw(CHANNELS, image.shape[1:])
        np.testing.assert_array_equal(draws.affine, drawn["affine"])
        part = (..., *augmentation.needed(image.shape[1:], draws.affine))
        stacked, labels = torch.cat([image, soft])[part], label[part]
        grid = sampling_grid(draws.affine, augmentation.sampled_patch, stacked.shape[1:], torch.device("cpu"))
        ours = torch.nn.functional.grid_sample(stacked[None], grid[None], align_corners=False)[0]
        torch.testing.assert_close(ours[:CHANNELS], spatial._apply_to_image(image, **drawn), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[CHANNELS:], spatial._apply_to_regr_target(soft, **drawn), rtol=0, atol=1e-5)
        our_label = sample_labels(labels, grid, augmentation.outside)
        nnunets = spatial._apply_to_segmentation(label, **drawn)
        assert (our_label != nnunets).float().mean() < 0.002
        self.assert_argmax(our_label[0].numpy(), nnunets[0].numpy(), label[0].numpy(), drawn["grid"].numpy())

    def assert_argmax(self, ours, nnunets, label, grid):
        """SciPy's interpolation of each label, in double precision, of a volume that -1 continues to all sides."""
        positions = [((grid[..., -1 - a] + 1.0) * n - 1) / 2 for a, n in enumerate(label.shape)]
        values = [-1, 0, 1, 2, 3]
        scores = np.stack(
            [
                map_coordinates(
                    (label == v).astype(float), positions, order=1, mode="grid-constant", cval=float(v == -1)
                )
                for v in values
            ]
        )
        ordered = np.sort(scores, 0)
        clear = ordered[-1] - ordered[-2] > 1e-3
        assert clear.mean() > 0.9
        winner = np.array(values)[scores.argmax(0)]
        np.testing.assert_array_equal(ours[clear], winner[clear])
        np.testing.assert_array_equal(nnunets[clear], winner[clear])
        its_score = np.take_along_axis(scores, np.searchsorted(values, ours)[None], 0)[0]
        assert (ordered[-1] - its_score).max() < 1e-3, "a label that loses is never taken"

    def test_exact_ties_go_to_the_nearest_neighbour_of_the_tied(self):
        """Half way between voxels all is tied; the oracle is nnU-Net's transform on the same grid."""
        spatial = nnunet_transforms("3d").transforms[0]
        _, label, _ = sample("3d")
        half = sampling_grid(np.eye(3), spatial.patch_size, label.shape[1:], torch.device("cpu"))
        for shift in (np.zeros(3), np.array([0.5, 0, 0]), np.array([0, 0.5, 0.5]), np.array([0.5, 0.5, 0.5])):
            grid = half + torch.tensor(2 * shift[::-1] / np.array(label.shape[:0:-1])).float()
            expected = spatial._apply_to_segmentation(label, grid=grid, center_location_in_pixels=None)
            ours = sample_labels(label, grid, -1)
            assert (ours != expected).float().mean() < 0.001

    def test_cropping_only(self):
        transforms = nnunet_transforms("3d").transforms
        transforms[0].p_rotation = transforms[0].p_scaling = 0
        image, label, _ = sample("3d")
        expected = transforms[0](image=image, segmentation=label)
        augmentation = recognise(transforms)
        assert augmentation.draw(CHANNELS, image.shape[1:]).affine is None
        part = (..., *augmentation.needed(image.shape[1:], None))
        assert torch.equal(image[part], expected["image"])
        assert torch.equal(label[part], expected["segmentation"])


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("kind", ["3d", "planes", "2d"])
def test_intensity(kind, number):
    randomly = [t for t in always(nnunet_transforms(kind).transforms) if isinstance(t, RandomTransform)]
    assert len(randomly) == 7
    transform = randomly[number].transform
    image, _, _ = sample(kind)
    for seed in range(5):
        seed_generators(seed)
        drawn = transform.get_parameters(image=image)
        changes = CHANGES[type(transform)](drawn, image.shape[1:])
        assert [c.channel for c in changes] == list(range(CHANNELS))
        ours = image.clone()
        for change in changes:
            change.apply(ours[change.channel], *change.numbers)
        if isinstance(transform, GaussianNoiseTransform):
            expected = image.clone()
            for change in changes:  # noise of one channel at a time, from the generator ours comes from
                torch.manual_seed(change.numbers[1])
                one = {"num_apply": 1, "apply_idx": torch.tensor([0]), "sigmas": drawn["sigmas"]}
                transform._apply_to_image(expected[change.channel][None], **one)
        else:
            expected = transform._apply_to_image(image.clone(), **drawn)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours, image, atol=1e-4)


def test_gamma_of_a_constant_channel():
    """Nothing to scale by: nnU-Net's guards against dividing by zero."""
    transform = GammaTransform((0.7, 1.5), 0.5, False, 1, 0.5)
    image = torch.full((2, 4, 4, 4), 1.5)
    for seed in range(4):
        seed_generators(seed)
        drawn = transform.get_parameters(image=image)
        ours = image.clone()
        for change in CHANGES[GammaTransform](drawn, image.shape[1:]):
            change.apply(ours[change.channel], *change.numbers)
        torch.testing.assert_close(ours, transform._apply_to_image(image.clone(), **drawn))


OPTIONS = {
    "plain": {},
    "deep supervision": {"scales": True},
    "masked": {"use_mask_for_norm": [False, True]},
    "regions": {"regions": [(1, 2), 2], "scales": True},
    "regions and ignore": {"regions": [(1, 2), 2], "ignore_label": 3, "use_mask_for_norm": [True, True]},
}


class TestWhole:
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_same_generators_same_samples(self, kind, options):
        """All transforms in a row, drawn from generators in the same state, but for nnU-Net's noise."""
        options = dict(OPTIONS[options])
        dims = len(KINDS[kind][0])
        if options.pop("scales", None):
            options["scales"] = [[1.0] * dims, [0.5] * dims, [1.0] + [0.25] * (dims - 1)]
        transforms = without_noise(nnunet_transforms(kind, **options).transforms)
        seeds = range(8)
        samples = [sample(kind, seed) for seed in seeds]
        batch = on_device(transforms, samples, seeds)
        *targets, soft_NSZYX = batch["target"]
        scales = options.get("scales")
        assert len(targets) == (1 if scales is None else len(scales))
        for n, seed in enumerate(seeds):
            image, label, soft = by_nnunet(transforms, samples[n], seed)
            torch.testing.assert_close(batch["data"][n], image, rtol=1e-4, atol=5e-5)
            same_side = (soft[-1] - 0.5).abs() > 1e-4
            torch.testing.assert_close(soft_NSZYX[n][:, same_side], opinions(soft)[:, same_side], rtol=0, atol=2e-5)
            for ours, expected in zip(targets, label if scales is not None else [label], strict=True):
                assert ours.dtype == expected.dtype
                assert ours[n].shape == expected.shape
                assert (ours[n] != expected).float().mean() < 0.005
        if "regions" not in options:
            assert targets[0].min() == 0, "-1, which is outside, is removed"
        channels = len(options["regions"]) + ("ignore_label" in options) if "regions" in options else 1
        assert targets[0].shape[1] == channels

    def test_without_soft_labels_targets_are_what_nnunet_gives(self):
        for scales, kind in ((None, torch.Tensor), ([[1.0] * 3, [0.5] * 3], list)):
            augmentation = recognise(nnunet_transforms("3d", scales=scales).transforms)
            image, label, _ = sample("3d")
            seed_generators(0)
            draws = augmentation.draw(CHANNELS, image.shape[1:])
            part = (..., *augmentation.needed(image.shape[1:], draws.affine))
            _, target = augmentation.apply([image[part]], [label[part]], [draws], 0)
            assert isinstance(target, kind)

    def test_bits_repeat(self):
        transforms, samples = always(nnunet_transforms("3d").transforms), [sample("3d", n) for n in range(3)]
        first, second = (on_device(transforms, samples, (4, 5, 6)) for _ in range(2))
        assert torch.equal(first["data"], second["data"])
        assert all(torch.equal(a, b) for a, b in zip(first["target"], second["target"], strict=True))
        alone = on_device(transforms, samples[1:2], (5,))
        assert torch.equal(alone["data"][0], first["data"][1]), "its neighbours do not matter to a sample"

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("options", ["plain", "regions and ignore"])
    def test_everything_stays_on_the_gpu(self, kind, options, monkeypatch):
        """Tensors that only pretend to be on a GPU refuse to be mixed with others and to be looked into."""
        monkeypatch.setattr(device_intensity, "device_generator", lambda _device, _seed: None)
        scales = [[1.0] * len(KINDS[kind][0]), [0.5] * len(KINDS[kind][0])]
        transforms = always(nnunet_transforms(kind, scales=scales, **OPTIONS[options]).transforms)
        augmentation = recognise(transforms)
        _, space, _ = KINDS[kind]
        draws = augmentation.draw(CHANNELS, space)
        assert len({c.apply for c in draws.changes}) == 6
        image, label, soft = sample(kind)
        part = (..., *augmentation.needed(space, draws.affine))
        shapes = [t[part].shape for t in (torch.cat([image, soft]), label)]
        with FakeTensorMode():
            stacked = [torch.empty(shapes[0], device="cuda")]
            labels = [torch.empty(shapes[1], dtype=torch.int16, device="cuda")]
            data, targets = augmentation.apply(stacked, labels, [draws], STACKED)
            assert {t.device.type for t in (data, *targets)} == {"cuda"}
            assert len(targets) == 3


def test_probabilities_and_ranges():
    """Counts of 2000 draws are within what chance leaves of nnU-Net's probabilities, written out here once more."""
    augmentation = recognise(nnunet_transforms("3d").transforms)
    seed_generators(0)
    draws = [augmentation.draw(1, KINDS["3d"][1]) for _ in range(2000)]
    numbers = {}
    for draw in draws:
        for change in draw.changes:
            inverted = change.numbers[2] if change.apply is device_intensity.change_gamma else ""
            numbers.setdefault(f"{change.apply.__name__}{inverted}", []).append(change.numbers[0])
    counts = {name: len(values) for name, values in numbers.items()}
    counts |= {f"mirror {a}": sum(a in d.mirror_axes for d in draws) for a in range(3)}
    counts["moved"] = sum(d.affine is not None for d in draws)
    expected = {
        "add_noise": 0.1,
        "blur": 0.2 * 0.5,
        "scale_brightness": 0.15,
        "scale_contrast": 0.15,
        "lower_resolution": 0.25 * 0.5,
        "change_gammaTrue": 0.1,
        "change_gammaFalse": 0.3,
        "mirror 0": 0.5,
        "mirror 1": 0.5,
        "mirror 2": 0.5,
        "moved": 1 - 0.8 * 0.8,
    }
    assert counts.keys() == expected.keys()
    for name, p in expected.items():
        low, high = binom.ppf([1e-6, 1 - 1e-6], len(draws), p)
        assert low <= counts[name] <= high, name
    for name, low, high in (
        ("add_noise", 0, 0.1),
        ("blur", 0.5, 1),
        ("scale_brightness", 0.75, 1.25),
        ("scale_contrast", 0.75, 1.25),
        ("change_gammaTrue", 0.7, 1.5),
        ("change_gammaFalse", 0.7, 1.5),
    ):
        values = np.array(numbers[name])
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
    shapes = np.array(numbers["lower_resolution"])
    assert shapes.min(0).tolist() == [8, 9, 10]
    scales = np.array([np.linalg.det(d.affine) ** (1 / 3) for d in draws if d.affine is not None])
    assert 0.7 <= scales.min() < 0.73
    assert 1.37 < scales.max() <= 1.4


class TestUnknown:
    """What is not nnU-Net's default stays in the loader processes, and the log says so."""

    def test_cascade(self, caplog):
        transforms = nnunet_transforms("3d", is_cascaded=True, foreground_labels=[1, 2]).transforms
        with caplog.at_level(logging.WARNING):
            assert device_augmentation(transforms) is None
        assert "in the loader processes" in caplog.text
        assert "MoveSegAsOneHotToDataTransform is not where" in caplog.text

    @pytest.mark.parametrize("kind", ["3d", "planes"])
    def test_da5(self, kind):
        transforms = nnunet_transforms(kind, nnUNetTrainerDA5, use_mask_for_norm=[False]).transforms
        with pytest.raises(MismatchError, match="is not where nnU-Net's default augmentation has it"):
            recognise(transforms)

    def test_other_settings(self):
        transforms = nnunet_transforms("3d").transforms
        transforms[0].p_elastic_deform = 0.1
        with pytest.raises(MismatchError, match=r"SpatialTransform has p_elastic_deform=0\.1, expected 0"):
            recognise(transforms)

    def test_other_transforms(self):
        transforms = nnunet_transforms("3d").transforms
        transforms.insert(1, RandomTransform(InvertImageTransform(1, 1, 1), 0.1))
        with pytest.raises(MismatchError, match="InvertImageTransform is not where"):
            recognise(transforms)
        with pytest.raises(MismatchError, match="the end is not where"):
            recognise(transforms[:1])
        assert device_augmentation(nnunet_transforms("planes").transforms).planes
