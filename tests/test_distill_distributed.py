"""Two processes under torchrun train as one process does on the whole batch."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastnnunet.cli.guard import guarded
from fastnnunet.cli.main import main
from fastnnunet.distill.job import run_folder
from fastnnunet.distill.losses import DistillationObjective
from fastnnunet.distill.train import train_student
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.trainer.distributed import LossOverValidVoxels, Share, valid_share
from fastnnunet.nnunet.trainer.mixing import loss_of_samples
from tests.test_distill_seeds import build, make_job
from tests.test_kinds import prepare
from tests.tiny import CONFIGURATION, DATASET

OPTIONS = (
    "-a 0.3 -e 4 --iterations 2 --val-iterations 1 --precision fp32 --seed 5 --threads 1 -device cpu --no-validate"
)


def words_of(world, *options):
    return [*f"train -d 998 -f 0 -tf 0 -r 2 --spec {world / 'recipe.yaml'} {OPTIONS}".split(), *options]


def torchrun(world, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastnnunet"]
    return subprocess.run(
        [*command, *words_of(world, *options)], capture_output=True, text=True, timeout=300, check=False
    )


def two_processes(world, *options):
    """As torchrun, without its agent. Their exit codes and what they said.

    They are not forked: autograd refuses to run in the fork of a process whose own autograd has started threads, which
    tests before this one may have.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn, files = multiprocessing.get_context("spawn"), [world / f"said_{rank}" for rank in range(2)]
    processes = [
        spawn.Process(target=one_of_two, args=(rank, port, words_of(world, *options), file))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # none is left behind
    return [process.exitcode for process in processes], [file.read_text() for file in files]


def one_of_two(rank, port, words, said):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
        guarded(lambda: main(words))


def change_plans(world, **changes):
    path = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}" / "plans.json"
    plans = json.loads(path.read_text())
    plans["configurations"][CONFIGURATION].update(changes)
    path.write_text(json.dumps(plans))


@pytest.fixture
def prepared(world):
    (world / "recipe.yaml").write_text("precision: fp32\nmirroring: false\nengine: torch\n")
    return world


@pytest.mark.parametrize(("batch_size", "batch_dice"), [(2, True), (3, False)])
def test_two_processes_are_one(prepared, batch_size, batch_dice):
    change_plans(prepared, batch_size=batch_size, batch_dice=batch_dice)
    build()
    job = make_job(alpha=0.3)
    one = load_checkpoint(train_student(job, validate=False) / "checkpoint_final.pth")
    if batch_dice:
        done = torchrun(prepared, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("student r2:") == 1, "one process speaks"
    else:
        codes, said = two_processes(prepared, "--overwrite")
        assert codes == [0, 0], said
    two = load_checkpoint(run_folder(job) / "checkpoint_final.pth")
    assert two["current_epoch"] == one["current_epoch"] == 4
    np.testing.assert_allclose(two["logging"]["train_losses"], one["logging"]["train_losses"], rtol=1e-4)
    np.testing.assert_allclose(two["logging"]["mean_fg_dice"], one["logging"]["mean_fg_dice"], rtol=1e-2, atol=1e-3)
    assert two["network_weights"].keys() == one["network_weights"].keys()
    for name, tensor in one["network_weights"].items():
        torch.testing.assert_close(two["network_weights"][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("regions", [False, True])
def test_loss_over_valid_voxels_of_two_processes(monkeypatch, regions):
    """nnU-Net's own losses on parts of a batch, weighted by their samples, make its loss on the whole batch."""
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    rng = torch.Generator().manual_seed(1)
    outputs = [torch.randn(3, 3, n, n, n, generator=rng) for n in (6, 3)]
    ignored = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1, 1)  # share of each sample's voxels
    valid = [torch.rand(3, 1, n, n, n, generator=rng) > ignored for n in (6, 3)]
    labels = [torch.randint(0, 3, v.shape, generator=rng) for v in valid]
    if regions:
        target = [torch.cat([*(lab == i for i in range(3)), ~v], 1) for lab, v in zip(labels, valid, strict=True)]
    else:
        target = [torch.where(v, lab, 3) for lab, v in zip(labels, valid, strict=True)]

    def loss():
        own = (
            DC_and_BCE_loss({}, dict(dice), use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
            if regions
            else DC_and_CE_loss(dict(dice), {}, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss)
        )
        return DeepSupervisionWrapper(own, [0.7, 0.3])

    def part(of, samples):
        return [t[samples] for t in of]

    whole = loss()(outputs, target)
    shares = ((slice(2), 2), (slice(2, 3), 1))  # samples of the two processes
    of_all_processes(monkeypatch, valid)
    weighted = LossOverValidVoxels(loss(), lambda t: t[:, -1:] == 0 if regions else t != 3)
    torch.testing.assert_close(sum(weighted(part(outputs, s), part(target, s)) * n for s, n in shares) / 3, whole)
    assert abs(sum(loss()(part(outputs, s), part(target, s)) * n for s, n in shares) / 3 - whole) > 0.01

    told = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: told.append(counts.tolist()))
    assert loss_of_samples(weighted, outputs, target, [], 3) == 0  # of a process with unlabelled samples only
    assert told == [[0, 0, 0]]

    objective = DistillationObjective(0.3, 2.0, regions)
    (logits, mask), soft = (outputs[0], valid[0]), outputs[0].flip(1).softmax(1)[:, 0 if regions else 1 :]
    whole = objective(torch.tensor(0.0), logits, soft, mask)[1]
    of_all_processes(monkeypatch, [mask])
    parts = [objective(torch.tensor(0.0), logits[s], soft[s], mask[s], shares=valid_share)[1] * n for s, n in shares]
    torch.testing.assert_close(sum(parts) / 3, whole)


def of_all_processes(monkeypatch, masks):
    """Let a sum over processes give the valid voxels and the samples of the whole batch."""
    total = torch.tensor([*(float(mask.sum()) for mask in masks), len(masks[0])], dtype=torch.float64)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.copy_(total))


def test_valid_voxels_count_alike_in_all_processes(prepared):
    """An ignore label leaves each process other numbers of voxels: cross entropy and KL are means over all of them."""
    prepare(prepared, "ignore")
    build()
    job = make_job(alpha=0.3, soft_on_ignored=False, loss="kl_dice")
    one = load_checkpoint(train_student(job, validate=False) / "checkpoint_final.pth")
    codes, said = two_processes(prepared, "--overwrite", "--no-soft-on-ignored", "--loss", "kl_dice")
    assert codes == [0, 0], said
    two = load_checkpoint(run_folder(job) / "checkpoint_final.pth")
    for name in ("train_losses", "val_losses"):
        np.testing.assert_allclose(two["logging"][name], one["logging"][name], rtol=1e-4)
    for name, tensor in one["network_weights"].items():
        torch.testing.assert_close(two["network_weights"][name], tensor, rtol=1e-3, atol=1e-4)


def test_batch_dice_wants_equal_shares(prepared):
    change_plans(prepared, batch_size=3, batch_dice=True)
    build()
    old = run_folder(make_job(alpha=0.3)) / "checkpoint_final.pth"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"an earlier run")
    codes, said = two_processes(prepared, "--overwrite")
    assert codes == [2, 2], said
    assert old.read_bytes() == b"an earlier run", "what cannot run replaces nothing"
    for text in said:
        assert "2 processes: the batch of 3 cannot be divided among them" in text
        assert "Traceback" not in text


@pytest.mark.parametrize(("batch_size", "world_size"), [(7, 2), (4, 4), (9, 4), (2, 1)])
def test_shares_are_the_whole_batch_and_nnunets(batch_size, world_size):
    shares = [Share(rank, world_size).of(batch_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(batch_size))
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
