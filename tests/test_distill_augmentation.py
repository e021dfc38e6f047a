"""nnU-Net's whole augmentation, default and DA5, moves image, label and soft label alike."""

import dataclasses

import numpy as np
import pytest
import torch

from fastnnunet.distill.check import check_job
from fastnnunet.distill.configure import configure
from fastnnunet.errors import SpecError
from fastnnunet.nnunet.augment.soft_samples import NO_OPINION, SampleTransforms
from fastnnunet.nnunet.trainer.seeds import generators_kept, seed_generators
from fastnnunet.specs.distill import DistillSpec
from tests.samples import transformed
from tests.teachers import start_weights_of
from tests.test_distill_seeds import make_job


class LabelAsSoftLabel:
    """The soft label of a case is its label: channel 1 where class 1 is, channel 2 where class 2 is."""

    num_channels = 2

    def __init__(self, shape):
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
        self.label = (grid[0] > shape[0] // 3).astype(np.int16) + (grid[1] > shape[1] // 2)

    def sample(self):
        soft = np.stack([self.label == c for c in (1, 2)]).astype(np.float32)
        image = np.random.default_rng(0).normal(size=(1, *self.label.shape)).astype(np.float32)
        return torch.from_numpy(image), torch.from_numpy(self.label[None]), torch.from_numpy(soft)


def transforms(job):
    plans, dataset_json, _ = check_job(job, resume=False, overwrite=True)
    trainer = configure(job, plans, dataset_json, None, False, "cpu", start_weights_of(job))
    rotation, dummy_2d, initial, mirrors = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    trainer.soft_labels = LabelAsSoftLabel(initial)
    patch = trainer.configuration_manager.patch_size
    augment = trainer._augmenter.get_training_transforms(patch, rotation, None, mirrors, dummy_2d)
    return trainer, SampleTransforms(augment), mirrors


@pytest.mark.parametrize("augmentation", ["default", "da5"])
def test_soft_label_stays_on_the_label(world, augmentation):
    trainer, augment, _ = transforms(make_job(augmentation=augmentation))
    moved = 0
    with generators_kept():
        for seed in range(60):
            seed_generators(seed, 0, 0)
            image, ((label_ZYX,), soft_SZYX) = transformed(augment, *trainer.soft_labels.sample())
            assert image.shape[0] == 1
            expected_SZYX = torch.stack([label_ZYX == c for c in (1, 2)]).float()
            inside = soft_SZYX.sum(0) > 0.999  # interpolated borders are soft, what is beyond has no soft label
            inside |= soft_SZYX.sum(0) == 0
            difference = (soft_SZYX - expected_SZYX).abs().amax(0)[inside]
            assert (difference < 0.501).float().mean() > 0.999
            middle = LabelAsSoftLabel(label_ZYX.shape).label
            moved += not np.array_equal(label_ZYX.numpy(), middle)
    assert moved > 30


@pytest.mark.parametrize("augmentation", ["default", "da5"])
def test_one_grid_is_nnunets_own_sampling(world, augmentation):
    """What nnU-Net's pipeline makes of image, label and a `regression_target` it samples by itself."""
    trainer, augment, mirrors = transforms(make_job(augmentation=augmentation))
    patch = trainer.configuration_manager.patch_size
    rotation, dummy_2d = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[:2]
    alone = trainer._augmenter.get_training_transforms(patch, rotation, None, mirrors, dummy_2d)
    with generators_kept():
        for seed in range(20):
            image, label, soft = trainer.soft_labels.sample()
            seed_generators(seed, 0, 0)
            our_image, (our_label, our_soft) = transformed(augment, image, label, soft)
            seed_generators(seed, 0, 0)
            with_coverage = torch.cat([soft, torch.ones_like(image)])
            expected = alone(image=image.clone(), segmentation=label.clone(), regression_target=with_coverage)
            torch.testing.assert_close(our_image, expected["image"], rtol=1e-5, atol=1e-5)
            assert torch.equal(our_label, expected["segmentation"])
            *soft, coverage = expected["regression_target"]
            for ours, nnunets in zip(our_soft, soft, strict=True):
                torch.testing.assert_close(ours[coverage >= 0.5] * coverage[coverage >= 0.5], nnunets[coverage >= 0.5])
                assert torch.equal(ours[coverage == 1], nnunets[coverage == 1])
                assert (ours[coverage < 0.5] == NO_OPINION).all()


def test_without_mirrored_patches(world):
    trainer, augment, mirrors = transforms(make_job(mirror_augmentation=False))
    assert mirrors is None
    assert trainer.inference_allowed_mirroring_axes is None
    with generators_kept():
        seed_generators(0, 0, 0)
        for _ in range(40):
            _, ((first,), _) = transformed(augment, *trainer.soft_labels.sample())
            assert first[0].sum() <= first[-1].sum()  # class 0 stays where z is small: no flip ever


def test_mirroring_at_test_time_wants_mirrored_patches():
    with pytest.raises(SpecError, match="mirroring: test-time mirroring needs"):
        DistillSpec(mirroring=True, mirror_augmentation=False)


def test_the_name_says_so():
    spec = DistillSpec(augmentation="da5", mirror_augmentation=False, loss="kl")
    assert spec.tag == "a0.5_T1_kl_da5_unmirrored"
    assert DistillSpec(batch_size=2, epochs=5).tag == "a0.5_T1_e5_b2"
    assert dataclasses.replace(spec, seed=4, optimizer="adamw", initial_lr=0.001).tag.startswith(
        "a0.5_T1_adamw_lr0.001_s4"
    )
