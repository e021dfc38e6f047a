"""What users get wrong when they train: refused before anything is trained or replaced, in one message."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch

from fastnnunet.cli import aliases
from fastnnunet.cli.guard import guarded
from fastnnunet.cli.main import main
from fastnnunet.cli.parts.choices import parse_folds, student_specs
from fastnnunet.distill.check import resolve_device
from fastnnunet.distill.train import train_student, train_students
from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.nnunet.files.checkpoint import check_same_run, load_checkpoint, weights_digest
from fastnnunet.nnunet.files.checkpoint_digest import DIGEST, write_checkpoint
from fastnnunet.nnunet.student.inherit import inherit
from fastnnunet.nnunet.versions import OLDEST
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.load import load_yaml_spec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import build_command
from tests.test_distill_train import SHORT, build, make_job
from tests.tiny import DATASET

CONTROL = dataclasses.replace(SHORT, alpha=0.0, epochs=1)
WORDS = "-d 998 -f 0 -tf 0 1 -a 0 -e 1 --iterations 1 --val-iterations 1 --no-validate --threads 1 --precision fp32"


def refused(words, capsys):
    """The message of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as done:
        main(words.split())
    assert done.value.code == 2
    return capsys.readouterr().err


def students(world):
    return sorted(p.name for p in (world / "results" / DATASET).iterdir() if "_r" in p.name)


def tiny_unet(**changes):
    kwargs = {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": 1,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"affine": True},
        "nonlin": "torch.nn.LeakyReLU",
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    return StudentSpec(network_class_name=name, arch_kwargs={**kwargs, **changes}, name="own")


class TestPlansNames:
    @pytest.mark.parametrize("name", ["dataset", "dataset_fingerprint", "splits_final", "OtherPlans"])
    def test_files_of_others_are_never_replaced(self, world, name):
        base = world / "preprocessed" / DATASET
        (base / "OtherPlans.json").write_text('{"plans_name": "OtherPlans"}')
        before = {p.name: p.read_bytes() for p in base.glob("*.json")}
        with pytest.raises(SpecError, match=f"(?s)-spl {name}: .*give another name"):
            train_student(make_job(student=StudentSpec(r=2, plans_name=name), distill=CONTROL))
        assert {p.name: p.read_bytes() for p in base.glob("*.json")} == before

    def test_a_student_may_be_trained_again(self, world):
        job = make_job(student=StudentSpec(r=2, plans_name="mine"), distill=CONTROL)
        folder = train_student(job, validate=False)
        train_student(job, overwrite=True, validate=False)
        published = json.loads((world / "preprocessed" / DATASET / "mine.json").read_text())
        assert published.pop("fastnnunet_student")
        assert published == json.loads((folder.parent / "plans.json").read_text())


def was_trained_with(path, **fields):
    """Change settings in a checkpoint; None: an earlier version did not know them. Nor did it know `-spl`."""
    checkpoint = load_checkpoint(path)
    run = checkpoint["fastnnunet"]
    distill = {name: value for name, value in {**run["distill"], **fields}.items() if value is not None}
    student = {**run["student"], "plans_name": None}
    kept = {k: v for k, v in checkpoint.items() if k != DIGEST}
    write_checkpoint({**kept, "fastnnunet": {**run, "distill": distill, "student": student}}, path)


def digest_of(folder):
    return weights_digest(load_checkpoint(folder / "checkpoint_final.pth")["network_weights"])


class TestContinue:
    def test_without_a_checkpoint_it_is_a_plain_start(self, world, caplog):
        """First weights from the teacher, as the name of the run says; losses of the first step tell."""
        losses = []
        for name, resume in (("plain", False), ("continued", True)):
            job = make_job(student=StudentSpec(r=2, plans_name=name), distill=CONTROL)
            with caplog.at_level(logging.WARNING):
                folder = train_student(job, resume=resume, validate=False)
            losses.append(load_checkpoint(folder / "checkpoint_final.pth")["network_weights"])
        assert "holds no checkpoint, the run starts from the beginning" in caplog.text
        first, second = losses
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_after_an_update_of_the_package(self, tmp_path):
        there = {"version": "0.0.1", "distill": {"alpha": 0.3}}  # when there was KL alone, at full resolution
        spec = DistillSpec(alpha=0.3, loss="kl", soft_deep_supervision=False, start="random")
        check_same_run(tmp_path, there, {"version": "0.2.0", "distill": dataclasses.asdict(spec)})
        now = {"version": "0.2.0", "distill": dataclasses.asdict(dataclasses.replace(spec, soft_deep_supervision=True))}
        with pytest.raises(MismatchError, match="soft_deep_supervision"):
            check_same_run(tmp_path, there, now)
        with pytest.raises(MismatchError, match="alpha"):
            check_same_run(tmp_path, there, {"version": "0.0.1", "distill": dataclasses.asdict(DistillSpec(alpha=0.1))})

    def test_a_control_of_before(self, world):
        """It has no soft loss, so what the soft loss was then does not matter."""
        folder = train_student(make_job(distill=CONTROL), validate=False)
        was_trained_with(folder / "checkpoint_final.pth", temperature=3.0, loss=None, soft_deep_supervision=None)
        assert train_student(make_job(distill=CONTROL), resume=True, validate=False) == folder

    def test_a_run_of_before_under_its_name(self, world):
        """Its name was of other defaults: `--continue` names it, and with `-spl` it goes on."""
        build()
        name = "nnUNetPlans_r2_a0.3_T1_e2_i2"
        spec = dataclasses.replace(SHORT, alpha=0.3, loss="kl", soft_deep_supervision=False)
        named = make_job(distill=spec, student=StudentSpec(r=2, plans_name=name))
        folder = train_student(named, validate=False)
        weights = load_checkpoint(folder / "checkpoint_final.pth")["network_weights"]
        was_trained_with(folder / "checkpoint_final.pth", loss=None, soft_deep_supervision=None)
        with pytest.raises(MismatchError, match=f"is there under another name\ncontinue it with -spl {name},"):
            train_student(make_job(distill=spec), resume=True, validate=False)
        assert students(world) == [folder.parent.name]
        epochs = []
        assert train_student(named, resume=True, validate=False, progress=epochs.append) == folder
        assert not epochs
        assert digest_of(folder) == weights_digest(weights)
        other = make_job(distill=dataclasses.replace(spec, loss="kl_dice"), student=named.student)
        with pytest.raises(MismatchError, match=r'distill\.loss: "kl" -> "kl_dice"'):
            train_student(other, resume=True, validate=False)

    def test_another_spelling_of_the_data_set(self, world):
        folder = train_student(make_job(distill=CONTROL), validate=False)
        again = make_job(distill=CONTROL, teacher=TeacherSpec(dataset=DATASET, folds=(1, 0)))
        assert train_student(again, resume=True, validate=False) == folder


def test_folds_have_no_order():
    assert TeacherSpec(dataset="1", folds=(4, "all", 10, 2)).folds == (2, 4, 10, "all")
    assert TeacherSpec(dataset="1", folds=(1, 0)) == TeacherSpec(dataset="1", folds=(0, 1))


def test_all_sizes_are_checked_before_the_first_is_trained(world, capsys):
    assert "-r 99 leaves no channels" in refused(f"train {WORDS} -r 2 99", capsys)
    assert students(world) == []


def test_a_validation_without_label_maps(world, capsys):
    shutil.rmtree(world / "preprocessed" / DATASET / "gt_segmentations")
    said = refused(f"train {WORDS.replace('--no-validate', '')} -r 2", capsys)
    assert "gt_segmentations is missing" in said
    assert "--no-validate, or run: nnUNetv2_preprocess -d 998 -plans_name nnUNetPlans -c 3d_fullres" in said
    assert students(world) == []


def test_a_package_that_is_too_old(world, capsys, monkeypatch):
    monkeypatch.setitem(OLDEST, "batchgeneratorsv2", "99.1")
    said = refused(f"train {WORDS} -r 2", capsys)
    assert "batchgeneratorsv2: got 0." in said
    assert "pip install 'batchgeneratorsv2>=99.1'" in said
    assert students(world) == []


def test_the_same_student_twice(world):
    with pytest.raises(SpecError, match="into one folder"):
        train_students([make_job(distill=CONTROL)] * 2)
    assert students(world) == []
    assert [s.r for s in student_specs([4, 2, 4], None, {})] == [4, 2]
    assert parse_folds(["1", "0", "1", "all"]) == (1, 0, "all")


@pytest.mark.parametrize("device", ["gpu0", "mps", "cpu:0", "cuda:x"])
def test_devices_that_are_none(device, world, capsys):
    with pytest.raises(SpecError, match=f"got '{device}', expected auto, cpu, cuda or cuda:N"):
        resolve_device(device)
    assert f"--device: got '{device}'" in refused(f"train {WORDS} -r 2 --device {device}", capsys)
    assert students(world) == []


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(MismatchError, match="there are 2 CUDA devices"):
        resolve_device("cuda:2")


def test_the_alias_asks_for_the_device_before_it_labels(world, capsys):
    before = sorted((world / "preprocessed" / DATASET).iterdir())
    with pytest.raises(SystemExit) as done:
        aliases.distillation_train(
            ["-d", "998", "-f", "0", "-tf", "0", "1", "-r", "2", "-e", "1", "--iterations", "1", "-d_device", "nowhere"]
        )
    assert done.value.code == 2
    assert "expected auto, cpu, cuda" in capsys.readouterr().err
    assert sorted((world / "preprocessed" / DATASET).iterdir()) == before


def test_an_alias_with_r_0(world, capsys):
    with pytest.raises(SystemExit) as done:
        aliases.distillation_train(["-d", "998", "-f", "0", "-tf", "0", "1", "-r", "0", "-d_device", "cpu"])
    assert done.value.code == 2
    assert "r: got 0" in capsys.readouterr().err


class TestTemperature:
    """Of the recipe, unless -temp says another; the command that is quoted builds the cache that is looked for."""

    @pytest.mark.parametrize(("more", "temperature", "quoted"), [("", 2, False), (" -temp 4", 4, True)])
    def test_train(self, world, tmp_path, capsys, more, temperature, quoted):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("temperature: 2.0\nmirroring: false\n")
        told = refused(f"train {WORDS} -r 2 -a 0.3 --spec {recipe}{more}", capsys)
        assert ("--temp 4" in told) == quoted
        spec = dataclasses.replace(load_yaml_spec(CacheSpec, recipe), temperature=float(temperature))
        assert build_command(TeacherSpec(dataset="998", folds=(0, 1)), spec, recipe) in told

    def test_recipes_without_one(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text("mirroring: false\n")
        for temperature, words in ((1.0, False), (2.0, True)):
            spec = CacheSpec(mirroring=False, temperature=temperature)
            command = build_command(TeacherSpec(dataset="4"), spec, tmp_path / "recipe.yaml")
            assert ("--temp 2" in command) == words


class TestWrittenOut:
    """Networks written out that cannot be made, or trained by nnU-Net."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"features_per_stage": [4, 6]}, r"features_per_stage: got \[4, 6\], expected .* for each of 3 stages"),
            ({"features_per_stage": [4, "six", 8]}, "features_per_stage: got .*'six'.*, expected whole numbers"),
            ({"nonlin_kwargs": {"depth": 3}}, "cannot build a network .*: TypeError"),
            ({"strides": 2}, "strides: got 2, expected a list of 3 numbers a stage"),
        ],
    )
    def test_refused(self, world, changes, message):
        before = sorted((world / "results" / DATASET).iterdir())
        with pytest.raises((SpecError, MismatchError), match=message):
            train_student(make_job(student=tiny_unet(**changes), distill=CONTROL))
        assert sorted((world / "results" / DATASET).iterdir()) == before

    def test_a_decoder_of_residual_blocks_has_nothing_to_take(self):
        """Its encoder's names are those of other networks."""
        from dynamic_network_architectures.architectures.unet import ResidualUNet

        kwargs = dict(tiny_unet().arch_kwargs)
        del kwargs["n_conv_per_stage"]
        network = ResidualUNet(
            input_channels=1,
            num_classes=3,
            n_blocks_per_stage=1,
            **{
                **kwargs,
                "conv_op": torch.nn.Conv3d,
                "norm_op": torch.nn.InstanceNorm3d,
                "nonlin": torch.nn.LeakyReLU,
            },
        )
        assert inherit(network.state_dict(), network.state_dict()) == {}

    def test_files(self, tmp_path):
        file = tmp_path / "student.yaml"
        file.write_text("# nothing yet\n")
        with pytest.raises(SpecError, match="says nothing of a student"):
            student_specs(None, file, {})
        file.write_bytes("r: 4  # größer".encode("latin-1"))
        with pytest.raises(SpecError, match="is not valid YAML"):
            load_yaml_spec(StudentSpec, file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-r 2 -bs keep", "-bs keep: this network has no residual blocks"),
        ("-r 2 --lr nan", "'initial_lr': got nan"),
        ("-r 2 -f ²", "fold '²' is no fold"),
    ],
)
def test_smaller_ones(world, capsys, words, message):
    assert message in refused(f"train {WORDS} {words}", capsys)
    assert students(world) == []


def test_describe_without_folds(world, capsys):
    with pytest.raises(SystemExit) as done:
        main(["student", "describe", "-d", "998", "-r", "2", "--folds", "0"])
    assert done.value.code == 2
    assert "greater than or equal to 1" in capsys.readouterr().err


def test_auto_into_a_file(world, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    words = f"distill auto -d 998 -f 0 -tf 0 1 -a 0 -r 2 -e 1 --iterations 1 --device cpu -o {tmp_path / 'out'}"
    assert "is a file; give another one" in refused(words, capsys)
    assert students(world) == []


def test_a_folder_without_permission_is_one_message(capsys):
    def write():
        raise PermissionError(13, "Permission denied", "results/fold_0")

    with pytest.raises(SystemExit) as done:
        guarded(write)
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: Permission denied: results/fold_0\nchange the permissions")
