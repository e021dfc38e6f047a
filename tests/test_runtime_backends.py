"""One contract, run over every backend; and what each of them refuses."""

import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fastnnunet.engines import registry
from fastnnunet.engines.base import Engine, LiveNetwork, Settings
from fastnnunet.engines.devices import Device
from fastnnunet.engines.labelling import resolve_device
from fastnnunet.engines.registry import ENGINES, create_engine, engine_of_network, is_installed
from fastnnunet.engines.torch import TorchEngine
from fastnnunet.engines.trt.cuda import gpu_architecture
from fastnnunet.errors import BackendError, CorruptError, MismatchError, SpecError
from fastnnunet.export.tensorrt import export_engines
from fastnnunet.testing import check_engine
from tests.bundles import PATCH_3D, Toy, ToyModel, make_toy_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def model_2d(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(dims=2, spacing=(1.0, 1.0)), tmp_path_factory.mktemp("toy2d"))


def _expected(model: ToyModel, batch: np.ndarray) -> np.ndarray:
    """PyTorch on nnU-Net's checkpoint."""
    import torch

    from tests.bundles import _network

    network, _ = _network(len(model.spec.patch_size), 1, 3)
    with torch.inference_mode():
        return network(torch.from_numpy(batch)).numpy()


def _live(model: ToyModel) -> LiveNetwork:
    """The network that a teacher would hand over."""
    from tests.bundles import _network

    network, onnx_bytes = _network(len(model.spec.patch_size), 1, 3)
    return LiveNetwork(
        module=deepcopy(network),
        channels=1,
        num_heads=3,
        patch_size=model.spec.patch_size,
        to_onnx=lambda: onnx_bytes,
    )


def _needed(name: str, model: ToyModel) -> None:
    """Skip where a backend cannot run; make the engine of one that runs no ONNX."""
    if not is_installed(name):
        pytest.skip(f"{' or '.join(ENGINES[name].requires)} is not installed")
    if ENGINES[name].needs_gpu:
        if (architecture := gpu_architecture()) is None:
            pytest.skip("there is no GPU that CUDA can use")
        export_engines(model.bundle, precision="fp32", architectures=[architecture])


@pytest.mark.parametrize("name", ENGINES)
class TestEngineContract:
    """Of a bundle, as the runtime makes engines, and of a network in memory, as teachers do."""

    @pytest.fixture(params=["bundle", "bundle, apart", "network", "network, apart"])
    def backend(self, name: str, model: ToyModel, request: pytest.FixtureRequest) -> Engine:
        _needed(name, model)
        apart = request.param.endswith("apart")
        if request.param.startswith("bundle"):
            return create_engine(name, model.bundle, model.spec, threads=1, apart=apart)
        return engine_of_network(name, _live(model), Settings(threads=1, device=resolve_device(name), apart=apart))

    def test_name(self, name: str, backend: Engine) -> None:
        assert backend.name == name
        assert backend.precision == "fp32"

    def test_labels_are_those_of_pytorch(self, backend: Engine, model: ToyModel) -> None:
        batch = np.random.default_rng(0).standard_normal((1, 1, *PATCH_3D)).astype(np.float32)
        expected = _expected(model, batch)
        got = backend.run(batch)
        assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.9999

    def test_parity_file_of_the_bundle(self, backend: Engine, model: ToyModel) -> None:
        parity = np.load(model.bundle / "parity.npz")
        np.testing.assert_allclose(backend.run(parity["image"]), parity["logits"], atol=1e-3)

    def test_what_every_engine_does(self, backend: Engine, model: ToyModel) -> None:
        batch = np.random.default_rng(1).standard_normal((3, 1, *PATCH_3D)).astype(np.float32)
        check_engine(backend, batch, _expected(model, batch))

    def test_wrong_patch(self, backend: Engine) -> None:
        with pytest.raises(BackendError, match=r"\(1, 2, 16, 20, 24\)"):
            backend.run(np.zeros((1, 2, *PATCH_3D), np.float32))

    def test_2d(self, name: str, model_2d: ToyModel) -> None:
        _needed(name, model_2d)
        batch = np.random.default_rng(3).standard_normal((4, 1, *model_2d.spec.patch_size)).astype(np.float32)
        expected = _expected(model_2d, batch)
        got = create_engine(name, model_2d.bundle, model_2d.spec, threads=1).run(batch)
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())

    def test_damaged_model(self, name: str, model: ToyModel, tmp_path: Path) -> None:
        _needed(name, model)
        if name == "tensorrt":
            pytest.skip("it reads engines, whose damage tests/test_trt_backend.py sees to")
        (tmp_path / "model.onnx").write_bytes((model.bundle / "model.onnx").read_bytes()[:2000])
        with pytest.raises((BackendError, CorruptError), match=r"model\.onnx"):
            create_engine(name, tmp_path, model.spec, threads=1)

    def test_not_installed_says_how_to_install(
        self, name: str, model: ToyModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry.importlib.util, "find_spec", lambda _: None)
        install = f"fastnnunet[{ENGINES[name].extra}]" if ENGINES[name].extra else name
        with pytest.raises(BackendError) as caught:
            create_engine(name, model.bundle, model.spec)
        assert f"pip install '{install}'" in str(caught.value)


@pytest.mark.parametrize("name", ENGINES)
def test_patches_computed_apart_do_not_depend_on_each_other(name: str, model: ToyModel) -> None:
    _needed(name, model)
    if resolve_device(name).kind == "cuda":
        pytest.skip("a GPU computes several at once")
    batch = np.random.default_rng(4).standard_normal((5, 1, *PATCH_3D)).astype(np.float32)
    one, two = (engine_of_network(name, _live(model), Settings(threads=n, apart=True)) for n in (1, 2))
    together = one.run(batch).copy()
    for row, alone in zip(together, batch, strict=True):
        np.testing.assert_array_equal(one.run(alone[None])[0], row)
    if name == "openvino":  # whose threads take a patch each
        np.testing.assert_array_equal(two.run(batch), together)


class TestTorchOnAGpu:
    def test_what_is_missing_is_named(self, model: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(registry, "cuda_device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for cuda, reason in ((None, "was built without CUDA"), ("12.6", "finds no GPU")):
            monkeypatch.setattr(torch.version, "cuda", cuda)
            with pytest.raises(BackendError, match=f"torch cannot compute on cuda: torch .*{reason}"):
                create_engine("torch", model.bundle, model.spec, device="cuda")

    def test_network_and_patches_go_to_the_device_asked_for(
        self, model: ToyModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a CPU that says it is a GPU."""
        import torch

        made = []

        def device(kind: str, index: int | None = None) -> torch.device:
            made.append((kind, index))
            return real("cpu")

        real = torch.device
        monkeypatch.setattr(registry, "cuda_device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        backend = TorchEngine.of_network(_live(model), Settings(threads=1))
        monkeypatch.setattr(torch, "device", device)
        on_gpu = TorchEngine.of_network(_live(model), Settings(threads=1, device=Device("cuda", 1)))
        assert made == [("cuda", 1)]
        batch = np.random.default_rng(5).standard_normal((2, 1, *PATCH_3D)).astype(np.float32)
        np.testing.assert_array_equal(on_gpu.run(batch), backend.run(batch))


def test_bf16_is_close(model: ToyModel) -> None:
    batch = np.random.default_rng(0).standard_normal((1, 1, *PATCH_3D)).astype(np.float32)
    expected = _expected(model, batch)
    for name in ("openvino", "torch"):
        if is_installed(name):
            backend = create_engine(name, model.bundle, model.spec, threads=1, precision="bf16")
            assert (backend.run(batch).argmax(1) == expected.argmax(1)).mean() > 0.95
    with pytest.raises(BackendError, match="fp32 or int8 only"):
        create_engine("onnxruntime", model.bundle, model.spec, precision="bf16")


class FakeSession:
    """Of an onnxruntime for GPUs, as far as the backend uses it; `made` keeps what was asked for."""

    loads_cuda = True
    made: ClassVar[list[Any]] = []

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        import onnxruntime

        strict = options.get_session_config_entry("session.disable_cpu_ep_fallback")
        self.made.append((providers, strict))
        # ONNX Runtime adds its CPU provider behind those asked for, and is left with it alone where CUDA does not load
        self._providers = [name for name, _ in providers if self.loads_cuda] + ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.falls_back = True

    def get_providers(self) -> list[str]:
        return self._providers

    def disable_fallback(self) -> None:
        self.falls_back = False

    def run_with_iobinding(self, binding: Any) -> None:
        assert not self.falls_back
        self._session.run_with_iobinding(binding)

    def __getattr__(self, name: str) -> Any:
        if name not in ("get_inputs", "get_outputs", "io_binding"):
            raise AttributeError(name)
        return getattr(self._session, name)


class TestOnnxRuntimeOnAGpu:
    """With a pretended build for GPUs: what is asked of it, and that nothing falls back to the CPU unnoticed."""

    @pytest.fixture
    def onnxruntime(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        import onnxruntime

        monkeypatch.setattr(registry, "cuda_device_count", lambda: 2)
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
        session = type("Session", (FakeSession,), {"made": []})
        real = onnxruntime.InferenceSession
        monkeypatch.setattr(
            onnxruntime,
            "InferenceSession",
            lambda path, options=None, providers=None: (
                real(path, options, providers=providers) if options is None else session(path, options, providers)
            ),
        )
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
        onnxruntime.session = session
        yield onnxruntime
        del onnxruntime.session

    @pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
    def test_provider(self, onnxruntime: Any, model: ToyModel, device: str, index: int) -> None:
        backend = create_engine("onnxruntime", model.bundle, model.spec, threads=1, device=device)
        assert onnxruntime.session.made == [([("CUDAExecutionProvider", {"device_id": index})], "1")]
        batch = np.random.default_rng(0).standard_normal((2, 1, *PATCH_3D)).astype(np.float32)
        expected = _expected(model, batch)
        np.testing.assert_allclose(backend.run(batch), expected, atol=1e-4 * np.abs(expected).max())

    def test_cuda_libraries_that_do_not_load(self, onnxruntime: Any, model: ToyModel) -> None:
        onnxruntime.session.loads_cuda = False
        with pytest.raises(BackendError, match=r"on CPUExecutionProvider, expected CUDAExecutionProvider\n.*cudnn"):
            create_engine("onnxruntime", model.bundle, model.spec, device="cuda")

    @pytest.mark.parametrize("both", [False, True])
    def test_the_other_distribution(
        self, onnxruntime: Any, model: ToyModel, both: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider", "CPUExecutionProvider"]
        )
        versions = {"onnxruntime": "1.32.0", **({"onnxruntime-gpu": "1.30.0"} if both else {})}

        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(metadata, "version", version)
        with pytest.raises(BackendError) as caught:
            create_engine("onnxruntime", model.bundle, model.spec, device="cuda")
        message = str(caught.value)
        assert "offers AzureExecutionProvider, CPUExecutionProvider, expected CUDAExecutionProvider too" in message
        installed = "onnxruntime 1.32.0 and onnxruntime-gpu 1.30.0 (two distributions of one module"
        assert (installed if both else "installed: onnxruntime 1.32.0\n") in message
        assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in message
        assert not onnxruntime.session.made

    def test_the_fake_is_honest(self, model: ToyModel) -> None:
        """The real session takes the same arguments and has the same methods."""
        import onnxruntime

        real = set(dir(onnxruntime.InferenceSession))
        assert {name for name in vars(FakeSession) if not name.startswith("_")} - {"loads_cuda", "made"} <= real
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        file = str(model.bundle / "model.onnx")
        # the real library, of whichever distribution, refuses the CPU where falling back to it is forbidden
        with pytest.raises(Exception, match="fallback to the CPU EP"):
            onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def test_auto_takes_openvino_if_there_is_one(model: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "is_installed", lambda name: name == "onnxruntime")
    assert create_engine("auto", model.bundle, model.spec, threads=1).name == "onnxruntime"
    monkeypatch.undo()
    if is_installed("openvino"):
        assert create_engine("auto", model.bundle, model.spec, threads=1).name == "openvino"


def test_unknown_names_and_threads(model: ToyModel) -> None:
    with pytest.raises(SpecError, match="'caffe', expected auto or one of openvino, onnxruntime, torch"):
        create_engine("caffe", model.bundle, model.spec)
    with pytest.raises(SpecError, match="threads"):
        create_engine("auto", model.bundle, model.spec, threads=0)


def _with_architecture(model: ToyModel, **changes: Any) -> Any:
    architecture = {**model.spec.architecture}
    arguments = {**architecture["arch_kwargs"], **changes.pop("arch_kwargs", {})}
    return replace(model.spec, architecture={**architecture, "arch_kwargs": arguments, **changes})


def test_torch_builds_only_known_classes(model: ToyModel, tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nNet = object")
    sys.path.insert(0, str(tmp_path))
    try:
        for spec in (
            _with_architecture(model, network_class_name="evil.Net"),
            _with_architecture(model, network_class_name="dynamic_network_architectures.none.Net"),
            _with_architecture(model, arch_kwargs={"nonlin": "evil.Net"}),
            _with_architecture(model, arch_kwargs={"stages": 3}),
        ):
            with pytest.raises(MismatchError, match=r"architecture|network class"):
                create_engine("torch", model.bundle, spec, threads=1)
    finally:
        sys.path.remove(str(tmp_path))
    assert not marker.exists()


def test_torch_refuses_weights_of_another_architecture(model: ToyModel) -> None:
    wider = _with_architecture(model, arch_kwargs={"features_per_stage": [6, 8, 16]})
    with pytest.raises(MismatchError, match=r"has shape \(12, 8, 3, 3, 3\), expected \(16, 8, 3, 3, 3\)"):
        create_engine("torch", model.bundle, wider, threads=1)
    deeper = _with_architecture(model, arch_kwargs={"n_conv_per_stage": [1, 1, 2]})
    with pytest.raises(MismatchError, match="is missing"):
        create_engine("torch", model.bundle, deeper, threads=1)


def test_the_slim_runtime_imports_nothing_heavy(model: ToyModel, tmp_path: Path) -> None:
    """A prediction with ONNX Runtime, in a fresh interpreter, without torch, nnU-Net, zarr or scikit-image."""
    shutil.copytree(model.bundle, tmp_path / "bundle")
    program = f"""
import sys
import fastnnunet.runtime.predict
heavy = {{"torch", "nnunetv2", "zarr", "skimage", "onnx", "scipy", "SimpleITK", "onnxruntime", "openvino"}}
print(sorted(heavy & sys.modules.keys()))
import numpy as np
from pathlib import Path
from fastnnunet.runtime.predict import Predictor
predictor = Predictor.load(Path({str(tmp_path / "bundle")!r}), "onnxruntime", threads=1)
image = np.random.default_rng(0).standard_normal((1, 18, 22, 26))
for spacing in ([1, 1, 1], [1.2, 0.8, 5]):
    predictor.predict_array(image, {{"spacing": spacing}})
print(sorted({{"torch", "nnunetv2", "zarr", "skimage", "onnx", "openvino", "batchgenerators"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stderr
