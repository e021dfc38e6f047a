"""The gate of an export: rounding and near ties pass, wrong graphs do not; of large patches one is enough."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fastnnunet.errors import CorruptError, ParityError
from fastnnunet.events import Message
from fastnnunet.export import bundle as bundle_module
from fastnnunet.export import parity
from fastnnunet.export.bundle import export_bundle
from fastnnunet.export.models import cached_bundle
from fastnnunet.export.parity import judge, small_patches
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.onnx import put_weights, to_onnx
from fastnnunet.specs.bundle import load_bundle_spec
from tests.tiny import CONFIGURATION, DATASET, PATCH

SHAPE = (1, 3, 32, 32, 32)
NOISE = 2e-6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def model_folder(world):
    return world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"


def judged(got, expected, has_regions=False):
    return judge(got.astype(np.float32), expected.astype(np.float32), is_real=False, has_regions=has_regions)


def same_labels(a, b):
    return float((a.argmax(1) == b.argmax(1)).mean())


class TestLabels:
    def near_ties(self, rng):
        """Two classes that share most of the volume, with logits as near to each other as rounding moves them."""
        expected = rng.normal(size=SHAPE)
        expected[:, 1] = expected[:, 2] + rng.normal(0, 3 * NOISE, SHAPE)[:, 0]
        return expected.astype(np.float32)

    def test_near_ties_are_no_errors(self, rng):
        expected = self.near_ties(rng)
        got = (expected + rng.normal(0, NOISE, SHAPE)).astype(np.float32)
        report = judged(got, expected)
        assert report.label_agreement == pytest.approx(same_labels(got, expected), abs=1e-9)
        assert report.label_agreement < 0.95
        assert report.max_abs_difference == np.abs(got - expected).max()

    def test_many_labels_where_no_rounding_explains_them(self, rng):
        """A face of the patch is wrong by less than the largest logit allows, and labels there differ."""
        expected = rng.normal(size=SHAPE) * 0.1 + np.array([1, 0, -1]).reshape(1, 3, 1, 1, 1)
        expected[0, 0, 16, 16, 16] = 3000
        got = expected + rng.normal(0, NOISE, SHAPE)
        got[:, 1, 0, :4] = expected[:, 0, 0, :4] + 0.1
        assert np.abs(got - expected).max() < 1e-3 * expected.max()
        assert 0.99 < same_labels(got, expected) < 0.9999
        with pytest.raises(ParityError, match=r"(?s)same label on 99\.\d+% of voxels, or on 99\.[0-8]\d+%"):
            judged(got, expected)

    @pytest.mark.parametrize("wrong", [0.3, 0.02])
    def test_wrong_everywhere_by_less_than_the_largest_logit_allows(self, wrong, rng):
        expected = rng.normal(size=SHAPE)
        expected[0, 0, 0, 0, 0] = 1000
        got = expected + rng.normal(0, wrong / 5, SHAPE)
        with pytest.raises(ParityError):
            judged(got, expected)

    def test_a_common_offset_does_not_hide_it(self, rng):
        expected = 100 + rng.normal(size=SHAPE)
        with pytest.raises(ParityError):
            judged(expected + rng.normal(0, 0.01, SHAPE), expected)

    def test_rounding_beside_a_common_offset(self, rng):
        """Logits that differ by less than their own last digits."""
        expected = (100 + rng.normal(0, 3e-5, SHAPE)).astype(np.float32)
        got = np.nextafter(expected, np.where(rng.random(SHAPE) < 0.5, 0, 200).astype(np.float32))
        assert same_labels(got, expected) < 0.95
        assert judged(got, expected).label_agreement < 0.95

    def test_too_large_a_difference_anywhere(self, rng):
        expected = rng.normal(size=SHAPE)
        got = expected.copy()
        got[0, expected[0, :, 5, 5, 5].argmax(), 5, 5, 5] += 0.1  # the label stays
        assert same_labels(got, expected) == 1
        with pytest.raises(ParityError, match=r"largest logit difference 0\.1"):
            judged(got, expected)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_no_numbers(self, value, rng):
        expected = rng.normal(size=SHAPE)
        got = expected.copy()
        got[0, 0, 3, 3, 3] = value
        with pytest.raises(ParityError):
            judged(got, expected)

    def test_weights_in_half_precision_are_another_model(self, model_folder):
        """Of this network at least: where fewer than 0.01 % of the labels change, as of one in six, it passes."""
        torch.manual_seed(17)
        plans, dataset = (json.loads((model_folder / n).read_text()) for n in ("plans.json", "dataset.json"))
        network = build_network(model_of(plans, CONFIGURATION, dataset)).eval()
        image = torch.randn(4, 1, *PATCH, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = network(image).numpy()
            network.half().float()
            with pytest.raises(ParityError):
                judged(network(image).numpy(), expected)


class TestRegions:
    def test_labels_are_signs(self, rng):
        expected = rng.normal(size=SHAPE) + np.where(rng.random(SHAPE) < 0.5, -5, 5)
        expected[:, 1] = expected[:, 0] + rng.normal(0, 3 * NOISE, SHAPE)[:, 0]  # which is greater means nothing
        got = expected + rng.normal(0, NOISE, SHAPE)
        assert same_labels(got, expected) < 0.95
        assert judged(got, expected, has_regions=True).label_agreement == 1

    def test_near_ties(self, rng):
        expected = rng.normal(size=SHAPE)
        expected[:, 2] = rng.normal(0, 3 * NOISE, SHAPE)[:, 0]
        got = expected + rng.normal(0, NOISE, SHAPE)
        share = ((got > 0) == (expected > 0)).all(axis=1).mean()
        assert judged(got, expected, has_regions=True).label_agreement == pytest.approx(share, abs=1e-4)
        assert share < 0.95

    def test_signs_where_no_rounding_explains_them(self, rng):
        expected = np.abs(rng.normal(size=SHAPE)) + 0.2
        expected[0, 0, 16, 16, 16] = 3000
        got = expected + rng.normal(0, NOISE, SHAPE)
        got[:, 1, 0, :4] = -0.1
        with pytest.raises(ParityError):
            judged(got, expected, has_regions=True)


def save_near_ties(model_folder, fold):
    """Make two classes of a fold nearly the same."""
    path = model_folder / f"fold_{fold}" / "checkpoint_final.pth"
    checkpoint = load_checkpoint(path)
    heads = [name for name in checkpoint["network_weights"] if "seg_layers" in name]
    for name in heads:
        tensor = checkpoint["network_weights"][name]
        noise = torch.randn(tensor[1].shape, generator=torch.Generator().manual_seed(fold))
        tensor[2] = tensor[1] * (1 + 1e-7 * noise)
        if name.endswith("bias"):
            tensor[1:] += 1  # ahead of the background
    torch.save(checkpoint, path)


def test_an_ensemble_of_near_ties_is_exported(model_folder, tmp_path):
    for fold in (0, 1):
        save_near_ties(model_folder, fold)
    report = export_bundle(model_folder, (0, 1), tmp_path / "bundle")
    assert report.label_agreement < 0.9999
    assert load_bundle_spec(tmp_path / "bundle").provenance["parity"]["label_agreement"] < 0.9999


def mixing_batches(network, *shape):
    """The graph, but with patches of a batch that look at each other; right for one alone."""
    model = to_onnx(network, *shape)
    graph = model.graph
    graph.node[-1].output[0] = "own"
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "batch_axis"))
    graph.node.extend(
        [
            helper.make_node("ReduceMean", ["own", "batch_axis"], ["mean"], keepdims=1),
            helper.make_node("Sub", ["own", "mean"], ["away"]),
            helper.make_node("Add", ["own", "away"], ["logits"]),
        ]
    )
    return model


def wrong_from_fold_1(model, weights):
    """Takes a bias of the first fold for that of all."""
    kept = {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer}
    put_weights(model, weights)
    bias = next(t for t in model.graph.initializer if "seg_layers" in t.name and t.name.endswith("bias"))
    bias.ParseFromString(kept[bias.name])


class TestLargePatches:
    @pytest.fixture
    def runs(self, monkeypatch):
        """Patches of 16^3 count as large; returns the shapes that ONNX Runtime computes."""
        monkeypatch.setattr(parity, "LARGE_PATCH", 16**3 - 1)
        shapes, run = [], parity._runs

        def recorded(model, image_NCX, batch_sizes):
            shapes.append((image_NCX.shape, batch_sizes))
            return run(model, image_NCX, batch_sizes)

        monkeypatch.setattr(parity, "_runs", recorded)
        return shapes

    def test_one_patch_a_fold_and_a_small_batch_once(self, model_folder, tmp_path, runs):
        report = export_bundle(model_folder, (0, 1), tmp_path / "bundle")
        first = [((1, 1, *PATCH), {1}), ((2, 1, 8, 8, 8), {2})]
        assert runs == [*first, ((2, 1, 8, 8, 8), {2}), ((1, 1, *PATCH), {1})]
        assert report.real
        stored = np.load(tmp_path / "bundle" / "parity.npz")
        assert stored["image"].shape == (1, 1, *PATCH)
        plans, dataset = (json.loads((model_folder / n).read_text()) for n in ("plans.json", "dataset.json"))
        network = build_network(model_of(plans, CONFIGURATION, dataset)).eval()
        logits = []
        for fold in (0, 1):
            network.load_state_dict(
                load_checkpoint(model_folder / f"fold_{fold}/checkpoint_final.pth")["network_weights"]
            )
            with torch.inference_mode():
                logits.append(network(torch.from_numpy(stored["image"])).numpy())
        np.testing.assert_allclose(stored["logits"], np.mean(logits, axis=0), atol=1e-5)

    def test_patches_that_look_at_each_other(self, model_folder, tmp_path, runs, monkeypatch):
        monkeypatch.setattr(bundle_module, "to_onnx", mixing_batches)
        with pytest.raises(ParityError, match="on 2 real patches"):
            export_bundle(model_folder, 0, tmp_path / "bundle")
        assert list(tmp_path.glob("*bundle*")) == []

    def test_another_fold_that_is_wrong(self, model_folder, tmp_path, runs, monkeypatch):
        path = model_folder / "fold_1" / "checkpoint_final.pth"
        checkpoint = load_checkpoint(path)
        for name, tensor in checkpoint["network_weights"].items():
            if "seg_layers" in name and name.endswith("bias"):
                tensor += torch.arange(3.0)
        torch.save(checkpoint, path)
        monkeypatch.setattr(bundle_module, "put_weights", wrong_from_fold_1)
        with pytest.raises(ParityError, match="on 1 real patches"):
            export_bundle(model_folder, (0, 1), tmp_path / "bundle")

    def test_where_the_small_batch_says_nothing_whole_patches_decide(self, model_folder, tmp_path, runs, monkeypatch):
        monkeypatch.setattr(parity, "for_other_sizes", lambda model: b"no model")
        export_bundle(model_folder, (0, 1), tmp_path / "bundle")
        assert runs[2:] == [((2, 1, *PATCH), {2}), ((1, 1, *PATCH), {1})]
        np.testing.assert_array_equal(np.load(tmp_path / "bundle" / "parity.npz")["image"].shape, (1, 1, *PATCH))


def graph_of(*nodes, initializers=()):
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, 16, 16, 16]) for name in ("image", "logits")
    ]
    graph = helper.make_graph(
        list(nodes), "g", values[:1], values[1:], [numpy_helper.from_array(*i) for i in initializers]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


class TestSmallPatches:
    IMAGE = np.random.default_rng(0).normal(size=(2, 2, 16, 16, 16)).astype(np.float32)

    @pytest.mark.parametrize(
        ("node", "initializers", "is_local"),
        [
            (helper.make_node("Relu", ["image"], ["logits"]), (), True),
            (helper.make_node("Mul", ["image", "w"], ["logits"]), ((np.ones((2, 1, 1, 1), "f4"), "w"),), True),
            (helper.make_node("Mul", ["image", "w"], ["logits"]), ((np.ones((16, 16, 16), "f4"), "w"),), False),
            (helper.make_node("Mul", ["image", "w"], ["logits"]), ((np.ones(16, "f4"), "w"),), False),
            (helper.make_node("Softmax", ["image"], ["logits"], axis=-1), (), False),
            (helper.make_node("Conv", ["image", "w"], ["logits"]), ((np.ones((2, 2, 1, 1, 1), "f4"), "w"),), True),
            (
                helper.make_node("Conv", ["image", "w"], ["logits"], auto_pad="SAME_UPPER"),
                ((np.ones((2, 2, 3, 3, 3), "f4"), "w"),),
                False,
            ),
        ],
        ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
    )
    def test_only_graphs_that_do_the_same_everywhere(self, node, initializers, is_local):
        graph = graph_of(node, initializers=initializers)
        small = small_patches(graph, self.IMAGE, (4, 4, 4))
        assert (small is not None) == is_local
        if small is not None:
            got = next(parity._runs(parity.for_other_sizes(graph), small, {2}))
            assert got.shape == (2, 2, 8, 8, 8)
            np.testing.assert_array_equal(small[0], self.IMAGE[0, :, :8, :8, :8])
            np.testing.assert_array_equal(small[1], self.IMAGE[0, :, 8:, 8:, 8:])

    def test_without_a_smaller_size(self):
        relu = graph_of(helper.make_node("Relu", ["image"], ["logits"]))
        assert small_patches(relu, self.IMAGE, None) is None
        assert small_patches(relu, self.IMAGE, (8, 8, 8)) is None
        assert small_patches(relu, self.IMAGE, (8, 8, 4)) is not None


class TestProgress:
    def test_every_stage_is_told_before_it_begins(self, model_folder, tmp_path):
        stages = []

        def note(event):
            stages.append((event.done, event.total, event.note))

        export_bundle(model_folder, (0, 3), tmp_path / "b", progress=note)
        assert [number for number, _, _ in stages] == [1, 2, 3, 4, 5, 6]
        assert {total for _, total, _ in stages} == {6}
        assert stages[4][2] == "fold 3, 2 patches of 16 x 16 x 16 through PyTorch"
        (model_folder / "fold_0" / "checkpoint_final.pth").write_bytes(b"damaged")
        with pytest.raises(CorruptError):
            export_bundle(
                model_folder, (0,), tmp_path / "c", progress=lambda e: stages.append((e.done, e.total, e.note))
            )
        assert stages[6:] == [(1, 4, "building the network")]

    def test_first_use_of_a_model(self, model_folder, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
        told = []

        def tell(event):
            message = event.text if isinstance(event, Message) else event.line
            told.append((message, (tmp_path / "home").exists()))

        bundle = cached_bundle(model_folder, (0,), progress=tell)
        messages = [message for message, _ in told]
        assert messages[0].startswith(f"{model_folder.name}: reading 3 new or changed file(s)")
        assert not told[0][1]  # nothing was done by then
        assert messages[1].startswith("first use of this model: exporting 1 fold(s)")
        assert [m.split(":")[0] for m in messages[2:-1]] == [f"export {n}/4" for n in (1, 2, 3, 4)]
        told.clear()
        assert cached_bundle(model_folder, (0,), progress=tell) == bundle
        assert told == []
        shutil.copytree(model_folder / "fold_0", model_folder / "fold_9")
        assert cached_bundle(model_folder, (9,), progress=tell) != bundle
        assert told[0][0].startswith(f"{model_folder.name}: reading 1 new")
