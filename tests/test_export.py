"""Bundles: what is in them, that they compute what PyTorch computes, and that nothing is left when they do not."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fastnnunet.engines.registry import create_engine, is_installed
from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, ParityError, SpecError
from fastnnunet.export import bundle as bundle_module
from fastnnunet.export import patches
from fastnnunet.export.bundle import export_bundle
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.onnx import to_onnx
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.graph import GraphSpec
from tests.test_kinds import nnunet_predictor, read
from tests.tiny import CONFIGURATION, DATASET, PATCH


@pytest.fixture
def model_folder(world):
    return world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"


@pytest.fixture
def bundle(model_folder, tmp_path):
    export_bundle(model_folder, 0, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_bundle_describes_the_model(bundle, model_folder):
    spec = load_bundle_spec(bundle)
    plans = json.loads((model_folder / "plans.json").read_text())
    config = plans["configurations"][CONFIGURATION]
    assert spec.patch_size == tuple(PATCH)
    assert spec.spacing_mm == tuple(config["spacing"])
    assert spec.normalization_schemes == ("CTNormalization",)
    assert spec.channel_names == ("CT",)
    assert spec.labels == {"background": 0, "bright": 1, "dark": 2}
    assert spec.num_heads == 3
    assert spec.plans == plans
    assert sorted(p.name for p in bundle.iterdir()) == ["bundle.json", "model.onnx", "parity.npz"]


def test_model_computes_what_pytorch_computes_for_any_batch(bundle, model_folder):
    plans, dataset_json = (json.loads((model_folder / n).read_text()) for n in ("plans.json", "dataset.json"))
    network = build_network(model_of(plans, CONFIGURATION, dataset_json)).eval()
    network.load_state_dict(load_checkpoint(model_folder / "fold_0/checkpoint_final.pth")["network_weights"])
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        image = np.random.default_rng(batch).normal(size=(batch, 1, *PATCH)).astype(np.float32)
        with torch.inference_mode():
            expected = network(torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(session.run(["logits"], {"image": image})[0], expected, atol=1e-3, rtol=1e-3)


def test_graph_keeps_norms_weights_and_no_traces_of_the_machine(bundle, model_folder):
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    assert (
        operators.count("InstanceNormalization") == 5
    )  # three encoder stages, two decoder stages, one convolution each
    assert "ReduceMean" not in operators
    assert {o.domain for o in model.opset_import} == {""}
    weights = load_checkpoint(model_folder / "fold_0/checkpoint_final.pth")["network_weights"]
    assert {i.name for i in model.graph.initializer} <= set(weights)
    assert b"site-packages" not in (bundle / "model.onnx").read_bytes()


def test_parity_patches_are_real(bundle, world):
    parity = np.load(bundle / "parity.npz")
    assert parity["image"].shape == (2, 1, *PATCH)
    assert parity["logits"].shape == (2, 3, *PATCH)
    assert parity["image"].std() > 0.1


def test_patches_that_show_nothing_come_last(monkeypatch):
    """What a network with instance norm says of an image of one value is rounding."""
    rng = np.random.default_rng(0)
    images = {case: np.full((2, 4, 5, 6), [[[[1]]], [[[3]]]], np.float32) for case in "abe"}
    images |= {case: rng.normal(size=(2, 4, 5, 6)).astype(np.float32) for case in "cdf"}
    stored = SimpleNamespace(case_ids=sorted(images), image_CZYX=images.__getitem__)
    monkeypatch.setattr(patches, "open_cases", lambda *_: stored)
    np.testing.assert_array_equal(patches.real_patches({}, "", (4, 5, 6)), [images["c"], images["d"]])
    np.testing.assert_array_equal([*patches.real_images({}, "", count=5)], [images[case] for case in "cdf"])
    stored.case_ids = ["a", "f", "b"]
    np.testing.assert_array_equal(patches.real_patches({}, "", (4, 5, 6)), [images["f"], images["a"]])


def test_export_is_reproducible(bundle, model_folder, tmp_path):
    export_bundle(model_folder, 0, tmp_path / "again")
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()


@pytest.mark.parametrize("name", ["model.onnx", "parity.npz"])
def test_changed_file_is_refused(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(CorruptError, match=f"{name} was changed"):
        load_bundle_spec(bundle)


def test_changed_description_is_refused(bundle):
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace('"step_size": 0.5', '"step_size": 0.9'))
    with pytest.raises(CorruptError, match=r"bundle\.json was changed"):
        load_bundle_spec(bundle)


def test_missing_file_and_newer_format_are_refused(bundle):
    (bundle / "parity.npz").unlink()
    with pytest.raises(CorruptError, match=r"parity\.npz is missing"):
        load_bundle_spec(bundle)
    raw = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**raw, "format_version": 99}))
    with pytest.raises(CorruptError, match="format version 99"):
        load_bundle_spec(bundle)


@pytest.fixture
def network(model_folder):
    plans, dataset_json = (json.loads((model_folder / n).read_text()) for n in ("plans.json", "dataset.json"))
    network = build_network(model_of(plans, CONFIGURATION, dataset_json)).eval()
    network.load_state_dict(load_checkpoint(model_folder / "fold_0/checkpoint_final.pth")["network_weights"])
    return network


def run_onnx(bundle, image):
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image})[0]


class TestShapesOfTheGraph:
    def test_other_patch_size_is_what_nnunet_predicts_with_it(self, world, model_folder, tmp_path):
        export_bundle(model_folder, 0, tmp_path / "bundle", graph=GraphSpec(patch_size=(12, 20, 16)))
        assert load_bundle_spec(tmp_path / "bundle").patch_size == (12, 20, 16)
        images = world / "raw" / DATASET / "imagesTs"
        Predictor.load(tmp_path / "bundle", "onnxruntime").predict_files(images, tmp_path / "ours")
        other = tmp_path / "other"  # nnU-Net's model with that patch size in its plans
        shutil.copytree(model_folder, other)
        plans = json.loads((other / "plans.json").read_text())
        plans["configurations"][CONFIGURATION]["patch_size"] = [12, 20, 16]
        (other / "plans.json").write_text(json.dumps(plans))
        (tmp_path / "theirs").mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            for folder, name in ((other, "other"), (model_folder, "trained")):
                predictor = nnunet_predictor(folder)
                predictor.use_mirroring = True
                image = str(images / "tiny_10_0000.nii.gz")
                predictor.predict_from_files_sequential([[image]], [str(tmp_path / "theirs" / name)])
        ours = read(tmp_path / "ours" / "tiny_10.nii.gz")
        assert (ours == read(tmp_path / "theirs" / "other.nii.gz")).mean() >= 0.9999
        assert (ours != read(tmp_path / "theirs" / "trained.nii.gz")).any()

    @pytest.mark.parametrize(
        ("patch_size", "message"),
        [
            ((16, 16), r"got \[16, 16\], expected 3 numbers, as in \[16, 16, 16\]"),
            ((16, 18, 16), "axis 1: got 18, expected a multiple of 4"),
        ],
    )
    def test_patch_sizes_that_cannot_be(self, model_folder, tmp_path, patch_size, message):
        with pytest.raises(SpecError, match=message):
            export_bundle(model_folder, 0, tmp_path / "bundle", graph=GraphSpec(patch_size=patch_size))
        assert not (tmp_path / "bundle").exists()

    def test_dynamic_space(self, network, bundle, model_folder, tmp_path):
        export_bundle(model_folder, 0, tmp_path / "dynamic", graph=GraphSpec(dynamic_space=True))
        shape = onnx.load(tmp_path / "dynamic" / "model.onnx").graph.input[0].type.tensor_type.shape
        assert [bool(d.dim_param) for d in shape.dim] == [True, False, True, True, True]
        for n, *space in ((1, 16, 16, 16), (3, 12, 8, 32), (1, 40, 20, 24)):
            image = np.random.default_rng(n).normal(size=(n, 1, *space)).astype(np.float32)
            with torch.inference_mode():
                expected = network(torch.from_numpy(image)).numpy()
            np.testing.assert_allclose(run_onnx(tmp_path / "dynamic", image), expected, atol=1e-3, rtol=1e-3)
        spec = load_bundle_spec(tmp_path / "dynamic")
        image = np.load(bundle / "parity.npz")["image"]
        expected = create_engine("onnxruntime", bundle, spec).run(image)
        for name in ("openvino", "torch"):
            if is_installed(name):
                np.testing.assert_allclose(
                    create_engine(name, tmp_path / "dynamic", spec).run(image), expected, atol=1e-3, rtol=1e-3
                )

    def test_fixed_batch(self, bundle, model_folder, tmp_path):
        export_bundle(model_folder, 0, tmp_path / "fixed", graph=GraphSpec(batch_size=3))
        model = onnx.load(tmp_path / "fixed" / "model.onnx")
        onnx.checker.check_model(model, full_check=True)
        for value, channels in ((model.graph.input[0], 1), (model.graph.output[0], 3)):
            assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [3, channels, *PATCH]
        images = np.random.default_rng(0).normal(size=(7, 1, *PATCH)).astype(np.float32)
        spec = load_bundle_spec(tmp_path / "fixed")
        backend = create_engine("onnxruntime", tmp_path / "fixed", spec)
        for count in (1, 3, 7):
            np.testing.assert_allclose(
                backend.run(images[:count]), run_onnx(bundle, images[:count]), atol=1e-4, rtol=1e-4
            )

    def test_values_that_cannot_be(self):
        with pytest.raises(SpecError, match=r"patch_size: got \(0, 8\).*; batch_size: got 0"):
            GraphSpec(patch_size=(0, 8), batch_size=0)


class TestRefusals:
    def test_mismatch_leaves_nothing(self, model_folder, tmp_path, monkeypatch):
        def wrong(network, *shape):
            with torch.no_grad():
                list(network.parameters())[-1].add_(1)
            return to_onnx(network, *shape)

        monkeypatch.setattr(bundle_module, "to_onnx", wrong)
        out = tmp_path / "new" / "bundle"
        with pytest.raises(ParityError, match="differs from PyTorch on 2 real patches"):
            export_bundle(model_folder, 0, out)
        assert list(out.parent.iterdir()) == []

    def test_graph_without_instance_normalization(self):
        class Disguised(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = torch.nn.InstanceNorm3d(1)

            def forward(self, x):
                return x - x.mean((2, 3, 4), keepdim=True)

        with pytest.raises(ParityError, match="0 InstanceNormalization nodes, expected 1"):
            to_onnx(Disguised(), 1, (8, 8, 8))

    def test_existing_target(self, bundle, model_folder, tmp_path):
        with pytest.raises(MismatchError, match="exists already"):
            export_bundle(model_folder, 0, bundle)
        export_bundle(model_folder, 1, bundle, overwrite=True)
        assert load_bundle_spec(bundle).provenance["fold"] == "1"
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "thesis.tex").write_text("mine")
        with pytest.raises(MismatchError, match="not a bundle and not empty"):
            export_bundle(model_folder, 0, precious, overwrite=True)
        assert (precious / "thesis.tex").read_text() == "mine"

    def test_missing_fold(self, model_folder, tmp_path):
        with pytest.raises(NotFoundError, match=r"(?s)fold_7.*folds with a checkpoint_final.pth: 0, 1, 2, 3, 4"):
            export_bundle(model_folder, 7, tmp_path / "b")
