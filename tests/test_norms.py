"""Statistics of batch norms in training: what a student predicts with, however its training was run."""

import dataclasses
from itertools import islice, pairwise

import pytest
import torch

from fastnnunet.distill.check import check_job
from fastnnunet.distill.configure import configure
from fastnnunet.distill.job import run_folder
from fastnnunet.distill.train import train_student, train_students
from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.trainer import norms
from fastnnunet.nnunet.trainer.trainer import StudentTrainer
from fastnnunet.specs.student import StudentSpec
from tests import test_distill_seeds as seeds
from tests.teachers import start_weights_of
from tests.test_distill_distributed import change_plans, prepared, torchrun
from tests.test_distill_seeds import assert_same, build, trained

__all__ = ["prepared"]  # a fixture
NORM = "encoder.stages.0.0.convs.0.norm"


def make_job(norm="batch", r=2, **changes):
    return dataclasses.replace(seeds.make_job(**changes), student=StudentSpec(r=r, norm=norm))


def statistics(weights):
    return {name: t for name, t in weights.items() if name.endswith(("running_mean", "running_var"))}


def killed_at(epoch, iteration):
    def kill(state):
        if (state.epoch, state.iteration) == (epoch, iteration):
            raise KeyboardInterrupt

    return kill


@pytest.mark.parametrize("norm_statistics", ["frozen", "precise"])
def test_killed_run_continues_bit_for_bit(world, monkeypatch, norm_statistics):
    """Killed in the first epoch, which starts over, and in one with frozen norms."""
    monkeypatch.setattr(norms, "FROZEN_SHARE", 0.5)
    build()
    job = make_job(alpha=0.3, norm_statistics=norm_statistics)
    assert run_folder(job).parent.name.count("_bn_") == 1
    reference = trained(job)
    assert len(statistics(reference["network_weights"])) > 10
    for epoch in (0, 3):
        with pytest.raises(KeyboardInterrupt):
            train_student(job, overwrite=True, validate=False, progress=killed_at(epoch, 1))
        assert_same(reference, trained(job, resume=True))


@pytest.mark.parametrize("norm_statistics", ["frozen", "precise"])
def test_together_is_alone(world, monkeypatch, norm_statistics):
    """One with batch norm beside one without, and one that is ahead."""
    monkeypatch.setattr(norms, "FROZEN_SHARE", 0.5)
    jobs = [make_job("same", 2, epochs=2), make_job("batch", 3, epochs=2, norm_statistics=norm_statistics)]
    alone = [trained(job) for job in jobs]
    together = train_students(jobs, overwrite=True, validate=False)
    for folder, reference in zip(together, alone, strict=True):
        assert_same(load_checkpoint(folder / "checkpoint_final.pth"), reference)
    with pytest.raises(KeyboardInterrupt):
        train_students(jobs[:1], overwrite=True, validate=False, progress=killed_at(1, 1))
    with pytest.raises(KeyboardInterrupt):
        train_students(jobs[1:], overwrite=True, validate=False, progress=killed_at(0, 1))
    for folder, reference in zip(train_students(jobs, resume=True, validate=False), alone, strict=True):
        assert_same(load_checkpoint(folder / "checkpoint_final.pth"), reference)


def test_statistics_of_no_batch_norms(world):
    job = make_job("same", norm_statistics="precise")
    with pytest.raises(MismatchError, match=r"norm_statistics: got precise.*\n.*--norm batch"):
        check_job(job, resume=False, overwrite=True)


def test_frozen_statistics_stay_while_weights_move(world, monkeypatch):
    monkeypatch.setattr(norms, "FROZEN_SHARE", 0.5)
    seen = []
    step = StudentTrainer.train_step

    def watched(self, batch, iteration=0):
        out = step(self, batch, iteration)
        seen.append({name: t.clone() for name, t in self.plain_network.state_dict().items()})
        return out

    monkeypatch.setattr(StudentTrainer, "train_step", watched)
    final = trained(make_job(norm_statistics="frozen"))["network_weights"]
    moved = [not torch.equal(a[f"{NORM}.running_var"], b[f"{NORM}.running_var"]) for a, b in pairwise(seen)]
    assert moved == [True] * 3 + [False] * 4  # two steps an epoch
    for name, tensor in statistics(final).items():
        assert torch.equal(tensor, seen[3][name]), name
    assert all(not torch.equal(a[f"{NORM}.weight"], b[f"{NORM}.weight"]) for a, b in pairwise(seen))


def fresh(job):
    plans, dataset_json, _ = check_job(job, resume=False, overwrite=True)
    torch.manual_seed(job.distill.seed)
    return configure(job, plans, dataset_json, None, False, "cpu", start_weights_of(job))


def first_layer(trainer, batches):
    """Mean and unbiased variance of what goes into the first norm, each averaged over batches."""
    outputs = []
    conv = trainer.network.encoder.stages[0][0].convs[0].conv
    handle = conv.register_forward_hook(lambda _m, _i, out: outputs.append(out.detach()))
    with torch.no_grad():
        for batch in batches:
            trainer.network(batch["data"])
    handle.remove()
    mean = torch.stack([o.mean((0, 2, 3, 4)) for o in outputs]).mean(0)
    return mean, torch.stack([o.var((0, 2, 3, 4)) for o in outputs]).mean(0)


def assert_measured(weights, trainer, batches):
    mean, var = first_layer(trainer, batches)
    torch.testing.assert_close(weights[f"{NORM}.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[f"{NORM}.running_var"], var, rtol=1e-4, atol=1e-5)


def test_statistics_at_the_start(world, monkeypatch):
    """Before the first step: those of eight batches that are not trained on, with the teacher's channels."""
    first = []
    step = StudentTrainer.train_step

    def watched(self, batch, iteration=0):
        first.append({name: t.clone() for name, t in self.plain_network.state_dict().items()})
        assert all(norm.training and norm.momentum == 0.02 for norm in norms.batch_norms(self.network))
        return step(self, batch, iteration)

    monkeypatch.setattr(StudentTrainer, "train_step", watched)
    job = make_job(epochs=1)
    given = run_folder(job) / "checkpoint_final.pth"
    stored = trained(job)["network_weights"]
    trainer = fresh(job)
    for name, tensor in trainer.network.state_dict().items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(first[0][name], tensor), name
    assert_measured(first[0], trainer, islice(trainer.batches_to_measure(), norms.START_BATCHES))
    first.clear()
    kept = given.rename(world / "given.pth")
    trained(dataclasses.replace(job, pretrained=kept), overwrite=True)
    for name, tensor in statistics(stored).items():  # of given weights they are given
        assert torch.equal(first[0][name], tensor), name


def test_precise_statistics(world, monkeypatch):
    """After the last step: those of the batches that would have come next, with the last weights."""
    monkeypatch.setattr("fastnnunet.nnunet.trainer.epochs.PRECISE_BATCHES", 3)
    job = make_job(norm_statistics="precise")
    weights = trained(job)["network_weights"]
    trainer = fresh(job)
    trainer.network.load_state_dict(weights)
    trainer.current_epoch = 4
    assert_measured(weights, trainer, islice(trainer.get_dataloaders()[0], 3))
    running = trained(make_job(norm_statistics="running"))["network_weights"]
    assert torch.equal(running[f"{NORM}.weight"], weights[f"{NORM}.weight"])
    assert not torch.equal(running[f"{NORM}.running_var"], weights[f"{NORM}.running_var"])


def test_two_processes_are_one(prepared):
    """Norms see the whole batch, however it is divided; one that did not would be another network's."""
    change_plans(prepared, batch_size=3, batch_dice=False)
    build()
    job = make_job(alpha=0.3)
    one = load_checkpoint(train_student(job, validate=False) / "checkpoint_final.pth")
    done = torchrun(prepared, "--overwrite", "--norm", "batch")
    assert done.returncode == 0, done.stderr
    two = load_checkpoint(run_folder(job) / "checkpoint_final.pth")
    losses = [c["logging"]["train_losses"] for c in (two, one)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    for name, tensor in one["network_weights"].items():
        torch.testing.assert_close(two["network_weights"][name], tensor, rtol=1e-3, atol=2e-3, msg=name)
