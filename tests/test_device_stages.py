"""Predictions whose every step is on a GPU, here one whose kernels run on the CPU (tests/fake_kernels.py): labels are
those of the same engines with everything else on the CPU, and the image goes over once, the labels come back once.

Nothing of this has run on a real GPU: pipelines/measure/predict/device_campaign.py is there to do it.
"""

import ctypes
import gc
import inspect
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnnunet.engines import registry
from fastnnunet.engines.base import RunsOnDevice
from fastnnunet.engines.cuda.gpu import Gpu
from fastnnunet.engines.onnxruntime import OnnxRuntimeEngine
from fastnnunet.engines.tensorrt import TensorRTEngine
from fastnnunet.engines.trt import library as seam
from fastnnunet.engines.trt.cuda import Cuda
from fastnnunet.engines.trt.store import EngineKey, write_engine
from fastnnunet.errors import BackendError, ImageError, NoMemoryError
from fastnnunet.nnunet.onnx import to_onnx
from fastnnunet.runtime import loaded
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.locator import Locator
from fastnnunet.specs.one_pass import OnePass
from tests.bundles import (
    DEFAULT_RESAMPLING,
    NO_RESAMPLING,
    TORCH_RESAMPLING,
    Toy,
    _network,
    make_toy_model,
    smooth_noise,
    write_image,
)
from tests.fake_gpu import FakeTensorRT
from tests.fake_kernels import FakeCudaWithKernels, use_fake_cuda

CUBIC = {**DEFAULT_RESAMPLING, "probabilities": DEFAULT_RESAMPLING["data"]}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


@dataclass(kw_only=True)
class Scenario:
    toy: Toy
    shape: tuple[int, ...] = (18, 23, 29)  # z, y, x as read
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    border: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)  # of the bundle's spec
    folds: int = 1


SCENARIOS = {
    "window": Scenario(toy=Toy()),
    "smaller than the patch": Scenario(toy=Toy(), shape=(9, 11, 24)),
    "cropped, resampled": Scenario(toy=Toy(schemes=["CTNormalization"]), spacing=(0.8, 1.3, 1.1), border=3),
    "separate z": Scenario(toy=Toy(), spacing=(4.0, 0.9, 0.8), shape=(8, 23, 29)),
    "torch": Scenario(toy=Toy(resampling=TORCH_RESAMPLING), spacing=(1.2, 0.9, 0.8)),
    "no resampling": Scenario(toy=Toy(resampling=NO_RESAMPLING), spacing=(1.2, 0.9, 0.8)),
    "cubic logits": Scenario(toy=Toy(resampling=CUBIC), spacing=(1.2, 0.9, 0.8)),
    "transposed": Scenario(toy=Toy(transpose=((2, 0, 1), (1, 2, 0))), spacing=(1.2, 1.0, 0.8), border=2),
    "regions": Scenario(toy=Toy(labels=REGIONS, regions_class_order=[1, 2]), spacing=(0.9, 1.1, 1.0)),
    "mirrors": Scenario(toy=Toy(mirror_axes=(0, 1, 2)), shape=(17, 22, 24)),
    "channels": Scenario(
        toy=Toy(channels=3, schemes=["RescaleTo01Normalization", "NoNormalization", "RGBTo01Normalization"])
    ),
    "2d with mirrors": Scenario(
        toy=Toy(dims=2, spacing=(1.0, 1.0), mirror_axes=(0, 1)), shape=(5, 37, 41), spacing=(3.0, 0.8, 1.1)
    ),
    "masked": Scenario(toy=Toy(use_mask=True), border=3),  # preprocessed on the CPU
    "ensemble": Scenario(toy=Toy(), folds=2),
    "step": Scenario(toy=Toy(), settings={"step_size": 0.3, "use_gaussian": False}),
    "one pass": Scenario(
        toy=Toy(mirror_axes=(2,)),
        shape=(18, 40, 49),
        settings={"passes": 2, "memory_limit": "2G"},
        changes={"one_pass": OnePass(multiples=(4, 4, 4), halo=(4, 4, 4), halo_is="exact", bytes_per_voxel=200.0)},
    ),
}
STREAMED = ["cropped, resampled", "torch", "transposed", "regions", "2d with mirrors"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCudaWithKernels:
    return use_fake_cuda(monkeypatch)


@pytest.fixture
def tensorrt(cuda: FakeCudaWithKernels, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    seam._load.cache_clear()
    yield fake
    seam._load.cache_clear()


def engines(scenario: Scenario, where: Path, fake: FakeTensorRT) -> tuple[Any, list[TensorRTEngine]]:
    """The spec, and an engine for each fold, whose weights differ."""
    import onnx

    model = make_toy_model(scenario.toy, where)
    spec = replace(model.spec, **scenario.changes)
    made = []
    for fold in range(scenario.folds):
        network = onnx.load(model.bundle / "model.onnx")
        if spec.one_pass:
            in_torch, _ = _network(3, scenario.toy.channels, scenario.toy.heads)
            network = to_onnx(in_torch, scenario.toy.channels, spec.patch_size, spec.one_pass.multiples)
        for tensor in network.graph.initializer:
            if fold and "seg_layers" in tensor.name and tensor.name.endswith("weight"):
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), tensor.name))
        key = EngineKey(
            model_sha256=str(fold), precision="fp32", library=fake.__name__, library_version=fake.__version__,
            architecture="sm86", max_batch=3, input_shape=(scenario.toy.channels, *spec.patch_size),
            output_shape=(spec.num_heads, *spec.patch_size),
        )  # fmt: skip
        if spec.one_pass:
            largest = (20, 44, 52)
            key = replace(
                key, input_shape=(1, *largest), output_shape=(spec.num_heads, *largest), smallest_tile=spec.patch_size
            )
        plan = fake.plan(network.SerializeToString(), "sm86", 3)
        stored = write_engine(where / f"engines{fold}", key, plan, {})
        library = seam.find_library("tensorrt_rtx")
        made.append(TensorRTEngine(library, stored, Cuda(), "fp32"))
    return spec, made


def image_of(scenario: Scenario) -> np.ndarray:
    colours = "RGBTo01Normalization" in (scenario.toy.schemes or ())
    images = [smooth_noise(scenario.shape, seed, border=scenario.border) for seed in range(scenario.toy.channels)]
    return np.clip(np.stack(images), 0, 255) if colours else np.stack(images)


def labels_of(bundle: LoadedBundle, scenario: Scenario, image: np.ndarray, monkeypatch: Any, **arguments: Any) -> Any:
    """By the CPU and by the GPU."""
    both = []
    for place in ("cpu", "gpu"):
        monkeypatch.setenv(loaded.STAGES_VARIABLE, place)
        bundle._device.clear()
        both.append(bundle.predict_array(image, {"spacing": list(scenario.spacing)}, **arguments))
    assert both[1].segmentation_ZYX.dtype == both[0].segmentation_ZYX.dtype
    np.testing.assert_array_equal(both[1].segmentation_ZYX, both[0].segmentation_ZYX)
    assert both[1].properties == both[0].properties
    return both


@pytest.mark.parametrize("name", SCENARIOS)
def test_labels_are_those_of_the_cpu(
    name: str, tmp_path: Path, tensorrt: FakeTensorRT, cuda: FakeCudaWithKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = SCENARIOS[name]
    spec, made = engines(scenario, tmp_path, tensorrt)
    bundle = LoadedBundle(spec, made, threads=1, **scenario.settings)
    image = image_of(scenario)
    labels, _ = labels_of(bundle, scenario, image, monkeypatch)
    counts = np.bincount(labels.segmentation_ZYX.ravel())
    assert np.count_nonzero(counts) >= 2, "the comparison means nothing"
    assert "label_logits" in cuda.started or "label_head" in cuda.started
    assert ("nonzero_box" in cuda.started) == (name != "masked")


@pytest.mark.parametrize("name", STREAMED)
def test_chunk_by_chunk(
    name: str, tmp_path: Path, tensorrt: FakeTensorRT, cuda: FakeCudaWithKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "STREAM_BYTES", 0)
    scenario = SCENARIOS[name]
    spec, made = engines(scenario, tmp_path, tensorrt)
    labels_of(LoadedBundle(spec, made, threads=1), scenario, image_of(scenario), monkeypatch)
    assert cuda.started.count("label_logits") > 1


@pytest.mark.parametrize("name", ["cropped, resampled", "regions", "ensemble"])
def test_probabilities(name: str, tmp_path: Path, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are fetched for them."""
    scenario = SCENARIOS[name]
    spec, made = engines(scenario, tmp_path, tensorrt)
    bundle = LoadedBundle(spec, made, threads=1)
    both = labels_of(bundle, scenario, image_of(scenario), monkeypatch, return_probabilities=True)
    np.testing.assert_array_equal(both[1].probabilities_HZYX, both[0].probabilities_HZYX)


def test_the_image_goes_over_once_and_the_labels_come_back_once(
    tmp_path: Path, tensorrt: FakeTensorRT, cuda: FakeCudaWithKernels
) -> None:
    """All else that is copied is a box of six numbers, limits of logits, tables and weights of a tile."""
    scenario = SCENARIOS["cropped, resampled"]
    spec, made = engines(scenario, tmp_path, tensorrt)
    bundle = LoadedBundle(spec, made, threads=1)
    image = image_of(scenario)
    bundle.predict_array(image, {"spacing": list(scenario.spacing)})
    cuda.uploads.clear(), cuda.downloads.clear(), cuda.started.clear()
    launches = cuda.launches
    bundle.predict_array(image, {"spacing": list(scenario.spacing)})
    assert cuda.uploads.count(image.nbytes) == 1
    voxels = int(np.prod(spec.patch_size))
    assert sorted(n for n in cuda.uploads if n > 20 * 100) == sorted([2 * voxels, 4 * voxels, image.nbytes])
    assert sorted(cuda.downloads) == [24, 32, image.size]
    assert cuda.launches - launches == cuda.started.count("gather") > 1  # the network as a CUDA graph, tile by tile


def test_a_locator_keeps_its_case_on_the_cpu_whatever_was_done_before(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    spec, made = engines(SCENARIOS["window"], tmp_path, tensorrt)
    found = Locator(
        model_file="locator.onnx", factor=(2, 2, 2), patch_size=(16, 16, 16), architecture={}, threshold=0.5,
        margin_mm=1.0,
    )  # fmt: skip
    everywhere = LoadedBundle(replace(spec, locator=found), made, threads=1, locate=False)
    image, properties = np.zeros((1, 18, 23, 29), np.float32), {"spacing": [1.0, 1.0, 1.0]}
    settings: dict[str, Any] = {"step_size": None, "mirroring": True, "use_gaussian": True}
    assert not isinstance(everywhere.prepare(image, properties).data_CZYX, np.ndarray)
    located = everywhere.with_settings(**settings)
    assert isinstance(located.prepare(image.copy(), properties).data_CZYX, np.ndarray)
    again = located.with_settings(**settings, locate=False)
    assert not isinstance(again.prepare(image, properties).data_CZYX, np.ndarray)


def test_nothing_is_left_on_the_gpu(tmp_path: Path, tensorrt: FakeTensorRT, cuda: FakeCudaWithKernels) -> None:
    scenario = SCENARIOS["cropped, resampled"]
    spec, made = engines(scenario, tmp_path, tensorrt)
    bundle = LoadedBundle(spec, made, threads=1)
    image = image_of(scenario)

    def left() -> dict[str, int]:
        gc.collect()
        for stream in list(cuda.streams):
            cuda.cudaStreamSynchronize(stream)
        return cuda.alive()

    bundle.predict_array(image, {"spacing": list(scenario.spacing)})
    before = left()
    for _ in range(2):
        bundle.predict_array(image, {"spacing": list(scenario.spacing)})
    assert left() == before
    assert before["device"] == 3  # the engine's buffers and working memory
    del bundle, made
    assert left()["device"] == 0


def test_files_overlap(tmp_path: Path, tensorrt: FakeTensorRT, cuda: FakeCudaWithKernels, monkeypatch: Any) -> None:
    """Reading, network and writing in threads of their own, each case on its stream."""
    scenario = SCENARIOS["cropped, resampled"]
    spec, made = engines(scenario, tmp_path / "model", tensorrt)
    for seed in range(3):
        write_image(
            smooth_noise(scenario.shape, seed, border=2), tmp_path / "in" / f"c{seed}_0000.nii.gz", (1.1, 1.3, 0.8)
        )
    for place in ("cpu", "gpu"):
        monkeypatch.setenv(loaded.STAGES_VARIABLE, place)
        results = Predictor(spec, made, threads=1).predict_files(tmp_path / "in", tmp_path / place)
        assert [result.error for result in results] == [None] * 3
    for seed in range(3):
        name = f"c{seed}.nii.gz"
        assert (tmp_path / "gpu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()
    assert cuda.started.count("nonzero_box") == 3


class TestTrouble:
    def test_logits_beyond_float16(
        self, tmp_path: Path, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scenario = SCENARIOS["window"]
        spec, made = engines(scenario, tmp_path, tensorrt)
        image, properties = image_of(scenario), {"spacing": [1.0, 1.0, 1.0]}
        (engine,) = made
        real = engine._engine.session.run
        engine._engine.session = type("Session", (), {"run": lambda _, *a: [1e5 * logits for logits in real(*a)]})()
        messages = []
        for place in ("cpu", "gpu"):
            monkeypatch.setenv(loaded.STAGES_VARIABLE, place)
            with pytest.raises(BackendError, match="left the range of float16") as caught:
                LoadedBundle(spec, made, threads=1).predict_array(image, properties)
            messages.append(str(caught.value).split(":")[0])
        assert messages[0] == messages[1]

    def test_colours_that_are_none(self, tmp_path: Path, tensorrt: FakeTensorRT) -> None:
        scenario = SCENARIOS["channels"]
        spec, made = engines(scenario, tmp_path, tensorrt)
        image = image_of(scenario)
        image[2, 0, 0, 0] = 300
        with pytest.raises(ImageError, match="colour values from 0 to 255, got 0 to 300"):
            LoadedBundle(spec, made).predict_array(image, {"spacing": [1.0, 1.0, 1.0]})

    def test_a_gpu_without_enough_memory(
        self, tmp_path: Path, tensorrt: FakeTensorRT, cuda: FakeCudaWithKernels
    ) -> None:
        scenario = SCENARIOS["window"]
        spec, made = engines(scenario, tmp_path, tensorrt)
        image = image_of(scenario)
        cuda.left_bytes = image.nbytes - 1
        with pytest.raises(NoMemoryError, match="the GPU has not enough memory"):  # one pass has smaller tiles then
            LoadedBundle(spec, made).predict_array(image, {"spacing": [1.0, 1.0, 1.0]})

    def test_kernels_that_cannot_be_had_leave_the_rest_on_the_cpu(
        self, tmp_path: Path, tensorrt: FakeTensorRT, cuda: FakeCudaWithKernels, monkeypatch: Any, caplog: Any
    ) -> None:
        def refuse(architecture: str) -> bytes:
            raise BackendError("NVRTC is missing")

        monkeypatch.setattr("fastnnunet.engines.cuda.gpu.kernel_code", refuse)
        scenario = SCENARIOS["window"]
        spec, made = engines(scenario, tmp_path, tensorrt)
        bundle = LoadedBundle(spec, made, threads=1)
        bundle.predict_array(image_of(scenario), {"spacing": [1.0, 1.0, 1.0]})
        assert cuda.started == []
        assert caplog.text.count("what comes before and after the network stays on the CPU: NVRTC is missing") == 1


class FakeBinding:
    """Of a session on CUDA: addresses on the GPU."""

    def __init__(self, cuda: FakeCudaWithKernels) -> None:
        self.cuda, self.bound = cuda, {}

    def bind_input(self, name: str, kind: str, device: int, dtype: Any, shape: Any, address: int) -> None:
        self._bind("input", name, kind, device, dtype, shape, address)

    def bind_output(self, name: str, kind: str, device: int, dtype: Any, shape: Any, address: int) -> None:
        self._bind("output", name, kind, device, dtype, shape, address)

    def _bind(self, what: str, name: str, kind: str, device: int, dtype: Any, shape: Any, address: int) -> None:
        assert (kind, device, dtype) == ("cuda", 0, np.float32)
        count = int(np.prod(shape))
        self.cuda.check("device", address, 4 * count)
        array = np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)
        self.bound[what] = name, array

    def synchronize_outputs(self) -> None: ...


def test_onnxruntime_on_the_gpu(tmp_path: Path, cuda: FakeCudaWithKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and logits stay on the GPU there too; against the same on the CPU."""
    import onnxruntime

    real = onnxruntime.InferenceSession

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            self.real = real(path, providers=["CPUExecutionProvider"])

        def io_binding(self) -> FakeBinding:
            return FakeBinding(cuda)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def run_with_iobinding(self, binding: FakeBinding) -> None:
            (name, batch), (output, logits) = binding.bound["input"], binding.bound["output"]
            assert np.isfinite(batch).all(), "the network ran before the batch was there"
            logits[...] = self.real.run([output], {name: batch})[0]

        def __getattr__(self, name: str) -> Any:
            return (lambda: None) if name == "disable_fallback" else getattr(self.real, name)

    scenario = SCENARIOS["2d with mirrors"]
    model = make_toy_model(scenario.toy, tmp_path)
    properties, image = {"spacing": list(scenario.spacing)}, image_of(scenario)
    on_cpu = LoadedBundle.load(model.bundle, "onnxruntime", threads=1)
    assert isinstance(on_cpu.backend, RunsOnDevice)
    expected = on_cpu.predict_array(image, properties).segmentation_ZYX

    monkeypatch.setattr(registry, "cuda_device_count", lambda: 1)
    monkeypatch.setattr("fastnnunet.engines.onnxruntime.why_no_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    bundle = LoadedBundle.load(model.bundle, "onnxruntime", threads=1, device="cuda")
    assert isinstance(bundle.backend, OnnxRuntimeEngine)
    np.testing.assert_array_equal(bundle.predict_array(image, properties).segmentation_ZYX, expected)
    assert "label_logits" in cuda.started


def test_the_fake_is_honest(cuda: FakeCudaWithKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has, the real bindings have too, with as many arguments (the first line of their docstrings tells)."""
    monkeypatch.undo()
    runtime = pytest.importorskip("cuda.bindings.runtime")
    driver = pytest.importorskip("cuda.bindings.driver")
    for fake, real, prefix in ((cuda, runtime, "cuda"), (cuda.driver, driver, "cu")):
        names = [name for kind in type(fake).__mro__ for name in vars(kind) if re.match(rf"{prefix}[A-Z]", name)]
        for name in dict.fromkeys(names):
            if not callable(made := getattr(fake, name)) or isinstance(made, type):
                assert hasattr(real, name), name
                continue
            told = getattr(real, name).__doc__.splitlines()[0]
            arguments = re.sub(r"\[.*?\]", "", told[told.index("(") + 1 : told.rindex(")")])
            count = len([argument for argument in arguments.split(",") if argument.strip()])
            inspect.signature(made).bind(*range(count))
    assert runtime.cudaEventDisableTiming == cuda.cudaEventDisableTiming
    for kind in cuda.cudaMemcpyKind:
        assert getattr(runtime.cudaMemcpyKind, kind.name) == kind


def test_without_the_driver(cuda: FakeCudaWithKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuda-python says it: at the first call."""

    def missing(flags: int) -> Any:
        raise RuntimeError("cuda is an NVIDIA driver library")

    monkeypatch.setattr(cuda.driver, "cuInit", missing)
    with pytest.raises(BackendError, match="the NVIDIA driver cannot be loaded: cuda is an NVIDIA driver library"):
        Gpu()
