"""Images without labels: preprocessed as nnU-Net preprocesses labelled ones, labelled as the ordinary cache is."""

import dataclasses
import errno
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import zarr

from fastnnunet.api.label import label
from fastnnunet.cache.build import build_cache
from fastnnunet.cache.job import prepare_job
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.errors import (
    CorruptError,
    DiskSpaceError,
    FastnnUNetError,
    ImageError,
    MismatchError,
    NotFoundError,
    SpecError,
)
from fastnnunet.nnunet.unlabelled import sets as unlabelled
from fastnnunet.nnunet.unlabelled.foreground import read_locations, write_locations
from fastnnunet.nnunet.unlabelled.sets import SetRecord, resolve_set
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from fastnnunet.teachers.images import list_foreground, open_images
from fastnnunet.teachers.jobs import cache_for_training
from tests.tiny import CONFIGURATION, DATASET

TEACHER = TeacherSpec(dataset="998", folds=(0, 1))
RECIPE = CacheSpec(precision="fp32", mirroring=False, engine="torch")


def raw_image(world, case, part="Tr"):
    return world / "raw" / DATASET / f"images{part}" / f"{case}_0000.nii.gz"


def image_folder(world, *cases, prefix="u", part="Tr"):
    """A folder of copies of images, labelled ones (`Tr`) or not (`Ts`), under other names."""
    folder = world / "more scans"
    folder.mkdir(exist_ok=True)
    for case in cases:
        shutil.copy(raw_image(world, case, part), folder / f"{prefix}_{case}_0000.nii.gz")
    return folder


def build_unlabelled(images, recipe=RECIPE, teacher=TEACHER, **options):
    job = open_images(teacher, recipe, images, **options)
    cache = build_cache(job.cache_job(job.preprocess(0)))
    list_foreground(job, cache, 0)
    return job, cache


class TestPreprocessing:
    def test_equal_to_the_labelled_case(self, world):
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        images = image_folder(world, "tiny_00", "tiny_04")
        original = sitk.ReadImage(str(raw_image(world, "tiny_04")))
        empty = sitk.GetArrayFromImage(original)
        empty[:4], empty[:, :, -3:] = 0, 0  # something to crop
        changed = sitk.GetImageFromArray(empty)
        changed.CopyInformation(original)
        sitk.WriteImage(changed, str(images / "cropped_0000.nii.gz"))
        job = open_images(TEACHER, RECIPE, images)
        shapes, missing = job.expected(0)
        assert not job.target.folder.exists(), "a plan writes nothing"
        assert missing == ["cropped", "u_tiny_00", "u_tiny_04"]
        made = job.preprocess(2)
        assert job.target.folder == world / "preprocessed" / DATASET / "unlabelled" / "more-scans"
        labelled, _, _ = open_teacher(TEACHER, RECIPE)
        for case in ("tiny_00", "tiny_04"):
            np.testing.assert_array_equal(made.image_CZYX(f"u_{case}"), labelled.image_CZYX(case))
            assert made.digest(f"u_{case}") == labelled.digest(case)
            outside = made.load(f"u_{case}")[1][0] < 0
            np.testing.assert_array_equal(outside, labelled.load(case)[1][0] < 0)
        dataset = infer_dataset_class(str(made.folder))(str(made.folder))
        assert dataset.identifiers == ["cropped", "u_tiny_00", "u_tiny_04"] == list(made.case_ids)
        for case in made.case_ids:
            assert shapes.shape_zyx(case) == dataset.load_case(case)[0].shape[1:]
        assert made.shape_zyx("cropped")[0] < made.shape_zyx("u_tiny_04")[0]

    def test_only_new_and_changed_images_are_done_again(self, world, monkeypatch):
        images = image_folder(world, "tiny_00", "tiny_01", "tiny_02")
        job = open_images(TEACHER, RECIPE, images)
        before = job.preprocess(0)
        digests = {case: before.digest(case) for case in before.case_ids}
        done = []
        preprocess = unlabelled.preprocess_case
        monkeypatch.setattr(unlabelled, "preprocess_case", lambda task: done.append(task.case_id) or preprocess(task))
        (images / "u_tiny_00_0000.nii.gz").touch()  # another time, the same bytes
        job.preprocess(0)
        assert done == []
        shutil.copy(raw_image(world, "tiny_03"), images / "u_tiny_01_0000.nii.gz")
        shutil.copy(raw_image(world, "tiny_05"), images / "new_0000.nii.gz")
        (images / "u_tiny_02_0000.nii.gz").unlink()
        after = job.preprocess(0)
        assert sorted(done) == ["new", "u_tiny_01"]
        assert after.case_ids == ("new", "u_tiny_00", "u_tiny_01")
        assert sorted(p.name for p in after.folder.glob("*_seg.b2nd")) == [f"{c}_seg.b2nd" for c in after.case_ids]
        assert after.digest("u_tiny_00") == digests["u_tiny_00"]
        assert after.digest("u_tiny_01") != digests["u_tiny_01"]

    def test_killed_and_run_again(self, world, monkeypatch):
        images = image_folder(world, "tiny_00", "tiny_01", "tiny_02")
        job = open_images(TEACHER, RECIPE, images)
        preprocess = unlabelled.preprocess_case

        def killed(task):
            if task.case_id == "u_tiny_01":
                (task.folder / "u_tiny_01.pkl").write_bytes(b"half")
                (task.folder.parent / ".partial-dead").mkdir()
                raise KeyboardInterrupt
            return preprocess(task)

        monkeypatch.setattr(unlabelled, "preprocess_case", killed)
        with pytest.raises(KeyboardInterrupt):
            job.preprocess(0)
        assert job.target.cases.case_ids == ("u_tiny_00",)
        monkeypatch.setattr(unlabelled, "preprocess_case", preprocess)
        assert len(job.preprocess(0).case_ids) == 3
        assert not list(job.target.folder.glob(".*"))

    def test_other_plans_preprocess_anew(self, world):
        job = open_images(TEACHER, RECIPE, image_folder(world, "tiny_00"))
        job.preprocess(0)
        plans = {**job.target.plans, "transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
        assert dataclasses.replace(job.target, plans=plans).preprocessing != job.target.preprocessing


class TestCache:
    def test_equal_to_the_ordinary_cache(self, world):
        """Same image, same bytes; the policy of a recipe does not matter, as no fold saw the images."""
        images = image_folder(world, "tiny_00", "tiny_03")
        _, cache = build_unlabelled(images)
        source, factory, root = open_teacher(TEACHER, RECIPE)
        ordinary = build_cache(prepare_job(source, factory, RECIPE, root, command="build"), only=["tiny_00", "tiny_03"])
        assert cache.path.parent == ordinary.path.parent
        assert cache.key != ordinary.key
        for case in ("tiny_00", "tiny_03"):
            one = SoftLabelReader(cache.path).read_case(f"u_{case}")
            np.testing.assert_array_equal(one, SoftLabelReader(ordinary.path).read_case(case))
            assert one.any()
        out_of_fold = dataclasses.replace(RECIPE, policy="out_of_fold")
        again = open_images(dataclasses.replace(TEACHER, folds=(0, 1)), out_of_fold, images)
        assert again.cache_job(again.target.cases).path == cache.path

    def test_foreground_is_where_the_teacher_sees_it(self, world):
        job, cache = build_unlabelled(image_folder(world, "tiny_00"))
        stored = zarr.open_array(str(cache.case_dir("u_tiny_00")), mode="r")[:].astype(int)  # two foreground classes
        units = np.concatenate([255 - stored.sum(0, keepdims=True), stored])
        label = units.argmax(0)
        locations = read_locations(job.target.foreground_folder(cache.key) / "u_tiny_00.npz")
        assert list(locations) == [1, 2]
        for kind, voxels in locations.items():
            assert np.all(voxels[:, 0] == 0)
            expected = np.argwhere(label == kind)
            assert len(voxels) == min(10000, len(expected))
            listed = {tuple(v) for v in voxels[:, 1:]}
            assert listed <= {tuple(v) for v in expected}
            assert len(listed) == len(voxels)

    def test_locations_are_stored_as_they_are(self, tmp_path):
        locations = {1: np.array([[0, 1, 2, 3]]), (1, 2): np.array([[0, 0, 0, 0], [0, 4, 5, 6]]), (-1, 0, 1): []}
        write_locations(tmp_path / "a" / "case.npz", locations)
        back = read_locations(tmp_path / "a" / "case.npz")
        assert list(back) == list(locations)
        for kind, voxels in locations.items():
            np.testing.assert_array_equal(back[kind], np.asarray(voxels).reshape(-1, 4))
        (tmp_path / "a" / "case.npz").write_bytes(b"PK")
        with pytest.raises(CorruptError, match="cannot be read"):
            read_locations(tmp_path / "a" / "case.npz")

    def test_locations_that_cannot_be_written_leave_no_file(self, tmp_path, monkeypatch):
        def fail(file, **arrays):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(np, "savez_compressed", fail)
        with pytest.raises(DiskSpaceError):
            write_locations(tmp_path / "a" / "case.npz", {})
        assert list((tmp_path / "a").iterdir()) == []

    def test_a_disk_that_is_full_is_no_fault_of_the_images(self, world, monkeypatch):
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr("fastnnunet.system.files._why_no_room", lambda _: full)

        def fail(*_):
            raise RuntimeError("Error while creating the NDArray")

        monkeypatch.setattr(DefaultPreprocessor, "run_case_save", fail)
        with pytest.raises(DiskSpaceError, match="no room left to write"):
            build_unlabelled(image_folder(world, "tiny_00"))

    def test_other_caches_are_not_taken_for_the_data_sets_own(self, world):
        build_unlabelled(image_folder(world, "tiny_00"))
        with pytest.raises(NotFoundError, match="no soft-label cache of these cases under"):
            cache_for_training(TEACHER, RECIPE)


class TestBadImages:
    """One message that names all of them."""

    def refused(self, images, error=ImageError, **options):
        with pytest.raises(error) as caught:
            build_unlabelled(images, **options)
        return str(caught.value)

    def test_no_folder(self, world):
        assert "is not a folder" in self.refused(world / "nowhere", NotFoundError)

    def test_no_images(self, world):
        folder = world / "more scans"
        folder.mkdir()
        (folder / "a_0000.nrrd").write_bytes(b"")
        message = self.refused(folder, NotFoundError)
        assert "got      a_0000.nrrd\n  expected files named CASE_0000.nii.gz" in message
        assert not (world / "preprocessed" / DATASET / "unlabelled").exists()

    def test_names_and_channels(self, world):
        folder = image_folder(world, "tiny_00", "tiny_01", "tiny_02")
        (folder / "u_tiny_00_0000.nii.gz").rename(folder / "u_tiny_00_0001.nii.gz")
        shutil.copy(folder / "u_tiny_01_0000.nii.gz", folder / "u_tiny_01_0001.nii.gz")
        (folder / "u_tiny_02_0000.nii.gz").rename(folder / "plain.nii.gz")
        shutil.copy(raw_image(world, "tiny_03"), folder / "x_seg_0000.nii.gz")
        message = self.refused(folder)
        assert message.startswith("4 image(s) in")
        assert "u_tiny_00: got channels _0001, expected _0000\n" in message
        assert "u_tiny_01: got channels _0000, _0001, expected _0000\n" in message
        assert "plain.nii.gz: no channel number in the name, expected plain_0000.nii.gz" in message
        assert "x_seg: a name that ends in _seg" in message
        assert not (world / "preprocessed" / DATASET / "unlabelled").exists()

    def test_unreadable_and_not_finite(self, world):
        """In .nrrd, since ITK reads NaN in a NIfTI file as 0."""
        dataset_file = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}" / "dataset.json"
        dataset_file.write_text(dataset_file.read_text().replace(".nii.gz", ".nrrd"))
        folder = world / "more scans"
        folder.mkdir()
        for case in ("tiny_00", "tiny_01", "tiny_02"):
            picture = sitk.ReadImage(str(raw_image(world, case)))
            if case == "tiny_02":
                picture[3, 3, 3] = float("nan")
            sitk.WriteImage(picture, str(folder / f"u_{case}_0000.nrrd"))
        (folder / "u_tiny_01_0000.nrrd").write_bytes(b"no image")
        job = open_images(TEACHER, RECIPE, folder)
        with pytest.raises(ImageError) as caught:
            job.expected(0)
        assert str(caught.value).startswith("2 image(s) in")
        message = self.refused(folder)
        assert message.startswith("2 image(s) in")
        assert "u_tiny_01: " in message
        assert "u_tiny_02: it holds NaN or infinite values" in message
        assert job.target.cases.case_ids == ("u_tiny_00",), "the good one is kept"
        assert {p.name for p in job.target.cases_folder.iterdir()} == {
            f"u_tiny_00{e}" for e in (".b2nd", "_seg.b2nd", ".pkl")
        }
        assert not list(job.root.glob("*/zarr.json")), "no cache was begun"
        for case in ("u_tiny_01", "u_tiny_02"):
            (folder / f"{case}_0000.nrrd").unlink()
        assert list(build_unlabelled(folder)[1].cases) == ["u_tiny_00"]

    def test_names_of_labelled_cases(self, world):
        folder = image_folder(world, "tiny_00")
        shutil.copy(raw_image(world, "tiny_01"), folder / "tiny_01_0000.nii.gz")
        assert "have the name of a case of the data set: tiny_01\n" in self.refused(folder, MismatchError)

    def test_names_are_looked_at_before_any_image_is(self, world, monkeypatch):
        """The images of a large set take minutes to be measured."""
        folder = image_folder(world, "tiny_00")
        shutil.copy(raw_image(world, "tiny_01"), folder / "tiny_01_0000.nii.gz")
        monkeypatch.setattr("fastnnunet.teachers.measured.measure_scans", lambda *_, **__: pytest.fail("read an image"))
        with pytest.raises(MismatchError, match="have the name of a case of the data set: tiny_01\n"):
            label(TEACHER, images=folder)

    def test_two_folders_of_one_name(self, world):
        folder = image_folder(world, "tiny_00")
        build_unlabelled(folder)
        other = world / "elsewhere" / folder.name
        other.mkdir(parents=True)
        shutil.copy(raw_image(world, "tiny_05"), other / "v_0000.nii.gz")
        assert "give this folder a set of its own with --name" in self.refused(other, SpecError)
        job, _ = build_unlabelled(other, name="other")
        assert job.command.endswith(f"--images '{other}' --name other")
        resolve = job.target.plans, CONFIGURATION
        assert [resolve_set(*resolve, str(f)) for f in (folder, other)] == ["more-scans", "other"]
        assert resolve_set(*resolve, "other") == "other"
        with pytest.raises(NotFoundError, match=r"neither a folder.*\nsets there are: more-scans, other"):
            resolve_set(*resolve, "third")
        with pytest.raises(SpecError, match="--name: got 'a__b'"):
            open_images(TEACHER, RECIPE, folder, "a__b")

    def test_a_record_that_cannot_be_written_leaves_nothing_half_written(self, tmp_path):
        in_its_place = tmp_path / "images.json"
        in_its_place.mkdir()
        with pytest.raises(FastnnUNetError, match=r"cannot write .*images\.json"):
            unlabelled._write_record(in_its_place, SetRecord(images=tmp_path, preprocessing="digest", cases={}))
        assert list(tmp_path.iterdir()) == [in_its_place]

    def test_moved_folder(self, world):
        folder = image_folder(world, "tiny_00")
        build_unlabelled(folder)
        moved = folder.rename(folder.with_name("moved"))
        again, _ = build_unlabelled(moved, name="more-scans")
        assert again.target.record().images == moved

    def test_cascade(self, world):
        from tests.test_kinds import prepare, teacher_spec

        prepare(world, "cascade")
        with pytest.raises(SpecError, match="is a cascade stage and needs predictions of 3d_lowres"):
            open_images(teacher_spec("cascade"), RECIPE, image_folder(world, "tiny_00"))
