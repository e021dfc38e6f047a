"""Students of every kind: widths and blocks by hand, stock nnU-Net as the oracle, the whole way on tiny networks."""

import contextlib
import dataclasses
import inspect
import io
import json
import pydoc
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.job import prepare_job
from fastnnunet.cli import aliases
from fastnnunet.cli.parts.choices import student_specs
from fastnnunet.distill.job import TrainingJob, run_folder
from fastnnunet.distill.train import train_student
from fastnnunet.engines.registry import create_engine
from fastnnunet.errors import CorruptError, MismatchError, SpecError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.files.plans import configuration_of, read_json, trainer_class
from fastnnunet.nnunet.student.fit import check_fit, network_cost, patch_problems
from fastnnunet.nnunet.student.plans import student_folder, student_plans
from fastnnunet.nnunet.student.primus import narrower_primus, primus_kwargs, stock_architecture, stock_trainer_of
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.load import build_spec
from fastnnunet.specs.student import StudentSpec, student_plans_name
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from tests.teachers import nnunet_predictor
from tests.test_kinds import prepare, read
from tests.tiny import CONFIGURATION, DATASET, PATCH

CONTROL = DistillSpec(alpha=0, epochs=1, iterations_per_epoch=2, val_iterations_per_epoch=1, precision="fp32")
TINY_PRIMUS = """
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus


class TinyPrimusTrainer(AbstractPrimus):
    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        shape = configuration_manager.patch_size
        return Primus(
            num_input_channels, 48, (8, 8, 8), num_output_channels, 2, 4, shape, scale_attn_inner=True, init_values=0.1
        )
"""


@pytest.mark.parametrize(
    ("changes", "features", "expected"),
    [
        ({"r": 4}, [32, 64, 320], [8, 16, 80]),
        ({"r": 6}, [32, 64, 128, 256, 320], [8, 10, 21, 42, 53]),
        ({"r": 6, "round_to": 8}, [32, 64, 128, 256, 320], [8, 8, 16, 40, 48]),
        ({"r": 2, "round_to": 8}, [6, 20, 36], [6, 8, 16]),
        ({"r": 4, "min_features": 12, "round_to": 8}, [32, 128], [16, 32]),
    ],
)
def test_widths(changes, features, expected):
    spec = StudentSpec(**changes)
    assert [spec.narrower(f) for f in features] == expected


@pytest.mark.parametrize(
    ("blocks", "r", "expected"),
    [
        ("keep", 4, [1, 3, 4, 6]),
        ("reduce", 4, [1, 2, 2, 3]),
        ("increase", 4, [2, 5, 6, 9]),
        ("adaptive", 1, [1, 3, 4, 6]),
        ("adaptive", 4, [1, 2, 2, 3]),  # half: 0.5, 1.5, 2, 3
        ("auto", 16, [1, 1, 1, 2]),  # a quarter: 0.06 (held at 8 instead of 2), 0.19, 1, 1.5
    ],
)
def test_blocks(blocks, r, expected):
    spec = StudentSpec(r=r, blocks=blocks)
    features = [32, 64, 128, 256]
    assert spec.fewer_blocks([1, 3, 4, 6], features, [spec.narrower(f) for f in features]) == expected


@pytest.mark.parametrize(
    ("changes", "tag"),
    [
        ({"r": 4}, "r4"),
        ({"r": 4, "family": "lite"}, "r4_lite"),
        ({"r": 4, "family": "width"}, "r4_width"),
        ({"r": 4, "family": "lite", "norm": "batch"}, "r4_lite_bn"),
        ({"r": 4, "round_to": 8}, "r4_m8"),
        ({"r": 4, "blocks": "keep"}, "r4_keep"),
        ({"r": 2, "architecture": "plain", "family": "lite"}, "r2_plain_lite"),
        ({"size": "S"}, "primusS"),
        ({"network_class_name": "a.B", "arch_kwargs": {}, "name": "mine"}, "mine"),
    ],
)
def test_tags(changes, tag):
    assert StudentSpec(**changes).tag == tag
    assert student_plans_name("P", StudentSpec(**changes), DistillSpec()) == f"P_{tag}_a0.5_T1"


def test_all_problems_of_a_student_at_once():
    raw = {"network_class_name": "a.B", "r": 0, "family": "heavy", "widht": 3, "plans_name": "a__b"}
    with pytest.raises(SpecError, match="6 problem") as error:
        build_spec(StudentSpec, raw)
    assert all(word in str(error.value) for word in ("arch_kwargs", "r: got 0", "family", "widht", "plans_name"))


@pytest.mark.parametrize(
    ("reduction", "choices", "name", "message"),
    [
        (None, {}, None, "which student"),
        ([2], {"size": "S"}, None, "leave out -r 2"),
        ([2, 4], {}, "mine", "names one student"),
    ],
)
def test_options_that_contradict_each_other(reduction, choices, name, message):
    with pytest.raises(SpecError, match=message):
        student_specs(reduction, None, choices, name)


def test_primus_keeps_its_head_dimension():
    teacher = {"embed_dim": 864, "eva_numheads": 12, "eva_depth": 16}
    made = narrower_primus(teacher, StudentSpec(r=4))
    assert made == {"embed_dim": 216, "eva_numheads": 3, "eva_depth": 16}
    assert narrower_primus(teacher, StudentSpec(r=4, blocks="reduce"))["eva_depth"] == 8
    with pytest.raises(SpecError, match="leaves no attention head: the teacher has 12"):
        narrower_primus(teacher, StudentSpec(r=13))


def plans_of(world):
    base = world / "preprocessed" / DATASET
    return read_json(base / "nnUNetPlans.json"), read_json(base / "dataset.json")


def teacher_file(world, fold, trainer="nnUNetTrainer"):
    return world / "results" / DATASET / f"{trainer}__nnUNetPlans__{CONFIGURATION}/fold_{fold}/checkpoint_final.pth"


def make_job(student, distill=CONTROL, trainer="nnUNetTrainer", **changes):
    return TrainingJob(
        teacher=TeacherSpec(dataset="998", folds=(0, 1), trainer=trainer),
        student=student,
        distill=distill,
        cache=CacheSpec(precision="fp32", mirroring=False, engine="torch"),
        fold=0,
        device="cpu",
        threads=1,
        **changes,
    )


STOCK = """
import json, sys
answers, sys.stdout = sys.stdout, sys.stderr  # nnU-Net prints
sys.modules["fastnnunet"] = None
import numpy as np, torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

for line in sys.stdin:
    model, image, logits = json.loads(line)
    p = nnUNetPredictor(use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"))
    p.initialize_from_trained_model_folder(model, (0,), "checkpoint_final.pth")
    p.network.load_state_dict(p.list_of_parameters[0])
    p.network.eval()
    with torch.inference_mode():
        np.save(logits, p.network(torch.from_numpy(np.load(image))[None])[0].numpy())
    print("done", file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Logits of nnUNetPredictor in a process in which fastnnunet cannot be imported; one process, as it starts slowly.

    A function of a model folder and an image (channels, z, y, x).
    """
    folder = tmp_path_factory.mktemp("stock")
    image, logits, errors = (folder / name for name in ("image.npy", "logits.npy", "errors.txt"))
    with (
        errors.open("w") as said,
        subprocess.Popen(
            [sys.executable, "-c", STOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process,
    ):

        def run(model, image_CZYX):
            logits.unlink(missing_ok=True)
            np.save(image, image_CZYX)
            print(json.dumps([str(model), str(image), str(logits)]), file=process.stdin, flush=True)
            assert process.stdout.readline() == "done\n", errors.read_text()
            return np.load(logits)

        yield run
        process.stdin.close()


def logits_of_nnunet(model, image_CZYX):
    """As `stock`, in this process: for networks of ours."""
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnunet_predictor(model, (0,), mirroring=False)
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    with torch.inference_mode():
        return predictor.network.eval()(torch.from_numpy(image_CZYX)[None])[0].numpy()


def agrees_with_stock(folder, tmp_path, logits_of):
    """Stock nnU-Net, the exported ONNX and our torch backend compute the same from a trained student."""
    export_bundle(folder.parent, 0, tmp_path / "bundle")
    with np.load(tmp_path / "bundle" / "parity.npz") as parity:
        image, ours = parity["image"], parity["logits"]
    theirs = logits_of(folder.parent, image[0])
    np.testing.assert_allclose(ours[0], theirs, atol=1e-4 * np.abs(theirs).max())
    return image, ours


@pytest.mark.parametrize(
    "student",
    [
        StudentSpec(r=2),
        StudentSpec(r=2, family="width"),
        StudentSpec(r=2, architecture="residual", blocks="reduce", family="width"),
        StudentSpec(r=2, architecture="residual", round_to=8),
        StudentSpec(r=2, norm="batch"),
        StudentSpec(r=2, architecture="residual", family="width", norm="batch"),
    ],
    ids=lambda s: s.tag,
)
def test_trained_students_load_in_stock_nnunet(world, tmp_path, stock, student):
    folder = train_student(make_job(student), validate=False)
    agrees_with_stock(folder, tmp_path, stock)


@pytest.mark.parametrize(
    ("changes", "thin"),
    [
        ({"r": 2}, True),
        ({"r": 2, "family": "width"}, False),
        ({"r": 1}, False),  # the teacher's own network
        ({"r": 1, "family": "lite"}, True),
    ],
)
def test_families(world, changes, thin):
    plans, _ = plans_of(world)
    teacher = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    made = student_plans(plans, CONFIGURATION, StudentSpec(**changes), CONTROL)["configurations"][CONFIGURATION]
    kwargs = made["architecture"]["arch_kwargs"]
    full, *rest = teacher["kernel_sizes"]
    assert kwargs["kernel_sizes"] == ([[1, *full[1:]], *rest] if thin else teacher["kernel_sizes"])
    for name, place in (("n_conv_per_stage", 0), ("n_conv_per_stage_decoder", -1)):
        expected = list(teacher[name])
        expected[place] = 1 if thin else expected[place]
        assert kwargs[name] == expected


def make_flat(plans):
    """Turn the plans of the tiny world into those of a 2d model."""
    config = plans["configurations"][CONFIGURATION]
    kwargs = config["architecture"]["arch_kwargs"]
    config["patch_size"], config["spacing"] = PATCH[1:], config["spacing"][1:]
    for name in ("conv_op", "norm_op"):
        kwargs[name] = kwargs[name].replace("3d", "2d")
    for name in ("kernel_sizes", "strides"):
        kwargs[name] = [value[1:] for value in kwargs[name]]


@pytest.mark.parametrize("family", ["width", "lite"])
@pytest.mark.parametrize("architecture", ["plain", "residual"])
@pytest.mark.parametrize("axes", [2, 3])
def test_batch_norm(world, axes, architecture, family):
    """Every normalisation is batch norm of the right dimensions, and nothing else of the network is another."""
    plans, dataset_json = plans_of(world)
    if axes == 2:
        make_flat(plans)
    spec = StudentSpec(r=2, architecture=architecture, family=family)
    same, batch = (
        build_network(model_of(student_plans(plans, CONFIGURATION, s, CONTROL), CONFIGURATION, dataset_json))
        for s in (spec, dataclasses.replace(spec, norm="batch"))
    )
    kinds = {torch.nn.InstanceNorm2d: torch.nn.BatchNorm2d, torch.nn.InstanceNorm3d: torch.nn.BatchNorm3d}
    assert [kinds.get(type(m), type(m)) for m in same.modules()] == [type(m) for m in batch.modules()]
    assert sum(type(m) in kinds for m in same.modules()) > 4
    shapes = {n: p.shape for n, p in same.named_parameters()}
    biases = [n for n in shapes if n.endswith("conv.bias") or ("transpconvs" in n and n.endswith("bias"))]
    assert {n: s for n, s in shapes.items() if n not in biases} == {n: p.shape for n, p in batch.named_parameters()}


def test_batch_norm_where_it_makes_no_sense(world):
    plans, _ = plans_of(world)
    for changes in ({"size": "S"}, {"network_class_name": "a.B", "arch_kwargs": {}}):
        with pytest.raises(SpecError, match="norm"):
            StudentSpec(norm="batch", **changes)
    with pytest.raises(SpecError, match=r"LayerNorm.*leave it out"):
        narrower_primus({"eva_numheads": 12, "embed_dim": 96, "eva_depth": 12}, StudentSpec(r=4, norm="batch"))
    kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = None
    with pytest.raises(SpecError, match=r"--norm batch: .*PlainConvUNet has no normalisation"):
        student_plans(plans, CONFIGURATION, StudentSpec(r=2, norm="batch"), CONTROL)


def test_plain_student_of_a_residual_teacher(world):
    plans, dataset_json = plans_of(world)
    residual = student_plans(plans, CONFIGURATION, StudentSpec(architecture="residual"), CONTROL)
    made = student_plans(residual, CONFIGURATION, StudentSpec(r=2, architecture="plain"), CONTROL)
    architecture = made["configurations"][CONFIGURATION]["architecture"]
    assert architecture["network_class_name"].endswith("PlainConvUNet")
    assert architecture["arch_kwargs"]["n_conv_per_stage"] == [1, 2, 2]
    assert architecture["arch_kwargs"]["features_per_stage"] == [8, 16, 16]
    assert "n_blocks_per_stage" not in architecture["arch_kwargs"]
    assert type(build_network(model_of(made, CONFIGURATION, dataset_json))).__name__ == "PlainConvUNet"


def test_student_written_out(world, tmp_path, stock):
    plans, _ = plans_of(world)
    shape = {
        "n_stages": 3,
        "features_per_stage": [8, 12, 12],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    spec = StudentSpec(network_class_name=name, arch_kwargs=shape, name="two")
    agrees_with_stock(train_student(make_job(spec), validate=False), tmp_path, stock)
    wrong = {**shape, "depth": 3, "input_channels": 1}
    del wrong["strides"]
    with pytest.raises(SpecError, match=r"(?s)3 problem.*'depth'.*'strides' is missing.*'input_channels' is set"):
        student_plans(plans, CONFIGURATION, dataclasses.replace(spec, arch_kwargs=wrong), CONTROL)


def test_what_does_not_fit_is_refused_at_once(world):
    plans, dataset_json = plans_of(world)
    teacher = json.loads(json.dumps(plans))
    teacher["configurations"][CONFIGURATION].update(spacing=[9.0, 1.0, 1.0], patch_size=[16, 18, 16])
    student = student_plans(teacher, CONFIGURATION, StudentSpec(r=2), CONTROL)
    other = {**dataset_json, "labels": {"background": 0, "liver": 1}}
    with pytest.raises(MismatchError, match="3 problem") as error:
        check_fit(teacher, student, other, CONFIGURATION)
    assert all(
        w in str(error.value) for w in ("spacing: teacher [9.0", "labels:", "axis 1: got 18, expected a multiple of 4")
    )


def test_flops_are_counted(world):
    """One convolution by hand: 2 x 27 x in x out x voxels; the rest of the network is what is left at r."""
    plans, dataset_json = plans_of(world)
    kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    voxels = int(np.prod(PATCH))
    kwargs.update(
        n_stages=2, features_per_stage=[4, 6], kernel_sizes=[[3, 3, 3]] * 2, strides=[[1, 1, 1], [2, 2, 2]],
        n_conv_per_stage=[1, 1], n_conv_per_stage_decoder=[1],
    )  # fmt: skip
    encoder = 27 * 1 * 4 * voxels + 27 * 4 * 6 * voxels // 8
    decoder = 6 * 4 * voxels + 27 * 8 * 4 * voxels + 4 * 3 * voxels
    assert network_cost(model_of(plans, CONFIGURATION, dataset_json))["flops"] == 2 * (encoder + decoder)


def test_pretrained_weights(world, tmp_path):
    start = train_student(make_job(StudentSpec(r=2)), validate=False) / "checkpoint_final.pth"
    frozen = dataclasses.replace(CONTROL, initial_lr=1e-12)
    done = train_student(make_job(StudentSpec(r=2), frozen, pretrained=start), validate=False)
    before, after = (load_checkpoint(p)["network_weights"] for p in (start, done / "checkpoint_final.pth"))
    name = "encoder.stages.0.0.convs.0.conv.weight"
    torch.testing.assert_close(after[name], before[name])
    other = make_job(StudentSpec(r=1), pretrained=start)
    with pytest.raises(MismatchError, match="do not fit this student"):
        train_student(other, validate=False)
    assert not run_folder(other).parent.exists()
    (tmp_path / "text.pth").write_text("precision: fp32")
    with pytest.raises(CorruptError, match="not an nnU-Net checkpoint"):
        train_student(dataclasses.replace(other, pretrained=tmp_path / "text.pth"), validate=False)


def leave_little_to_label(world):
    """As many cases as five folds need, and one mirrored axis: the commands label all of them, mirrored."""
    for number in range(5, 10):
        for file in (world / "preprocessed" / DATASET / f"nnUNetPlans_{CONFIGURATION}").glob(f"tiny_{number:02d}*"):
            file.unlink()
    for file in (world / "results").rglob("fold_0/checkpoint_final.pth"):
        torch.save({**load_checkpoint(file), "inference_allowed_mirroring_axes": (0,)}, file)


def test_resenc_commands(world, tmp_path, capsys):
    prepare(world, "resenc_m")
    leave_little_to_label(world)
    flags = ["-d", "998", "-f", "0", "-r", "2"]
    short = "-e 1 --iterations 2 -d_device cpu -spl small"
    aliases.resenc_distillation_train([*flags, "-tf", "0", "-bs", "reduce", *short.split()])
    said = capsys.readouterr()
    assert "building the soft-label cache first" in said.err
    assert "mean Dice on the validation fold" in said.out
    made = read_json(world / "results" / DATASET / f"nnUNetTrainer__small__{CONFIGURATION}" / "plans.json")
    kwargs = made["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    assert kwargs["n_blocks_per_stage"] == [1, 2, 2, 3, 3, 3]
    export = [*flags, "-spl", "small", "-o"]
    bundle = tmp_path / "bundle"
    aliases.resenc_distillation_export_onnx([*export, str(bundle), "-is", "20", "16", "24", "-da", "-sim", "-b", "2"])
    assert "-b 2 without -fix changes nothing" in capsys.readouterr().err
    spec = load_bundle_spec(bundle)
    assert (spec.patch_size, spec.batch_size) == ((20, 16, 24), None)
    image = np.load(bundle / "parity.npz")["image"]
    for patches in (image, image[:, :, :16, :, :16]):
        expected = create_engine("torch", bundle, spec).run(np.ascontiguousarray(patches))
        got = create_engine("onnxruntime", bundle, spec).run(patches)
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(SystemExit):
        aliases.resenc_distillation_export_onnx([*export, str(tmp_path / "c"), "-da", "-fix"])
    assert "-da makes shapes dynamic, -fix makes them fixed" in capsys.readouterr().err


class TestPrimus:
    @pytest.fixture
    def primus(self, world, tmp_path, monkeypatch):
        """Two folds of a tiny Primus of a trainer that only nnUNet_extTrainer knows."""
        (tmp_path / "trainers").mkdir()
        (tmp_path / "trainers" / "tiny_primus.py").write_text(TINY_PRIMUS)
        monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
        plans, dataset_json = plans_of(world)
        source = teacher_file(world, 0)
        for fold in (0, 1):
            torch.manual_seed(fold)
            network = build_network(model_of(plans, CONFIGURATION, dataset_json), trainer="TinyPrimusTrainer")
            target = teacher_file(world, fold, "TinyPrimusTrainer")
            target.parent.mkdir(parents=True)
            for name in ("plans.json", "dataset.json"):
                (target.parents[1] / name).write_text((source.parents[1] / name).read_text())
            checkpoint = {**load_checkpoint(source), "trainer_name": "TinyPrimusTrainer"}
            torch.save({**checkpoint, "network_weights": network.state_dict()}, target)
        return world

    def test_caches_what_nnunet_predicts_then_trains_exports_and_predicts(self, primus, tmp_path):
        job = make_job(StudentSpec(r=2), dataclasses.replace(CONTROL, alpha=0.3), "TinyPrimusTrainer")
        source, factory, root = open_teacher(job.teacher, job.cache)
        assert factory.engine == "torch"
        image = source.image_CZYX("tiny_03")
        loaded = factory.load(1)
        mean = np.zeros((3, *image.shape[1:]), np.float32)
        for _, values in (blocks := list(loaded.blocks(image, (0, 1), image.shape[1:]))):
            mean[:] = values
        assert len(blocks) == 1
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = nnunet_predictor(factory.folder, (0, 1), mirroring=False)
            theirs = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float().numpy()
        # nnU-Net sums weighted tiles in half precision, which leaves no digits where the weight is small
        assert np.median(np.abs(mean - theirs)) < 1e-3
        patch = image[:, :16, :16, :16]
        for fold, weights in zip((0, 1), predictor.list_of_parameters, strict=True):
            predictor.network.load_state_dict(weights)
            with torch.inference_mode():
                expected = predictor.network.eval()(torch.from_numpy(patch[None]))
            np.testing.assert_allclose(loaded.engines[fold].run(patch[None]), expected, atol=1e-5)
        build_cache(prepare_job(source, factory, job.cache, root, command="rebuild"))
        folder = train_student(job, validate=True)
        weights = load_checkpoint(folder / "checkpoint_final.pth")["network_weights"]
        assert weights["eva.pos_embed"].shape == (1, 8, 24)
        _, ours = agrees_with_stock(folder, tmp_path, logits_of_nnunet)
        spec = load_bundle_spec(tmp_path / "bundle")
        assert spec.architecture["network_class_name"].endswith(".Primus")
        assert ours.shape[1] == 3
        images = primus / "raw" / DATASET / "imagesTs"
        Predictor.load(tmp_path / "bundle", "onnxruntime").predict_files(images, tmp_path / "ours")
        (tmp_path / "theirs").mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            student = nnunet_predictor(folder.parent, (0,), mirroring=False)
            cases = ["tiny_10", "tiny_11"]
            student.predict_from_files_sequential(
                [[str(images / f"{case}_0000.nii.gz")] for case in cases], [str(tmp_path / "theirs" / c) for c in cases]
            )
        for case in cases:
            got, expected = (read(tmp_path / who / f"{case}.nii.gz") for who in ("ours", "theirs"))
            assert (got == expected).mean() >= 0.9999

    def test_commands(self, primus, tmp_path, capsys):
        leave_little_to_label(primus)
        train = "-d 998 -f 0 -t TinyPrimusTrainer -tf 0 -r 2 -e 1 --iterations 2 -d_device cpu"
        aliases.primus_distillation_train([*train.split(), "-spl", "small"])
        assert "building the soft-label cache first" in capsys.readouterr().err
        export = ["-d", "998", "-f", "0", "-t", "TinyPrimusTrainer", "-r", "2", "-spl", "small", "-o"]
        plain, simple = tmp_path / "plain", tmp_path / "simple"
        aliases.primus_distillation_export_onnx([*export, str(plain), "-v"])
        assert "parity with PyTorch" in capsys.readouterr().out
        aliases.primus_distillation_export_onnx([*export, str(simple), "-sim", "-fix", "-b", "2"])
        assert load_bundle_spec(simple).batch_size == 2
        before, after = (onnx.load(folder / "model.onnx").graph for folder in (plain, simple))
        assert len(after.node) < 0.7 * len(before.node)
        assert not any("Sequence" in node.op_type for node in after.node)
        image = np.load(plain / "parity.npz")["image"]
        logits = [
            create_engine(name, folder, load_bundle_spec(folder)).run(image)
            for name, folder in (("onnxruntime", plain), ("onnxruntime", simple), ("torch", simple))
        ]
        for got in logits[1:]:  # torch finds the weights in the simplified file by their names
            np.testing.assert_allclose(got, logits[0], atol=1e-4 * np.abs(logits[0]).max())
        for flags in (["-is", "24", "16", "16"], ["-da"]):
            with pytest.raises(SystemExit):
                aliases.primus_distillation_export_onnx([*export, str(tmp_path / "no"), *flags])
            assert "PrimusStudent computes on patches of [16, 16, 16] only" in capsys.readouterr().err

    @pytest.mark.parametrize(("size", "heads", "depth", "millions"), [
        ("S", 6, 12, 23.2), ("B", 12, 12, 92.0), ("M", 12, 16, 145.3), ("L", 16, 24, 324.0),
    ])  # fmt: skip
    def test_stock_sizes(self, world, size, heads, depth, millions):
        """What plans and bundle say of a stock size is the network nnU-Net's trainer builds, weight for weight."""
        plans, dataset_json = plans_of(world)
        spec = StudentSpec(size=size)
        stock = f"nnUNet_Primus_{size}_Trainer"
        made = student_plans(plans, CONFIGURATION, spec, CONTROL, dataset_json)
        with torch.device("meta"):  # no memory for hundreds of millions of weights
            theirs = trainer_class(stock).build_network_architecture(
                *configuration_of(plans, CONFIGURATION), 1, 3, False
            )
            architecture = stock_architecture(made["configurations"][CONFIGURATION]["architecture"])
            kwargs = architecture["arch_kwargs"]
            ours = pydoc.locate(architecture["network_class_name"])(1, num_classes=3, **kwargs)
        assert stock_trainer_of(architecture) == stock
        assert (kwargs["eva_numheads"], kwargs["eva_depth"], kwargs["input_shape"]) == (heads, depth, PATCH)
        assert f"init_values={kwargs['init_values']}" in inspect.getsource(trainer_class(stock))
        if size == "S":
            network = build_network(model_of(plans, CONFIGURATION, dataset_json), trainer=stock)
            assert primus_kwargs(network, PATCH) == kwargs
        cost = network_cost(model_of(made, CONFIGURATION, dataset_json))
        weights = [{name: tuple(t.shape) for name, t in n.state_dict().items()} for n in (ours, theirs)]
        assert weights[0] == weights[1]
        assert cost["parameters"] == pytest.approx(millions * 1e6, rel=0.005)
        folder = student_folder(DATASET, "nnUNetPlans", CONFIGURATION, spec, CONTROL)
        assert folder.name.startswith(f"{stock}__nnUNetPlans_primus{size}_a0")
        assert patch_problems({**made["configurations"][CONFIGURATION], "patch_size": [16, 20, 16]})

    def test_stock_size_loads_in_stock_nnunet(self, world, tmp_path, stock):
        """nnU-Net's own Primus S on a patch of 16^3, with nothing of ours importable."""
        folder = train_student(make_job(StudentSpec(size="S")), validate=False)
        assert folder.parent.name.startswith("nnUNet_Primus_S_Trainer__nnUNetPlans_primusS_a0")
        agrees_with_stock(folder, tmp_path, stock)
