"""Two processes under torchrun train as one process does on the whole batch."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastnnunet.distill.train import run_folder, train_student
from fastnnunet.nnunet.checkpoint import load_checkpoint
from fastnnunet.nnunet.loading import Share
from tests.test_distill_seeds import build, make_job
from tests.tiny import CONFIGURATION, DATASET

OPTIONS = (
    "-a 0.3 -e 4 --iterations 2 --val-iterations 1 --precision fp32 --seed 5 --threads 1 -device cpu --no-validate"
)


def torchrun(world, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastnnunet", "train"]
    words = f"-d 998 -f 0 -tf 0 -r 2 --spec {world / 'recipe.yaml'} {OPTIONS}".split()
    return subprocess.run(
        [*command, *words, *options], capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ)
    )


def change_plans(world, **changes):
    path = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}" / "plans.json"
    plans = json.loads(path.read_text())
    plans["configurations"][CONFIGURATION].update(changes)
    path.write_text(json.dumps(plans))


@pytest.fixture
def prepared(world):
    (world / "recipe.yaml").write_text("precision: fp32\nmirroring: false\n")
    return world


@pytest.mark.parametrize(("batch_size", "batch_dice"), [(2, True), (3, False)])
def test_two_processes_are_one(prepared, batch_size, batch_dice):
    change_plans(prepared, batch_size=batch_size, batch_dice=batch_dice)
    build()
    job = make_job(alpha=0.3)
    one = load_checkpoint(train_student(job, validate=False) / "checkpoint_final.pth")
    done = torchrun(prepared, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student r2:") == 1, "one process speaks"
    two = load_checkpoint(run_folder(job) / "checkpoint_final.pth")
    assert two["current_epoch"] == one["current_epoch"] == 4
    np.testing.assert_allclose(two["logging"]["train_losses"], one["logging"]["train_losses"], rtol=1e-4)
    np.testing.assert_allclose(two["logging"]["mean_fg_dice"], one["logging"]["mean_fg_dice"], rtol=1e-2, atol=1e-3)
    assert two["network_weights"].keys() == one["network_weights"].keys()
    for name, tensor in one["network_weights"].items():
        torch.testing.assert_close(two["network_weights"][name], tensor, rtol=1e-3, atol=1e-4)


def test_batch_dice_wants_equal_shares(prepared):
    change_plans(prepared, batch_size=3, batch_dice=True)
    build()
    done = torchrun(prepared)
    assert done.returncode != 0
    assert "2 processes: the batch of 3 cannot be divided among them" in done.stderr
    assert "Traceback" not in done.stderr.split("cannot be divided")[0]


@pytest.mark.parametrize(("batch_size", "world_size"), [(7, 2), (4, 4), (9, 4), (2, 1)])
def test_shares_are_the_whole_batch_and_nnunets(batch_size, world_size):
    shares = [Share(rank, world_size).of(batch_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(batch_size))
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
