"""What a training finds damaged, missing or moved: one message, with the command that mends it."""

import dataclasses
import logging
import re
import shlex
import shutil
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.store.folder import command_at
from fastnnunet.cli.main import main
from fastnnunet.distill.job import run_folder
from fastnnunet.distill.train import train_student, train_students
from fastnnunet.errors import BuildError, CorruptError, DiskSpaceError, FastnnUNetError, NotFoundError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.checkpoint_digest import DIGEST, digest_of, write_checkpoint
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.load import load_yaml_spec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import build_command, cache_for_training, cache_job
from tests.test_distill_train import CACHE, SHORT, build, make_job
from tests.tiny import CONFIGURATION, DATASET

CONTROL = dataclasses.replace(SHORT, alpha=0.0, epochs=1, iterations_per_epoch=8)
PREPROCESS = f"nnUNetv2_preprocess -d 998 -plans_name nnUNetPlans -c {CONFIGURATION}"


def files_of(world, ending):
    return sorted((world / "preprocessed" / DATASET / f"nnUNetPlans_{CONFIGURATION}").glob(f"*{ending}"))


def cut(file):
    file.write_bytes(file.read_bytes()[:300])


def noise(file):
    file.write_bytes(np.random.default_rng(0).bytes(200))


def blank(file):
    """A frame whose header is whole and whose chunks are not."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(255 - b for b in data[len(data) // 2 : len(data) // 2 + 40])
    file.write_bytes(data)


class TestPreprocessedCases:
    @pytest.mark.parametrize(
        ("ending", "damage"),
        [("_seg.b2nd", blank), ("_seg.b2nd", cut), (".pkl", noise), (".pkl", lambda f: f.unlink())],
    )
    @pytest.mark.parametrize(("processes", "augment_on"), [("0", "loader"), ("2", "loader"), ("1", "device")])
    def test_name_case_and_command(self, world, monkeypatch, capfd, ending, damage, processes, augment_on):
        monkeypatch.setenv("nnUNet_n_proc_DA", processes)
        for file in files_of(world, ending):
            damage(file)
        with pytest.raises((CorruptError, NotFoundError)) as caught:
            train_student(make_job(distill=CONTROL, augment_on=augment_on), validate=False)
        first, last = str(caught.value).splitlines()
        assert re.match(r"preprocessed case '?tiny_0\d'? ", first)
        assert last == f"make it again with: {PREPROCESS}"
        assert "Traceback" not in "".join(capfd.readouterr())

    def test_during_a_training_together(self, world, monkeypatch):
        """The loaders of one student serve all; what was trained before stays."""
        monkeypatch.setenv("nnUNet_n_proc_DA", "2")
        jobs = [make_job(student=StudentSpec(r=r), distill=dataclasses.replace(CONTROL, epochs=50)) for r in (2, 4)]

        def damaged(state):
            if state.epoch == 1:
                for file in files_of(world, ".pkl"):
                    file.unlink(missing_ok=True)

        with pytest.raises(NotFoundError, match="make it again with"):
            train_students(jobs, validate=False, progress=damaged)
        assert all((run_folder(job) / "checkpoint_latest.pth").is_file() for job in jobs)

    def test_in_the_validation_at_the_end(self, world):
        job = make_job(distill=dataclasses.replace(CONTROL, iterations_per_epoch=1))
        train_student(job, validate=False)
        for file in files_of(world, "[0-9].b2nd"):
            cut(file)
        with pytest.raises(CorruptError, match=f"make it again with: {PREPROCESS}"):
            train_student(job, resume=True)


class TestMovedCaches:
    def test_the_command_builds_where_it_is_now(self, world, tmp_path):
        recipe = world / "recipe.yaml"
        recipe.write_text("precision: fp32\nmirroring: false\nengine: torch\n")
        job = make_job(cache=load_yaml_spec(CacheSpec, recipe), cache_spec_file=recipe)
        cache = build_cache(cache_job(job.teacher, job.cache, spec_file=recipe))
        assert "--root" not in cache.build_command
        moved = tmp_path / "moved here"
        shutil.move(cache.path.parent, moved)
        shards = sorted((moved / cache.path.name).glob("*/c/0/0/0/0"))
        whole = {shard: shard.read_bytes() for shard in shards}
        for shard, data in whole.items():
            shard.write_bytes(data[:50] + bytes(255 - b for b in data[50:-200]) + data[-200:])
        with pytest.raises(CorruptError) as caught:
            train_student(dataclasses.replace(job, cache_root=moved), validate=False)
        command, case = re.search(r"with: (fastnnunet cache build .*?--case (\S+))$", str(caught.value), re.M).groups()
        words = shlex.split(command)[1:]
        assert words[words.index("--root") + 1] == str(moved)
        main_exits(*words, "--workers", "0", "--threads", "1", code=0)
        shard = moved / cache.path.name / case / "c/0/0/0/0"
        assert shard.read_bytes() == whole[shard]
        assert not cache.path.parent.exists()

    def test_a_damaged_group(self, world):
        build()
        job = make_job()
        cache = cache_for_training(job.teacher, CACHE)
        (cache / "zarr.json").write_text("{}")
        with pytest.raises(CorruptError) as caught:
            train_student(job, validate=False)
        assert f"rm -r {cache}\n" in str(caught.value)
        assert str(caught.value).endswith(f"with: {build_command(job.teacher, CACHE)}")

    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            ("fastnnunet cache build -d 4", "fastnnunet cache build -d 4 --root '/a b/c'"),
            ("fastnnunet cache build -d 4 --root '/a b/c' -f 0", "fastnnunet cache build -d 4 --root '/a b/c' -f 0"),
            ("fastnnunet cache build -d 4 --root /old -f 0", "fastnnunet cache build -d 4 --root '/a b/c' -f 0"),
            ("something else", "something else"),
        ],
    )
    def test_by_hand(self, command, expected, tmp_path):
        from pathlib import Path

        assert command_at(command, Path("/a b/c")) == expected


def main_exits(*words, code):
    with pytest.raises(SystemExit) as done:
        main([str(w) for w in words])
    assert (done.value.code or 0) == code


def flip(file, record):
    """Turn one bit of a number in a record of torch's file; it loads as before, with another number."""
    with zipfile.ZipFile(file) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(record))
    data = bytearray(file.read_bytes())
    name, extra = (
        int.from_bytes(data[info.header_offset + k : info.header_offset + k + 2], "little") for k in (26, 28)
    )
    data[info.header_offset + 30 + name + extra + 2] ^= 8
    file.write_bytes(data)


class TestCheckpoints:
    @pytest.fixture
    def run(self, world):
        """A run of two epochs that ended after the first."""
        job = make_job(distill=dataclasses.replace(CONTROL, epochs=2, iterations_per_epoch=1))

        def stop(state):
            if state.epoch == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_student(job, validate=False, progress=stop)
        return job, run_folder(job)

    def test_damage_that_loads_is_not_continued_from(self, run):
        job, folder = run
        latest, best = folder / "checkpoint_latest.pth", folder / "checkpoint_best.pth"
        flip(latest, "data/0")
        weights = torch.load(latest, weights_only=False)["network_weights"]  # torch sees nothing
        assert any(not torch.equal(t, weights[n]) for n, t in load_checkpoint(best)["network_weights"].items())
        with pytest.raises(CorruptError) as caught:
            train_student(job, resume=True, validate=False)
        assert "damaged: its contents are not those it was written with" in str(caught.value)
        assert f"rm {latest}\n" in str(caught.value)
        assert "it goes on from checkpoint_best.pth" in str(caught.value)
        latest.unlink()
        epochs = []
        train_student(job, resume=True, validate=False, progress=lambda s: epochs.append(s.epoch))
        assert epochs == [1]
        flip(folder / "checkpoint_final.pth", "data/1")
        with pytest.raises(CorruptError, match="is damaged"):
            load_checkpoint(folder / "checkpoint_final.pth")

    def test_of_earlier_versions(self, run):
        """They have no digest, and are believed while torch's own checksums hold."""
        job, folder = run
        latest = folder / "checkpoint_latest.pth"
        plain = torch.load(latest, weights_only=False)
        assert plain.pop(DIGEST) == digest_of(plain)
        torch.save(plain, latest)
        whole = latest.read_bytes()
        flip(latest, "data/3")
        torch.load(latest, weights_only=False)
        with pytest.raises(CorruptError, match="checksum"):
            train_student(job, resume=True, validate=False)
        latest.write_bytes(whole)
        epochs = []
        train_student(job, resume=True, validate=False, progress=lambda s: epochs.append(s.epoch))
        assert epochs == [1]

    def test_stock_nnunet_loads_them(self, run):
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        _, folder = run
        stored = load_checkpoint(folder / "checkpoint_latest.pth")
        arguments = stored["init_args"]
        plans = {**arguments.pop("plans"), "continue_training": True}  # as nnUNetv2_train gives them
        trainer = nnUNetTrainer(plans, **arguments, device=torch.device("cpu"))
        trainer.initialize()
        trainer.load_checkpoint(str(folder / "checkpoint_latest.pth"))
        assert trainer.current_epoch == 1
        for name, tensor in trainer.network.state_dict().items():
            torch.testing.assert_close(tensor, stored["network_weights"][name], rtol=0, atol=0)

    def test_a_full_disk_leaves_the_one_before(self, tmp_path, monkeypatch):
        file = tmp_path / "checkpoint_latest.pth"
        write_checkpoint({"a": torch.ones(3)}, file)
        before = file.read_bytes()

        def full(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        for part in ("torch.save", "os.fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(part, full)
                with pytest.raises(DiskSpaceError, match="no room left"):
                    write_checkpoint({"a": torch.zeros(3)}, file)
            assert file.read_bytes() == before
            assert list(tmp_path.iterdir()) == [file]
        with pytest.raises(BuildError, match="cannot write"):
            write_checkpoint({}, tmp_path / "nowhere" / "x.pth")


SCALARS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(width=64) | st.text(max_size=5)
ARRAYS = st.sampled_from([np.float32(0.1), np.float64(2.5), np.int64(3), np.bool_(True)]) | st.builds(
    torch.full, st.lists(st.integers(0, 3), max_size=3).map(tuple), st.floats(-1, 1, width=16)
).flatmap(lambda t: st.sampled_from([t, t.half(), t.bfloat16(), t.double(), t.transpose(0, -1) if t.ndim else t]))
CONTENT = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(content=CONTENT)
def test_a_digest_survives_saving_and_loading(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "digest.pth"
    checkpoint = {"network_weights": {}, "init_args": {"configuration": "x"}, "trainer_name": "x"}
    checkpoint["content"] = content
    write_checkpoint(checkpoint, file)
    loaded = load_checkpoint(file)
    assert loaded.pop(DIGEST) == digest_of(checkpoint) == digest_of(loaded)


@settings(max_examples=60, deadline=None)
@given(one=CONTENT, other=CONTENT)
def test_other_contents_have_other_digests(one, other):
    if repr(one) != repr(other):
        assert digest_of({"content": one}) != digest_of({"content": other})


class TestQueuedAgain:
    def test_beside_a_damaged_run_of_another_student(self, world, caplog):
        job = make_job(distill=dataclasses.replace(CONTROL, iterations_per_epoch=1))
        noise(train_student(job, validate=False) / "checkpoint_latest.pth")
        noise(run_folder(job) / "checkpoint_final.pth")
        other = make_job(distill=dataclasses.replace(job.distill, epochs=2))
        with caplog.at_level(logging.WARNING):
            train_student(other, resume=True, validate=False)
        assert "holds no checkpoint, the run starts from the beginning" in caplog.text
        assert (run_folder(other) / "checkpoint_final.pth").is_file()


def test_images_that_are_damaged_are_named_before_the_training(world):
    build()
    for file in files_of(world, "[0-9].b2nd"):
        cut(file)
    with pytest.raises(FastnnUNetError, match=f"preprocessed case 'tiny_00'.*\nmake it again with: {PREPROCESS}"):
        train_student(make_job(teacher=TeacherSpec(dataset="998", folds=(0, 1))), validate=False)
