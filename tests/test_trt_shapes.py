"""Bundles of other shapes through TensorRT: dynamic space, a fixed batch, ensembles.

Engines are built with tensorrt_rtx, which needs no GPU, and run on the simulated one of tests/fake_gpu.py.
"""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fastnnunet.engines import registry
from fastnnunet.engines.registry import create_engine
from fastnnunet.engines.trt.library import find_library
from fastnnunet.engines.trt.stepwise import run_stepwise
from fastnnunet.engines.trt.store import write_engine
from fastnnunet.errors import BackendError, MismatchError, ParityError, SpecError
from fastnnunet.export.graph import fix_batch
from fastnnunet.export.tensorrt import engine_key, export_engines, make_graph
from fastnnunet.nnunet.onnx import to_onnx
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file
from tests.bundles import PATCH_3D, Toy, ToyModel, _network, make_toy_model, smooth_noise
from tests.fake_gpu import FakeCuda, FakeTensorRT
from tests.test_cli import refused, run
from tests.test_trt_backend import batch_of, cuda, rtx  # noqa: F401
from tests.test_trt_export import needs_rtx


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture
def bundle(model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(model.bundle, tmp_path / "bundle"))


def write_spec(bundle: Path, spec: BundleSpec, **changes: Any) -> BundleSpec:
    """bundle.json with changes and the digests of what is there now."""
    files = {p.name: sha256_of_file(p) for p in bundle.iterdir() if p.name != "bundle.json" and p.is_file()}
    write_bundle_json(replace(spec, **{**changes, "files": files}), bundle / "bundle.json")
    return load_bundle_spec(bundle)


@cache
def dynamic_model() -> bytes:
    network, _ = _network(3, 1, 3)
    return to_onnx(network, 1, PATCH_3D, (4, 4, 4)).SerializeToString()


def make_dynamic(bundle: Path, spec: BundleSpec) -> BundleSpec:
    (bundle / "model.onnx").write_bytes(dynamic_model())
    return write_spec(bundle, spec)


def make_fixed(bundle: Path, spec: BundleSpec, size: int) -> BundleSpec:
    fix_batch(bundle / "model.onnx", size)
    return write_spec(bundle, spec, batch_size=size)


def make_ensemble(bundle: Path, spec: BundleSpec) -> BundleSpec:
    """Two folds; the second with other weights of the last layer."""
    graph = onnx.load(str(bundle / "model.onnx"))
    (bundle / "model.onnx").rename(bundle / "model_0.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name.endswith("seg_layers.1.weight"):
            turned = np.roll(numpy_helper.to_array(tensor), 1, axis=0)
            tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
    onnx.save(graph, str(bundle / "model_1.onnx"))
    files = ("model_0.onnx", "model_1.onnx")
    spec = write_spec(bundle, spec, model_files=files, folds=("0", "1"))
    with np.load(bundle / "parity.npz") as parity:
        image = parity["image"]
    folds = [create_engine("onnxruntime", bundle, replace(spec, model_files=(f,)), threads=1) for f in files]
    np.savez(bundle / "parity.npz", image=image, logits=np.mean([fold.run(image) for fold in folds], axis=0))
    return write_spec(bundle, spec)


class TestGraphs:
    """Without any library of NVIDIA's."""

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_dynamic_space_becomes_the_patch(self, bundle: Path, model: ToyModel, precision: Any) -> None:
        spec = make_dynamic(bundle, model.spec)
        graph = make_graph(bundle / "model.onnx", spec, precision)
        for value, heads in ((graph.graph.input[0], 1), (graph.graph.output[0], 3)):
            batch, *shape = value.type.tensor_type.shape.dim
            assert batch.dim_param
            assert [axis.dim_value for axis in shape] == [heads, *PATCH_3D]
        with np.load(bundle / "parity.npz") as parity:
            got = run_stepwise(graph, {"image": parity["image"]})["logits"]
            assert (got.argmax(1) == parity["logits"].argmax(1)).mean() > 0.998


@needs_rtx
class TestBuilding:
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_dynamic_space(self, bundle: Path, model: ToyModel, precision: Any) -> None:
        spec = make_dynamic(bundle, model.spec)
        (built,) = export_engines(bundle, precision=precision, architectures=["sm86"])
        key = built.stored.key
        assert (key.min_batch, key.max_batch, key.input_shape) == (1, 4, (1, *spec.patch_size))
        assert len(built.stored.read_plan()) > 1000

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    @pytest.mark.parametrize("size", [1, 3])
    def test_fixed_batch(self, bundle: Path, model: ToyModel, precision: Any, size: int) -> None:
        make_fixed(bundle, model.spec, size)
        (built,) = export_engines(bundle, precision=precision, architectures=["sm89"])
        assert (built.stored.key.min_batch, built.stored.key.max_batch) == (size, size)
        assert f"batch {size}" in str(built.stored.key)
        assert built.stored.info.parity["patches"] == size
        assert export_engines(bundle, precision=precision, architectures=["sm89"], max_batch=size)[0].was_there
        with pytest.raises(SpecError, match=rf"--batch 2: .* exported for batches of exactly {size}\n"):
            export_engines(bundle, precision=precision, architectures=["sm89"], max_batch=2)

    def test_a_batch_of_one_at_most(self, bundle: Path) -> None:
        """Not a fixed batch: the model takes any."""
        (built,) = export_engines(bundle, precision="fp32", architectures=["sm86"], max_batch=1)
        assert (built.stored.key.min_batch, built.stored.key.max_batch) == (1, 1)

    def test_ensemble(self, bundle: Path, model: ToyModel) -> None:
        spec = make_ensemble(bundle, model.spec)
        built = export_engines(bundle, precision="fp16", architectures=["sm86", "sm120"])
        digests = [sha256_of_file(bundle / file) for file in spec.model_files]
        assert [(e.stored.key.model_sha256, e.stored.key.architecture) for e in built] == [
            (digest, architecture) for digest in digests for architecture in ("sm86", "sm120")
        ]
        # each against the fold it is of, not against the mean
        assert all(e.stored.info.parity["label_agreement"] > 0.995 for e in built)
        assert len(list((bundle / "engines").iterdir())) == 4
        shutil.rmtree(built[3].stored.path)
        again = export_engines(bundle, precision="fp16", architectures=["sm86", "sm120"])
        assert [engine.was_there for engine in again] == [True, True, True, False]

    def test_a_fold_that_does_not_fit_leaves_the_others(self, bundle: Path, model: ToyModel) -> None:
        spec = make_ensemble(bundle, model.spec)
        graph = onnx.load(str(bundle / "model_1.onnx"))
        tensor = next(t for t in graph.graph.initializer if t.name.endswith("seg_layers.1.weight"))
        tensor.CopyFrom(numpy_helper.from_array(1e6 * numpy_helper.to_array(tensor), tensor.name))
        onnx.save(graph, str(bundle / "model_1.onnx"))
        write_spec(bundle, spec)
        with pytest.raises(MismatchError, match="65504"):
            export_engines(bundle, precision="fp16", architectures=["sm86"])
        (info,) = (bundle / "engines").glob("*/engine.json")
        assert json.loads(info.read_text())["key"]["model_sha256"] == sha256_of_file(bundle / "model_0.onnx")

    def test_parity_of_another_patch(self, bundle: Path, model: ToyModel) -> None:
        """A fixed batch repeats the patches there are, and still sees that they are others."""
        spec = make_fixed(bundle, model.spec, 3)
        with np.load(bundle / "parity.npz") as parity:
            np.savez(bundle / "parity.npz", image=parity["image"], logits=-parity["logits"])
        write_spec(bundle, spec)
        with pytest.raises(ParityError, match=r"of\s+3 real patches"):
            export_engines(bundle, precision="fp32", architectures=["sm86"])

    def test_command(self, bundle: Path, model: ToyModel) -> None:
        make_ensemble(bundle, model.spec)
        done = run("export", "tensorrt", bundle, "--arch", "sm86")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("built: fp16 sm86") == 2
        fixed = Path(shutil.copytree(model.bundle, bundle.parent / "fixed"))
        make_fixed(fixed, model.spec, 2)
        refused(run("export", "tensorrt", fixed, "--arch", "sm86", "--batch", "8"), "exactly 2")


class TestRunning:
    """With engines that compute what the exported graph says."""

    def store(self, fake: FakeTensorRT, bundle: Path, spec: BundleSpec) -> None:
        library = find_library()
        for file in spec.model_files:
            graph = make_graph(bundle / file, spec, "fp32")
            key = engine_key(spec, bundle / file, "fp32", library, "sm86", None)
            write_engine(bundle / "engines", key, fake.plan(graph.SerializeToString(), "sm86", key.max_batch), {})

    def test_dynamic_space(self, rtx: FakeTensorRT, bundle: Path, model: ToyModel) -> None:  # noqa: F811
        spec = make_dynamic(bundle, model.spec)
        self.store(rtx, bundle, spec)
        backend = create_engine("tensorrt", bundle, spec)
        oracle = create_engine("onnxruntime", model.bundle, model.spec, threads=1)
        for size in (1, 4, 6):
            np.testing.assert_allclose(backend.run(batch_of(size)), oracle.run(batch_of(size)), atol=1e-4)
        with pytest.raises(BackendError, match=r"expected \(N, 1, 16, 20, 24\)"):
            backend.run(np.zeros((1, 1, 16, 20, 28), np.float32))

    def test_fixed_batch(self, rtx: FakeTensorRT, cuda: FakeCuda, bundle: Path, model: ToyModel) -> None:  # noqa: F811
        spec = make_fixed(bundle, model.spec, 3)
        self.store(rtx, bundle, spec)
        backend = create_engine("tensorrt", bundle, spec)
        oracle = create_engine("onnxruntime", model.bundle, model.spec, threads=1)
        for size in (1, 3, 7):
            np.testing.assert_allclose(backend.run(batch_of(size)), oracle.run(batch_of(size)), atol=1e-4)
        assert (rtx.executions, cuda.launches) == (2, 1 + 1 + 3 - 1)  # one size, run and captured once

    def test_ensemble(self, rtx: FakeTensorRT, bundle: Path, model: ToyModel) -> None:  # noqa: F811
        spec = make_ensemble(bundle, model.spec)
        self.store(rtx, bundle, spec)
        image = smooth_noise((20, 26, 30), 4)[None]
        on_gpu = Predictor.load(bundle, "tensorrt").predict_array(image, {"spacing": [1, 1, 1]})
        on_cpu = Predictor.load(bundle, "onnxruntime").predict_array(image, {"spacing": [1, 1, 1]})
        np.testing.assert_array_equal(on_gpu.segmentation_ZYX, on_cpu.segmentation_ZYX)
        single = Predictor.load(bundle, "onnxruntime", folds=["0"]).predict_array(image, {"spacing": [1, 1, 1]})
        assert (single.segmentation_ZYX != on_cpu.segmentation_ZYX).mean() > 0.01
        shutil.rmtree(next((bundle / "engines").iterdir()))
        with pytest.raises(BackendError, match=r"no engine of .* \(model_[01]\.onnx\) fits this machine"):
            Predictor.load(bundle, "tensorrt")

    def test_another_gpu(
        self,
        rtx: FakeTensorRT,  # noqa: F811
        cuda: FakeCuda,  # noqa: F811
        bundle: Path,
        model: ToyModel,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(registry, "cuda_device_count", lambda: 2)
        cuda.devices = 2
        self.store(rtx, bundle, model.spec)
        backend = create_engine("tensorrt", bundle, model.spec, device="cuda:1")
        assert cuda.device == 1
        cuda.device = 0  # another backend's
        backend.run(batch_of(1))
        assert cuda.device == 1
