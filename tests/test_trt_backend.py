"""The TensorRT backend on a GPU made of host memory (tests/fake_gpu.py): order of calls, memory, choice of an engine.

What no fake can show, that real kernels compute the right thing, is what pipelines/gpu_check.py is for.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastnnunet.engines.base import Engine, LiveNetwork, Settings
from fastnnunet.engines.devices import Device
from fastnnunet.engines.registry import create_engine, engine_of_network
from fastnnunet.engines.trt import library as seam
from fastnnunet.engines.trt.store import EngineKey, StoredEngine, write_engine
from fastnnunet.errors import BackendError, CorruptError, MismatchError, ParityError, SpecError
from fastnnunet.export.tensorrt import BuiltEngine
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.canonical import sha256_of_file
from pipelines import gpu_check
from tests import fake_gpu
from tests.bundles import PATCH_3D, Toy, ToyModel, _network, make_toy_model
from tests.fake_gpu import CudaError, FakeCuda, FakeTensorRT

MAX_BATCH = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """An sm86 in this machine, no TensorRT yet."""
    fake = FakeCuda((8, 6))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    use_libraries(monkeypatch)
    yield fake
    monkeypatch.undo()
    seam._load.cache_clear()


@pytest.fixture
def rtx(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(cuda)
    use_libraries(monkeypatch, fake)
    return fake


def use_libraries(monkeypatch: pytest.MonkeyPatch, *fakes: FakeTensorRT) -> None:
    """Exactly these libraries are installed."""
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    names = {fake.__name__ for fake in fakes}
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (
            (object() if name in names else None) if name in ("tensorrt", "tensorrt_rtx") else real(name, *rest)
        ),
    )
    seam._load.cache_clear()


def store(
    model: ToyModel, fake: FakeTensorRT, home: Path, /, architecture: str = "sm86", precision: str = "fp32", **changes
) -> StoredEngine:
    """An engine of the model for the fake library, beside a copy of the bundle at `home`."""
    key = {
        "model_sha256": sha256_of_file(model.bundle / "model.onnx"),
        "precision": precision,
        "library": fake.__name__,
        "library_version": fake.__version__,
        "architecture": architecture,
        "max_batch": MAX_BATCH,
        "input_shape": (1, *PATCH_3D),
        "output_shape": (3, *PATCH_3D),
    }
    plan = fake.plan((model.bundle / "model.onnx").read_bytes(), architecture, MAX_BATCH)
    return write_engine(home / "engines", EngineKey(**{**key, **changes}), plan, {})


@pytest.fixture
def bundle(model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model's bundle without engines."""
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in model.bundle.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def batch_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, 1, *PATCH_3D)).astype(np.float32)


class TestNetworkInMemory:
    """What a teacher hands over: its engine is built once for a machine."""

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_built_once_and_computes_the_network(
        self, rtx: FakeTensorRT, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
    ) -> None:
        built = []

        def build_plan(graph: Any, key: EngineKey, library: Any) -> bytes:
            built.append(key)
            return rtx.plan(onnx_bytes, key.architecture, key.max_batch)  # the fake computes in float32

        monkeypatch.setattr("fastnnunet.engines.trt.build.build_plan", build_plan)
        network, onnx_bytes = _network(3, 1, 3)
        live = LiveNetwork(module=network, channels=1, num_heads=3, patch_size=PATCH_3D, to_onnx=lambda: onnx_bytes)
        settings = Settings(threads=1, precision=precision, device=Device("cuda"), apart=True)
        batch = batch_of(8)
        with torch.inference_mode():
            expected = network(torch.from_numpy(batch)).numpy()
        for _ in range(2):
            engine = engine_of_network("tensorrt", live, settings)
            assert engine.precision == precision
            np.testing.assert_allclose(engine.run(batch), expected, atol=1e-4)
        (key,) = built
        assert (key.precision, key.architecture, key.max_batch) == (precision, "sm86", 4)
        assert (key.input_shape, key.output_shape) == ((1, *PATCH_3D), (3, *PATCH_3D))
        (folder,) = (tmp_path / "home" / "engines").iterdir()
        assert folder.name == key.folder_name

    def test_a_precision_that_overflows_builds_nothing(
        self, rtx: FakeTensorRT, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnx

        _, onnx_bytes = _network(3, 1, 3)
        model = onnx.load_model_from_string(onnx_bytes)
        for tensor in model.graph.initializer:  # logits beyond the range of float16
            if tensor.name == "decoder.seg_layers.1.weight":
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1e5, tensor.name))
        live = LiveNetwork(module=None, channels=1, num_heads=3, patch_size=PATCH_3D, to_onnx=model.SerializeToString)
        settings = Settings(threads=1, precision="fp16", device=Device("cuda"))
        with pytest.raises((ParityError, MismatchError)):
            engine_of_network("tensorrt", live, settings)
        assert not (tmp_path / "home").exists()


class TestRunning:
    @pytest.fixture
    def backend(self, rtx: FakeTensorRT, model: ToyModel, bundle: Path) -> Engine:
        store(model, rtx, bundle)
        return create_engine("tensorrt", bundle, model.spec)

    def test_logits_of_every_batch_size_first_and_replayed(
        self, backend: Engine, model: ToyModel, cuda: FakeCuda, rtx: FakeTensorRT
    ) -> None:
        oracle = create_engine("onnxruntime", model.bundle, model.spec, threads=1)
        for turn, size in enumerate((1, 3, 2, 1, 2, 3, 7, 3)):
            batch = batch_of(size, turn)
            np.testing.assert_allclose(backend.run(batch), oracle.run(batch), atol=1e-4)
        # each size is run once and captured once; 7 is 3 + 3 + 1
        assert rtx.executions == 2 * 3
        assert cuda.launches == 3 + 3 + 1

    def test_parity_file_of_the_bundle(self, backend: Engine, model: ToyModel) -> None:
        parity = np.load(model.bundle / "parity.npz")
        np.testing.assert_allclose(backend.run(parity["image"]), parity["logits"], atol=1e-3)

    def test_input_may_be_a_view_and_is_left_alone(self, backend: Engine) -> None:
        batch = batch_of(2)
        expected = backend.run(batch).copy()
        wide = np.stack([batch, batch], axis=1)
        np.testing.assert_array_equal(backend.run(wide[:, 0]), expected)
        np.testing.assert_array_equal(wide[:, 0], batch)

    def test_a_result_outlives_the_backend_and_nothing_is_left(
        self, rtx: FakeTensorRT, cuda: FakeCuda, model: ToyModel, bundle: Path
    ) -> None:
        store(model, rtx, bundle)
        backend = create_engine("tensorrt", bundle, model.spec)
        result = backend.run(batch_of(2))
        expected = result.copy()
        backend.run(batch_of(2))
        assert cuda.alive() == {"device": 3, "host": 2, "streams": 1, "graphs": 1}
        del backend
        gc.collect()
        assert cuda.alive() == {"device": 0, "host": 1, "streams": 0, "graphs": 0}
        np.testing.assert_array_equal(result, expected)
        del result
        gc.collect()
        assert cuda.alive() == {"device": 0, "host": 0, "streams": 0, "graphs": 0}

    def test_a_library_that_allows_no_capture(
        self, backend: Engine, model: ToyModel, cuda: FakeCuda, rtx: FakeTensorRT
    ) -> None:
        rtx.capturable = False
        oracle = create_engine("onnxruntime", model.bundle, model.spec, threads=1)
        for seed in range(3):
            np.testing.assert_allclose(backend.run(batch_of(2, seed)), oracle.run(batch_of(2, seed)), atol=1e-4)
        assert cuda.launches == 0
        assert rtx.executions == 3

    @pytest.mark.parametrize("shape", [(1, 2, *PATCH_3D), (0, 1, *PATCH_3D), (1, 1, 8, 8, 8), (5,)])
    def test_wrong_shapes(self, backend: Engine, shape: tuple[int, ...]) -> None:
        with pytest.raises(BackendError, match=r"expected \(N, 1, 16, 20, 24\)"):
            backend.run(np.zeros(shape, np.float32))

    def test_predictor(self, rtx: FakeTensorRT, model: ToyModel, bundle: Path) -> None:
        store(model, rtx, bundle, precision="fp16")
        image = np.random.default_rng(1).standard_normal((1, 20, 30, 40))
        on_gpu = Predictor.load(bundle, "tensorrt", precision="fp16").predict_array(image, {"spacing": [1, 1, 1]})
        on_cpu = Predictor.load(bundle, "onnxruntime").predict_array(image, {"spacing": [1, 1, 1]})
        # fp16 in name only, the fake computes what it is given
        np.testing.assert_array_equal(on_gpu.segmentation_ZYX, on_cpu.segmentation_ZYX)


class TestFullTensorRT:
    """The other library, which has no question whether capture is possible: a failed capture ends in plain runs."""

    @pytest.fixture
    def full(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
        fake = FakeTensorRT(cuda, "tensorrt", "11.4.0")
        use_libraries(monkeypatch, fake)
        return fake

    def test_runs(self, full: FakeTensorRT, cuda: FakeCuda, model: ToyModel, bundle: Path) -> None:
        store(model, full, bundle)
        backend = create_engine("tensorrt", bundle, model.spec)
        oracle = create_engine("onnxruntime", model.bundle, model.spec, threads=1)
        for seed in range(3):
            np.testing.assert_allclose(backend.run(batch_of(2, seed)), oracle.run(batch_of(2, seed)), atol=1e-4)
        assert cuda.launches == 2

    def test_failed_capture(
        self, full: FakeTensorRT, model: ToyModel, bundle: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        full.capturable = False
        store(model, full, bundle)
        backend = create_engine("tensorrt", bundle, model.spec)
        oracle = create_engine("onnxruntime", model.bundle, model.spec, threads=1)
        for seed in range(3):
            np.testing.assert_allclose(backend.run(batch_of(2, seed)), oracle.run(batch_of(2, seed)), atol=1e-4)
        assert caplog.text.count("without a CUDA graph") == 1


class TestRefusals:
    def test_no_gpu(self, rtx: FakeTensorRT, cuda: FakeCuda, model: ToyModel, bundle: Path) -> None:
        for error in (CudaError.cudaErrorNoDevice, CudaError.cudaErrorInsufficientDriver):
            cuda.device_error = error
            with pytest.raises(BackendError, match=rf"(?s)needs an NVIDIA GPU.*{error.name}.*--backend auto"):
                create_engine("tensorrt", bundle, model.spec)

    def test_no_library(self, cuda: FakeCuda, model: ToyModel, bundle: Path) -> None:
        with pytest.raises(BackendError, match=r"(?s)tensorrt or tensorrt_rtx.*fastnnunet\[rtx\]"):
            create_engine("tensorrt", bundle, model.spec)

    def test_no_cuda_python(
        self, rtx: FakeTensorRT, model: ToyModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
        with pytest.raises(BackendError, match=r"(?s)cuda-python.*fastnnunet\[rtx\]"):
            create_engine("tensorrt", bundle, model.spec)

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"architecture": "sm89"}, "fp32 sm89 tensorrt_rtx 1.7.1.116"),
            ({"library_version": "1.6.0"}, "fp32 sm86 tensorrt_rtx 1.6.0"),
            ({"library": "tensorrt"}, "fp32 sm86 tensorrt 1.7.1.116"),
            ({"precision": "fp16"}, "fp16 sm86"),
            ({"model_sha256": "0" * 64}, "none"),
            ({"recipe": 0}, "none"),
        ],
    )
    def test_engines_for_something_else(
        self, rtx: FakeTensorRT, model: ToyModel, bundle: Path, changes: dict, what: str
    ) -> None:
        store(model, rtx, bundle, **changes)
        with pytest.raises(BackendError) as caught:
            create_engine("tensorrt", bundle, model.spec)
        assert "needed fp32 sm86 tensorrt_rtx 1.7.1.116" in str(caught.value)
        assert what in str(caught.value)
        assert f"fastnnunet export tensorrt {bundle} --arch sm86 --precision fp32" in str(caught.value)

    def test_an_engine_the_library_refuses(self, rtx: FakeTensorRT, model: ToyModel, bundle: Path) -> None:
        engine = store(model, rtx, bundle)
        plan = rtx.plan((bundle / "model.onnx").read_bytes(), "sm89", MAX_BATCH)
        write_engine(bundle / "engines", engine.key, plan, {})
        with pytest.raises(BackendError, match="the engine is for something else"):
            create_engine("tensorrt", bundle, model.spec)

    def test_an_engine_of_another_network(
        self, rtx: FakeTensorRT, model: ToyModel, bundle: Path, tmp_path: Path
    ) -> None:
        engine = store(model, rtx, bundle)
        other = make_toy_model(Toy(channels=2), tmp_path / "other")
        plan = rtx.plan((other.bundle / "model.onnx").read_bytes(), "sm86", MAX_BATCH)
        write_engine(bundle / "engines", engine.key, plan, {})
        with pytest.raises(
            BackendError, match=r"inputs and outputs image .*\(-1, 2, 16, 20, 24\).*expected one of each"
        ):
            create_engine("tensorrt", bundle, model.spec)

    def test_damaged_plan(self, rtx: FakeTensorRT, model: ToyModel, bundle: Path) -> None:
        file = store(model, rtx, bundle).path / "engine.plan"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CorruptError, match="was changed after it was built"):
            create_engine("tensorrt", bundle, model.spec)

    def test_damaged_info_is_passed_over(
        self, rtx: FakeTensorRT, model: ToyModel, bundle: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (store(model, rtx, bundle, max_batch=2).path / "engine.json").write_text("{")
        with pytest.raises(BackendError, match="none"):
            create_engine("tensorrt", bundle, model.spec)
        assert "engine.json cannot be read" in caplog.text
        store(model, rtx, bundle)
        assert create_engine("tensorrt", bundle, model.spec).name == "tensorrt"

    def test_too_little_memory_leaves_nothing(
        self, rtx: FakeTensorRT, cuda: FakeCuda, model: ToyModel, bundle: Path
    ) -> None:
        store(model, rtx, bundle)
        needed = 4 * MAX_BATCH * (1 + 3) * int(np.prod(PATCH_3D)) * 2 + 1024
        for left in range(0, needed, needed // 7):
            cuda.left_bytes = left
            with pytest.raises(BackendError, match="the GPU has not enough memory"):
                create_engine("tensorrt", bundle, model.spec)
            gc.collect()
            assert cuda.alive() == {"device": 0, "host": 0, "streams": 0, "graphs": 0}
        cuda.left_bytes = needed
        create_engine("tensorrt", bundle, model.spec)

    def test_precision_it_has_not(self, rtx: FakeTensorRT, model: ToyModel) -> None:
        with pytest.raises(BackendError, match="fp32 or fp16 or int8 only, got precision 'bf16'"):
            create_engine("tensorrt", model.bundle, model.spec, precision="bf16")


class TestChoice:
    def test_engine_in_the_cache_folder(self, rtx: FakeTensorRT, model: ToyModel, bundle: Path, tmp_path: Path) -> None:
        store(model, rtx, tmp_path / "home")
        assert create_engine("tensorrt", bundle, model.spec).precision == "fp32"

    def test_larger_batches_first(self, rtx: FakeTensorRT, model: ToyModel, bundle: Path, cuda: FakeCuda) -> None:
        store(model, rtx, bundle, max_batch=1)
        store(model, rtx, bundle)
        create_engine("tensorrt", bundle, model.spec).run(batch_of(3))
        assert cuda.launches == 0  # one batch of three, not three of one

    def test_both_libraries(
        self, cuda: FakeCuda, model: ToyModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """tensorrt is taken first, but the one that has an engine wins."""
        full, rtx = FakeTensorRT(cuda, "tensorrt", "11.4.0"), FakeTensorRT(cuda)
        use_libraries(monkeypatch, full, rtx)
        assert seam.find_library().name == "tensorrt"
        assert seam.find_library("tensorrt_rtx").name == "tensorrt_rtx"
        store(model, rtx, bundle)
        create_engine("tensorrt", bundle, model.spec).run(batch_of(1))
        assert (full.executions, rtx.executions) == (0, 2)
        store(model, full, bundle)
        create_engine("tensorrt", bundle, model.spec).run(batch_of(1))
        assert (full.executions, rtx.executions) == (2, 2)

    def test_targets(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        use_libraries(monkeypatch, FakeTensorRT(cuda, "tensorrt", "11.4.0"), FakeTensorRT(cuda))
        assert seam.find_library("tensorrt").architectures() == ("sm86",)
        assert seam.find_library("tensorrt_rtx").architectures() == ("sm75", "sm80", "sm86", "sm120")
        with pytest.raises(SpecError, match=r"(?s)'sm89', expected sm86 .*only for the GPU of this machine"):
            seam.find_library("tensorrt").set_target(object(), "sm89")
        cuda.device_error = CudaError.cudaErrorNoDevice
        assert seam.find_library("tensorrt").architectures() == ()
        with pytest.raises(SpecError, match="expected a GPU in this machine"):
            seam.find_library("tensorrt").set_target(object(), "sm86")

    def test_old_tensorrt(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        use_libraries(monkeypatch, FakeTensorRT(cuda, "tensorrt", "10.13.3"))
        with pytest.raises(BackendError, match=r"10\.13\.3 is too old, expected 11"):
            seam.find_library()

    def test_a_library_that_does_not_load(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        use_libraries(monkeypatch, FakeTensorRT(cuda))
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(BackendError, match="installed but cannot be loaded"):
            seam.find_library()

    def test_unknown_library(self) -> None:
        with pytest.raises(SpecError, match="'torch', expected tensorrt or tensorrt_rtx"):
            seam.find_library("torch")


def test_gpu_check(
    rtx: FakeTensorRT, cuda: FakeCuda, model: ToyModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script a person with a GPU runs, with everything but the building of the engine."""

    def export(where: Path, *, precision: str, architectures: list[str], library_name: str | None):
        assert architectures == ["sm86"]
        return [BuiltEngine(stored=store(model, rtx, where, precision=precision), was_there=False)]

    monkeypatch.setattr(gpu_check, "export_engines", export)
    record = bundle.parent / "record.json"
    args = argparse.Namespace(bundle=bundle, output=record, precision=["fp32", "fp16"], library=None, repeat=2)
    gpu_check.main(args)
    written = json.loads(record.read_text())
    assert written["hardware"]["gpu"] == "Fake GPU"
    for precision in ("fp32", "fp16"):
        part = written["precisions"][precision]
        assert part["passed"]
        assert part["replay_equals_first_run"]
        assert part["label_agreement"] == 1
        assert part["max_abs_difference"] < 1e-3 * part["max_abs_logit"]
        assert part["cuda_graphs_for_batches"] == [1, 2, 3]
        assert part["median_ms_by_batch"].keys() == {"1", "3"}

    monkeypatch.setattr(gpu_check.TensorRTEngine, "run", lambda self, batch: np.zeros((len(batch), 3, *PATCH_3D)))
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(args)
    assert caught.value.code == 1
    assert not json.loads(record.read_text())["precisions"]["fp16"]["passed"]


class TestTheFakesAreHonest:
    """They offer nothing the real modules lack, and the real CUDA runtime takes the arguments they take."""

    def test_tensorrt(self) -> None:
        real = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
        counterparts = {
            fake_gpu.FakeRuntime: real.Runtime,
            fake_gpu.FakeEngine: real.ICudaEngine,
            fake_gpu.FakeRuntimeConfig: real.IRuntimeConfig,
            fake_gpu.FakeContextRTX: real.IExecutionContext,
        }
        own = {"library", "logger", "max_batch", "session", "tensors", "strategy"}
        for fake, counterpart in counterparts.items():
            names = {name for name in dir(fake) if not name.startswith("_")} - own
            assert names
            assert names <= set(dir(counterpart))
        fake = FakeTensorRT(FakeCuda())
        for name in (
            "TensorIOMode",
            "ExecutionContextAllocationStrategy",
            "DynamicShapesKernelSpecializationStrategy",
            "ComputeCapability",
        ):
            assert set(getattr(fake, name).__members__) <= set(getattr(real, name).__members__)
        assert set(fake.ILogger.Severity.__members__) == set(real.ILogger.Severity.__members__)
        assert {"float32", "float16", "Runtime"} <= set(dir(real))

    def test_cuda(self) -> None:
        real = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
        names = {name for name in dir(FakeCuda) if name.startswith("cuda")}
        assert names <= set(dir(real))
        if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
            pytest.skip("there is a GPU here: its driver must not be handed invented addresses")
        kind, mode = real.cudaMemcpyKind.cudaMemcpyHostToDevice, real.cudaStreamCaptureMode
        graph, executable = real.cudaGraph_t(0), real.cudaGraphExec_t(0)
        for answer in (
            real.cudaSetDevice(0),
            real.cudaDeviceGetAttribute(real.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, 0),
            real.cudaGetDeviceProperties(0),
            real.cudaMemGetInfo(),
            real.cudaMalloc(64),
            real.cudaFree(64),
            real.cudaHostAlloc(64, real.cudaHostAllocDefault),
            real.cudaFreeHost(64),
            real.cudaStreamCreateWithFlags(real.cudaStreamNonBlocking),
            real.cudaStreamSynchronize(64),
            real.cudaMemcpyAsync(64, 128, 4, kind, 64),
            real.cudaStreamBeginCapture(64, mode.cudaStreamCaptureModeThreadLocal),
            real.cudaStreamEndCapture(64),
            real.cudaGraphInstantiate(graph, 0),
            real.cudaGraphLaunch(executable, 64),
            real.cudaGraphDestroy(graph),
            real.cudaGraphExecDestroy(executable),
            real.cudaStreamDestroy(64),
        ):
            assert answer[0].name != "cudaSuccess"  # an error code, and no TypeError
        assert b"driver" in real.cudaGetErrorString(real.cudaError_t.cudaErrorInsufficientDriver)[1]
