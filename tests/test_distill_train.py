"""Training: soft labels move with the image, students are ordinary nnU-Net models, resuming and refusals."""

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.job import prepare_job
from fastnnunet.distill.check import check_job
from fastnnunet.distill.job import TrainingJob, run_folder
from fastnnunet.distill.losses import DistillationObjective
from fastnnunet.distill.train import train_student
from fastnnunet.errors import BuildError, MismatchError, NotFoundError, SpecError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.nnunet.augment.soft_samples import NO_OPINION, SampleTransforms, has_opinion, opinions, placed, read_box
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.splits import load_splits
from fastnnunet.nnunet.student.plans import find_student, reduce_features
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec, student_plans_name
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from fastnnunet.teachers.jobs import cache_for_training
from tests.samples import NNUNETS, SoftLabel, transformed
from tests.tiny import CONFIGURATION, DATASET

CACHE = CacheSpec(precision="fp32", mirroring=False, engine="torch")  # loads at once; OpenVINO compiles each fold
LOGIT_GAP = dataclasses.replace(CACHE, encoding="logit_gap_u8", temperature_range=(1.0, 4.0), level=3)
SHORT = DistillSpec(epochs=2, iterations_per_epoch=2, val_iterations_per_epoch=1, precision="fp32")


def make_job(**changes):
    fields = {
        "teacher": TeacherSpec(dataset="998", folds=(0, 1)),
        "student": StudentSpec(r=2),
        "distill": SHORT,
        "cache": CACHE,
        "fold": 0,
        "device": "cpu",
        "threads": 1,
    }
    return TrainingJob(**{**fields, **changes})


def build(spec=CACHE, folds=(0, 1)):
    source, factory, root = open_teacher(TeacherSpec(dataset="998", folds=folds), spec)
    return build_cache(prepare_job(source, factory, spec, root, command="rebuild"))


class TestSoftLabelsMoveWithTheImage:
    """The oracle: a soft label that *is* the image must stay equal to it through crop, padding and every transform."""

    @pytest.fixture
    def image(self):
        return np.random.default_rng(0).random((1, 20, 22, 24), np.float32)

    def test_crop_and_padding(self, image):
        from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

        labels, shape = SoftLabel(image), image.shape[1:]
        for box in ([[-3, 15], [4, 30], [0, 24]], [[2, 4], [-5, 40], [20, 30]]):
            soft = placed(read_box(labels, "case", shape, tuple(zip(*box, strict=True))))
            np.testing.assert_array_equal(soft, crop_and_pad_nd(image, box, NO_OPINION))
        beyond = placed(read_box(labels, "case", shape, ((25, 0, 0), (30, 5, 5))))
        assert beyond.shape == (1, 5, 5, 5)
        assert (beyond == NO_OPINION).all()

    def test_rotation_scaling_and_mirrors(self, image):
        from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
        from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

        spatial = SpatialTransform(
            (16, 16, 16), 0, False, p_rotation=1, rotation=(-0.5, 0.5), p_scaling=1, scaling=(0.7, 1.4), **NNUNETS
        )
        split = SampleTransforms(ComposeTransforms([spatial, MirrorTransform((0, 1, 2))]))
        np.random.seed(3)
        for _ in range(5):
            label = torch.zeros(image.shape, dtype=torch.int16)
            out, (_, soft) = transformed(split, torch.from_numpy(image), label, image)
            assert out.shape == soft.shape == (1, 16, 16, 16)
            inside = soft >= 0
            assert inside.float().mean() > 0.8
            assert inside.equal(has_opinion(soft[None])[0])
            # linear interpolation with zeros around: at the border the image is darkened, the soft label is not
            assert (soft[inside] >= out[inside] - 1e-6).all()
            deep = torch.zeros(1, 16, 16, 16, dtype=torch.bool)
            deep[:, 6:10, 6:10, 6:10] = True
            torch.testing.assert_close(soft[deep], out[deep])

    def test_intensity_transforms_leave_it_alone(self, image):
        from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
        from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

        class Always:
            def __init__(self, transform):
                self.transform = transform

            def __call__(self, **data):
                return self.transform(**data)

        brighter = Always(MultiplicativeBrightnessTransform((2.0, 2.0), False, 1))
        split = SampleTransforms(ComposeTransforms([brighter]))
        out, (_, soft) = transformed(split, torch.from_numpy(image), torch.zeros(image.shape), image)
        torch.testing.assert_close(soft, torch.from_numpy(image))
        torch.testing.assert_close(out, 2 * torch.from_numpy(image))

    def test_no_opinion_beyond_the_volume(self, image):
        """A box half beyond the volume, by hand: the soft label inside, nothing outside; rotated, SciPy's shares."""
        from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
        from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
        from scipy.ndimage import map_coordinates

        box = [-8, 0, 0], [12, 22, 24]
        patch, there = (
            torch.from_numpy(crop_and_pad_nd(v, [list(b) for b in zip(*box, strict=True)], 0))
            for v in (image, np.ones_like(image))
        )
        label = torch.zeros(1, *patch.shape[1:], dtype=torch.int16)
        plain = SampleTransforms(ComposeTransforms([]))
        soft_box = read_box(SoftLabel(image), "case", image.shape[1:], box)
        drawn = plain.draw(patch.shape[1:])
        assert drawn.part == tuple(slice(0, n) for n in patch.shape[1:])
        soft = plain.make(patch, label, soft_box, drawn)[1][-1]
        assert (soft[:, :8] == NO_OPINION).all()
        np.testing.assert_array_equal(soft[:, 8:], image[:, :12])

        spatial = SpatialTransform((16, 16, 16), 0, False, p_rotation=1, rotation=(0.4, 0.4), p_scaling=0, **NNUNETS)
        rotating = SampleTransforms(ComposeTransforms([spatial]))
        drawn = rotating.draw(patch.shape[1:])
        assert drawn.part == tuple(slice(0, n) for n in patch.shape[1:])
        soft = rotating.make(patch, label, soft_box, drawn)[1][-1][0].numpy()
        grid = spatial.get_parameters(image=patch)["grid"].numpy()
        positions = [((grid[..., -1 - a] + 1.0) * n - 1) / 2 for a, n in enumerate(patch.shape[1:])]
        values, share = (
            map_coordinates(v[0].double().numpy(), positions, order=1, mode="grid-constant") for v in (patch, there)
        )
        clear = abs(share - 0.5) > 1e-4
        assert ((share > 0.01) & (share < 0.99)).any()
        expected = np.where(share > 0.5, values / np.maximum(share, 0.5), -1)
        np.testing.assert_allclose(soft[clear], expected[clear], atol=1e-4)

    def test_tempered_background_is_not_certain_beyond_the_volume(self):
        """Where nothing is known the loss is 0 with no gradient; what is known weighs as if the rest were not there."""
        logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        soft = torch.softmax(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)), 1)[:, 1:]
        padded = soft.clone()
        padded[:, :, 2:] = NO_OPINION
        for regions, dice in ((False, False), (True, False), (False, True)):
            objective = DistillationObjective(1.0, 3.0, regions, dice)
            heads = logits[:, 1:] if regions else logits
            _, loss = objective(torch.zeros(()), heads, padded, has_opinion(padded))
            _, inside = objective(torch.zeros(()), heads[:, :, :2], soft[:, :, :2])
            torch.testing.assert_close(loss, inside)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert not gradient[:, :, 2:].any()
            assert gradient[:, :, :2].any()

    def test_coverage_is_taken_out_again(self):
        stacked = torch.tensor([[0.4, 0.3, 0.1, 0.0], [0.2, 0.1, 0.1, 0.0], [1.0, 0.5, 0.4, 0.0]])
        expected = torch.tensor([[0.4, 0.6, -1.0, -1.0], [0.2, 0.2, -1.0, -1.0]])
        torch.testing.assert_close(opinions(stacked), expected)
        torch.testing.assert_close(opinions(stacked[None], 1), expected[None])


@pytest.mark.parametrize(
    ("features", "r", "expected"),
    [([32, 64, 320], 4, [8, 16, 80]), ([32, 64, 320], 6, [8, 10, 53]), ([32, 64], 1, [32, 64]), ([6, 12], 2, [6, 8])],
)
def test_reduced_widths(features, r, expected):
    assert reduce_features(features, StudentSpec(r=r)) == expected


def test_r_that_leaves_no_channels(world):
    with pytest.raises(SpecError, match="-r 17 leaves no channels: the narrowest stage has 16"):
        train_student(make_job(student=StudentSpec(r=17)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(val=[]), "fold 0 of .*splits_final.json has no validation cases\n.*-f all"),
        (lambda s: s["val"].append("gone"), "names 1 case.* not preprocessed, first 'gone'"),
    ],
)
def test_fold_that_cannot_be_trained(world, change, message):
    path = world / "preprocessed" / DATASET / "splits_final.json"
    splits = load_splits(path.parent, open_teacher(TeacherSpec(dataset="998"), CACHE)[0].case_ids)
    change(splits[0])
    path.write_text(json.dumps(splits))
    job = make_job(distill=dataclasses.replace(SHORT, alpha=0.0))
    with pytest.raises(MismatchError, match=message):
        train_student(job)
    assert not run_folder(job).exists()


def test_fold_that_nnunet_draws_itself(world, caplog):
    check_job(make_job(fold=7), resume=False, overwrite=False)
    assert "there is no fold 7" in caplog.text


def test_continue_with_nothing_to_continue(world, caplog):
    job = make_job(distill=dataclasses.replace(SHORT, alpha=0.0, epochs=1, iterations_per_epoch=1))
    assert (train_student(job, resume=True, validate=False) / "checkpoint_final.pth").is_file()
    assert "holds no checkpoint, the run starts from the beginning" in caplog.text


@pytest.mark.parametrize(("fold", "words"), [(0, "the validation fold: 0.5"), ("all", "the training cases, fold all")])
def test_dice_says_what_it_was_measured_on(tmp_path, monkeypatch, capsys, fold, words):
    from fastnnunet.cli.train import run_jobs

    (tmp_path / "validation").mkdir()
    (tmp_path / "validation/summary.json").write_text('{"foreground_mean": {"Dice": 0.5}}')
    monkeypatch.setattr("fastnnunet.distill.train.train_students", lambda *_args, **_options: [tmp_path])
    run_jobs([make_job(fold=fold)], resume=False, overwrite=False, validate=True)
    assert words in capsys.readouterr().out


class TestTraining:
    def test_student_is_an_ordinary_nnunet_model(self, world, tmp_path):
        """Stock nnU-Net loads and runs it in a process in which fastnnunet cannot be imported."""
        cache = build()
        seen = []
        folder = train_student(make_job(), progress=seen.append)
        assert [(s.epoch, s.iteration) for s in seen] == [(0, 1), (0, 2), (1, 1), (1, 2)]
        assert all(s.soft > 0 for s in seen)
        assert json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"] >= 0
        checkpoint = load_checkpoint(folder / "checkpoint_final.pth")
        assert checkpoint["fastnnunet"]["cache_key"] == cache.key
        export_bundle(folder.parent, 0, tmp_path / "bundle")
        assert load_bundle_spec(tmp_path / "bundle").provenance["training"]["cache_key"] == cache.key
        assert checkpoint["inference_allowed_mirroring_axes"] is None
        assert checkpoint["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"].shape[0] == 8
        code = (
            "import sys; sys.modules['fastnnunet'] = None\n"
            "from nnunetv2.inference.predict_from_raw_data import predict_entry_point\n"
            "if __name__ == '__main__': predict_entry_point()\n"
        )
        script = tmp_path / "stock.py"
        script.write_text(code)
        plans = student_plans_name("nnUNetPlans", StudentSpec(r=2), SHORT)
        options = f"-d 998 -c {CONFIGURATION} -p {plans} -f 0 -device cpu -npp 0 -nps 0".split()
        images, out = world / "raw" / DATASET / "imagesTs", tmp_path / "out"
        command = [sys.executable, str(script), "-i", str(images), "-o", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in out.glob("*.nii.gz")) == ["tiny_10.nii.gz", "tiny_11.nii.gz"]

    def test_one_cache_of_a_range_serves_several_temperatures(self, world):
        built = build(LOGIT_GAP)
        for temperature in (1.5, 4.0):
            recipe = dataclasses.replace(LOGIT_GAP, temperature=temperature)
            assert cache_for_training(TeacherSpec(dataset="998", folds=(0, 1)), recipe) == built.path
            distill = dataclasses.replace(SHORT, temperature=temperature, epochs=1)
            folder = train_student(make_job(cache=recipe, distill=distill), validate=False)
            provenance = load_checkpoint(folder / "checkpoint_final.pth")["fastnnunet"]
            assert provenance["cache_key"] == built.key
            assert provenance["distill"]["temperature"] == temperature

    def test_control_needs_no_cache(self, world):
        folder = train_student(make_job(distill=dataclasses.replace(SHORT, alpha=0.0)), validate=False)
        assert folder.parent.name.startswith("nnUNetTrainer__nnUNetPlans_r2_a0_e2_i2")
        assert load_checkpoint(folder / "checkpoint_final.pth")["fastnnunet"]["cache_key"] is None

    def test_resumed_run_equals_uninterrupted(self, world):
        """On one core with in-process loading the second half of a resumed run starts from the stored state."""
        build()
        whole = train_student(make_job(), validate=False)
        reference = load_checkpoint(whole / "checkpoint_final.pth")
        stopped = []

        def stop_in_second_epoch(state):
            stopped.append(state)
            if state.epoch == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_student(make_job(), overwrite=True, validate=False, progress=stop_in_second_epoch)
        assert load_checkpoint(whole / "checkpoint_latest.pth")["current_epoch"] == 1
        with pytest.raises(MismatchError, match=r"unfinished run.*\n.*--continue"):
            train_student(make_job(), validate=False)
        epochs = []
        train_student(make_job(), resume=True, validate=False, progress=lambda s: epochs.append(s.epoch))
        assert set(epochs) == {1}
        resumed = load_checkpoint(whole / "checkpoint_final.pth")
        assert resumed["current_epoch"] == reference["current_epoch"] == 2
        assert len(resumed["logging"]["train_losses"]) == 2
        assert resumed["logging"]["train_losses"][0] == reference["logging"]["train_losses"][0]

    def test_continue_with_other_hyperparameters(self, world, caplog):
        job = make_job(distill=dataclasses.replace(SHORT, alpha=0.0))
        folder = train_student(job, validate=False)
        other = make_job(distill=dataclasses.replace(SHORT, alpha=0.0, epochs=3, initial_lr=0.5))
        train_student(other, resume=True, validate=False)  # a job that is queued again before its first checkpoint
        said = (
            r"(?s)holds no checkpoint, the run starts from the beginning; .*distill.epochs: 2 -> 3.*distill.initial_lr"
        )
        assert re.search(said, caplog.text)
        assert (run_folder(other) / "checkpoint_final.pth").is_file()
        # what the name does not say is compared with the checkpoint, before a cache of that teacher is asked for
        taught = make_job(distill=dataclasses.replace(SHORT, alpha=0.0), teacher=TeacherSpec(dataset="998", folds=(2,)))
        with pytest.raises(MismatchError, match=r"(?s)trained differently.*teacher.folds: \[0, 1\] -> \[2\]"):
            train_student(taught, resume=True, validate=False)
        changed = dataclasses.replace(job.distill, val_iterations_per_epoch=7)
        with pytest.raises(MismatchError, match=r"(?s)trained differently.*distill.val_iterations_per_epoch"):
            train_student(make_job(distill=changed), resume=True, validate=False)
        assert run_folder(other) != folder

    def test_export_finds_the_only_run_or_asks(self, world):
        spec = dataclasses.replace(SHORT, alpha=0.0, epochs=1)
        for seed in (1, 2):
            train_student(
                make_job(student=StudentSpec(r=3), distill=dataclasses.replace(spec, seed=seed)), validate=False
            )
            if seed == 1:
                found = find_student(DATASET, "nnUNetPlans", CONFIGURATION, StudentSpec(r=3), DistillSpec(alpha=0))
                assert found.name.split("__")[1].endswith("_s1")
        with pytest.raises(MismatchError, match=r"several students nnUNetPlans_r3_a0: .*_s1, .*_s2\nname one"):
            find_student(DATASET, "nnUNetPlans", CONFIGURATION, StudentSpec(r=3), DistillSpec(alpha=0))

    def test_loss_that_is_not_finite(self, world):
        job = make_job(distill=dataclasses.replace(SHORT, alpha=0.0, initial_lr=1e30))
        with pytest.raises(BuildError, match=r"loss became (nan|inf).*tiny_"):
            train_student(job, validate=False)


class TestCacheThatDoesNotFit:
    """Refused before anything is written, with the fields that differ and the command that builds the right one."""

    def refused(self, job, error=MismatchError):
        with pytest.raises(error) as caught:
            train_student(job, validate=False)
        assert not run_folder(job).exists()
        return str(caught.value)

    def test_none(self, world):
        message = self.refused(make_job(), NotFoundError)
        assert f"fastnnunet cache build -d 998 -c {CONFIGURATION} -f 0 1" in message

    def test_other_temperature(self, world):
        build(dataclasses.replace(CACHE, temperature=2.0))
        message = self.refused(make_job())
        assert "temperature: 2.0 -> 1.0" in message
        assert message.endswith("or train at the temperature of this one, with --temp 2")
        moreover = self.refused(make_job(cache=dataclasses.replace(CACHE, step_size=0.75)))
        assert "--temp 2" not in moreover, "that alone would not do"

    def test_temperature_outside_the_range_of_the_recipe(self, world):
        """Said before a cache is asked for: there is no use in building one."""
        cache = dataclasses.replace(LOGIT_GAP, temperature=5.0)
        message = self.refused(make_job(cache=cache, distill=dataclasses.replace(SHORT, temperature=5.0)), SpecError)
        assert "got 5, expected 1 to 4" in message

    def test_objective_at_another_temperature_than_the_cache(self, world):
        build()
        message = self.refused(make_job(distill=dataclasses.replace(SHORT, temperature=2.0)))
        assert "got      1\n  expected 2" in message

    def test_other_folds(self, world):
        build(folds=(0, 1, 2))
        message = self.refused(make_job())
        assert "folds" in message
        assert "-f 0 1" in message
        assert "checkpoints" not in message

    def test_retrained_fold(self, world):
        build()
        path = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/fold_1/checkpoint_final.pth"
        checkpoint = load_checkpoint(path)
        checkpoint["network_weights"]["decoder.seg_layers.0.bias"][0] += 1
        torch.save(checkpoint, path)
        assert "checkpoints.1" in self.refused(make_job())

    def test_case_preprocessed_anew(self, world):
        import blosc2

        build()
        file = world / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres" / "tiny_03.b2nd"
        array = blosc2.open(str(file))[:]
        file.unlink()
        with contextlib.redirect_stdout(io.StringIO()):
            blosc2.asarray(array + 1, urlpath=str(file))
        assert "tiny_03" in self.refused(make_job())

    def test_incomplete(self, world):
        import shutil

        cache = build()
        shutil.rmtree(cache.case_dir("tiny_05"))
        assert "tiny_05" in self.refused(make_job(), NotFoundError)
