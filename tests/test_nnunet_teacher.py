"""The teacher against nnU-Net's own predictor, and what it refuses."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from scipy.special import softmax

from fastnnunet.engines.base import Settings
from fastnnunet.engines.labelling import resolve_device, resolve_engine, resolve_precision
from fastnnunet.engines.torch import TorchEngine, cpu_has_bf16
from fastnnunet.errors import BackendError, CorruptError, MismatchError, NotFoundError, SpecError
from fastnnunet.geometry.chunked_window import chunked_window
from fastnnunet.geometry.grid import tile_slices
from fastnnunet.geometry.padding import centre_padding, inner_slices
from fastnnunet.nnunet.files.checkpoint import load_checkpoint, weights_digest
from fastnnunet.nnunet.files.paths import resolve_dataset
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from fastnnunet.teachers.nnunet import LoadedTeacher
from tests.test_trt_backend import cuda, rtx  # noqa: F401 (fixtures)
from tests.tiny import DATASET

SPEC = TeacherSpec(dataset="998")
ONE_FOLD = TeacherSpec(dataset="998", folds=(2,))  # networks are compiled one by one, in seconds
FP32 = CacheSpec(precision="fp32")


def nnunet_logits(folder, image_CZYX, folds, mirroring=True):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds)
        return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image_CZYX)).float().numpy()


def teacher_logits(teacher, image_CZYX, folds, chunk_zyx=None, per_fold=None):
    """All blocks put together."""
    chunk_zyx = chunk_zyx or image_CZYX.shape[1:]
    out = np.full((teacher.num_heads, *image_CZYX.shape[1:]), np.nan, np.float32)
    for number, block in teacher.load(threads=1).blocks(image_CZYX, folds, chunk_zyx, per_fold):
        inside = tuple(slice(n * c, (n + 1) * c) for n, c in zip(number, chunk_zyx, strict=True))
        assert np.isnan(out[(slice(None), *inside)]).all(), f"chunk {number} came twice"
        out[(slice(None), *inside)] = block
    assert np.isfinite(out).all()
    return out


def well_weighted(shape_zyx, patch_size):
    """Voxels where nnU-Net's half-precision sums of weighted logits keep their digits: not the corners of tiles."""
    weight = np.zeros([max(n, p) for n, p in zip(shape_zyx, patch_size, strict=True)])
    for inside in tile_slices(weight.shape, patch_size, 0.5):
        weight[inside] += compute_gaussian(patch_size, value_scaling_factor=10, device=torch.device("cpu")).numpy()
    out = weight[inner_slices(shape_zyx, centre_padding(shape_zyx, patch_size))] > 1e-4
    assert out.mean() > 0.75
    return out


@pytest.mark.parametrize("engine", ["torch", "openvino", "onnxruntime"])
@pytest.mark.parametrize(("folds", "mirroring"), [((1, 3), True), ((2,), False)])
def test_logits_equal_nnunets(world, folds, mirroring, engine):
    spec = TeacherSpec(dataset="998", folds=folds)
    cases, teacher, _ = open_teacher(spec, dataclasses.replace(FP32, mirroring=mirroring, engine=engine))
    image_CZYX = cases.image_CZYX(cases.case_ids[0])
    expected = nnunet_logits(teacher.folder, image_CZYX, folds, mirroring)
    got = teacher_logits(teacher, image_CZYX, folds)
    inner = well_weighted(image_CZYX.shape[1:], teacher.patch_size)
    np.testing.assert_allclose(got[:, inner], expected[:, inner], rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("chunk_zyx", [(32, 32, 32), (7, 11, 64), (1, 100, 100)])
def test_chunks_change_nothing(world, chunk_zyx):
    cases, teacher, _ = open_teacher(SPEC, dataclasses.replace(FP32, engine="torch", mirroring=False))
    image_CZYX = np.tile(cases.image_CZYX(cases.case_ids[0]), (1, 2, 1, 1))  # several tiles along z
    got = teacher_logits(teacher, image_CZYX, (0, 1), chunk_zyx)
    np.testing.assert_array_equal(got, teacher_logits(teacher, image_CZYX, (0, 1)))


def test_pooled_probabilities_are_the_mean_of_the_folds(world):
    cases, teacher, _ = open_teacher(SPEC, dataclasses.replace(FP32, engine="torch", mirroring=False))
    one_tile = tuple(slice(0, p) for p in teacher.patch_size)
    image_CZYX = cases.image_CZYX(cases.case_ids[0])[(slice(None), *one_tile)]
    got = teacher_logits(teacher, image_CZYX, (0, 1, 2), per_fold=lambda logits: softmax(logits / 2, axis=0))
    folds = [softmax(nnunet_logits(teacher.folder, image_CZYX, (f,), False) / 2, axis=0) for f in (0, 1, 2)]
    inner = well_weighted(image_CZYX.shape[1:], teacher.patch_size)
    np.testing.assert_allclose(got[:, inner], np.mean(folds, axis=0)[:, inner], atol=2e-3)
    logits = [nnunet_logits(teacher.folder, image_CZYX, (f,), False) for f in (0, 1, 2)]
    assert not np.allclose(got[:, inner], softmax(np.mean(logits, axis=0) / 2, axis=0)[:, inner], atol=2e-3)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_bf16_keeps_labels(world, engine):
    cases, teacher, _ = open_teacher(ONE_FOLD, CacheSpec(precision="bf16", engine=engine, mirroring=False))
    image_CZYX = cases.image_CZYX(cases.case_ids[0])
    folds = teacher.folds  # and no mirrors: torch takes minutes for more where the CPU has no bf16
    got = teacher_logits(teacher, image_CZYX, folds)
    expected = nnunet_logits(teacher.folder, image_CZYX, folds, False)
    assert (got.argmax(0) == expected.argmax(0)).mean() > 0.98
    if engine == "torch" or cpu_has_bf16():  # OpenVINO computes in fp32 where the CPU has no bf16
        fp32 = teacher_logits(dataclasses.replace(teacher, precision="fp32"), image_CZYX, folds)
        assert not np.array_equal(got, fp32), "bf16 was asked for and fp32 was run"


def test_tensorrt_labels_as_pytorch_does(world, rtx, monkeypatch):  # noqa: F811
    """On the simulated GPU, with engines that are built of the teacher's own ONNX."""
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(world / "home"))
    monkeypatch.setattr("fastnnunet.engines.labelling.cuda_device_count", lambda: 1)
    monkeypatch.setattr(
        "fastnnunet.engines.trt.build.build_plan",
        lambda graph, key, library: rtx.plan(graph.SerializeToString(), key.architecture, key.max_batch),
    )
    two_folds = TeacherSpec(dataset="998", folds=(0, 3))  # an export takes seconds
    cases, teacher, _ = open_teacher(two_folds, dataclasses.replace(FP32, engine="tensorrt"))
    image_CZYX = cases.image_CZYX(cases.case_ids[0])
    got = teacher_logits(teacher, image_CZYX, (0, 3))
    expected = teacher_logits(dataclasses.replace(teacher, engine="torch"), image_CZYX, (0, 3))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    engines = {path.name for path in (world / "home" / "engines").iterdir()}
    assert len(engines) == len(teacher.folds)
    monkeypatch.setattr("fastnnunet.engines.trt.build.build_plan", None)  # the same networks give the same keys
    dataclasses.replace(teacher, folds=(3,)).load(threads=1)
    assert {path.name for path in (world / "home" / "engines").iterdir()} == engines


def test_a_teacher_that_needs_a_gpu_is_refused_before_it_is_read(world, rtx, monkeypatch):  # noqa: F811
    monkeypatch.setattr("fastnnunet.engines.labelling.cuda_device_count", lambda: 0)
    _, teacher, _ = open_teacher(SPEC, CacheSpec(engine="tensorrt"))
    assert teacher.precision == "fp16"
    for file in world.rglob("checkpoint_final.pth"):
        file.write_bytes(b"")
    with pytest.raises(BackendError, match="engine tensorrt needs an NVIDIA GPU"):
        teacher.load(threads=1)


@pytest.mark.parametrize(
    ("engine", "precision", "expected"),
    [
        ("onnxruntime", "auto", "fp32"),
        ("tensorrt", "auto", "fp16"),
        ("tensorrt", "fp32", "fp32"),
        ("torch", "bf16", "bf16"),
        ("torch", "auto", "bf16" if cpu_has_bf16() else "fp32"),
        ("openvino", "auto", "bf16" if cpu_has_bf16() else "fp32"),
    ],
)
def test_precision_of_an_engine(engine, precision, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision(precision, engine) == expected


@pytest.mark.parametrize(("engine", "precision"), [("onnxruntime", "bf16"), ("tensorrt", "bf16"), ("torch", "fp16")])
def test_a_precision_the_engine_does_not_have(engine, precision):
    with pytest.raises(SpecError, match=f"precision: got {precision} with engine: {engine}, expected auto or fp32"):
        resolve_precision(precision, engine)


def test_devices_of_engines(monkeypatch):
    monkeypatch.setattr("fastnnunet.engines.labelling.cuda_device_count", lambda: 1)
    monkeypatch.setattr("fastnnunet.engines.labelling.why_no_cuda", lambda name: None if name == "torch" else "no")
    assert str(resolve_device("torch")) == str(resolve_device("tensorrt")) == "cuda"
    assert str(resolve_device("onnxruntime")) == str(resolve_device("openvino")) == "cpu"


@pytest.mark.parametrize(("engine", "mirroring"), [("openvino", False), ("torch", True)])
def test_threads_and_tiles_under_way_together_change_nothing(world, engine, mirroring, monkeypatch):
    two_folds = TeacherSpec(dataset="998", folds=(1, 2))
    cases, teacher, _ = open_teacher(two_folds, dataclasses.replace(FP32, engine=engine, mirroring=mirroring))
    image_CZYX = np.tile(cases.image_CZYX(cases.case_ids[0]), (1, 2, 1, 1))  # several tiles along z
    shape = image_CZYX.shape[1:]
    assert len(chunked_window(shape, teacher.patch_size, teacher.step_size, shape).tiles) > 2
    together = [next(teacher.load(n).blocks(image_CZYX, (1, 2), shape))[1] for n in (1, 2)]
    monkeypatch.setattr("fastnnunet.teachers.nnunet.APART_BYTES", 0)
    assert teacher.tiles_at_once == 1
    alone = next(teacher.load(2).blocks(image_CZYX, (1, 2), shape))[1]
    np.testing.assert_array_equal(together[0], alone)
    np.testing.assert_array_equal(together[1], alone)


class SideBySide:
    """An engine that answers as soon as `threads` rows of all engines of a teacher are with it at once."""

    def __init__(self, num_heads, most, rows):
        self.num_heads, self.most, self.rows = num_heads, most, rows

    def run(self, batch_NCX):
        self.rows.append(len(batch_NCX))
        if len(batch_NCX) < self.most.parties:
            self.most.wait(timeout=60)
        return np.zeros((len(batch_NCX), self.num_heads, *batch_NCX.shape[2:]), np.float32)


class TestAllThreadsAreBusy:
    """Without mirrors a tile is one patch, of one thread: labelling took one core, whatever it was given."""

    @pytest.fixture
    def labelled(self, world):
        cases, teacher, _ = open_teacher(SPEC, dataclasses.replace(FP32, engine="openvino", mirroring=False))
        case_CZYX = cases.image_CZYX(cases.case_ids[0])

        def label(threads, folds, copies=1):
            rows, most = [], threading.Barrier(threads)
            engines = {fold: SideBySide(teacher.num_heads, most, rows) for fold in folds}
            loaded = LoadedTeacher(teacher, engines, teacher.num_heads, teacher.mirror_axes(), threads)
            image_CZYX = np.tile(case_CZYX, (1, copies, 1, 1))[:, : copies * teacher.patch_size[0]]
            image_CZYX = image_CZYX[:, :, : teacher.patch_size[1], : teacher.patch_size[2]]
            list(loaded.blocks(image_CZYX, folds, image_CZYX.shape[1:]))
            return rows

        return label

    def test_by_folds_where_there_is_one_tile(self, labelled):
        assert labelled(2, (0, 1, 2, 3)) == [1] * 4
        assert labelled(4, (0, 1, 2, 3)) == [1] * 4

    def test_by_tiles_where_there_is_one_fold(self, labelled):
        assert labelled(2, (0,), copies=2) == [3]

    def test_one_thread_never_waits_for_another(self, labelled):
        assert labelled(1, (0, 1), copies=2) == [3, 3]


def test_a_batch_too_large_for_the_device_is_halved():
    seen = []

    class Small(torch.nn.Module):
        def forward(self, x):
            seen.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("no room")
            return 2 * x

    engine = TorchEngine(Small(), Settings(threads=1))
    tiles = np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1, 1)
    np.testing.assert_array_equal(engine.run(tiles), 2 * tiles)
    assert seen == [8, 4, 2, 2, 2, 2]
    engine.run(tiles[:2])
    assert seen[6:] == [2]


THREADS = """
import os, numpy as np, torch
from fastnnunet.engines.base import LiveNetwork, Settings
from fastnnunet.engines.openvino import OpenVINOEngine

class Watched:  # looks at the threads while a tile is computed: pinning shows at no other time
    def __init__(self, queue):
        self.queue = queue

    def __getattr__(self, name):
        return getattr(self.queue, name)

    def set_callback(self, keep):
        def watch(request, number):
            seen.update(len(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task"))
            keep(request, number)
        self.queue.set_callback(watch)

seen = set()
network = torch.nn.Sequential(torch.nn.Conv3d(1, 16, 3), torch.nn.Conv3d(16, 16, 3), torch.nn.Conv3d(16, 2, 3))
network = LiveNetwork(module=network, channels=1, num_heads=2, patch_size=(24, 24, 24), to_onnx=bytes)
engine = OpenVINOEngine.of_network(network, Settings(threads=1, apart=True))
engine._queue = Watched(engine._queue)
engine.run(np.zeros((12, 1, 24, 24, 24), np.float32))
print(sorted(seen), len(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="thread affinities are those of Linux")
def test_threads_are_not_pinned():
    """Two workers with a thread each would otherwise compute on the same core."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    cpus = len(os.sched_getaffinity(0))
    assert done.stdout.splitlines()[-1] == f"[{cpus}] {cpus}"


def test_deviation_is_that_of_nnunets_predictor(world):
    """A patch from the middle of each case, by each fold in turn."""
    cases, teacher, _ = open_teacher(SPEC, CacheSpec(precision="bf16", engine="torch"))
    images = [cases.image_CZYX(case) for case in cases.case_ids[:3]]
    nothing = np.full_like(images[0], 0.3)  # instance norm makes noise of rounding there
    record = teacher.load(1).deviation([nothing, *images], 2.0)
    equal, differences = [], []
    for image_CZYX, fold in zip(images, (*teacher.folds, *teacher.folds), strict=False):
        patch_CZYX = image_CZYX
        for axis, size in enumerate(teacher.patch_size, start=1):
            start = max(0, (image_CZYX.shape[axis] - size) // 2)
            patch_CZYX = patch_CZYX.take(range(start, min(start + size, image_CZYX.shape[axis])), axis)
        got = teacher_logits(teacher, patch_CZYX, (fold,))
        expected = nnunet_logits(teacher.folder, patch_CZYX, (fold,))
        equal.append((got.argmax(0) == expected.argmax(0)).mean())
        differences.append(np.abs(softmax(got / 2, axis=0) - softmax(expected / 2, axis=0)))
    assert record["patches"] == 3
    assert record["argmax_equal"] == pytest.approx(np.mean(equal))
    assert record["mean_abs_difference"] == pytest.approx(np.mean([d.mean() for d in differences]), rel=1e-3)
    assert record["max_abs_difference"] == pytest.approx(max(d.max() for d in differences), rel=1e-3)


def test_memory_follows_shape_and_heads(world):
    _, teacher, _ = open_teacher(SPEC, FP32)
    small, large = (teacher.memory_bytes((n, n, n), (32, 32, 32)) for n in (64, 256))
    assert 4 * teacher.num_heads * 16 * 32 * 32 < small < large
    # what waits is a part of the volume: less than the sums of all of it would take
    assert large < 4 * teacher.num_heads * 256**3


def test_identity_follows_the_weights_and_nothing_else(world):
    _, teacher, _ = open_teacher(SPEC, FP32)
    before = teacher.identity()
    path = teacher.folder / "fold_3" / "checkpoint_final.pth"
    checkpoint = load_checkpoint(path)
    checkpoint["logging"] = {"more": [1.0]}
    torch.save(checkpoint, path)
    assert open_teacher(SPEC, FP32)[1].identity() == before
    checkpoint["network_weights"]["decoder.seg_layers.0.bias"][0] += 1e-3
    torch.save(checkpoint, path)
    after = open_teacher(SPEC, FP32)[1].identity()
    assert teacher.identity() == before, "what was read is read once"
    assert [f for f in "01234" if after["checkpoints"][f] != before["checkpoints"][f]] == ["3"]


def test_weights_digest_sees_shape_and_dtype():
    zeros = torch.zeros(4)
    variants = [{"w": zeros}, {"w": zeros.view(2, 2)}, {"w": zeros.half()}, {"v": zeros}]
    assert len({weights_digest(v) for v in variants}) == len(variants)


def test_unseen_folds_follow_nnunets_split(world):
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    cases, teacher, _ = open_teacher(SPEC, FP32)
    for fold, split in enumerate(generate_crossval_split(sorted(cases.case_ids), seed=12345, n_splits=5)):
        for case in split["val"]:
            assert teacher.unseen_folds(case) == (fold,)


def test_case_digest_is_of_the_values(world):
    cases, _, _ = open_teacher(SPEC, FP32)
    first, second = cases.case_ids[:2]
    assert cases.digest(first) == cases.digest(first) != cases.digest(second)


class TestRefusals:
    def test_unknown_dataset(self, world):
        with pytest.raises(NotFoundError, match=f"(?s)unknown data set '77'.*{DATASET}"):
            resolve_dataset("77")

    def test_missing_fold(self, world):
        (world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/fold_2/checkpoint_final.pth").unlink()
        with pytest.raises(NotFoundError, match=r"(?s)fold\(s\) 2 have no.*0, 1, 3, 4"):
            open_teacher(SPEC, FP32)

    def test_a_fold_that_is_still_training(self, world):
        fold = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/fold_2"
        (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
        with pytest.raises(NotFoundError, match=r"(?s)fold\(s\) 2 have no.*still training, or stopped early: 2"):
            open_teacher(SPEC, FP32)

    def test_unset_variable(self, world, monkeypatch):
        monkeypatch.delenv("nnUNet_results")
        with pytest.raises(NotFoundError, match="nnUNet_results is not set"):
            open_teacher(SPEC, FP32)

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
    def test_truncated_checkpoint(self, world, keep):
        path = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/fold_1/checkpoint_final.pth"
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        _, teacher, _ = open_teacher(SPEC, FP32)
        with pytest.raises(CorruptError, match=r"(?s)fold_1/checkpoint_final\.pth cannot be read"):
            teacher.load(threads=1)

    def test_checkpoint_that_runs_code(self, tmp_path):
        import pickle

        class Evil:
            def __reduce__(self):
                return print, ("ran",)

        torch.save(
            {"network_weights": Evil(), "init_args": {}, "trainer_name": ""}, tmp_path / "c.pth", pickle_module=pickle
        )
        with pytest.raises(CorruptError):
            load_checkpoint(tmp_path / "c.pth")

    def test_plans_that_do_not_fit(self, world):
        path = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/plans.json"
        path.write_text(path.read_text().replace("[16, 32, 32]", "[16, 24, 32]"))
        _, teacher, _ = open_teacher(SPEC, FP32)
        with pytest.raises(MismatchError, match="do not fit the checkpoint"):
            teacher.load(threads=1)

    def test_data_preprocessed_with_other_plans(self, world):
        path = world / "preprocessed" / DATASET / "nnUNetPlans.json"
        path.write_text(path.read_text().replace("CTNormalization", "ZScoreNormalization"))
        with pytest.raises(MismatchError, match="normalization_schemes"):
            open_teacher(SPEC, FP32)

    def test_out_of_fold_needs_a_fold_for_every_case(self, world):
        with pytest.raises(MismatchError, match="out_of_fold"):
            open_teacher(TeacherSpec(dataset="998", folds=(0,)), CacheSpec(policy="out_of_fold"))

    def test_an_engine_that_is_not_installed(self, monkeypatch):
        import importlib.util

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert resolve_engine("auto", "x.PlainConvUNet") == "torch"
        with pytest.raises(SpecError, match="not installed"):
            resolve_engine("openvino", "x.PlainConvUNet")

    def test_no_folds(self):
        with pytest.raises(SpecError, match="folds"):
            TeacherSpec(dataset="998", folds=())

    def test_cascade(self, world):
        import json

        path = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/plans.json"
        plans = json.loads(path.read_text())
        plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
        path.write_text(json.dumps(plans))
        with pytest.raises(SpecError, match="3d_fullres is a cascade stage, it needs the predictions of 3d_lowres"):
            open_teacher(SPEC, FP32)


def test_one_timed_patch_takes_time(world):
    _, teacher, _ = open_teacher(ONE_FOLD, FP32)
    assert teacher.load(threads=1).seconds_per_patch() > 0
