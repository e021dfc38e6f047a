"""Kinds of teachers: each does what every teacher must, and a published model is the one it was made of."""

import dataclasses
import shutil
import zipfile

import numpy as np
import pytest

from fastnnunet.errors import CorruptError, NotFoundError, SpecError
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import PublishedSpec, TeacherSpec
from fastnnunet.teachers.registry import open_factory
from fastnnunet.testing import check_teacher
from tests.tiny import DATASET

RECIPE = CacheSpec(precision="fp32", engine="torch", mirroring=False)
NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"
IMAGE = np.random.default_rng(0).normal(size=(1, 20, 40, 33)).astype(np.float32)


@pytest.fixture
def folder(world, monkeypatch):
    """A model folder, and no place to unpack to but this test's own."""
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(world / "home"))
    return world / "results" / DATASET / NAME


def zipped(folder, file, *, more=()):
    """As nnU-Net exports models: names below the folder of results. `more`: (name, content) of further members."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder.parents[1]))
        for name, content in more:
            archive.writestr(name, content)
    return file


@pytest.mark.parametrize("kind", [TeacherSpec, PublishedSpec])
def test_conformance(folder, kind):
    spec = TeacherSpec(dataset="998", folds=(0, 1)) if kind is TeacherSpec else PublishedSpec(path=folder, folds=(0, 1))
    check_teacher(open_factory(spec, RECIPE), IMAGE, (16, 24, 24))


def test_a_published_model_is_the_one_it_was_made_of(folder, tmp_path):
    own = open_factory(TeacherSpec(dataset="998"), RECIPE)
    file = zipped(folder, tmp_path / "model.zip", more=[("Dataset998/notes.txt", "no part of a model")])
    shutil.rmtree(folder.parents[2] / "preprocessed")
    for path in (folder, folder.parent, file):
        published = open_factory(PublishedSpec(path=path), RECIPE)
        assert published.identity() == own.identity()
        assert published.unseen_folds("any") == (0, 1, 2, 3, 4), "no fold is known to have seen it"
    file.touch()
    assert open_factory(PublishedSpec(path=file), RECIPE).folder == published.folder, "unpacked twice"
    assert not list(published.folder.parent.rglob("notes.txt"))
    assert [p.name for p in (folder.parents[2] / "home/models").iterdir()] == [published.folder.parents[1].name]


def test_the_recipe_says_what_is_open(folder):
    factory = open_factory(PublishedSpec(path=folder, folds=(0,)), RECIPE)
    assert [(a.engine, a.precision) for a in factory.alternatives(RECIPE)] == [("torch", "fp32")]
    auto = dataclasses.replace(RECIPE, engine="auto")
    engines = [a.engine for a in factory.alternatives(auto)]
    assert {"torch", "openvino"} <= set(engines)
    assert len(engines) == len(set(engines))
    assert {a.precision for a in factory.alternatives(auto)} == {"fp32"}


class TestRefusals:
    def test_no_model(self, folder, tmp_path):
        with pytest.raises(NotFoundError, match=r"nothing does not exist\nexpected the folder of an nnU-Net model"):
            open_factory(PublishedSpec(path=tmp_path / "nothing"), RECIPE)
        (tmp_path / "empty").mkdir()
        with pytest.raises(NotFoundError, match=r"there is no plans\.json\nname the folder that holds fold_0"):
            open_factory(PublishedSpec(path=tmp_path / "empty"), RECIPE)

    def test_two_models(self, folder):
        shutil.copytree(folder, folder.with_name(NAME.replace("3d_fullres", "2d")))
        with pytest.raises(SpecError, match=r"(?s)one of these models:\n.*__2d\n.*__3d_fullres\nchoose one with -c$"):
            open_factory(PublishedSpec(path=folder.parent), RECIPE)
        assert open_factory(PublishedSpec(path=folder.parent, configuration="3d_fullres"), RECIPE).folder == folder

    def test_no_zip(self, folder, tmp_path):
        file = zipped(folder, tmp_path / "model.zip")
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(CorruptError, match="no zip file, or it is cut off"):
            open_factory(PublishedSpec(path=file), RECIPE)

    def test_damaged_zip(self, folder, tmp_path):
        file = zipped(folder, tmp_path / "model.zip")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
        with pytest.raises(CorruptError, match=r"fold_./checkpoint_final\.pth in .*cannot be unpacked"):
            open_factory(PublishedSpec(path=file), RECIPE)
        assert not list((folder.parents[2] / "home/models").iterdir()), "a part was left"

    @pytest.mark.parametrize(
        ("at", "value"),
        [(0, 0), (6, 255)],  # of the first entry of the list of members: its mark, the version it needs
    )
    def test_a_zip_whose_list_is_damaged(self, folder, tmp_path, at, value):
        file = zipped(folder, tmp_path / "model.zip")
        data = bytearray(file.read_bytes())
        data[data.index(b"PK\1\2") + at] = value
        file.write_bytes(data)
        with pytest.raises(CorruptError, match=r"model\.zip cannot be unpacked: .*\nget the file again"):
            open_factory(PublishedSpec(path=file), RECIPE)
        assert not list((folder.parents[2] / "home/models").iterdir()), "a part was left"

    @pytest.mark.parametrize("name", ["Dataset998/plans.json/fold_0/a.pth", "y" * 300 + "/plans.json"])
    def test_a_zip_with_names_no_file_can_have(self, folder, tmp_path, name):
        file = zipped(folder, tmp_path / "model.zip", more=[("Dataset998/plans.json", "{}"), (name, "x")])
        with pytest.raises(CorruptError, match="cannot be unpacked"):
            open_factory(PublishedSpec(path=file), RECIPE)

    def test_a_zip_that_would_write_elsewhere(self, folder, tmp_path):
        file = zipped(folder, tmp_path / "model.zip", more=[("../../fold_0/evil.pth", "x")])
        with pytest.raises(CorruptError, match="outside its folder"):
            open_factory(PublishedSpec(path=file), RECIPE)
        assert not list(tmp_path.rglob("evil.pth"))

    def test_what_is_no_teacher(self):
        with pytest.raises(SpecError, match="got a str, expected TeacherSpec, PublishedSpec"):
            open_factory("model.zip", RECIPE)
