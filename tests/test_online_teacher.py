"""A teacher beside a training; the oracle is nnU-Net's predictor, whose networks see the very patches of a batch."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from fastnnunet.cache.build import build_cache
from fastnnunet.cli.main import main
from fastnnunet.distill.job import TrainingJob, run_folder
from fastnnunet.distill.train import train_student, train_students
from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.nnunet.trainer.trainer import StudentTrainer
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.teachers.jobs import cache_job
from fastnnunet.teachers.nnunet import NnUNetTeacher
from fastnnunet.teachers.online import OnlineTeacher, online_teacher
from tests.bundles import Toy
from tests.teachers import make_teacher, nnunet_predictor
from tests.test_distill_seeds import assert_same
from tests.test_unlabelled_images import RECIPE as AT_ONE
from tests.test_unlabelled_images import TEACHER, build_unlabelled
from tests.test_unlabelled_train import scans
from tests.tiny import CONFIGURATION, DATASET

RECIPE = dataclasses.replace(AT_ONE, temperature=3.0)
SPEC = DistillSpec(
    alpha=0.5,
    temperature=3.0,
    epochs=4,
    iterations_per_epoch=2,
    val_iterations_per_epoch=1,
    precision="fp32",
    seed=5,
    online_teacher=0.5,
)


def make_job(r=2, **changes):
    distill = dataclasses.replace(SPEC, **changes)
    return TrainingJob(
        teacher=TEACHER, student=StudentSpec(r=r), distill=distill, cache=RECIPE, fold=0, device="cpu", threads=1
    )


def nnunets_logits(folder, folds, patches_NCX):
    """Mean logits of nnU-Net's networks, as its predictor loads them, on patches and nothing around them."""
    predictor = nnunet_predictor(folder, folds, mirroring=False)
    logits = []
    for weights in predictor.list_of_parameters:
        predictor.network.load_state_dict(weights)
        with torch.inference_mode():
            logits.append(predictor.network.eval()(patches_NCX))
    return torch.stack(logits).mean(0).double().numpy()


def watch(monkeypatch):
    """What every training step gets: epoch, student, and its batch."""
    step, seen = StudentTrainer.train_step, []

    def watched(self, batch, iteration=0):
        seen.append((self.current_epoch, self.plans_manager.plans_name, batch))
        return step(self, batch, iteration)

    monkeypatch.setattr(StudentTrainer, "train_step", watched)
    return seen


def assert_answered(world, batch, temperature):
    """Where the cache has an opinion the soft label is that of nnU-Net's networks, elsewhere there still is none."""
    folder = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    expected = softmax(nnunets_logits(folder, TEACHER.folds, batch["data"]) / temperature, 1)[:, 1:]
    soft = batch["target"][-1].numpy()
    known = soft != -1
    assert known.mean() > 0.5
    assert np.abs(soft - expected)[known].max() < 1e-5
    return known


class TestTraining:
    @pytest.fixture
    def seen(self, world, monkeypatch):
        build_cache(cache_job(TEACHER, RECIPE))
        return watch(monkeypatch)

    def test_the_last_epochs_have_the_teachers_answers(self, world, seen, monkeypatch):
        """Of two students on the same batches, asked once for both; killed among them and resumed to the same bits."""
        soft_labels, asked = OnlineTeacher.soft_labels, []
        monkeypatch.setattr(OnlineTeacher, "soft_labels", lambda self, *of: asked.append(of) or soft_labels(self, *of))
        jobs = [make_job(), make_job(3)]
        alone = load_checkpoint(train_student(jobs[1], validate=False, online=online_teacher) / "checkpoint_final.pth")
        assert len(asked) == 4
        answered = [batch for _, _, batch in seen]
        train_student(make_job(online_teacher=0.0), validate=False)
        cached = [batch for _, _, batch in seen[8:]]
        for number, (ours, stored) in enumerate(zip(answered, cached, strict=True)):
            assert torch.equal(ours["data"], stored["data"])
            assert all(torch.equal(a, b) for a, b in zip(ours["target"][:-1], stored["target"][:-1], strict=True))
            if number < 4:
                assert torch.equal(ours["target"][-1], stored["target"][-1])
                continue
            known = assert_answered(world, ours, 3.0)
            assert np.array_equal(known, stored["target"][-1].numpy() != -1)
            assert (ours["target"][-1] - stored["target"][-1]).abs().mean() > 0.01
        assert [tuple(cases) for _, cases in asked] == [tuple(batch["keys"]) for batch in cached[4:]]

        def kill(state):
            if (state.epoch, state.iteration) == (3, 1):
                raise KeyboardInterrupt

        options = {"validate": False, "online": online_teacher}
        with pytest.raises(KeyboardInterrupt):
            train_students(jobs, overwrite=True, progress=kill, **options)
        asked.clear()
        together = train_students(jobs, resume=True, **options)
        assert len(asked) == 2, "of the last epoch, for both"
        assert_same(load_checkpoint(together[1] / "checkpoint_final.pth"), alone)
        assert "_online0.5" in run_folder(jobs[0]).parent.name

    def test_unlabelled_images_too(self, world, seen):
        build_unlabelled(scans(world), RECIPE, TEACHER)
        job = make_job(epochs=1, online_teacher=0.1, unlabelled="more-scans", pseudo_labels=True, temperature=3.0)
        train_student(job, validate=False, online=online_teacher)
        assert {case for _, _, batch in seen for case in batch["keys"]} & {"tiny_10", "tiny_11"}
        for _, _, batch in seen:
            assert_answered(world, batch, 3.0)

    def test_on_the_command_line_with_augmentation_on_the_device(self, world, seen):
        words = "train -d 998 -f 0 -tf 0 1 -r 2 -a 0.5 -e 2 --iterations 2 --val-iterations 1 --no-validate"
        recipe = world / "recipe.yaml"
        recipe.write_text("{precision: fp32, engine: torch, mirroring: false, temperature: 3.0}")
        more = ["--online-teacher", "0.5", "--spec", str(recipe), "-device", "cpu", "--augment-on", "device"]
        with pytest.raises(SystemExit) as ended:
            main([*words.split(), *more, "--threads", "1"])
        assert ended.value.code == 0
        for epoch, _, batch in seen:
            if epoch == 1:
                assert_answered(world, batch, 3.0)

    def test_refused_before_anything_is_written(self, world, seen, monkeypatch):
        with pytest.raises(SpecError, match="no teacher was handed in"):
            train_student(make_job(), validate=False)
        monkeypatch.setattr(OnlineTeacher, "patch_size", (8, 16, 16))
        with pytest.raises(MismatchError, match=r"patches are \[16, 16, 16\], its teacher's \[8, 16, 16\]"):
            train_student(make_job(), validate=False, online=online_teacher)
        assert not list(run_folder(make_job()).rglob("*.pth"))


class TestAnswers:
    @pytest.mark.parametrize("pooling", ["logits", "probabilities"])
    @pytest.mark.parametrize(
        "toy",
        [
            Toy(dims=2, spacing=(1.0, 1.0)),
            Toy(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2], channels=2),
        ],
        ids=["2d", "regions"],
    )
    def test_folds_that_the_recipe_wants(self, tmp_path, toy, pooling):
        folder = make_teacher(toy, tmp_path)
        recipe = dataclasses.replace(RECIPE, policy="out_of_fold", pooling=pooling)
        factory = NnUNetTeacher(
            files=ModelFolder(folder, f"{toy.dims}d_toy", "checkpoint_final.pth"),
            folds=(0, 1),
            mirroring=True,
            step_size=0.5,
            precision="fp32",
            engine="torch",
            unseen={"first": (0,), "second": (1,)},
        )
        teacher = OnlineTeacher(loaded=factory.load(1), recipe=recipe, temperature=2.0)
        generator = torch.Generator().manual_seed(0)
        patches = torch.randn((3, toy.channels, *toy.patch_size), generator=generator)
        zero, one = (nnunets_logits(folder, (fold,), patches) for fold in (0, 1))
        activation = (lambda z: expit(z / 2)) if toy.regions_class_order else (lambda z: softmax(z / 2, 1)[:, 1:])
        both = (activation(zero) + activation(one)) / 2 if pooling == "probabilities" else activation((zero + one) / 2)
        expected = np.stack([activation(zero)[0], activation(one)[1], both[2]])
        found = teacher.soft_labels(patches.numpy(), ["first", "second", "of no split"])
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-5
        assert np.abs(found - np.stack([activation(one)[0], activation(zero)[1], both[2]])).max() > 0.01


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"alpha": 0.0}, "online_teacher: at alpha 0 nobody listens to it"),
            ({"online_teacher": 1.5}, "online_teacher: got 1.5, expected a number from 0"),
            ({"epochs": 1000, "hours": 2.0}, "online_teacher: got it beside hours"),
            ({"last_patch": (24, 16, 16)}, "online_teacher: got it beside last_patch"),
        ],
    )
    def test_settings(self, fields, message):
        with pytest.raises(SpecError, match=message):
            dataclasses.replace(SPEC, **fields)

    def test_teachers_that_cannot_be_asked(self):
        with pytest.raises(SpecError, match="--soft-labels abc: leave out --online-teacher"):
            dataclasses.replace(make_job(), soft_labels="abc")
        with pytest.raises(SpecError, match="3d_fullres needs labels of the stage before it"):
            dataclasses.replace(make_job(), alone=True)
