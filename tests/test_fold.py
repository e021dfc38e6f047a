"""Batch norm folded into convolutions: the network's own answer, with nothing of the norms left in a bundle."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fastnnunet.engines.torch import load_network
from fastnnunet.export.bundle import export_bundle
from fastnnunet.export.fold import folding_of
from fastnnunet.export.quantize_onnx import quantize_onnx
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.files.plans import architecture_of
from fastnnunet.nnunet.student.plans import student_plans
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from tests.test_students import make_flat, plans_of
from tests.tiny import CONFIGURATION, PATCH


def model_with(world, axes=3, norm="batch", architecture="plain", **changes):
    """A student's model and its network, whose norms have seen something."""
    plans, dataset_json = plans_of(world)
    if axes == 2:
        make_flat(plans)
    spec = StudentSpec(r=2, norm=norm, architecture=architecture)
    plans = student_plans(plans, CONFIGURATION, spec, DistillSpec())
    plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"].update(changes)
    model = model_of(plans, CONFIGURATION, dataset_json)
    torch.manual_seed(0)
    network = build_network(model)
    stir(network)
    return model, network.eval()


def stir(network):
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("norm.weight", "running_var")):
                tensor.uniform_(0.3, 3)
            elif name.endswith(("bias", "running_mean")):
                tensor.normal_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("architecture", ["plain", "residual"])
@pytest.mark.parametrize("axes", [2, 3])
def test_computes_the_same(world, axes, architecture, bias):
    model, network = model_with(world, axes, architecture=architecture, conv_bias=bias)
    folding = folding_of(model, network)
    made = folding.apply(network)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._NormBase) for m in made.modules())
    image = torch.randn(2, 1, *PATCH[-axes:], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = network(image), made(image)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "same"},
        {"nonlin_first": True},
        {"norm_op_kwargs": {"affine": False}},
        {"norm_op_kwargs": {"affine": True, "track_running_stats": False}},
    ],
    ids=str,
)
def test_what_cannot_be_folded_is_left(world, changes):
    model, network = model_with(world, **changes)
    assert folding_of(model, network) is None


def test_network_of_a_trainers_own_is_left(world):
    """The bundle could not say how to build it without its norms."""
    model, network = model_with(world)
    assert folding_of(model, network) is not None
    for block in network.modules():
        if hasattr(block, "all_modules"):
            block.nonlin = block.all_modules[-1] = torch.nn.ELU()
    assert folding_of(model, network) is None


@pytest.fixture
def model_folder(world):
    """Two folds of a residual student with batch norm, as a training leaves them."""
    plans, dataset_json = plans_of(world)
    spec = StudentSpec(r=2, norm="batch", architecture="residual")
    plans = student_plans(plans, CONFIGURATION, spec, DistillSpec())
    folder = world / "results" / "student"
    teacher = next((world / "results").glob("*/nnUNetTrainer__*/fold_0/checkpoint_final.pth"))
    stored = load_checkpoint(teacher)
    for fold in (0, 1):
        torch.manual_seed(fold)
        network = build_network(model_of(plans, CONFIGURATION, dataset_json))
        stir(network)
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.save(
            {**stored, "network_weights": network.state_dict(), "fastnnunet": {}},
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    for name, value in (("plans", plans), ("dataset", dataset_json)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def run(file, image):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]


def test_bundle(world, model_folder, tmp_path):
    """No norm is left in the graph; it, the torch engine's network and its int8 twin compute what the folds do."""
    out = tmp_path / "bundle"
    export_bundle(model_folder, (0, 1), out)
    plans, dataset_json = (json.loads((model_folder / f"{name}.json").read_text()) for name in ("plans", "dataset"))
    network = build_network(model_of(plans, CONFIGURATION, dataset_json)).eval()
    spec = load_bundle_spec(out)
    assert spec.plans == plans, "stock nnU-Net's description stays"
    assert architecture_of(plans, CONFIGURATION)["arch_kwargs"]["norm_op"].endswith("BatchNorm3d")
    assert spec.architecture["arch_kwargs"]["norm_op"] is None
    with np.load(out / "parity.npz") as parity:
        image = parity["image"][:1]
    for fold in (0, 1):
        file = out / f"model_{fold}.onnx"
        nodes = {node.op_type for node in onnx.load(str(file)).graph.node}
        assert nodes <= {"Conv", "ConvTranspose", "LeakyRelu", "Add", "Concat", "AveragePool"}
        stored = load_checkpoint(model_folder / f"fold_{fold}" / "checkpoint_final.pth")
        network.load_state_dict(stored["network_weights"])
        with torch.inference_mode():
            expected = network(torch.from_numpy(image)).numpy()
            rebuilt = load_network(spec, file).eval()(torch.from_numpy(image)).numpy()
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(run(file, image), expected, atol=tolerance)
        np.testing.assert_allclose(rebuilt, expected, atol=tolerance)
        int8 = tmp_path / f"int8_{fold}.onnx"
        quantize_onnx(file, image, int8)
        rounded = run(int8, image)
        assert not np.array_equal(rounded, expected)
        assert np.corrcoef(rounded.ravel(), expected.ravel())[0, 1] > 0.98
