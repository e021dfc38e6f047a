"""Engines are built ahead of time by tensorrt_rtx, without a GPU: a graph TensorRT would not take fails here.

What is built cannot be run or even opened without a driver, so what the builder was given is checked instead: the
network it parsed, and the arithmetic of the fp16 and int8 graphs on the CPU.
"""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastnnunet.engines.trt import library as seam
from fastnnunet.engines.trt.build import build_plan, builder_config, check_parity
from fastnnunet.engines.trt.half import to_half
from fastnnunet.engines.trt.library import find_library
from fastnnunet.engines.trt.stepwise import run_stepwise
from fastnnunet.engines.trt.store import EngineKey, find_engine, write_engine
from fastnnunet.errors import BackendError, CorruptError, MismatchError, NotFoundError, ParityError, SpecError
from fastnnunet.export import tensorrt as export
from fastnnunet.export.quantize_onnx import quantize_onnx
from fastnnunet.export.quantized import prepare_quantized
from fastnnunet.export.tensorrt import export_engines, make_graph
from fastnnunet.nnunet.onnx import to_onnx
from fastnnunet.release.quantize import QuantizeJob, quantize_bundle
from fastnnunet.specs.canonical import sha256_of_file
from tests.bundles import PATCH_3D, Toy, ToyModel, make_toy_model, smooth_noise, write_image
from tests.small_networks import primus_network, residual_network
from tests.test_cli import refused, run

TARGETS = ("sm80", "sm86", "sm89", "sm120")
needs_rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in seam.installed_names(), reason="tensorrt_rtx is not installed: no engine can be built"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def float_graph(model: ToyModel) -> onnx.ModelProto:
    return onnx.load(str(model.bundle / "model.onnx"))


@pytest.fixture
def bundle(model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(model.bundle, tmp_path / "bundle"))


def rtx_key(architecture: str = "sm86", precision: str = "fp32", shape=(1, *PATCH_3D), heads: int = 3) -> EngineKey:
    return EngineKey(
        model_sha256="0" * 64,
        precision=precision,
        library="tensorrt_rtx",
        library_version="any",
        architecture=architecture,
        max_batch=4,
        input_shape=shape,
        output_shape=(heads, *shape[1:]),
    )


def run_whole(graph: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


def quantize_asymmetric(model_file: Path, out: Path, patches: np.ndarray) -> onnx.ModelProto:
    """ONNX Runtime's own quantiser as it comes: activations in uint8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Patches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"image": patch[None]} for patch in patches])

        def get_next(self):
            return next(self.left, None)

    quantize_static(
        str(model_file),
        str(out),
        Patches(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "ConvTranspose"],
    )
    return onnx.load(str(out))


@needs_rtx
class TestBuilding:
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_every_architecture(self, bundle: Path, precision: str) -> None:
        built = export_engines(bundle, precision=precision, architectures=TARGETS)
        assert [engine.stored.key.architecture for engine in built] == list(TARGETS)
        for engine in built:
            folder = engine.stored.path
            assert folder.parent == bundle / "engines"
            info = json.loads((folder / "engine.json").read_text())
            assert info["plan_sha256"] == sha256_of_file(folder / "engine.plan")
            assert info["key"]["model_sha256"] == sha256_of_file(bundle / "model.onnx")
            assert info["key"]["max_batch"] == 4
            assert info["parity"]["label_agreement"] >= 0.995
        assert len({engine.stored.read_plan() for engine in built}) == len(TARGETS)

    def test_int8_of_a_quantised_model(self, bundle: Path) -> None:
        with pytest.raises(NotFoundError, match=r"make it: fastnnunet export quantize \S+bundle --backend onnxruntime"):
            export_engines(bundle, precision="int8")
        for number in range(2):
            write_image(smooth_noise(PATCH_3D, number), bundle.parent / "images" / f"{number}_0000.nii.gz")
        quantize_bundle(
            QuantizeJob(
                bundle=bundle,
                backends=("onnxruntime",),
                images=bundle.parent / "images",
                patches=4,
                max_loss_points=10.0,
                threads=1,
            )
        )
        graph = onnx.load(str(bundle / "model_int8.onnx"))
        assert any(tensor.data_type == TensorProto.INT32 for tensor in graph.graph.initializer)
        built = export_engines(bundle, precision="int8", architectures=TARGETS)
        assert len(built) == len(TARGETS)
        assert built[0].stored.key.model_sha256 == sha256_of_file(bundle / "model_int8.onnx")

    def test_2d(self, tmp_path: Path) -> None:
        toy = make_toy_model(Toy(dims=2, spacing=(1.0, 1.0)), tmp_path)
        (built,) = export_engines(toy.bundle, architectures=["sm86"])
        assert built.stored.key.max_batch == 16

    @pytest.mark.parametrize("kind", ["residual, anisotropic, two channels", "primus"])
    def test_other_networks(self, model: ToyModel, kind: str, tmp_path: Path) -> None:
        import torch

        network, shape = primus_network() if kind == "primus" else residual_network()
        image = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
        with torch.inference_mode():
            expected = network(torch.from_numpy(image)).numpy()
        onnx.save(to_onnx(network, shape[0], shape[1:]), str(tmp_path / "model.onnx"))
        norm_op = {} if kind == "primus" else {"norm_op": "torch.nn.InstanceNorm3d"}
        spec = replace(model.spec, architecture={"arch_kwargs": norm_op})
        for precision, agreement in (("fp32", 1.0), ("fp16", 0.998)):
            graph = make_graph(tmp_path / "model.onnx", spec, precision)
            got = run_stepwise(graph, {"image": image})["logits"]
            assert (got.argmax(1) == expected.argmax(1)).mean() >= agreement
            assert build_plan(graph, rtx_key("sm89", precision, shape), find_library("tensorrt_rtx"))

    def test_what_is_there_is_kept(self, bundle: Path) -> None:
        first = export_engines(bundle, architectures=["sm86"])[0]
        stamp = (first.stored.path / "engine.plan").stat().st_mtime_ns
        both = export_engines(bundle, architectures=["sm86", "sm89"])
        assert [engine.was_there for engine in both] == [True, False]
        assert (first.stored.path / "engine.plan").stat().st_mtime_ns == stamp
        for changes in ({"max_batch": 2}, {"precision": "fp32"}, {"beside_bundle": False}):
            assert not export_engines(bundle, architectures=["sm86"], **changes)[0].was_there
        assert len(list((bundle / "engines").iterdir())) == 4

    def test_defaults_leave_out_turing_alone(self) -> None:
        targets = export.default_architectures(find_library("tensorrt_rtx"))
        assert set(TARGETS) <= set(targets)
        assert "sm75" not in targets
        assert "sm90" not in targets

    def test_configuration(self) -> None:
        """One target, memory from the caller, and TF32, which is on by default, off where fp32 is asked for."""
        library = find_library("tensorrt_rtx")
        module, builder = library.module, library.module.Builder(library.logger)
        for precision, tf32 in (("fp32", False), ("fp16", True)):
            config = builder_config(builder, rtx_key("sm120", precision), library)
            assert config.get_flag(module.BuilderFlag.TF32) == tf32
            assert config.get_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
            assert config.num_compute_capabilities == 1
            assert config.get_compute_capability(0) == module.ComputeCapability.SM120
            assert config.num_optimization_profiles == 1


@needs_rtx
class TestWrongGraphs:
    def test_an_operator_tensorrt_has_not(self, float_graph: onnx.ModelProto) -> None:
        graph = onnx.ModelProto()
        graph.CopyFrom(float_graph)
        activation = next(node for node in graph.graph.node if node.op_type == "LeakyRelu")
        node = helper.make_node("Det", [activation.input[0]], ["determinant"], name="strange")
        graph.graph.node.insert(1, node)
        graph.graph.output.append(helper.make_tensor_value_info("determinant", TensorProto.FLOAT, None))
        with pytest.raises(
            MismatchError, match=r"(?s)cannot build the model in fp32 for sm86:\n  - Det strange.*--arch"
        ):
            build_plan(graph, rtx_key(), find_library("tensorrt_rtx"))

    def test_norms_in_fp16(self, float_graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastnnunet.engines.trt.half.FLOAT32_OPS", frozenset())
        with pytest.raises(MismatchError, match=r"normalization \S+ is computed in DataType.HALF, expected float32"):
            build_plan(to_half(float_graph), rtx_key(precision="fp16"), find_library("tensorrt_rtx"))

    def test_another_shape_than_the_bundle_says(self, float_graph: onnx.ModelProto) -> None:
        with pytest.raises(
            MismatchError, match=r"inputs are .*\(-1, 1, 16, 20, 24\).*expected .*\(-1, 1, 16, 20, 28\)"
        ):
            build_plan(float_graph, rtx_key(shape=(1, 16, 20, 28)), find_library("tensorrt_rtx"))

    def test_turing_has_no_3d_convolution_in_fp32(self, float_graph: onnx.ModelProto) -> None:
        with pytest.raises(MismatchError, match="FP32 3D convolution is not supported"):
            build_plan(float_graph, rtx_key("sm75"), find_library("tensorrt_rtx"))

    def test_nothing_is_written(self, bundle: Path) -> None:
        with pytest.raises(SpecError, match="'sm90', expected sm75 or sm80"):
            export_engines(bundle, architectures=["sm86", "sm90"])
        with pytest.raises(MismatchError, match="sm75"):
            export_engines(bundle, precision="fp32", architectures=["sm75"])
        assert not (bundle / "engines").exists()

    def test_command(self, bundle: Path, tmp_path: Path) -> None:
        done = run("export", "tensorrt", bundle, "--arch", "sm86", "sm89", "--batch", "2", "--cache")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("built: fp16 sm8") == 2
        assert "real patches: same label on 99." in done.stdout
        assert len(list((tmp_path / "home" / "engines").iterdir())) == 2
        refused(run("export", "tensorrt", bundle, "--arch", "sm90"), "'sm90'", "tensorrt_rtx")
        refused(run("export", "tensorrt", bundle, "--precision", "int8"), "has no model_int8.onnx", "export quantize")
        refused(run("export", "tensorrt", tmp_path, "--arch", "sm86"), "no bundle")


class TestInstanceNorms:
    def test_taken_apart(self, model: ToyModel, tmp_path: Path) -> None:
        """torch's other way to write an instance norm: reshape, BatchNormalization, reshape."""
        graph = onnx.load(str(model.bundle / "model.onnx"))
        norm = next(node for node in graph.graph.node if node.op_type == "InstanceNormalization")
        for name in ("mean", "variance"):
            graph.graph.initializer.append(numpy_helper.from_array(np.ones(6, np.float32), name))
        norm.op_type = "BatchNormalization"
        norm.input.extend(["mean", "variance"])
        onnx.save(graph, str(tmp_path / "model.onnx"))
        with pytest.raises(MismatchError, match=r"4 InstanceNormalization nodes and 1 BatchNormalization"):
            make_graph(tmp_path / "model.onnx", model.spec, "fp32")

    def test_other_norms_are_let_be(self, model: ToyModel) -> None:
        architecture = {**model.spec.architecture, "arch_kwargs": {"norm_op": "torch.nn.BatchNorm3d"}}
        graph = helper.make_model(helper.make_graph([], "empty", [], []))
        export.check_norms(graph, replace(model.spec, architecture=architecture))
        with pytest.raises(MismatchError, match="0 InstanceNormalization"):
            export.check_norms(graph, model.spec)

    def test_damaged_model(self, model: ToyModel, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes((model.bundle / "model.onnx").read_bytes()[:2000])
        with pytest.raises(CorruptError, match=r"model\.onnx"):
            make_graph(tmp_path / "model.onnx", model.spec, "fp32")


class TestHalf:
    def test_only_norms_stay_in_float32(self, float_graph: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(to_half(float_graph), strict_mode=True).graph
        types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type != "Cast":
                expected = TensorProto.FLOAT if node.op_type == "InstanceNormalization" else TensorProto.FLOAT16
                assert {types[name] for name in node.input} == {expected}
        before, after = (Counter(n.op_type for n in g.node) for g in (float_graph.graph, graph))
        # into and out of every norm, the image in, the logits out
        assert after - before == {"Cast": 2 * before["InstanceNormalization"] + 2}
        assert [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)] == [TensorProto.FLOAT] * 2

    def test_close_to_float32(self, model: ToyModel, float_graph: onnx.ModelProto) -> None:
        """Against PyTorch's logits; float16 has 11 bits."""
        with np.load(model.bundle / "parity.npz") as parity:
            image, expected = parity["image"], parity["logits"]
        got = run_stepwise(to_half(float_graph), {"image": image})["logits"]
        assert got.dtype == np.float32
        difference = np.abs(got - expected).max() / np.abs(expected).max()
        assert 1e-5 < difference < 4e-3, "no difference at all would mean that nothing was computed in float16"
        assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.999

    def test_statistics_that_overflow_float16(self, float_graph: onnx.ModelProto) -> None:
        """A bright image: the sum of squares behind the first norm is infinite in float16, the labels do not change."""
        image = 1000 * np.random.default_rng(0).standard_normal((1, 1, *PATCH_3D)).astype(np.float32)
        half = to_half(float_graph)
        norm = next(node for node in half.graph.node if node.op_type == "InstanceNormalization")
        peek = onnx.ModelProto()
        peek.CopyFrom(half)
        peek.graph.output.append(helper.make_tensor_value_info(norm.input[0], TensorProto.FLOAT, None))
        seen = run_stepwise(peek, {"image": image})[norm.input[0]]
        assert np.abs(seen).max() < 65504
        with np.errstate(over="ignore"):
            assert np.isinf(np.square(seen.astype(np.float16))).any()
        got, expected = run_stepwise(half, {"image": image})["logits"], run_whole(float_graph, image)
        assert np.isfinite(got).all()
        assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.998

    def test_stepwise_has_the_range_of_float16(self, float_graph: onnx.ModelProto) -> None:
        """What ONNX Runtime hides when it runs the whole graph: beyond 65504 there is nothing."""
        half, image = to_half(float_graph), np.full((1, 1, *PATCH_3D), 1e5, np.float32)
        assert np.isnan(run_stepwise(half, {"image": image})["logits"]).all()
        assert np.isfinite(run_whole(half, image)).all()

    def test_stepwise_is_the_whole_graph(self, float_graph: onnx.ModelProto) -> None:
        image = np.random.default_rng(0).standard_normal((2, 1, *PATCH_3D)).astype(np.float32)
        np.testing.assert_allclose(
            run_stepwise(float_graph, {"image": image})["logits"], run_whole(float_graph, image), atol=1e-4
        )

    def test_weights_beyond_float16(self, float_graph: onnx.ModelProto) -> None:
        graph = onnx.ModelProto()
        graph.CopyFrom(float_graph)
        tensor = next(t for t in graph.graph.initializer if t.name.endswith("seg_layers.1.weight"))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1e6, tensor.name))
        with pytest.raises(MismatchError, match=r"seg_layers\.1\.weight holds .*65504"):
            to_half(graph)

    def test_precision_that_changes_labels(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Expected logits of another image: nothing is built."""
        with np.load(bundle / "parity.npz") as parity:
            np.savez(bundle / "parity.npz", image=parity["image"] + 1, logits=-parity["logits"])
        graph = make_graph(bundle / "model.onnx", _spec_of(bundle), "fp16")
        with np.load(bundle / "parity.npz") as parity:
            image, expected = parity["image"], parity["logits"]
        with pytest.raises(ParityError, match="in fp16 the network gives the same label on"):
            check_parity(graph, image, expected, "fp16")


def _spec_of(bundle: Path):
    from fastnnunet.specs.bundle import BundleSpec
    from fastnnunet.specs.load import build_spec

    raw = json.loads((bundle / "bundle.json").read_text())
    del raw["self_sha256"]
    return build_spec(BundleSpec, raw)


@pytest.fixture(scope="module")
def quantized(model: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    patches = np.load(model.bundle / "parity.npz")["image"]
    file = tmp_path_factory.mktemp("int8") / "model_int8.onnx"
    quantize_onnx(model.bundle / "model.onnx", patches, file)
    return onnx.load(str(file))


class TestQuantized:
    def test_same_numbers_with_float_biases(self, quantized: onnx.ModelProto) -> None:
        prepared = prepare_quantized(quantized)
        assert not any(tensor.data_type == TensorProto.INT32 for tensor in prepared.graph.initializer)
        image = np.random.default_rng(3).standard_normal((2, 1, *PATCH_3D)).astype(np.float32)
        np.testing.assert_allclose(
            run_stepwise(prepared, {"image": image})["logits"],
            run_stepwise(quantized, {"image": image})["logits"],
            atol=1e-3,
        )

    def test_asymmetric(self, model: ToyModel, tmp_path: Path) -> None:
        patches = np.load(model.bundle / "parity.npz")["image"]
        graph = quantize_asymmetric(model.bundle / "model.onnx", tmp_path / "u8.onnx", patches)
        with pytest.raises(MismatchError, match=r"(?s)type uint8, expected 0 of type int8.*symmetric int8"):
            prepare_quantized(graph)

    def test_not_quantised(self, float_graph: onnx.ModelProto) -> None:
        with pytest.raises(MismatchError, match="no QuantizeLinear"):
            prepare_quantized(float_graph)

    def test_fp16_of_a_quantised_model(self, quantized: onnx.ModelProto) -> None:
        with pytest.raises(MismatchError, match="is a DequantizeLinear: float16 can be made of plain float32"):
            to_half(quantized)


class TestStore:
    def test_key(self) -> None:
        key = rtx_key()
        changes = {
            "recipe": 0,
            "model_sha256": "1" * 64,
            "precision": "fp16",
            "library": "tensorrt",
            "library_version": "2",
            "architecture": "sm89",
            "max_batch": 5,
            "min_batch": 4,
            "input_shape": (2, *PATCH_3D),
            "output_shape": (4, *PATCH_3D),
            "smallest_tile": (4, 4, 4),
        }
        assert changes.keys() == {name for name in EngineKey.__slots__}
        assert len({replace(key, **{name: value}).folder_name for name, value in changes.items()}) == len(changes)
        assert key.folder_name == rtx_key().folder_name

    def test_written_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastnnunet.system.files.os.replace", _no_room)
        with pytest.raises(OSError, match="No space"):
            write_engine(tmp_path / "engines", rtx_key(), b"plan", {})
        assert list((tmp_path / "engines").iterdir()) == []
        monkeypatch.undo()
        write_engine(tmp_path / "engines", rtx_key(), b"plan", {"label_agreement": 1.0})
        stored = find_engine(tmp_path / "engines", rtx_key())
        assert stored is not None
        assert (stored.read_plan(), stored.key, stored.info.parity) == (b"plan", rtx_key(), {"label_agreement": 1.0})
        assert find_engine(tmp_path / "engines", rtx_key("sm89")) is None
        write_engine(tmp_path / "engines", rtx_key(), b"again", {})
        assert len(list((tmp_path / "engines").iterdir())) == 1

    def test_a_bundle_with_engines_is_still_whole(self, bundle: Path) -> None:
        from fastnnunet.specs.bundle import load_bundle_spec

        write_engine(bundle / "engines", rtx_key(), b"plan", {})
        assert load_bundle_spec(bundle).name == "toy"


def _no_room(*_):
    raise OSError(28, "No space left on device")


def test_no_library(model: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "installed_names", lambda: ())
    with pytest.raises(BackendError, match=r"(?s)neither tensorrt nor tensorrt_rtx.*fastnnunet\[rtx\]"):
        export_engines(model.bundle)
