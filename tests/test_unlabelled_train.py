"""Unlabelled images in a training: what the losses see of them, how many there are, and that nothing else changes."""

import dataclasses
import pickle
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, rel_entr, softmax

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cli.main import main
from fastnnunet.distill.job import TrainingJob, run_folder
from fastnnunet.distill.losses import DistillationObjective
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.distill.train import train_student, train_students
from fastnnunet.distill.unlabelled import unlabelled_for_training
from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.augment.soft_samples import placed
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.checkpoint_digest import DIGEST
from fastnnunet.nnunet.trainer import mixing
from fastnnunet.nnunet.trainer.batches import SampledBatches
from fastnnunet.nnunet.trainer.cases import JoinedDataset, SoftLabelDataset
from fastnnunet.nnunet.trainer.distributed import Share
from fastnnunet.nnunet.trainer.mixing import Unlabelled, loss_of_samples
from fastnnunet.nnunet.trainer.seeds import BatchNumber
from fastnnunet.nnunet.trainer.trainer import StudentTrainer
from fastnnunet.nnunet.unlabelled.foreground import read_locations
from fastnnunet.nnunet.unlabelled.sets import UnlabelledCases
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.teachers.jobs import cache_for_training, cache_job
from tests.test_distill_distributed import change_plans, torchrun
from tests.test_distill_seeds import TEACHER, assert_same, trained
from tests.test_unlabelled_images import RECIPE, build_unlabelled, image_folder, raw_image
from tests.tiny import CONFIGURATION, DATASET

MIXED = DistillSpec(
    epochs=2,
    iterations_per_epoch=2,
    val_iterations_per_epoch=1,
    precision="fp32",
    seed=5,
    unlabelled="more-scans",
)


def make_job(r=2, teacher=TEACHER, recipe=RECIPE, **changes):
    distill = dataclasses.replace(MIXED, **changes)
    return TrainingJob(
        teacher=teacher, student=StudentSpec(r=r), distill=distill, cache=recipe, fold=0, device="cpu", threads=1
    )


def scans(world):
    """The two test images of the tiny world."""
    folder = world / "more scans"
    folder.mkdir()
    for case in ("tiny_10", "tiny_11"):
        shutil.copy(raw_image(world, case, "Ts"), folder)
    return folder


def build_for(teacher, recipe):
    build_cache(cache_job(teacher, recipe))


@pytest.fixture
def prepared(world):
    """Both caches."""
    build_for(TEACHER, RECIPE)
    build_unlabelled(scans(world), RECIPE, TEACHER)
    return world


def part(share, *cases, pseudo_labels=False):
    return Unlabelled(
        cases=UnlabelledCases(Path("nowhere"), cases),
        foreground=Path("nowhere"),
        soft_labels=None,
        key="",
        share=share,
        pseudo_labels=pseudo_labels,
        command="",
    )


def hard_problem(seed=0, classes=3):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, (3, classes, 4, 5, 6)), rng.integers(0, classes, (3, 1, 4, 5, 6))


def nnunet_loss(batch_dice):
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)


def by_hand(logits, label, batch_dice):
    """Cross entropy averaged over voxels less soft Dice of the foreground, in NumPy."""
    p, classes = softmax(logits, 1), logits.shape[1]
    truth = np.stack([label[:, 0] == c for c in range(classes)], 1)
    cross_entropy = -(truth * log_softmax(logits, 1)).sum(1).mean()
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    overlap, total = (p * truth).sum(axes), (p + truth).sum(axes)
    dice = (2 * overlap + 1e-5) / (total + 1e-5)
    return cross_entropy - (dice[1:] if batch_dice else dice[:, 1:]).mean()


class TestHardLoss:
    @pytest.mark.parametrize("batch_dice", [False, True])
    @pytest.mark.parametrize("labelled", [[0, 2], [1], [0, 1, 2]])
    def test_is_nnunets_of_the_labelled_samples(self, labelled, batch_dice):
        logits, label = hard_problem()
        keys = ["a" if place in labelled else "u" for place in range(3)]
        unlabelled = part((3 - len(labelled)) / 3, "u")
        z = torch.tensor(logits, requires_grad=True)
        loss = unlabelled.hard_loss(nnunet_loss(batch_dice), z, torch.tensor(label), keys, 0, 3)
        assert loss.item() == pytest.approx(by_hand(logits[labelled], label[labelled], batch_dice), rel=1e-6)
        loss.backward()
        for place in range(3):
            assert bool((z.grad[place] != 0).any()) == (place in labelled)

    def test_no_labelled_sample(self):
        logits, label = hard_problem()
        z = torch.tensor(logits, requires_grad=True)
        loss = part(0.99, "u").hard_loss(nnunet_loss(True), z, torch.tensor(label), ["u"] * 3, 0, 3)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(z.grad, torch.zeros_like(z))

    @pytest.mark.parametrize("batch_dice", [False, True])
    def test_pseudo_labels_are_labels(self, batch_dice):
        """The loss of the whole batch, whatever its share, with a gradient in every sample."""
        logits, label = hard_problem()
        z = torch.tensor(logits, requires_grad=True)
        unlabelled = part(1 / 3, "u", pseudo_labels=True)
        loss = unlabelled.hard_loss(nnunet_loss(batch_dice), z, torch.tensor(label), ["a", "u", "b"], 2, 3)
        assert loss.item() == pytest.approx(by_hand(logits, label, batch_dice), rel=1e-6)
        loss.backward()
        assert all(bool((z.grad[place] != 0).any()) for place in range(3))

    def test_with_deep_supervision(self):
        from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

        logits, label = hard_problem()
        coarse = logits[..., ::2], label[..., ::2]
        wrapped = DeepSupervisionWrapper(nnunet_loss(True), (0.75, 0.25))
        z = [torch.tensor(logits, requires_grad=True), torch.tensor(coarse[0], requires_grad=True)]
        loss = loss_of_samples(wrapped, z, [torch.tensor(label), torch.tensor(coarse[1])], [0, 2], 3)
        kept = [0, 2]
        expected = 0.75 * by_hand(logits[kept], label[kept], True) + 0.25 * by_hand(
            coarse[0][kept], coarse[1][kept], True
        )
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        loss.backward()
        for level in z:
            assert torch.equal(level.grad[1], torch.zeros_like(level[1]))

    def test_of_regions(self):
        from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss

        logits, _ = hard_problem(classes=2)
        truth = np.random.default_rng(1).integers(0, 2, logits.shape)
        loss = DC_and_BCE_loss({}, {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False})
        z = torch.tensor(logits, requires_grad=True)
        got = part(1 / 3, "u").hard_loss(loss, z, torch.tensor(truth), ["a", "u", "b"], 2, 3)  # 1 of batch 2
        p, t = expit(logits[[0, 2]]), truth[[0, 2]]
        cross_entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        overlap, total = (p * t).sum((2, 3, 4)), (p + t).sum((2, 3, 4))
        assert got.item() == pytest.approx(cross_entropy - ((2 * overlap + 1e-5) / (total + 1e-5)).mean(), rel=1e-6)
        got.backward()
        assert torch.equal(z.grad[1], torch.zeros_like(z[1]))

    def test_processes_add_up_to_the_whole_batch(self):
        """The mean over processes of losses with the weight of each part is the loss of the whole batch."""
        logits, label = hard_problem()
        keys, unlabelled, loss = ["a", "u", "b"], part(1 / 3, "u"), nnunet_loss(False)
        z, y = torch.tensor(logits), torch.tensor(label)
        whole = unlabelled.hard_loss(loss, z, y, keys, 2, 3).item()
        parts = [
            unlabelled.hard_loss(loss, z[i:j], y[i:j], keys[i:j], 2, 3).item() * (j - i) * 2 / 3
            for i, j in ((0, 2), (2, 3))
        ]
        assert np.mean(parts) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("dice", [False, True])
def test_total_loss_of_a_mixed_batch_by_hand(dice):
    """(1 - a) times nnU-Net's loss over the labelled samples plus a times the soft loss over all."""
    alpha, temperature, kept = 0.3, 3.0, [0, 2]
    logits, label = hard_problem()
    p = softmax(np.random.default_rng(7).normal(0, 3, logits.shape) / temperature, 1)
    q = softmax(logits / temperature, 1)
    soft = temperature**2 * rel_entr(p, q).sum(1).mean()
    if dice:
        overlap = np.minimum(p, q)[:, 1:].sum((2, 3, 4))
        soft += 1 - (2 * overlap / (p + q)[:, 1:].sum((2, 3, 4))).mean()
    z = torch.tensor(logits, requires_grad=True)
    hard = part(1 / 3, "u").hard_loss(nnunet_loss(True), z, torch.tensor(label), ["a", "u", "b"], 2, 3)
    total, _ = DistillationObjective(alpha, temperature, dice=dice)(hard, z, torch.tensor(p[:, 1:]))
    expected = (1 - alpha) * by_hand(logits[kept], label[kept], True) + alpha * soft
    assert total.item() == pytest.approx(expected, rel=1e-5)
    if not dice:  # the unlabelled sample has the gradient of the soft loss alone: a T (q - p) over all voxels
        total.backward()
        voxels = logits.size / logits.shape[1]
        np.testing.assert_allclose(z.grad[1], alpha * temperature * (q - p)[1] / voxels, rtol=1e-5, atol=1e-9)


class TestShare:
    @pytest.mark.parametrize(
        ("share", "batch_size"), [(0.5, 2), (0.3, 2), (0.25, 3), (0.9, 2), (0.5, 1), (0, 2), (1, 3)]
    )
    def test_number_of_unlabelled_samples(self, share, batch_size):
        counts = [part(share, "u").count(n, batch_size) for n in range(1000)]
        assert sum(counts) == pytest.approx(share * batch_size * 1000, abs=1)
        assert max(counts) - min(counts) <= 1
        if share in (0, 1):
            assert set(counts) == {share * batch_size}
        assert {int(share * batch_size)} <= set(counts) <= {int(share * batch_size), int(share * batch_size) + 1}

    def test_places_and_cases_are_drawn_evenly(self):
        np.random.seed(0)
        unlabelled = part(0.5, "u1", "u2", "u3")
        drawn = np.array([unlabelled.mixed(["a", "b"], n) for n in range(3000)])
        assert np.all(np.char.startswith(drawn, "u").sum(1) == 1)
        assert set(drawn[:, 0]) == {"a", "u1", "u2", "u3"}, "the labelled cases keep their places"
        for name in ("u1", "u2", "u3"):
            for place in range(2):  # 3000 / 2 / 3 = 500, standard deviation 20
                assert 420 < (drawn[:, place] == name).sum() < 580

    def test_processes_make_their_part_of_the_same_batch(self):
        class Keys:
            """Samples that are only counted, and a loader that knows which cases there are."""

            batch_size, patch_size_was_2d = 4, False

            def get_indices(self):
                return np.random.choice(list("abcdef"), self.batch_size)

            def get_do_oversample(self, _place):
                return False

            def get_bbox(self, shape, _show_foreground, _locations):
                return [0] * 3, list(shape)

            def load_case(self, key):
                return (
                    np.zeros((1, 2, 2, 2), np.float32),
                    np.zeros((1, 2, 2, 2), np.int8),
                    None,
                    {"class_locations": {}},
                )

            def draw(self, loaded):
                return SimpleNamespace(part=tuple(slice(0, n) for n in loaded))

            def make(self, *_sample):
                return None

            def stack(self, samples):
                return {"data": len(samples), "target": None}

        def keys(share, numbers):
            fake = Keys()
            maker = SampledBatches(
                loader=fake, cases=fake, samples=fake, soft=False, share=share, unlabelled=part(0.375, "u", "v")
            )
            batches = [maker.make(BatchNumber(3, 0, number), lambda _case: None) for number in numbers]
            assert all(batch["data"] == len(batch["keys"]) for batch in batches)
            return [batch["keys"] for batch in batches]

        whole = keys(Share(), range(6))
        halves = zip(keys(Share(0, 2), range(6)), keys(Share(1, 2), range(6)), strict=True)
        assert [first + second for first, second in halves] == whole
        assert [sum(key in "uv" for key in batch) for batch in whole] == [1, 2, 1, 2, 1, 2]


class TestTraining:
    def test_a_damaged_image_names_the_commands_that_mend_it(self, prepared):
        """They leave what was there before."""
        folder = prepared / "preprocessed" / DATASET / "unlabelled" / "more-scans" / f"nnUNetPlans_{CONFIGURATION}"
        file = folder / "tiny_10.pkl"
        whole = file.read_bytes()
        file.write_bytes(b"damaged")
        with pytest.raises(CorruptError) as caught:
            train_student(make_job(alpha=0.3), validate=False)
        first, last = str(caught.value).splitlines()
        assert re.match("preprocessed case 'tiny_10' .*cannot be read: UnpicklingError", first)
        remove, build = last.removeprefix("make it again with: ").split(" && ")
        words = shlex.split(remove)
        assert words[:2] == ["rm", "-f"]
        for name in words[2:]:
            Path(name).unlink(missing_ok=True)
        words = shlex.split(build)
        assert words[0] == "fastnnunet"
        with pytest.raises(SystemExit) as done:
            main([*words[1:], "--workers", "0", "--threads", "1"])
        assert not done.value.code
        mended, before = pickle.loads(file.read_bytes()), pickle.loads(whole)
        assert mended.keys() == before.keys()
        assert (
            mended["shape_after_cropping_and_before_resampling"] == before["shape_after_cropping_and_before_resampling"]
        )

    def test_batches_losses_and_name(self, prepared, monkeypatch):
        """One of two samples is unlabelled, hard loss and validation never see it, and the run says what it is."""
        seen, validated = [], []
        original, step = mixing.loss_of_samples, StudentTrainer.validation_step

        def spy(loss, outputs, target, places, batch_size):
            value = original(loss, outputs, target, places, batch_size)
            own = [t[list(places)] for t in target]
            assert value.item() == loss([o[list(places)] for o in outputs], own).item()
            seen.append((len(places), batch_size))
            return value

        monkeypatch.setattr(mixing, "loss_of_samples", spy)
        monkeypatch.setattr(
            StudentTrainer, "validation_step", lambda t, batch: validated.extend(batch["keys"]) or step(t, batch)
        )
        keys = []
        train_step = StudentTrainer.train_step
        monkeypatch.setattr(
            StudentTrainer,
            "train_step",
            lambda t, batch, i: keys.append(list(batch["keys"])) or train_step(t, batch, i),
        )
        job = make_job(loss="kl_dice")
        folder = train_student(job, validate=False)
        assert seen == [(1, 2)] * 4
        unlabelled = {"tiny_10", "tiny_11"}
        assert [len(unlabelled & set(k)) for k in keys] == [1] * 4
        assert not unlabelled & set(validated)
        assert folder.parent.name == (
            f"nnUNetTrainer__nnUNetPlans_r2_a0.5_T1_e2_i2_s5_u0.5_more-scans__{CONFIGURATION}"
        )
        provenance = load_checkpoint(folder / "checkpoint_final.pth")["fastnnunet"]
        caches = {p.parent.name for p in (prepared / "preprocessed" / DATASET).glob("fastnnunet_*/*/zarr.json")}
        keys_of_run = {provenance["cache_key"][:16], provenance["unlabelled_cache_key"][:16]}
        assert keys_of_run == caches
        assert provenance["distill"]["unlabelled"] == "more-scans"
        assert run_folder(make_job(loss="kl_dice", unlabelled_share=0.25)) != folder

    def test_soft_label_of_an_unlabelled_sample_is_its_own(self, prepared):
        """The loader reads an unlabelled case from its own data, cache and list of foreground voxels."""
        own = CachedSoftLabels(cache_for_training(TEACHER, RECIPE), RECIPE.temperature)
        unlabelled = unlabelled_for_training(TEACHER, RECIPE, MIXED, own.image_digests)

        class Labelled:
            identifiers = ("tiny_00",)

        joined = JoinedDataset(Labelled(), SoftLabelDataset(unlabelled, unlabelled.soft_labels))
        assert joined.identifiers == ("tiny_00",)
        loaded, segmentation, previous, properties = joined.load_case("tiny_11")
        image = unlabelled.cases.image_CZYX("tiny_11")
        np.testing.assert_array_equal(loaded[tuple(slice(0, n) for n in loaded.shape)], image)
        folder = next(p.parent for p in (prepared / "preprocessed").rglob("tiny_11/zarr.json")).parent
        stored = SoftLabelReader(folder).read_case("tiny_11")
        soft = placed(joined.read_soft("tiny_11", image.shape[1:], ((0, 0, 0), image.shape[1:])))
        np.testing.assert_allclose(soft, stored / np.float32(255), atol=1e-6)
        assert previous is None
        assert segmentation.shape[1:] == image.shape[1:]
        assert set(properties["class_locations"]) == {1, 2}

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_shares_from_none_to_all(self, prepared, monkeypatch, share):
        """Counted in the batches that reach the training step; validation sees labelled cases whatever the share."""
        keys, validated = [], []
        train_step, validation_step = StudentTrainer.train_step, StudentTrainer.validation_step
        monkeypatch.setattr(StudentTrainer, "train_step", lambda t, b, i: keys.extend(b["keys"]) or train_step(t, b, i))
        monkeypatch.setattr(
            StudentTrainer, "validation_step", lambda t, b: validated.extend(b["keys"]) or validation_step(t, b)
        )
        folder = train_student(make_job(unlabelled_share=share, iterations_per_epoch=5, epochs=1), validate=False)
        assert sum(key in ("tiny_10", "tiny_11") for key in keys) == share * 10
        assert validated
        assert not {"tiny_10", "tiny_11"} & set(validated)
        assert f"_u{share:g}_more-scans__" in folder.parent.name

    def test_pseudo_labels_alone(self, prepared, monkeypatch):
        """The control: unlabelled images with the teacher's labels and no soft loss, nor the cache of labelled cases.

        What the loader crops is the largest probability of the cache, -1 for background outside the image.
        """
        own = next(p.parent.parent for p in (prepared / "preprocessed").rglob("tiny_00/zarr.json"))
        shutil.rmtree(own)
        spec = dataclasses.replace(MIXED, alpha=0.0, pseudo_labels=True, unlabelled_share=1.0)
        unlabelled = unlabelled_for_training(TEACHER, RECIPE, spec, None)
        for case in ("tiny_10", "tiny_11"):
            empty = unlabelled.cases.load(case)[1]
            stored = SoftLabelReader(
                next(p.parent for p in (prepared / "preprocessed").rglob(f"{case}/zarr.json")).parent
            ).read_case(case)
            channels = np.concatenate([255 - stored.sum(0, keepdims=True, dtype=np.int32), stored]).argmax(0)
            expected = np.where((empty[0] < 0) & (channels == 0), -1, channels)
            got = unlabelled.load_case(case)[1]
            assert got.shape == empty.shape
            np.testing.assert_array_equal(got[0], expected)
            assert expected.max() > 0
        seen = []
        original = StudentTrainer.train_step

        def spy(trainer, batch, iteration):
            seen.append((set(batch["keys"]), int(max(t.max() for t in batch["target"]))))
            return original(trainer, batch, iteration)

        monkeypatch.setattr(StudentTrainer, "train_step", spy)
        steps = []
        job = make_job(alpha=0.0, pseudo_labels=True, unlabelled_share=1.0)
        folder = train_student(job, validate=False, progress=steps.append)
        assert all(keys <= {"tiny_10", "tiny_11"} for keys, _ in seen)
        assert max(largest for _, largest in seen) > 0, "the loss sees labels where the image has none"
        assert all(step.soft == 0 and step.hard != 0 for step in steps)
        assert folder.parent.name == f"nnUNetTrainer__nnUNetPlans_r2_a0_e2_i2_s5_pseudo_u1_more-scans__{CONFIGURATION}"
        (listed,) = (prepared / "preprocessed" / DATASET / "unlabelled" / "more-scans").glob("*.????????????????")
        (listed / "tiny_10.b2nd").unlink()
        with pytest.raises(NotFoundError, match=r"1 unlabelled case\(s\) have no label map of the teacher"):
            train_student(job, overwrite=True, validate=False)
        assert (folder / "checkpoint_final.pth").is_file()
        build_unlabelled(prepared / "more scans", RECIPE, TEACHER)  # makes what is missing
        train_student(job, overwrite=True, validate=False)

    def test_same_seed_same_student_and_resume(self, prepared, monkeypatch):
        job = make_job(epochs=3)
        reference = trained(job)
        monkeypatch.setenv("nnUNet_n_proc_DA", "2")
        assert_same(reference, trained(job, overwrite=True))
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")

        def kill(state):
            if (state.epoch, state.iteration) == (1, 2):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_student(job, overwrite=True, validate=False, progress=kill)
        assert_same(reference, trained(job, resume=True))

    def test_together_is_as_alone(self, prepared):
        jobs = [make_job(r) for r in (2, 4)]
        alone = [trained(job) for job in jobs]
        folders = train_students(jobs, overwrite=True, validate=False)
        for folder, reference in zip(folders, alone, strict=True):
            assert_same(load_checkpoint(folder / "checkpoint_final.pth"), reference)

    def test_two_processes_are_one(self, world):
        """Three samples a batch, one or two of them unlabelled: the processes have unequal numbers of each."""
        (world / "recipe.yaml").write_text("precision: fp32\nmirroring: false\nengine: torch\n")
        change_plans(world, batch_size=3, batch_dice=False)
        build_for(TEACHER, RECIPE)
        build_unlabelled(scans(world), RECIPE, TEACHER)
        job = make_job(epochs=4)
        one = trained(job)
        done = torchrun(world, "--overwrite", "--unlabelled", "more-scans")
        assert done.returncode == 0, done.stderr
        two = load_checkpoint(run_folder(job) / "checkpoint_final.pth")
        np.testing.assert_allclose(two["logging"]["train_losses"], one["logging"]["train_losses"], rtol=1e-4)
        for name, tensor in one["network_weights"].items():
            torch.testing.assert_close(two["network_weights"][name], tensor, rtol=1e-3, atol=1e-4)

    def test_batch_dice_in_several_processes_is_refused(self, prepared, monkeypatch):
        change_plans(prepared, batch_dice=True)
        folder = train_student(make_job(epochs=1), validate=False)
        monkeypatch.setattr("fastnnunet.nnunet.trainer.distributed.share", lambda: Share(0, 2))
        with pytest.raises(SpecError, match="with batch Dice or an ignore label several processes cannot join"):
            train_student(make_job(epochs=1), validate=False, overwrite=True)
        assert (folder / "checkpoint_final.pth").is_file(), "refused before the old run is replaced"

    @pytest.mark.parametrize("kind", ["regions", "ignore"])
    def test_other_kinds_of_labels(self, world, kind):
        from tests import test_kinds

        test_kinds.prepare(world, kind)
        teacher = test_kinds.teacher_spec(kind)
        recipe = test_kinds.recipe_for(kind)
        build_for(teacher, recipe)
        job, cache = build_unlabelled(scans(world), recipe, teacher)
        kinds = set(read_locations(job.target.foreground_folder(cache.key) / "tiny_10.npz"))
        assert kinds == ({(1, 2), 2} if kind == "regions" else {1, 2, (-1, 0, 1, 2)})
        seen = []
        job = make_job(teacher=teacher, recipe=recipe, temperature=recipe.temperature, epochs=1, soft_on_ignored=False)
        train_student(job, validate=False, progress=seen.append)
        assert all(s.soft > 0 and np.isfinite(s.hard) for s in seen)


class TestRefusals:
    def refused(self, job, error):
        with pytest.raises(error) as caught:
            train_student(job, validate=False)
        assert not run_folder(job).exists()
        return str(caught.value)

    def test_settings(self):
        for changes, message in (
            ({"alpha": 0.0}, "unlabelled: at alpha 0 there is nothing to learn"),
            ({"unlabelled_share": 1.01}, "unlabelled_share: got 1.01, expected a number from 0 to 1"),
            ({"unlabelled_share": -0.1}, "unlabelled_share: got -0.1"),
            ({"unlabelled": None, "pseudo_labels": True}, "pseudo_labels: got them without unlabelled"),
            ({"unlabelled": None, "unlabelled_share": 0.3}, "unlabelled_share: got 0.3 without unlabelled"),
            ({"unlabelled": "a/b"}, "unlabelled: got 'a/b', expected letters"),
        ):
            with pytest.raises(SpecError, match=message):
                dataclasses.replace(MIXED, **changes)

    def test_no_such_set(self, world):
        build_for(TEACHER, RECIPE)
        message = self.refused(make_job(), NotFoundError)
        assert "no unlabelled images were preprocessed" in message
        made = "make them with: fastnnunet cache build -d 998 -c 3d_fullres -f 0 --engine torch"
        assert f"{made} --images FOLDER --name more-scans" in message

    def test_command_line(self, world, capsys):
        """The message quotes the command that makes what is missing, and that command makes it."""
        images = scans(world)
        (world / "recipe.yaml").write_text("precision: fp32\nmirroring: false\nengine: torch\n")
        recipe = ["--spec", str(world / "recipe.yaml")]
        options = [
            "-e",
            "1",
            "--iterations",
            "1",
            "--val-iterations",
            "1",
            "--precision",
            "fp32",
            "--threads",
            "1",
            "--no-validate",
        ]
        training = [
            "train",
            "-d",
            "998",
            "-f",
            "0",
            "-tf",
            "0",
            "-r",
            "2",
            *recipe,
            *options,
            "--unlabelled",
            str(images),
        ]

        def run(*words):
            with pytest.raises(SystemExit) as stop:
                main(list(words))
            captured = capsys.readouterr()
            return stop.value.code or 0, captured.out + captured.err

        build_for(TEACHER, RECIPE)
        code, text = run(*training)
        assert code == 2
        assert "these images were not preprocessed and labelled yet" in text
        command = f"-d 998 -c {CONFIGURATION} -f 0 --spec {world / 'recipe.yaml'} --images '{images}'"
        assert f"make it with: fastnnunet cache build {command}\n" in text
        words = ["-d", "998", "-f", "0", *recipe, "--images", str(images), "--workers", "0", "--threads", "1"]
        code, text = run("cache", "plan", *words)
        assert code == 0
        assert "2, of which 2 to preprocess" in text
        assert "named once the images are preprocessed" in text
        code, text = run("cache", "build", *words)
        assert code == 0, text
        assert "2 of 2 cases stored" in text
        assert "train with: --unlabelled more-scans" in text
        code, text = run("cache", "plan", *words)
        assert code == 0
        assert "2, of which 0 to preprocess" in text
        assert run(*training)[0] == 0
        assert run_folder(make_job(epochs=1, iterations_per_epoch=1, seed=0)).is_dir()
        code, text = run("cache", "build", "-d", "998", "--name", "x")
        assert code == 2
        assert "give their folder with --images" in text
        code, text = run("cache", "build", "-d", "998", "--images", str(world / "nowhere"), "--workers", "0")
        assert code == 2
        assert text.count("error:") == 1

    def test_cache_or_list_missing(self, prepared):
        (listed,) = (prepared / "preprocessed" / DATASET / "unlabelled" / "more-scans").glob("*.????????????????")
        (listed / "tiny_10.npz").unlink()
        message = self.refused(make_job(), NotFoundError)
        assert "1 unlabelled case(s) have no list of foreground voxels" in message
        assert "finish it with: fastnnunet cache build -d 998" in message
        cache = next(p.parent.parent for p in (prepared / "preprocessed").rglob("tiny_10/zarr.json"))
        shutil.rmtree(cache)
        message = self.refused(make_job(), NotFoundError)
        assert "build it with: fastnnunet cache build -d 998" in message
        assert "--images '" in message

    def test_images_changed(self, prepared):
        images = prepared / "more scans"
        shutil.copy(raw_image(prepared, "tiny_03"), images / "tiny_10_0000.nii.gz")
        shutil.copy(raw_image(prepared, "tiny_04"), images / "new_0000.nii.gz")
        (images / "tiny_11_0000.nii.gz").unlink()
        message = self.refused(make_job(), MismatchError)
        assert "  - new: new\n  - changed: tiny_10\n  - no longer there: tiny_11\n" in message
        assert "bring them up to date with: fastnnunet cache build -d 998" in message
        shutil.rmtree(images)  # the images are not needed any more
        train_student(make_job(epochs=1), validate=False)

    def test_labelled_images_are_refused_before_they_are_labelled_again(self, world):
        from fastnnunet.api import label

        images = image_folder(world, "tiny_03")
        shutil.copy(raw_image(world, "tiny_10", "Ts"), images / "new_0000.nii.gz")
        with pytest.raises(MismatchError, match=r"under another name:\n  - u_tiny_03 is tiny_03\ntake them out"):
            label(TEACHER, RECIPE, images=images, threads=1)
        assert not list((world / "preprocessed").rglob("manifest.json"))
        (images / "u_tiny_03_0000.nii.gz").unlink()
        assert label(TEACHER, RECIPE, images=images, threads=1).cache.cases.keys() == {"new"}

    def test_labelled_images_under_other_names(self, world):
        build_for(TEACHER, RECIPE)
        build_unlabelled(image_folder(world, "tiny_03"), RECIPE, TEACHER)
        message = self.refused(make_job(), MismatchError)
        assert "1 unlabelled image(s) are labelled cases under another name:\n  - u_tiny_03 is tiny_03\n" in message

    def test_checkpoint_from_before_there_was_such_a_setting(self, world):
        """Its run goes on: settings it does not know are those it was trained with."""
        job = make_job(alpha=0.0, unlabelled=None, epochs=1)
        folder = train_student(job, validate=False)
        checkpoint = load_checkpoint(folder / "checkpoint_final.pth")
        for name in ("unlabelled", "unlabelled_share", "pseudo_labels"):
            del checkpoint["fastnnunet"]["distill"][name]
        del checkpoint[DIGEST]
        torch.save(checkpoint, folder / "checkpoint_final.pth")
        train_student(job, resume=True, validate=False)
