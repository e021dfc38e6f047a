"""Seeds, resuming and divergence: the same numbers bit for bit, whatever the loader processes do, or a clean stop."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.job import prepare_job
from fastnnunet.cli.guard import guarded
from fastnnunet.distill.job import TrainingJob, run_folder
from fastnnunet.distill.train import train_student
from fastnnunet.errors import SpecError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.trainer.loaders.numbered import NumberedBatches
from fastnnunet.nnunet.trainer.loaders.ordered import ordered_batches
from fastnnunet.nnunet.trainer.trainer import StudentTrainer
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher

TEACHER = TeacherSpec(dataset="998", folds=(0,))
CACHE = CacheSpec(precision="fp32", mirroring=False, engine="torch")  # loads at once; OpenVINO compiles each fold
FOUR = DistillSpec(epochs=4, iterations_per_epoch=2, val_iterations_per_epoch=1, precision="fp32", seed=5)


def make_job(alpha=0.0, **changes):
    distill = dataclasses.replace(FOUR, alpha=alpha, **changes)
    student = StudentSpec(r=2)
    return TrainingJob(teacher=TEACHER, student=student, distill=distill, cache=CACHE, fold=0, device="cpu", threads=1)


def build():
    source, factory, root = open_teacher(TEACHER, CACHE)
    build_cache(prepare_job(source, factory, CACHE, root, command="rebuild"))


def trained(job, **options):
    return load_checkpoint(train_student(job, validate=False, **options) / "checkpoint_final.pth")


def assert_same(first, second):
    """Weights, optimiser and logged figures, bit for bit; times of day differ."""
    assert first["network_weights"].keys() == second["network_weights"].keys()
    for name, tensor in first["network_weights"].items():
        assert torch.equal(tensor, second["network_weights"][name]), name
    assert first["optimizer_state"]["param_groups"] == second["optimizer_state"]["param_groups"]
    states = [c["optimizer_state"]["state"] for c in (first, second)]
    assert states[0].keys() == states[1].keys() != set()
    for key, state in states[0].items():
        for name, value in state.items():
            torch.testing.assert_close(value, states[1][key][name], rtol=0, atol=0, equal_nan=True)
    for name, values in first["logging"].items():
        if not name.endswith("timestamps"):
            np.testing.assert_array_equal(values, second["logging"][name], err_msg=name)
    assert first["_best_ema"] == second["_best_ema"]
    assert first["current_epoch"] == second["current_epoch"]


def assert_events(folder, logging):
    """TensorBoard's own reader finds what nnU-Net logged, each epoch once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs"):
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == list(range(len(logging[name])))
        np.testing.assert_allclose([s.value for s in scalars], logging[name], rtol=1e-6)
    hard, soft = (np.array([s.value for s in events.Scalars(f"train_losses_{n}")]) for n in ("hard", "soft"))
    np.testing.assert_allclose(0.7 * hard + 0.3 * soft, logging["train_losses"], rtol=1e-4)


class Draws:
    """A maker whose batch is what the three generators give."""

    def make(self, number, _is_loading):
        number.begin()
        return {"draws": (random.random(), float(np.random.rand()), float(torch.rand(())))}


def draws(count, **options):
    batches = ordered_batches(Draws(), pin_memory=False, **{"seed": 1, "stream": 0, "start": 0, **options})
    try:
        return [next(batches)["draws"] for _ in range(count)]
    finally:
        if hasattr(batches, "_finish"):
            batches._finish()


class TestNumberedBatches:
    def test_processes_do_not_matter(self):
        reference = draws(7, num_processes=0)
        assert len(set(reference)) == 7
        assert draws(7, num_processes=1) == draws(7, num_processes=3) == reference

    def test_start_seed_and_stream(self):
        reference = draws(5, num_processes=0)
        assert draws(3, num_processes=2, start=2) == reference[2:]
        others = draws(5, num_processes=0, seed=2) + draws(5, num_processes=0, stream=1)
        assert not set(reference) & set(others)

    def test_generators_of_this_process_are_left_alone(self):
        np.random.seed(3)
        torch.manual_seed(3)
        expected = np.random.rand(), torch.rand(()).item()
        np.random.seed(3)
        torch.manual_seed(3)
        next(NumberedBatches(Draws(), seed=0, stream=0, start=0, num_processes=0))
        assert (np.random.rand(), torch.rand(()).item()) == expected


class TestSeeds:
    def test_same_seed_same_checkpoint_with_any_number_of_loader_processes(self, world, monkeypatch):
        build()
        job = make_job(alpha=0.3, epochs=2)
        reference = trained(job)
        random.seed(99)  # what ran before in this process does not matter
        monkeypatch.setenv("nnUNet_n_proc_DA", "2")
        assert_same(reference, trained(job, overwrite=True))

    def test_another_seed_another_student(self, world):
        first, second = (trained(make_job(epochs=1, seed=s), overwrite=True) for s in (5, 6))
        assert any(not torch.equal(t, second["network_weights"][n]) for n, t in first["network_weights"].items())

    def test_overwriting_leaves_one_run_with_its_whole_log(self, world):
        job = make_job(epochs=1)
        folder = run_folder(job)
        (folder / "validation").mkdir(parents=True)
        for earlier in ("validation/summary.json", "training_log_2026_1_1_00_00_00.txt", "checkpoint_final.pth"):
            (folder / earlier).write_text("of an earlier run")
        trained(job, overwrite=True)
        assert not (folder / "validation").exists()
        (log,) = folder.glob("training_log_*.txt")
        text = log.read_text()
        assert "of an earlier run" not in text
        order = [text.index(line) for line in ("Desired fold for training: 0", "Epoch 0", "Training done.")]
        assert order == sorted(order)

    def test_negative_seed(self):
        with pytest.raises(SpecError, match="seed: got -1, expected at least 0"):
            DistillSpec(seed=-1)


class TestResume:
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_killed_run_continues_bit_for_bit(self, world, optimizer):
        """Killed within the third epoch: resumed from latest, and from best when latest is gone."""
        build()
        job = make_job(alpha=0.3, optimizer=optimizer)
        reference = trained(job)

        def kill(state):
            if (state.epoch, state.iteration) == (2, 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_student(job, overwrite=True, validate=False, progress=kill)
        folder = run_folder(job)
        assert load_checkpoint(folder / "checkpoint_latest.pth")["current_epoch"] == 2
        killed = folder.with_name("killed")
        shutil.copytree(folder, killed)
        epochs = []
        resumed = trained(job, resume=True, progress=lambda s: epochs.append(s.epoch))
        assert epochs == [2, 2, 3, 3]
        assert_same(reference, resumed)
        assert_events(folder / "tensorboard", resumed["logging"])

        shutil.rmtree(folder)
        killed.rename(folder)
        (folder / "checkpoint_latest.pth").unlink()
        best = load_checkpoint(folder / "checkpoint_best.pth")["current_epoch"]
        epochs.clear()
        assert_same(reference, trained(job, resume=True, progress=lambda s: epochs.append(s.epoch)))
        assert min(epochs) == best

    def test_larger_patches_come_last(self, world, monkeypatch):
        """Killed before, within and after the first epoch of larger patches."""
        build()
        job = make_job(alpha=0.3, last_patch=(24, 16, 32), last_share=0.5)
        step, shapes = StudentTrainer.train_step, []

        def watched(self, batch, iteration=0):
            shapes.append((self.current_epoch, tuple(batch["data"].shape[2:]), tuple(batch["target"][-1].shape[2:])))
            return step(self, batch, iteration)

        monkeypatch.setattr(StudentTrainer, "train_step", watched)
        reference = trained(job)
        patch, larger = (16, 16, 16), (24, 16, 32)
        assert shapes == [(epoch, *[patch if epoch < 2 else larger] * 2) for epoch in (0, 0, 1, 1, 2, 2, 3, 3)]
        stored = json.loads((run_folder(job).parent / "plans.json").read_text())
        assert stored["configurations"]["3d_fullres"]["patch_size"] == list(patch)
        for epoch in (1, 2, 3):

            def kill(state, epoch=epoch):
                if (state.epoch, state.iteration) == (epoch, 1):
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                train_student(job, overwrite=True, validate=False, progress=kill)
            assert_same(reference, trained(job, resume=True))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"last_patch": (24, 16)}, "last-patch: got .24, 16., expected 3 numbers, as in .16, 16, 16."),
            ({"last_patch": (24, 18, 16)}, "last-patch: patch_size axis 1: got 18, expected a multiple of 4"),
            ({"last_patch": (0, 16, 16)}, "last_patch: got .0, 16, 16., expected whole numbers of at least 1"),
            ({"last_share": 0.5}, "last_share: got 0.5 without last_patch"),
            ({"last_patch": (24, 16, 16), "last_share": 0.0}, "last_share: got 0.0, expected a number above 0"),
        ],
    )
    def test_patches_that_cannot_be(self, world, fields, message):
        with pytest.raises(SpecError, match=message):
            trained(make_job(**fields))

    def test_annealing_goes_on_where_it_was(self, world):
        """The weight of the soft loss in each of eight steps, also in those after a kill."""
        build()
        job = make_job(alpha=0.4, anneal=True)
        steps = {}

        def keep(state):
            steps[2 * state.epoch + state.iteration - 1] = (state.hard, state.soft)
            if killing and state.epoch == 2:
                raise KeyboardInterrupt

        killing = False
        reference = trained(job, progress=keep)
        alphas = 0.4 * (1 - np.arange(8) / 8)
        hard, soft = np.array([steps[n] for n in range(8)]).T
        totals = ((1 - alphas) * hard + alphas * soft).reshape(4, 2).mean(1)
        np.testing.assert_allclose(reference["logging"]["train_losses"], totals, rtol=1e-5)
        killing = True
        with pytest.raises(KeyboardInterrupt):
            train_student(job, overwrite=True, validate=False, progress=keep)
        assert_same(reference, trained(job, resume=True))

    def test_finished_run_trains_no_more(self, world):
        job = make_job(epochs=1)
        reference = trained(job)
        assert_same(reference, trained(job, resume=True, progress=lambda _: pytest.fail("trained again")))


class TestDivergence:
    """Exit code 2 and one message; the checkpoint of the epoch before is the one that stays."""

    def stopped(self, job, capsys):
        with pytest.raises(SystemExit) as caught:
            guarded(lambda: train_student(job, validate=False))
        assert caught.value.code == 2
        latest = load_checkpoint(run_folder(job) / "checkpoint_latest.pth")
        assert latest["current_epoch"] == 1
        assert all(bool(t.isfinite().all()) for t in latest["network_weights"].values())
        message = capsys.readouterr().err
        assert message.count("error:") == 1
        assert f"the last good checkpoint is {run_folder(job) / 'checkpoint_latest.pth'}" in message
        return message

    def at_second_epoch(self, monkeypatch, change):
        step = StudentTrainer.train_step

        def changed(trainer, batch, iteration):
            if trainer.current_epoch == 1:
                return change(trainer, lambda: step(trainer, batch, iteration))
            return step(trainer, batch, iteration)

        monkeypatch.setattr(StudentTrainer, "train_step", changed)

    def test_loss(self, world, monkeypatch, capsys):
        def nan_loss(trainer, step):
            monkeypatch.setattr(trainer, "loss", lambda outputs, _targets: outputs[0].mean() * float("nan"))
            before = [p.clone() for p in trainer.network.parameters()]
            losses = step()
            assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
            return losses

        self.at_second_epoch(monkeypatch, nan_loss)
        message = self.stopped(make_job(), capsys)
        assert "the loss became nan in epoch 2 of 4, iteration 1 of 2 (cases tiny_" in message

    def test_gradient(self, world, monkeypatch, capsys):
        def steep(trainer, step):
            monkeypatch.setattr(trainer, "loss", lambda outputs, _targets: (outputs[0] - outputs[0]).abs().sqrt().sum())
            return step()

        self.at_second_epoch(monkeypatch, steep)
        assert "the gradient became nan in epoch 2 of 4, iteration 1 of 2 (cases" in self.stopped(make_job(), capsys)

    def test_weights_after_the_last_step_of_an_epoch(self, world, monkeypatch, capsys):
        def spoil(trainer, step):
            losses = step()
            if self.seen:
                next(trainer.network.parameters()).data.view(-1)[0] = float("inf")
            self.seen.append(1)
            return losses

        self.seen = []
        self.at_second_epoch(monkeypatch, spoil)
        assert "weights became nan or inf in epoch 2 of 4, iteration 2 of 2" in self.stopped(make_job(), capsys)
