"""Training with augmentation on the device: the samples of the loader processes' pipeline, and bits that repeat."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from fastnnunet.cli.main import main
from fastnnunet.distill.job import run_folder
from fastnnunet.distill.train import train_student
from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.nnunet.augment.batches import AugmentedBatches
from fastnnunet.nnunet.augment.soft_samples import has_opinion
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.trainer import trainer as trainer_module
from fastnnunet.nnunet.trainer.distributed import Share
from fastnnunet.nnunet.trainer.trainer import StudentTrainer
from pipelines.measure.train.step_speed import batches_of, make_trainer
from tests.test_device_augmentation import without_noise
from tests.test_distill_seeds import CACHE, TEACHER, assert_same, build, make_job, trained
from tests.test_unlabelled_images import build_unlabelled
from tests.test_unlabelled_train import scans


class LabelAsSoftLabel:
    """The soft label of a case is its label."""

    num_channels = 2

    def __init__(self, trainer):
        self._cases = trainer.dataset_class(trainer.preprocessed_dataset_folder)

    def read(self, case_id, lower_zyx, upper_zyx):
        label = self._cases.load_case(case_id)[1]
        label = label[(slice(None), *map(slice, lower_zyx, upper_zyx))]
        return np.concatenate([label == c for c in (1, 2)]).astype(np.float32)


def device_job(**changes):
    return dataclasses.replace(make_job(**changes), augment_on="device")


def batches(job, count, soft=True):
    trainer = make_trainer(job, None)
    if soft:
        trainer.soft_labels = LabelAsSoftLabel(trainer)
    made = batches_of(trainer, count)
    assert isinstance(trainer.dataloader_train, AugmentedBatches) == (trainer.device_augmentation is not None)
    return made


class TestBatches:
    @pytest.mark.parametrize("soft", [True, False])
    def test_same_samples_as_from_the_loader_processes(self, world, monkeypatch, soft):
        """Cases, crops and every number are the same, since the same generators are asked in the same order."""
        nnunets = nnUNetTrainer.get_training_transforms

        def quiet(*args, **kwargs):
            transforms = nnunets(*args, **kwargs)
            without_noise(transforms.transforms)
            return transforms

        monkeypatch.setattr(nnUNetTrainer, "get_training_transforms", staticmethod(quiet))
        ours, nnunet = batches(device_job(), 5, soft), batches(make_job(), 5, soft)
        for batch, expected in zip(ours, nnunet, strict=True):
            assert list(batch) == list(expected)
            assert list(batch["keys"]) == list(expected["keys"])
            torch.testing.assert_close(batch["data"], expected["data"], rtol=1e-4, atol=1e-4)
            assert len(batch["target"]) == len(expected["target"]) == 2 + soft
            for target, expected_target in zip(batch["target"], expected["target"], strict=True):
                assert (target.dtype, target.shape) == (expected_target.dtype, expected_target.shape)
                close = torch.isclose(target.float(), expected_target.float(), atol=1e-5)
                assert close.float().mean() > 0.998

    def test_pseudo_labels_of_unlabelled_images(self, world, monkeypatch):
        """What a training step gets on the device is what it gets from the loader processes."""
        build()
        build_unlabelled(scans(world), CACHE, TEACHER)
        nnunets, step = nnUNetTrainer.get_training_transforms, StudentTrainer.train_step
        seen = {"device": [], "loader": []}

        def quiet(*args, **kwargs):
            transforms = nnunets(*args, **kwargs)
            without_noise(transforms.transforms)
            return transforms

        def watched(trainer, batch, iteration):
            seen["loader" if trainer.device_augmentation is None else "device"].append(batch)
            return step(trainer, batch, iteration)

        monkeypatch.setattr(nnUNetTrainer, "get_training_transforms", staticmethod(quiet))
        monkeypatch.setattr(StudentTrainer, "train_step", watched)
        job = make_job(alpha=0.3, epochs=1, iterations_per_epoch=4, unlabelled="more-scans", pseudo_labels=True)
        for augment_on in seen:
            losses = []
            options = {"validate": False, "overwrite": True, "progress": losses.append}
            train_student(dataclasses.replace(job, augment_on=augment_on), **options)
            assert all(loss.hard != 0 and loss.soft > 0 for loss in losses)
        foreground = 0
        for ours, theirs in zip(seen["device"], seen["loader"], strict=True):
            unlabelled = [place for place, key in enumerate(theirs["keys"]) if key in ("tiny_10", "tiny_11")]
            assert len(unlabelled) == 1
            assert list(ours["keys"]) == list(theirs["keys"])
            torch.testing.assert_close(ours["data"], theirs["data"], rtol=1e-4, atol=1e-4)
            for target, expected in zip(ours["target"], theirs["target"], strict=True):
                assert torch.isclose(target.float(), expected.float(), atol=1e-5).float().mean() > 0.998
            foreground += int((ours["target"][0][unlabelled] > 0).sum())
        assert foreground > 0, "the teacher's labels, which the images do not have"

    def test_soft_label_stays_on_the_label(self, world):
        moved = 0
        for batch in batches(device_job(), 10):
            label_N1ZYX, soft_NSZYX = batch["target"][0], batch["target"][-1]
            expected_NSZYX = torch.cat([label_N1ZYX == c for c in (1, 2)], 1).float()
            largest_N1ZYX = soft_NSZYX.amax(1, keepdim=True)
            # below a third in all, background or what is outside outweighs both classes
            sure = (largest_N1ZYX > 0.51) | (soft_NSZYX.sum(1, keepdim=True) < 0.33)
            beyond = ~has_opinion(soft_NSZYX)
            assert not label_N1ZYX[beyond].any()
            soft_NSZYX = soft_NSZYX.clamp(min=0)
            difference = (soft_NSZYX - expected_NSZYX).abs().amax(1, keepdim=True)
            assert sure.float().mean() > 0.95
            # at the border of the volume what is beyond outweighs a label, and is taken out of the soft label
            assert (difference[sure] < 0.5).float().mean() > 0.999
            moved += int(((soft_NSZYX > 0.01) & (soft_NSZYX < 0.99)).any())
        assert moved > 2, "some samples are interpolated"

    def test_processes_of_a_distributed_training_make_the_whole_batch(self, world, monkeypatch):
        whole = batches(device_job(), 2)
        parts = []
        for rank in range(2):
            monkeypatch.setattr(trainer_module, "share", lambda rank=rank: Share(rank, 2))
            parts.append(batches(device_job(), 2))
        for batch, *shares in zip(whole, *parts, strict=True):
            assert torch.equal(batch["data"], torch.cat([s["data"] for s in shares]))
            for n, target in enumerate(batch["target"]):
                assert torch.equal(target, torch.cat([s["target"][n] for s in shares]))


class TestTraining:
    def test_same_checkpoint_with_any_number_of_loader_processes(self, world, monkeypatch):
        build()
        job = device_job(alpha=0.3, epochs=2)
        reference = trained(job)
        for name in ("train_losses", "val_losses"):
            assert np.isfinite(reference["logging"][name]).all()
        assert reference["fastnnunet"]["augmented_on"] == "device"
        monkeypatch.setenv("nnUNet_n_proc_DA", "2")
        assert_same(reference, trained(job, overwrite=True))

    def test_killed_run_continues_bit_for_bit_and_where_it_was_augmented(self, world):
        job = device_job(epochs=3)
        reference = trained(job)

        def kill(state):
            if (state.epoch, state.iteration) == (2, 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_student(job, overwrite=True, validate=False, progress=kill)
        with pytest.raises(MismatchError, match='augmented_on: "device" -> absent'):
            trained(make_job(epochs=3), resume=True)
        assert_same(reference, trained(job, resume=True))

    def test_a_run_of_the_loader_processes_is_not_continued_on_the_device(self, world):
        job = make_job(epochs=1)
        assert "augmented_on" not in trained(job)["fastnnunet"]
        with pytest.raises(MismatchError, match='augmented_on: absent -> "device"'):
            trained(device_job(epochs=1), resume=True)

    def test_unknown_augmentation_stays_in_the_loader_processes(self, world, caplog):
        job = device_job(epochs=1, augmentation="da5")
        with caplog.at_level(logging.WARNING):
            checkpoint = trained(job)
        assert "augmenting in the loader processes, not on the device" in caplog.text
        assert "augmented_on" not in checkpoint["fastnnunet"]
        assert_same(checkpoint, trained(make_job(epochs=1, augmentation="da5"), overwrite=True))


class TestChoice:
    @pytest.mark.parametrize(("augment_on", "on_device"), [("auto", False), ("loader", False), ("device", True)])
    def test_on_the_cpu(self, world, augment_on, on_device):
        trainer = make_trainer(dataclasses.replace(make_job(), augment_on=augment_on), None)
        assert (trainer.device_augmentation is not None) == on_device

    def test_nonsense(self):
        with pytest.raises(SpecError, match="--augment-on: got 'gpu', expected auto, device, loader"):
            dataclasses.replace(make_job(), augment_on="gpu")

    def test_command_line(self, world):
        options = "-a 0 -e 1 --iterations 1 --val-iterations 1 --precision fp32 -device cpu --no-validate"
        with pytest.raises(SystemExit) as done:
            main(f"train -d 998 -f 0 -tf 0 -r 2 {options} --augment-on device".split())
        assert done.value.code == 0
        job = make_job(epochs=1, iterations_per_epoch=1, seed=0)
        assert load_checkpoint(run_folder(job) / "checkpoint_final.pth")["fastnnunet"]["augmented_on"] == "device"
