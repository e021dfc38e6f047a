"""A student from a published model and scans without labels: one command, its stages, and what it refuses."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fastnnunet.api.images import distil_images, label_images, train_on_images
from fastnnunet.cli.main import main
from fastnnunet.errors import MismatchError
from fastnnunet.events import Stage
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.world import VARIABLES, world_in
from fastnnunet.service.models import load_models
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import PublishedSpec
from tests.dicom_files import write_series
from tests.tiny import CONFIGURATION, DATASET

RECIPE = CacheSpec(precision="fp32", mirroring=False, engine="torch")
TRAINING = {"epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1}
FOLDS = (0, 1)


def model_in(world):
    return world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"


def scans_in(world, folder, count=5):
    """Copies of raw images, one of another spacing, which has to be resampled."""
    folder.mkdir()
    for number in range(count):
        shutil.copy(
            world / "raw" / DATASET / "imagesTr" / f"tiny_{number:02d}_0000.nii.gz", folder / f"s{number}_0000.nii.gz"
        )
    other = sitk.ReadImage(str(folder / "s1_0000.nii.gz"))
    other.SetSpacing((1.2, 0.9, 1.8))
    sitk.WriteImage(other, str(folder / "s1_0000.nii.gz"))
    return folder


def files_below(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


class Events(list):
    """A listener that keeps what it hears."""

    __call__ = list.append


@pytest.fixture(scope="module")
def done(pristine_world, tmp_path_factory):
    """The command once, in an environment whose variables name another place."""
    root = tmp_path_factory.mktemp("images")
    scans = scans_in(pristine_world, root / "scans")
    elsewhere = root / "elsewhere"
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            (elsewhere / name).mkdir(parents=True)
            patch.setenv(name, str(elsewhere / name))
        patch.setenv("nnUNet_n_proc_DA", "0")
        before = {name: os.environ[name] for name in VARIABLES}
        distilled = run(model_in(pristine_world), scans, root / "out")
        assert before == {name: os.environ[name] for name in VARIABLES}
    assert not [p for p in elsewhere.rglob("*") if p.parent != elsewhere], "something was written into the user's world"
    return root, distilled


def run(model, scans, output, sizes=(2,), **options):
    spec = PublishedSpec(path=model, folds=FOLDS)
    students = [StudentSpec(r=r) for r in sizes]
    options = {"training": TRAINING, "keep_all": True, **options}  # folds of random weights agree on nothing
    return distil_images(spec, scans, output, students, recipe=RECIPE, **options)


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def stock_label(model, folds, scan, output):
    """The label map that nnU-Net's own predictor writes."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds, "checkpoint_final.pth")
    predictor.predict_from_files_sequential([[str(scan)]], [str(output)])
    return read(f"{output}.nii.gz")


class TestTheCommand:
    def test_labels_are_what_nnunet_itself_writes(self, done, pristine_world, tmp_path):
        root, distilled = done
        for case, least in (("s0", 0.999), ("s1", 0.99)):  # the second is resampled, and rounded before that
            expected = stock_label(model_in(pristine_world), FOLDS, root / f"scans/{case}_0000.nii.gz", tmp_path / case)
            found = read(distilled.scans.labels / f"{case}.nii.gz")
            assert found.shape == expected.shape
            assert np.unique(expected).size == 3
            assert (found == expected).mean() > least

    def test_the_data_set_is_an_ordinary_one(self, done):
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        root, distilled = done
        base = root / "out/work/nnUNet_preprocessed/Dataset001_Images"
        folder = base / "nnUNetPlans_3d_fullres"
        dataset = infer_dataset_class(str(folder))(str(folder))
        assert dataset.identifiers == ["s0", "s1", "s2", "s3", "s4"]
        (split,) = json.loads((base / "splits_final.json").read_text())
        assert sorted(split["train"] + split["val"]) == dataset.identifiers
        assert (tuple(split["train"]), tuple(split["val"])) == (distilled.scans.learnt_from, distilled.scans.held_out)
        assert len(split["val"]) == 1
        _, segmentation, _, properties = dataset.load_case("s0")
        label = np.asarray(segmentation[0])
        inside = tuple(slice(a, b) for a, b in properties["bbox_used_for_cropping"])
        np.testing.assert_array_equal(np.maximum(label, 0), read(distilled.scans.labels / "s0.nii.gz")[inside])
        for kind in (1, 2):
            voxels = properties["class_locations"][kind]
            assert len(voxels) == min(10000, (label == kind).sum())
            assert (label[tuple(voxels[:, 1:].T)] == kind).all()

    def test_the_student_is_a_bundle_and_a_model_that_stock_nnunet_runs(self, done, tmp_path):
        root, distilled = done
        (student,) = distilled.students
        (held_out,) = distilled.scans.held_out
        expected = stock_label(student.model, (0,), root / f"scans/{held_out}_0000.nii.gz", tmp_path / "stock")
        predicted = read(student.bundle.parent / f"predictions/{held_out}.nii.gz")
        assert (predicted == expected).mean() > 0.999

    def test_its_bundle_tells_what_was_measured(self, done):
        _, distilled = done
        (student,) = distilled.students
        told = load_models([student.bundle], ["labels"]).models["bundle"].measured
        assert told["quality"]["dice"] == pytest.approx(student.fidelity.mean.mean)
        assert (told["quality"]["against"], told["quality"]["cases"]) == ("teacher", len(distilled.scans.held_out))
        assert told["speed"]["seconds_per_case"] == student.seconds
        assert told["parameters"] == student.parameters

    def test_fidelity_is_dice_against_the_teachers_labels(self, done):
        _, distilled = done
        (student,) = distilled.students
        (held_out,) = distilled.scans.held_out
        predicted = read(student.bundle.parent / f"predictions/{held_out}.nii.gz")
        teacher = read(distilled.scans.labels / f"{held_out}.nii.gz")
        for kind, name in ((1, "bright"), (2, "dark")):
            both = ((predicted == kind) & (teacher == kind)).sum()
            dice = 2 * both / ((predicted == kind).sum() + (teacher == kind).sum())
            assert student.fidelity.labels[name].mean == pytest.approx(dice)
        summary = json.loads(distilled.summary.read_text())
        assert summary["students"][0]["fidelity"]["mean"]["mean"] == pytest.approx(student.fidelity.mean.mean)
        assert summary["held_out"] == [held_out]
        page = distilled.report.read_text()
        assert held_out in page
        assert page.count("data:image/png;base64,") >= 2

    def test_scans_that_would_do_harm_are_left_out(self, done, pristine_world):
        root, distilled = done
        assert "s0: folds disagree: pairwise Dice 0." in distilled.report.read_text()
        shutil.copytree(root / "out/work", root / "strict/work")
        with pytest.raises(MismatchError, match="0 of 5 scans are fit to learn from") as caught:
            run(model_in(pristine_world), root / "scans", root / "strict", keep_all=False)
        assert "--keep-all" in str(caught.value)

    def test_probabilities_are_compared_as_nnunet_computes_them(self, done):
        from fastnnunet.cache.store.reader import SoftLabelReader
        from fastnnunet.evaluate.calibration import case_calibration, summarise
        from fastnnunet.nnunet.files.cases import PreprocessedCases
        from fastnnunet.nnunet.files.model import ModelFolder
        from fastnnunet.nnunet.reference import fold_reference

        root, distilled = done
        student = distilled.students[0]
        base = root / "out/work/nnUNet_preprocessed/Dataset001_Images"
        (cache,) = (path.parent for path in base.glob("fastnnunet_*/*/zarr.json"))
        reader, cases = SoftLabelReader(cache), PreprocessedCases(base / f"nnUNetPlans_{CONFIGURATION}")
        files = ModelFolder(student.model, CONFIGURATION, "checkpoint_final.pth")
        nnunet = fold_reference(files, mirroring=False, step_size=0.5)
        total = None
        for case in distilled.scans.held_out:
            logits = nnunet.logits(cases.image_CZYX(case), 0)
            q_CZYX = np.exp(logits - logits.max(0))
            q_CZYX /= q_CZYX.sum(0)
            spacing = tuple(files.model.config.spacing)
            found = case_calibration(q_CZYX, reader.to_probabilities(reader.read_case(case)), spacing_mm=spacing)
            total = found if total is None else total + found
        expected = summarise(total)
        assert student.calibration.teacher.voxels == expected.teacher.voxels > 0
        assert student.calibration.teacher_border.voxels == expected.teacher_border.voxels
        for name in ("brier", "nll", "target_entropy", "kl"):
            for where in ("teacher", "teacher_border"):
                got, wanted = (getattr(getattr(c, where), name) for c in (student.calibration, expected))
                assert got == pytest.approx(wanted, abs=2e-3), (where, name)
        assert "NLL" in distilled.report.read_text()

    def test_one_temperature_is_in_its_last_layer(self, done, pristine_world, tmp_path):
        from fastnnunet.nnunet.files.model import ModelFolder
        from fastnnunet.nnunet.reference import fold_reference

        root, distilled = done
        (student,) = distilled.students
        assert student.temperature != pytest.approx(1, abs=1e-3)
        (trained,) = (root / "out/work/nnUNet_results").glob("*/*_r2_*/fold_0")
        image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
        files = [
            ModelFolder(folder, CONFIGURATION, "checkpoint_final.pth") for folder in (trained.parent, student.model)
        ]
        centre = (slice(None), *[slice(5, 11)] * 3)  # at the rim float16 times small weights is coarse
        before, after = (fold_reference(f, mirroring=False, step_size=0.5).logits(image, 0)[centre] for f in files)
        np.testing.assert_allclose(after, before / student.temperature, rtol=0, atol=4e-3 * np.abs(before).max())
        stored = torch.load(student.model / "fold_0/checkpoint_final.pth", weights_only=False)
        assert stored["fastnnunet"]["folded_temperature"] == student.temperature
        shutil.copytree(root / "out/work", tmp_path / "work")
        plain = run(model_in(pristine_world), root / "scans", tmp_path, calibrate=False).students[0]
        assert plain.temperature == 1
        for case, dice in plain.fidelity.dice.items():  # but for voxels whose float16 logits are level
            assert dice == pytest.approx(student.fidelity.dice[case], abs=0.01)
        assert student.calibration.teacher_border.kl < plain.calibration.teacher_border.kl
        report = distilled.report.read_text()
        assert "Logits were divided (r2 by " in report
        assert (
            "2 epochs of 2 steps of 2 samples; adamw from a learning rate of 0.003; seed 0; soft loss KL and Dice"
            in report
        )
        assert "semimetric at T = 1, of weight 0.5" in report

    def test_again_it_does_nothing_twice_and_another_size_costs_its_training(self, done, pristine_world, monkeypatch):
        from fastnnunet.teachers.nnunet import NnUNetTeacher

        root, _ = done
        shutil.copytree(root / "out", root / "again")
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        load = NnUNetTeacher.load

        def of_students(self, threads):
            student = self.folder.name == "nnunet_model" or "_r4_" in self.folder.name
            assert student, "the teacher was asked again"
            return load(self, threads)

        monkeypatch.setattr(NnUNetTeacher, "load", of_students)
        before = files_below(root / "again/work/nnUNet_preprocessed")
        kept = [f for f in files_below(root / "again") if f[0].endswith(".pth") or "/r2/" in f[0]]
        assert any(name.endswith("/r2/judged.json") for name, _ in kept)
        events = Events()
        again = run(model_in(pristine_world), root / "scans", root / "again", sizes=(2, 4), progress=events)
        assert [student.tag for student in again.students] == ["r2", "r4"]
        begun = [event.note for event in events if isinstance(event, Stage)]
        assert [note.split(", about ")[0] for note in begun[:4]] == [
            *("preprocessing", "labelling", "writing labels", "training r2 r4")
        ]
        left_s = 2 * (20 + 5 * 0.2) + 5  # two exports, two students on five scans, the report; four steps take no time
        assert begun[0] == f"preprocessing, about {left_s:.0f} s left of all"
        after = dict(files_below(root / "again/work/nnUNet_preprocessed"))
        changed = {Path(name).name for name, time in before if after[name] != time}
        assert not {name for name in changed if name.endswith((".b2nd", ".pkl", ".nii.gz"))}
        trained = {event.student for event in events if getattr(event, "unit", "") == "iterations"}
        assert trained == {"r4"}
        assert set(kept) <= set(files_below(root / "again")), "the first was predicted or exported again"
        assert repr(again.students[0]) == repr(judged_in(done[1].students[0], root / "again"))  # NaN is not NaN
        (root / "again/r2/judged.json").write_text('{"asked": ')
        (fitted,) = (root / "again/work/nnUNet_results").glob("*/*_r2_*/fold_0/temperature.json")
        noted = json.loads(fitted.read_text())
        monkeypatch.setattr(NnUNetTeacher, "load", load)
        fitted.write_text('{"weights_sha256": ')
        once_more = run(model_in(pristine_world), root / "scans", root / "again", progress=events).students[0]
        assert once_more.fidelity == again.students[0].fidelity
        assert json.loads(fitted.read_text()) == noted
        changed = {Path(name).name for name, _ in set(files_below(root / "again/r2")) - set(kept)}
        assert {"judged.json", *(f"{case}.nii.gz" for case in again.scans.held_out)} <= changed

    def test_mirrors_change_the_student_that_is_there_and_back(self, done, pristine_world, tmp_path, monkeypatch):
        """The same weights: a bundle that mirrors is another, and so is what it finds."""
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        root, _ = done
        shutil.copytree(root / "out", tmp_path / "out")
        found = []
        for mirroring in (True, False):
            training = {**TRAINING, "mirroring": mirroring}
            student = run(model_in(pristine_world), root / "scans", tmp_path / "out", training=training).students[0]
            checkpoint = load_checkpoint(student.model / "fold_0/checkpoint_final.pth")
            axes = (0, 1, 2) if mirroring else None
            assert checkpoint["inference_allowed_mirroring_axes"] == axes
            assert load_bundle_spec(student.bundle).mirror_axes == axes
            found.append(predicted(tmp_path / "out/r2"))
        assert found[0] != found[1] == predicted(root / "out/r2")

    def test_each_case_of_the_cache_is_decoded_once(self, done, monkeypatch, tmp_path):
        from fastnnunet.cache.store.reader import SoftLabelReader
        from fastnnunet.nnunet.files.model import ModelFolder
        from fastnnunet.nnunet.unlabelled.sets import UnlabelledCases
        from fastnnunet.teachers.scans.labels import write_labels

        root, distilled = done
        base = root / "out/work/nnUNet_preprocessed/Dataset001_Images"
        (model,) = (root / "out/work/nnUNet_results/Dataset001_Images").glob(f"*__nnUNetPlans__{CONFIGURATION}")
        files = ModelFolder(model, CONFIGURATION, "checkpoint_final.pth")
        read_patch, voxels = SoftLabelReader.read_patch, []

        def counted(self, *args):
            patch = read_patch(self, *args)
            voxels.append(patch[0].size)
            return patch

        monkeypatch.setattr(SoftLabelReader, "read_patch", counted)
        images = UnlabelledCases(base / f"unlabelled/scans/nnUNetPlans_{CONFIGURATION}", ("s0", "s1"))
        write_labels(distilled.scans.cache.path, images, files, tmp_path / "cases", tmp_path / "labels")
        assert sum(voxels) == sum(np.prod(images.shape_zyx(case)) for case in images.case_ids)
        for case in images.case_ids:
            written = read(tmp_path / f"labels/{case}.nii.gz")
            np.testing.assert_array_equal(written, read(distilled.scans.labels / f"{case}.nii.gz"))


def predicted(student):
    """The voxels of each label map of a scan held out."""
    return {file.name: read(file).tobytes() for file in (student / "predictions").glob("*.nii.gz")}


def judged_in(student, output):
    """What is known of a student, for a copy of it in another folder."""
    return dataclasses.replace(student, bundle=output / "r2/bundle", model=output / "r2/nnunet_model")


def told(events):
    return [event.text for event in events if hasattr(event, "text")]


def weights_of(student):
    return torch.load(student.model / "fold_0/checkpoint_final.pth", weights_only=False)["network_weights"]


class TestInterrupted:
    def test_anywhere_the_same_comes_out(self, done, pristine_world, tmp_path, monkeypatch):
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        root, straight = done
        moments = [
            ("preprocessing images", 2),
            ("labelling", 3),
            ("writing labels", 2),
            ("r2 fold 0", 3),
            ("export", 3),
        ]

        def interrupt(event):
            if moments and (getattr(event, "what", ""), getattr(event, "done", 0)) == moments[0]:
                moments.pop(0)
                raise KeyboardInterrupt

        while moments:
            with pytest.raises(KeyboardInterrupt):
                run(model_in(pristine_world), root / "scans", tmp_path / "out", progress=interrupt)
        resumed = run(model_in(pristine_world), root / "scans", tmp_path / "out", progress=interrupt)
        assert not [p for p in tmp_path.rglob(".partial-*") if not p.name.endswith(".lock")]
        expected, found = weights_of(straight.students[0]), weights_of(resumed.students[0])
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
        assert resumed.students[0].fidelity.dice == straight.students[0].fidelity.dice
        events = Events()
        other = run(model_in(pristine_world), root / "scans", tmp_path / "out", held_out=2, progress=events)
        assert "student r2 learnt from other scans and is trained anew" in told(events)
        assert sorted(other.students[0].fidelity.dice) == list(other.scans.held_out)
        assert len(other.scans.held_out) == 2
        assert any(not np.array_equal(expected[name], value) for name, value in weights_of(other.students[0]).items())
        for case in ("s0", "s1", "s4"):
            np.testing.assert_array_equal(
                read(resumed.scans.labels / f"{case}.nii.gz"), read(straight.scans.labels / f"{case}.nii.gz")
            )


class TestSizesTogether:
    def trained(self, root, world, work, *sizes, **options):
        spec, students = PublishedSpec(path=model_in(world), folds=FOLDS), [StudentSpec(r=r) for r in sizes]
        options = {"recipe": RECIPE, "training": TRAINING, **options}
        students = train_on_images(spec, root / "scans", work, students, **options)
        return {s.tag: load_checkpoint(s.folder / "checkpoint_final.pth")["network_weights"] for s in students}

    def test_they_share_batches_and_are_what_they_are_alone(self, done, pristine_world, tmp_path, monkeypatch):
        from fastnnunet.nnunet.trainer.batches import SampledBatches

        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        root, _ = done
        for name in ("alone", "together", "resumed"):
            shutil.copytree(root / "out/work", tmp_path / name)
        make, made = SampledBatches.make, []
        monkeypatch.setattr(SampledBatches, "make", lambda self, *of: made.append(self) or make(self, *of))
        alone = {}
        for r in (4, 3):
            alone |= self.trained(root, pristine_world, tmp_path / "alone", r)
        batches_of_two = len(made)
        events = Events()
        together = self.trained(root, pristine_world, tmp_path / "together", 4, 2, 3, progress=events)
        assert len(made) - batches_of_two == batches_of_two / 2, "of one for both; r2 was trained before"
        assert list(together) == ["r4", "r2", "r3"]
        assert {event.what for event in events if getattr(event, "unit", "") == "iterations"} == {"r4 r3 fold 0"}

        def interrupt(event):
            if getattr(event, "unit", "") == "iterations" and (event.student, event.done) == ("r4", 3):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.trained(root, pristine_world, tmp_path / "resumed", 4, 3, progress=interrupt)
        resumed = self.trained(root, pristine_world, tmp_path / "resumed", 4, 3)
        for tag, weights in alone.items():
            for name, expected in weights.items():
                assert torch.equal(together[tag][name], expected)
                assert torch.equal(resumed[tag][name], expected)

    def test_the_teacher_answers_in_the_last_epochs(self, done, pristine_world, tmp_path, monkeypatch):
        from fastnnunet.teachers.online import OnlineTeacher

        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        root, distilled = done
        shutil.copytree(root / "out/work", tmp_path / "work")
        soft_labels, asked = OnlineTeacher.soft_labels, []
        monkeypatch.setattr(OnlineTeacher, "soft_labels", lambda self, *of: asked.append(of) or soft_labels(self, *of))
        training = {**TRAINING, "online_teacher": 0.5}
        self.trained(root, pristine_world, tmp_path / "work", 2, training=training)
        assert len(asked) == TRAINING["epochs"] * TRAINING["iterations_per_epoch"] / 2
        assert {case for _, cases in asked for case in cases} <= set(distilled.scans.learnt_from)

    def test_hours_are_those_of_each(self):
        from fastnnunet.api.images import _sharing

        jobs = [SimpleNamespace(student=StudentSpec(r=r), distill=DistillSpec()) for r in (2, 4)]
        assert _sharing(jobs) == [jobs]
        other = SimpleNamespace(student=StudentSpec(r=4, family="width"), distill=DistillSpec())
        assert _sharing([*jobs, other]) == [jobs, [other]]
        for job in jobs:
            job.distill = DistillSpec(hours=2)
        assert _sharing(jobs) == [jobs[:1], jobs[1:]]


def typed(*words, code=0):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == code


class TestTheStages:
    def test_one_by_one_as_the_command(self, done, pristine_world, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        root, straight = done
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("{precision: fp32, engine: torch, temperature: 1.0}")
        model, work = model_in(pristine_world), tmp_path / "work"
        words = ["-m", model, "-i", root / "scans", "--work", work, "--no-mirroring", "--spec", recipe]
        typed("cache", "build", *words, "-f", 0, 1, "--keep-all")
        said = capsys.readouterr().out
        assert "4 to learn from, 1 held out" in said
        begin, printed = next(line for line in said.splitlines() if "train with:" in line).split("fastnnunet train ")
        assert begin == "train with: "
        short = ["-e", "2", "--iterations", "2", "--val-iterations", "1"]
        asked = [*shlex.split(printed), *short]
        asked[asked.index("-r") + 1] = "2"
        with pytest.raises(SystemExit) as ended:
            main(["train", *asked, "--temp", "2"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "soft_labels.temperature: 1.0 -> 2.0" in said
        assert f"-f 0 1 --spec {recipe} --temp 2 --no-mirroring" in said
        typed("train", *asked)
        (folder,) = (work / "nnUNet_results/Dataset001_Images").glob("*_r2_*/fold_0")
        assert f"student r2: {folder}" in capsys.readouterr().out
        from fastnnunet.nnunet.student.tempered import tempered

        found = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
        found = tempered(found, straight.students[0].temperature)
        expected = weights_of(straight.students[0])
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
        spec = PublishedSpec(path=model, folds=FOLDS)  # a recipe that leaves open what labels takes what has labelled
        free = dataclasses.replace(RECIPE, engine="auto", precision="auto")
        (again,) = train_on_images(spec, root / "scans", work, [StudentSpec(r=2)], recipe=free, training=TRAINING)
        assert again.folder == folder


def test_cases_that_fail_end_every_command_with_1(pristine_world, tmp_path, monkeypatch, capsys):
    """As `cache build` of a data set does; what is wrong altogether ends with 2."""
    from fastnnunet.teachers.nnunet import LoadedTeacher

    blocks = LoadedTeacher.tallied_blocks

    def nan(self, *args):
        for number, logits in blocks(self, *args):
            yield number, logits * np.float32(np.nan)

    monkeypatch.setattr(LoadedTeacher, "tallied_blocks", nan)
    model, scans = model_in(pristine_world), scans_in(pristine_world, tmp_path / "scans", 2)
    asked = ["-m", model, "-i", scans, "--work", tmp_path / "work", "-f", 0, "--no-mirroring", "--engine", "torch"]
    for command in (["cache", "build"], ["distill", "images", "-r", 2, "-o", tmp_path / "out"]):
        typed(*command, *asked, code=1)
        said = capsys.readouterr().err
        assert "2 of 2 cases failed" in said
        assert "NaN" in said
        assert "run the same command again" in said


def test_a_zip_and_dicom_series(pristine_world, tmp_path, monkeypatch):
    """Labels of the same voxels are the same, whatever they and the model came in."""
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
    model, folder, plain = model_in(pristine_world), tmp_path / "dicom", tmp_path / "plain"
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for path in (p for p in model.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(model.parents[1]))
    plain.mkdir()
    for number in range(2):
        image = sitk.ReadImage(str(pristine_world / f"raw/{DATASET}/imagesTr/tiny_0{number}_0000.nii.gz"))
        stored = np.rint(sitk.GetArrayFromImage(image)).astype(np.int16)
        write_series(folder / f"p{number}", stored, spacing_zyx=(1.5, 1.0, 1.0), rescale=[(1.0, 0.0)])
        whole = sitk.GetImageFromArray(stored.astype(np.float32))
        whole.SetSpacing((1.0, 1.0, 1.5))
        sitk.WriteImage(whole, str(plain / f"p{number}_0000.nii.gz"))
    options = {"recipe": RECIPE, "keep_all": True}
    ours = label_images(PublishedSpec(path=tmp_path / "model.zip", folds=(0,)), folder, tmp_path / "a", **options)
    expected = label_images(PublishedSpec(path=model, folds=(0,)), plain, tmp_path / "b", **options)
    for case in ("p0", "p1"):
        found = sitk.ReadImage(str(ours.labels / f"{case}.nii.gz"))
        assert found.GetOrigin() == pytest.approx((-12.5, 3.0, 40.0))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(found), read(expected.labels / f"{case}.nii.gz"))


class TestTheWorld:
    def test_processes_see_it_and_the_users_comes_back(self, tmp_path, monkeypatch):
        import nnunetv2.paths

        monkeypatch.setenv("nnUNet_results", str(tmp_path / "mine"))
        monkeypatch.delenv("nnUNet_raw", raising=False)
        code = "import nnunetv2.paths as p; print(p.nnUNet_results, p.nnUNet_preprocessed)"
        with world_in(tmp_path / "work"):
            assert str(nnunetv2.paths.nnUNet_results) == str(tmp_path / "work" / "nnUNet_results")
            said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.split()[-2:] == [
            str(tmp_path / "work" / name) for name in ("nnUNet_results", "nnUNet_preprocessed")
        ]
        assert str(nnunetv2.paths.nnUNet_results) == str(tmp_path / "mine")
        assert [name in os.environ for name in VARIABLES[::2]] == [False, True]
