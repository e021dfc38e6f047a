"""Quantised graphs: PyTorch's activations are the oracle of scales, PyTorch with rounded tensors that of results."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fastnnunet.engines.openvino import shared_core
from fastnnunet.errors import BackendError
from fastnnunet.export import quantize_onnx as q_onnx
from fastnnunet.export import quantize_openvino as q_openvino
from fastnnunet.export.patches import RandomPatches
from fastnnunet.export.quantized import prepare_quantized
from fastnnunet.geometry.padding import centre_padding, pad_spatial
from fastnnunet.nnunet.onnx import to_onnx
from tests.bundles import PATCH_2D, PATCH_3D, Toy, _network, make_toy_model
from tests.small_networks import primus_network, residual_network

needs_nncf = pytest.mark.skipif(
    find_spec("nncf") is None or find_spec("openvino") is None, reason="nncf (extra quantize) is not installed"
)
CONVOLUTIONS = (torch.nn.modules.conv._ConvNd,)


def patches(channels: int, patch: tuple[int, ...], count: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, channels, *patch)).astype(np.float32)


NETWORKS = {
    "3d": lambda: (*_network(3, 1, 3), 1, PATCH_3D),
    "2d": lambda: (*_network(2, 1, 3), 1, PATCH_2D),
    "residual": lambda: exported(*residual_network()),
    "primus": lambda: exported(*primus_network()),
}


def exported(network: torch.nn.Module, shape: tuple[int, ...]) -> tuple[torch.nn.Module, bytes, int, tuple[int, ...]]:
    channels, *patch = shape
    return network, to_onnx(network, channels, tuple(patch)).SerializeToString(), channels, tuple(patch)


class Case:
    """A network, its ONNX file and its quantised twin."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.network, model, channels, patch = NETWORKS[kind]()
        self.patches = patches(channels, patch)
        self.file, self.int8 = folder / f"{kind}.onnx", folder / f"{kind}_int8.onnx"
        self.file.write_bytes(model)
        self.progress: list[tuple[int, int]] = []
        q_onnx.quantize_onnx(
            self.file, self.patches, self.int8, progress=lambda e: self.progress.append((e.done, e.total))
        )
        self.graph = onnx.load(str(self.int8)).graph
        self.stored = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}

    def torch_logits(self, image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.network(torch.from_numpy(image)).numpy()

    def convolutions(self) -> dict[str, torch.nn.Module]:
        """By the name of their weight in the graph; without those of deep supervision, which are not in it."""
        stored = {tensor.name for tensor in onnx.load(str(self.file)).graph.initializer}
        names = {id(p): n for n, p in self.network.state_dict(keep_vars=True).items() if n in stored}
        convolutions = [m for m in self.network.modules() if isinstance(m, CONVOLUTIONS)]
        return {names[id(m.weight)]: m for m in convolutions if id(m.weight) in names}

    def int8_logits(self, image: np.ndarray) -> np.ndarray:
        session = onnxruntime.InferenceSession(str(self.int8), providers=["CPUExecutionProvider"])
        return session.run(None, {"image": image})[0]


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("int8"))


def activation_limits(case: Case) -> dict[torch.nn.Module, float]:
    """Largest magnitude that goes into every convolution over the patches, seen by PyTorch."""
    limits: dict[torch.nn.Module, float] = {}

    def look(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        limits[module] = max(limits.get(module, 0.0), float(given[0].abs().max()))

    hooks = [module.register_forward_pre_hook(look) for module in case.convolutions().values()]
    case.torch_logits(case.patches)
    for hook in hooks:
        hook.remove()
    return limits


def weight_scales(module: torch.nn.Module) -> np.ndarray:
    """Largest magnitude of every output channel / 127."""
    axis = 1 if "Transpose" in type(module).__name__ else 0
    weight = module.weight.detach().numpy()
    return np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)) / 127


class TestOnnx:
    def test_every_convolution_and_nothing_else(self, case: Case) -> None:
        before, after = (Counter(n.op_type for n in g.node) for g in (onnx.load(str(case.file)).graph, case.graph))
        made_by = {name: node for node in case.graph.node for name in node.output}
        for node in case.graph.node:
            dequantised = [made_by[n].op_type == "DequantizeLinear" for n in node.input if n in made_by]
            if node.op_type in ("Conv", "ConvTranspose"):
                assert all(dequantised)
                assert len(dequantised) == len(node.input)
            elif node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                assert not any(dequantised)
        # norms, skip connections, sums of residual blocks and activations are those of the fp32 graph
        assert {k: n for k, n in after.items() if k not in ("QuantizeLinear", "DequantizeLinear")} == dict(before)
        assert before["InstanceNormalization"] + before["LayerNormalization"] > 0

    def test_zero_points_are_stored_zeros_of_int8(self, case: Case) -> None:
        activations = [n for n in case.graph.node if n.op_type == "QuantizeLinear"]
        assert activations
        for node in activations:
            zero = case.stored[node.input[2]]
            assert (zero.dtype, zero.tolist()) == (np.int8, 0)
        for node in case.graph.node:
            if node.op_type == "DequantizeLinear":
                assert not case.stored[node.input[2]].any()

    def test_scales(self, case: Case) -> None:
        """Largest magnitude / 127: of an activation over all patches, of a weight over its output channel."""
        limits, convolutions = activation_limits(case), case.convolutions()
        made_by = {name: node for node in case.graph.node for name in node.output}
        seen = 0
        for node in case.graph.node:
            if node.op_type not in ("Conv", "ConvTranspose"):
                continue
            activation, weight = (made_by[name] for name in node.input[:2])
            name = weight.input[0].removesuffix("_quantized")
            module = convolutions[name]
            np.testing.assert_allclose(case.stored[activation.input[1]], limits[module] / 127, rtol=1e-4)
            np.testing.assert_allclose(case.stored[weight.input[1]], weight_scales(module), rtol=1e-6)
            axis = {a.name: a.i for a in weight.attribute}["axis"]
            assert axis == (1 if node.op_type == "ConvTranspose" else 0)
            seen += 1
        assert seen == len(convolutions)

    def test_computes_what_pytorch_computes_with_rounded_tensors(self, case: Case) -> None:
        """The same numbers up to steps that fall the other way, on patches it was not calibrated on."""
        image = patches(case.patches.shape[1], case.patches.shape[2:], count=2, seed=5)
        exact, got = case.torch_logits(image), case.int8_logits(image)
        with rounded(case, activation_limits(case)):
            expected = case.torch_logits(image)
        error = np.abs(got - exact).mean()
        assert np.abs(got - expected).mean() < 0.1 * error
        assert 0 < error < 0.05 * np.abs(exact).max()
        assert (got.argmax(1) == exact.argmax(1)).mean() > 0.95

    def test_tensorrt_takes_it(self, case: Case) -> None:
        prepared = prepare_quantized(onnx.load(str(case.int8)))
        assert not any(t.data_type == TensorProto.INT32 for t in prepared.graph.initializer)

    def test_progress_and_nothing_beside_the_model(self, case: Case) -> None:
        assert case.progress == [(n, 6) for n in range(1, 7)]
        kinds = [p.name for p in case.file.parent.iterdir()]
        assert all(name.endswith(".onnx") and "infer" not in name for name in kinds)
        assert case.int8.stat().st_size < case.file.stat().st_size

    def test_known_range(self, tmp_path: Path) -> None:
        """One convolution whose input is known to lie within -2.54 and 1: its step is 0.02."""
        image = np.zeros((2, 1, 4, 4, 4), np.float32)
        image[1, 0, 0, 0, 0], image[0, 0, 1, 1, 1] = -2.54, 1
        weight = np.random.default_rng(0).standard_normal((2, 1, 3, 3, 3)).astype(np.float32)
        graph = helper.make_graph(
            [helper.make_node("Conv", ["image", "weight"], ["logits"], name="conv")],
            "one",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 4, 4, 4])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2, 2, 2, 2])],
            [numpy_helper.from_array(weight, "weight")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, str(tmp_path / "model.onnx"))
        q_onnx.quantize_onnx(tmp_path / "model.onnx", image, tmp_path / "int8.onnx")
        graph = onnx.load(str(tmp_path / "int8.onnx")).graph
        (quantize,) = [n for n in graph.node if n.op_type == "QuantizeLinear"]
        stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        assert stored[quantize.input[1]] == pytest.approx(0.02)

    def test_fixed_batch(self, tmp_path: Path) -> None:
        """A model that takes two patches at once is given them by twos; the odd one is left out."""
        from fastnnunet.export.graph import fix_batch

        (tmp_path / "model.onnx").write_bytes(_network(3, 1, 3)[1])
        fix_batch(tmp_path / "model.onnx", 2)
        given: list[tuple[int, int]] = []
        q_onnx.quantize_onnx(
            tmp_path / "model.onnx",
            patches(1, PATCH_3D, count=5),
            tmp_path / "int8.onnx",
            batch_size=2,
            progress=lambda e: given.append((e.done, e.total)),
        )
        assert given == [(2, 5), (4, 5)]
        shape = onnx.load(str(tmp_path / "int8.onnx")).graph.input[0].type.tensor_type.shape
        assert shape.dim[0].dim_value == 2


@contextmanager
def rounded(case: Case, limits: dict[torch.nn.Module, float]) -> Iterator[None]:
    """PyTorch rounds what goes into convolutions to int8, and weights, and biases to int32."""
    hooks, kept = [], []
    for module in case.convolutions().values():
        step = limits[module] / 127
        scales = torch.from_numpy(weight_scales(module))
        transposed = "Transpose" in type(module).__name__
        along = scales.reshape([-1 if i == (1 if transposed else 0) else 1 for i in range(module.weight.ndim)])
        kept.append((module, module.weight.data, None if module.bias is None else module.bias.data))
        module.weight.data = (module.weight.data / along).round().clamp(-127, 127) * along
        if module.bias is not None:
            module.bias.data = (module.bias.data / (scales * step)).round() * (scales * step)
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, given, step=step: ((given[0] / step).round().clamp(-128, 127) * step,)
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight, bias in kept:
            module.weight.data = weight
            if bias is not None:
                module.bias.data = bias


@needs_nncf
def test_openvino(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Close to PyTorch, and convolutions have 8 bits; nothing is printed."""
    progress: list[tuple[int, int]] = []
    q_openvino.quantize_openvino(
        case.file, case.patches, tmp_path / "model_int8.xml", progress=lambda e: progress.append((e.done, e.total))
    )
    assert progress[:6] == [(n, 6) for n in range(1, 7)]
    assert {p.name for p in tmp_path.iterdir()} == {"model_int8.xml", "model_int8.bin"}
    assert capfd.readouterr().out == ""
    core = shared_core()
    model = core.read_model(str(tmp_path / "model_int8.xml"))
    types = Counter(op.get_type_name() for op in model.get_ops())
    assert types["FakeQuantize"] >= len(case.convolutions())
    image = patches(case.patches.shape[1], case.patches.shape[2:], count=2, seed=5)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    exact, got = case.torch_logits(image), compiled(image)[0]
    assert 0 < np.abs(got - exact).mean() < 0.05 * np.abs(exact).max()
    assert (got.argmax(1) == exact.argmax(1)).mean() > 0.95


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q_onnx, "find_spec", lambda name: None)
    monkeypatch.setattr(q_openvino, "find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(BackendError, match=r"(?s)needs the package onnx.*fastnnunet\[quantize\]"):
        q_onnx.check_onnx_quantizer()
    with pytest.raises(BackendError, match=r"(?s)not installed: nncf\n.*fastnnunet\[quantize\].*--backend onnxruntime"):
        q_openvino.check_openvino_quantizer()


class TestRandomPatches:
    def test_windows_of_the_images(self) -> None:
        """Every patch is a window of its case; both ends of an axis are reached; each case is read once."""
        images = {
            name: np.arange(2 * 6 * 5 * 7, dtype=np.float32).reshape(2, 6, 5, 7) + 1000 * i
            for i, name in enumerate("abc")
        }
        read: list[str] = []

        def load(name: str) -> np.ndarray:
            read.append(name)
            return images[name]

        drawn = RandomPatches(list("abc"), load, (4, 5, 3), 200, 0)
        assert len(drawn) == 200
        got = np.concatenate([drawn[start : start + 8] for start in range(0, 200, 8)])
        assert got.shape == (200, 2, 4, 5, 3)
        assert sorted(read) == list("abc")
        starts = set()
        for patch in got:
            case, voxel = divmod(int(patch[0, 0, 0, 0]), 1000)
            z, y, x = np.unravel_index(voxel, (6, 5, 7))
            np.testing.assert_array_equal(patch, images["abc"[case]][:, z : z + 4, y : y + 5, x : x + 3])
            starts.add((z, x))
        assert starts == {(z, x) for z in range(3) for x in range(5)}

    def test_seed(self) -> None:
        def draw(seed: int) -> np.ndarray:
            images = np.random.default_rng(1).random((5, 1, 8, 8, 8), np.float32)
            return RandomPatches([*range(5)], lambda i: images[i], (4, 4, 4), 6, seed)[:6]

        np.testing.assert_array_equal(draw(3), draw(3))
        assert not np.array_equal(draw(3), draw(4))

    @pytest.mark.parametrize("patch_size", [(8, 6, 9), (6, 9)])
    def test_small_images_are_padded_as_in_prediction(self, patch_size: tuple[int, ...]) -> None:
        image = np.random.default_rng(0).random((1, 3, 5, 6), np.float32) + 1
        (patch,) = RandomPatches(["a"], lambda _: image, patch_size, 1, 0)[:1]
        whole = image if len(patch_size) == 3 else image[:, np.flatnonzero([patch.max() == p.max() for p in image[0]])]
        expected = pad_spatial(whole, centre_padding(whole.shape[1:], patch_size))
        np.testing.assert_array_equal(patch.reshape(expected.shape), expected)


def test_parity_patches_lie_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an even number of places the lower one."""
    from fastnnunet.export import patches as module

    image = np.arange(9, dtype=np.float32).reshape(1, 1, 1, 9)
    for width, first in ((9, 0), (8, 0), (7, 1), (6, 1), (1, 4)):
        assert module._cut(image, (1, 1, width), (module._MIDDLE,) * 3)[0, 0, 0, 0] == first


def test_toy_bundles_have_a_bias(tmp_path: Path) -> None:
    """Otherwise nothing here would see int32 biases."""
    model = make_toy_model(Toy(), tmp_path)
    graph = onnx.load(str(model.bundle / "model.onnx")).graph
    assert any(len(n.input) == 3 for n in graph.node if n.op_type == "Conv")
