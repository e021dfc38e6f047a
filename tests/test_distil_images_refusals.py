"""What `distil images` refuses before anything long, and what an interrupted run leaves."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.cli.main import main
from fastnnunet.errors import CorruptError, ImageError, MismatchError, NotFoundError, SpecError
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import PublishedSpec
from fastnnunet.teachers.scans.folder import open_work
from fastnnunet.teachers.scans.found import as_files, find_scans, hold_out
from tests.dicom_files import write_series
from tests.test_distil_images import FOLDS, RECIPE, model_in, scans_in


@pytest.fixture
def scans(pristine_world, tmp_path):
    return scans_in(pristine_world, tmp_path / "scans")


@pytest.fixture
def model(pristine_world):
    return model_in(pristine_world)


@pytest.fixture
def opened(model, scans, tmp_path):
    return opened_with(model, scans, tmp_path / "work")


def opened_with(model, scans, work, recipe=RECIPE, folds=FOLDS, **options):
    return open_work(PublishedSpec(path=model, folds=folds), scans, work, recipe, **options)


def begin_cache(work):
    (work.base / "fastnnunet_nnUNetPlans_3d_fullres").mkdir(parents=True)


def refused(error, *arguments, **options):
    with pytest.raises(error) as caught:
        opened_with(*arguments, **options)
    return str(caught.value)


class TestScans:
    def test_twice_under_one_name(self, model, scans, tmp_path):
        shutil.copy(scans / "s0_0000.nii.gz", scans / "s0_0000.nrrd")
        write_series(scans / "s2", np.zeros((4, 5, 6), np.int16))
        write_series(scans / "s7", np.zeros((4, 5, 6), np.int16))
        message = refused(SpecError, model, scans, tmp_path / "work")
        assert "2 scan(s)" in message
        assert "s0_0000.nii.gz and s0_0000.nrrd" in message
        assert "s2/ (DICOM) and s2_0000.nii.gz" in message
        assert not (tmp_path / "work").exists()

    def test_another_ending(self, model, tmp_path):
        folder = tmp_path / "other"
        folder.mkdir()
        (folder / "a_0000.nrrd").write_bytes(b"")
        message = refused(NotFoundError, model, folder, tmp_path / "work")
        assert "-i: no image in" in message
        assert "expected files named CASE_0000.nii.gz" in message

    def test_channels(self, model, scans, tmp_path):
        shutil.copy(scans / "s0_0000.nii.gz", scans / "s0_0001.nii.gz")
        assert "s0: got channels _0000, _0001" in refused(ImageError, model, scans, tmp_path / "work")

    def test_another_modality(self, model, scans, tmp_path):
        for file in scans.iterdir():
            image = sitk.ReadImage(str(file))
            array = sitk.GetArrayFromImage(image)
            scaled = sitk.GetImageFromArray(((array - array.min()) / np.ptp(array)).astype(np.float32))
            scaled.CopyInformation(image)
            sitk.WriteImage(scaled, str(file))
        message = refused(ImageError, model, scans, tmp_path / "work")
        properties = json.loads((model / "plans.json").read_text())["foreground_intensity_properties_per_channel"]["0"]
        assert f"{properties['percentile_00_5']:.4g} to {properties['percentile_99_5']:.4g}" in message
        assert "s0: channel 0 (CTNormalization): got 0." in message
        assert not (tmp_path / "work").exists()

    def test_too_few(self, model, scans, tmp_path):
        for file in list(scans.iterdir())[1:]:
            file.unlink()
        message = refused(SpecError, model, scans, tmp_path / "work")
        assert message.startswith("1 scan(s) are too few to hold 1 out: got 1, expected at least 2")

    @pytest.mark.parametrize(("cases", "count", "expected"), [(2, None, 1), (8, None, 2), (9, None, 3), (40, None, 8)])
    def test_how_many_are_held_out(self, cases, count, expected):
        names = [f"c{n:02d}" for n in range(cases)]
        out = hold_out(names, count)
        assert len(set(out)) == expected
        assert out == hold_out(names[::-1], count)
        assert set(out) < set(names)

    def test_more_held_out_than_there_are(self, model, scans, tmp_path):
        assert "expected at least 6" in refused(SpecError, model, scans, tmp_path / "work", held_out=5)
        assert "--hold-out: got 0" in refused(SpecError, model, scans, tmp_path / "work", held_out=0)

    def test_dicom_is_read_as_predict_reads_it(self, opened, tmp_path):
        rng = np.random.default_rng(3)
        folder = tmp_path / "dicom"
        for name in ("a", "b"):
            write_series(folder / name, rng.integers(-100, 900, (5, 8, 7)).astype(np.int16))
        found = find_scans(folder, opened.source.model)
        assert found.is_dicom
        place, files = as_files(found, tmp_path / "files", ".nii.gz")
        from fastnnunet.images.io import image_io

        for case, series in found.cases.items():
            expected, geometry = image_io("SimpleITKIO").read(series)
            again, stored = image_io("SimpleITKIO").read(files[case])
            np.testing.assert_array_equal(again, expected)
            np.testing.assert_allclose(stored["spacing"], geometry["spacing"], rtol=1e-6)
            for name in ("origin", "direction"):
                np.testing.assert_allclose(stored["sitk_stuff"][name], geometry["sitk_stuff"][name], atol=1e-4)
        before = (place / "a_0000.nii.gz").stat().st_mtime_ns
        as_files(found, place, ".nii.gz")
        assert (place / "a_0000.nii.gz").stat().st_mtime_ns == before


class TestModels:
    def test_a_zip_is_the_folder_it_was_made_of(self, opened, model, scans, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
        file = tmp_path / "model.zip"
        with zipfile.ZipFile(file, "w") as archive:
            for path in (p for p in model.rglob("*") if p.is_file()):
                archive.write(path, path.relative_to(model.parents[1]))
        again = opened_with(file, scans, opened.folder)
        assert again.teacher == opened.teacher

    @pytest.mark.parametrize(
        ("members", "error"),
        [
            ({"notes.txt": "no model"}, NotFoundError),
            ({"../../plans.json": "{}", "m/fold_0/checkpoint_final.pth": ""}, CorruptError),
            (None, CorruptError),
        ],
    )
    def test_zips_that_are_no_models(self, members, error, scans, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
        file = tmp_path / "model.zip"
        file.write_bytes(b"PK\x03\x04 cut off")
        if members is not None:
            with zipfile.ZipFile(file, "w") as archive:
                for name, text in members.items():
                    archive.writestr(name, text)
        refused(error, file, scans, tmp_path / "work", folds=None)
        assert not (tmp_path / "work").exists()
        assert not (tmp_path / "plans.json").exists()

    def test_a_damaged_zip_is_told_once(self, model, scans, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
        file = tmp_path / "model.zip"
        with zipfile.ZipFile(file, "w") as archive:
            archive.write(model / "plans.json", "plans.json")
            archive.writestr("dataset.json", "something that is changed below")
        file.write_bytes(file.read_bytes().replace(b"changed", b"CHANGED"))
        message = refused(CorruptError, file, scans, tmp_path / "work", folds=None)
        assert message.startswith(f"dataset.json in {file} cannot be unpacked: Bad CRC-32")
        assert message.count("get the file again") == 1


class TestWorkFolder:
    def test_what_is_no_scan_is_told_once_and_by_its_option(self, model, scans, tmp_path, caplog):
        (scans / "gone_0000.nii.gz").symlink_to("nowhere")
        opened = opened_with(model, scans, tmp_path / "work")
        with opened.world() as files:
            opened.unlabelled(files, scans).preprocess_alone(0)
        told = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
        assert told == [f"-i: {scans}: not used: 1 broken link(s): gone_0000.nii.gz"]

    def test_of_another_teacher(self, opened, model, scans):
        begin_cache(opened)
        message = refused(MismatchError, model, scans, opened.folder, folds=(0,))
        assert (
            "was labelled otherwise (there -> now):\n  - folds: 0 1 -> 0\ngive what is there, or name another --work"
            in message
        )
        mirrored = CacheSpec(precision="fp32", engine="torch")
        assert "  - --no-mirroring -> mirrored\n" in refused(
            MismatchError, model, scans, opened.folder, recipe=mirrored
        )
        sparse = CacheSpec(precision="fp32", engine="torch", mirroring=False, step_size=0.75)
        assert "  - step_size: 0.5 -> 0.75\n" in refused(MismatchError, model, scans, opened.folder, recipe=sparse)

    def test_of_other_weights(self, opened, pristine_world, model, scans, tmp_path):
        begin_cache(opened)
        other = shutil.copytree(model_in(pristine_world), tmp_path / "other")
        shutil.copy(other / "fold_1/checkpoint_final.pth", other / "fold_0/checkpoint_final.pth")
        message = refused(MismatchError, other, scans, opened.folder)
        assert "  - weights of fold 0: others than there\n" in message

    def test_remembers_how_many_are_held_out(self, opened, model, scans):
        asked = opened_with(model, scans, opened.folder, held_out=2, keep_all=True)
        assert opened_with(model, scans, opened.folder).held_out is None, "nothing was chosen yet"
        with asked.world():
            asked.choose(["s0", "s1", "s2"], ["s3", "s4"])
        again = opened_with(model, scans, opened.folder)
        assert (again.held_out, again.keep_all) == (2, True)
        assert again.options().endswith(" --hold-out 2 --keep-all")
        assert "--hold-out" not in again.options(of_training=True)
        other = opened_with(model, scans, opened.folder, held_out=1, keep_all=False)
        assert (other.held_out, other.keep_all) == (1, False)

    @pytest.mark.parametrize("text", ["{", "[]", '{"held_out": "2"}', '{"held_out": true}', '{"keep_all": null}'])
    def test_damaged_choice(self, opened, model, scans, text):
        (opened.folder / "chosen.json").write_text(text)
        message = refused(CorruptError, model, scans, opened.folder)
        assert message.startswith(f"{opened.folder / 'chosen.json'} is damaged: ")
        assert message.endswith("\nremove it, and give --hold-out and --keep-all again")

    def test_of_other_scans(self, opened, model, scans):
        begin_cache(opened)
        shutil.copy(scans / "s0_0000.nii.gz", scans / "x_0000.nii.gz")
        (scans / "s1_0000.nii.gz").unlink()
        (scans / "s2_0000.nii.gz").write_bytes((scans / "s2_0000.nii.gz").read_bytes() + b"\0")
        message = refused(MismatchError, model, scans, opened.folder)
        for line in ("scans new: x", "scans changed: s2", "scans no longer there: s1"):
            assert line in message

    def test_scans_may_be_mended_until_the_first_cache_is_begun(self, opened, model, scans):
        (scans / "s0_0000.nii.gz").unlink()
        shutil.copy(scans / "s3_0000.nii.gz", scans / "s1_0000.nii.gz")
        mended = opened_with(model, scans, opened.folder)
        record = json.loads((opened.folder / "work.json").read_text())
        assert list(record["scans"]) == list(mended.scans.cases) == ["s1", "s2", "s3", "s4"]
        assert record["scans"]["s1"] == {"s1_0000.nii.gz": [1, (scans / "s1_0000.nii.gz").stat().st_size]}

    def test_labelling_may_change_until_the_first_cache_is_begun(self, opened, model, scans):
        opened_with(model, scans, opened.folder, folds=(0,))
        changed = opened_with(model, scans, opened.folder, CacheSpec(precision="fp32", engine="torch"), folds=(0,))
        record = json.loads((opened.folder / "work.json").read_text())["model"]
        assert (list(record["checkpoints"]), record["mirroring"]) == (["0"], True)
        assert changed.teacher.folds == (0,)

    def test_other_plans_are_another_model_at_once(self, opened, pristine_world, scans, tmp_path):
        other = shutil.copytree(model_in(pristine_world), tmp_path / "other")
        plans = json.loads((other / "plans.json").read_text())
        plans["configurations"]["3d_fullres"]["spacing"][0] *= 2
        (other / "plans.json").write_text(json.dumps(plans))
        assert "model plans:" in refused(MismatchError, other, scans, opened.folder)

    def test_series_that_changed_are_converted_again(self, model, tmp_path):
        folder, work = tmp_path / "dicom", tmp_path / "work"
        for name in ("a", "b", "c"):
            write_series(folder / name, np.full((4, 8, 7), 50, np.int16))
        opened_with(model, folder, work).images()
        shutil.rmtree(folder / "c")
        shutil.rmtree(folder / "a")
        write_series(folder / "a", np.full((6, 8, 7), 70, np.int16))
        place, files = opened_with(model, folder, work).images()
        assert sorted(p.name for p in place.iterdir()) == ["a_0000.nii.gz", "b_0000.nii.gz"]
        converted = sitk.GetArrayFromImage(sitk.ReadImage(str(files["a"][0])))
        np.testing.assert_array_equal(converted, np.full((6, 8, 7), 70 - 1024))  # the intercept of these files

    def test_damaged_or_of_something_else(self, opened, model, scans, tmp_path):
        (opened.folder / "work.json").write_text("{")
        refused(CorruptError, model, scans, opened.folder)
        assert "holds other things" in refused(SpecError, model, scans, scans)


class TestTheCommandLine:
    def refused(self, capsys, *words):
        with pytest.raises(SystemExit) as caught:
            main(["distill", "images", *map(str, words)])
        assert caught.value.code == 2
        return capsys.readouterr().err

    def test_one_message_and_nothing_written(self, model, scans, tmp_path, capsys):
        output = tmp_path / "out"
        asked = ("-m", model, "-i", scans, "-o", output)
        assert "got 4 twice" in self.refused(capsys, *asked, "-r", "4", "4")
        assert "which model?" in self.refused(capsys, *asked, "-d", "998", "-r", "4")
        assert "which student?" in self.refused(capsys, *asked)
        assert "alpha" in self.refused(capsys, *asked, "-r", "4", "-a", "2")
        assert "hours: got it beside epochs" in self.refused(capsys, *asked, "-r", "4", "--hours", "1", "-e", "2")
        assert not output.exists()  # so that other options are not refused by what was begun with these
        file = tmp_path / "file"
        file.write_text("")
        assert f"{file} is a file" in self.refused(capsys, *asked[:-1], file, "-r", "4")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (("--norm-statistics", "precise"), "norm_statistics: got precise"),
            (("--last-patch", "17", "17", "17"), "--last-patch: patch_size"),
            (("-device", "gpu"), "gpu"),
            (("-device", "cuda"), "cuda"),
        ],
    )
    def test_what_no_student_can_learn_with_is_refused_before_labels(
        self, options, expected, model, scans, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        asked = ("-m", model, "-i", scans, "-o", tmp_path / "out", "-r", "4")
        assert expected in self.refused(capsys, *asked, *options)
        assert not list((tmp_path / "out").rglob("*.b2nd"))

    def test_nothing_of_others_is_replaced(self, model, scans, tmp_path, capsys):
        asked = ("-m", model, "-i", scans, "-o", tmp_path, "-r", "2", "4")
        for name in ("bundle", "nnunet_model"):
            mine = tmp_path / "r4" / name / "mine"
            mine.parent.mkdir(parents=True)
            mine.write_text("kept")
            assert f"{mine.parent} holds something else" in self.refused(capsys, *asked)
            assert mine.read_text() == "kept"
            shutil.rmtree(tmp_path / "r4")
        (tmp_path / "r4").write_text("")
        assert f"{tmp_path / 'r4'} is a file" in self.refused(capsys, *asked)
        assert not (tmp_path / "work").exists()

    def test_stages_need_each_other(self, model, scans, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["train", "-m", str(model), "-r", "4"])
        assert "-m: expected with -i" in capsys.readouterr().err
        words = ["-m", str(model), "-i", str(scans), "--work", str(tmp_path / "work")]
        with pytest.raises(SystemExit):
            main(["train", *words, "-r", "4", "-f", "0"])
        assert "leave out -f" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["train", *words, "-r", "4"])
        said = capsys.readouterr().err
        assert "not preprocessed yet" in said
        assert f"make it ready with: fastnnunet cache build -m {model} -i {scans} --work {tmp_path / 'work'}" in said
        assert not list(Path(tmp_path / "work").rglob("*.b2nd"))
