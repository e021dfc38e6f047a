"""Files and numbers in models from strangers: nothing outside is read, every refusal is one message."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastnnunet.errors import CorruptError, MismatchError, SpecError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import check_fits, model_of
from fastnnunet.nnunet.files.plans import configuration_of, read_json
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.load import load_yaml_spec
from fastnnunet.specs.student import StudentSpec
from tests.bundles import ToyModel
from tests.hostile_models import CONFIGURATION, bundle_json, plans_json, refused, write_bundle
from tests.hostile_models import model as model  # a fixture
from tests.hostile_models import toy as toy


class TestBundleFiles:
    def test_files_outside(self, model: ToyModel, tmp_path: Path) -> None:
        raw = bundle_json(model)
        outside = tmp_path / "outside.onnx"
        shutil.copy(model.bundle / "model.onnx", outside)
        digest = sha256_of_file(outside)
        for name in (str(outside), "../outside.onnx", "sub/../../outside.onnx", "a\nb.onnx", "..", "", "a\\b.onnx"):
            write_bundle(model, {**raw, "model_files": [name], "files": {**raw["files"], name: digest}})
            with pytest.raises(CorruptError, match="no name of a file in the bundle"):
                load_bundle_spec(model.bundle)

    def test_links(self, model: ToyModel, tmp_path: Path) -> None:
        for name in ("model.onnx", "parity.npz", "bundle.json"):
            file, elsewhere = model.bundle / name, tmp_path / name
            file.rename(elsewhere)
            file.symlink_to(elsewhere)
            with pytest.raises(CorruptError, match=f"(?s){name} is a link.*cp -rL"):
                load_bundle_spec(model.bundle)
            file.unlink()
            elsewhere.rename(file)
        load_bundle_spec(model.bundle)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"files": {}}, "model.onnx' has no digest"),
            ({"files": {"model.onnx": "0"}}, "expected a SHA-256"),
            ({"model_files": []}, "at least one"),
            ({"model_files": ["model.onnx", "model.onnx"]}, "each once"),
            ({"model_files": ["parity.npz"]}, "the name of an ONNX file"),
            ({"folds": ["0", "1"]}, "one for each of 1 model files"),
            ({"file_ending": "/../../.bashrc"}, "file_ending"),
            ({"name": "\x1b[2Jtoy"}, "control characters"),
        ],
    )
    def test_what_bundle_json_says_of_files(self, model: ToyModel, changes: dict[str, Any], message: str) -> None:
        write_bundle(model, {**bundle_json(model), **changes})
        with pytest.raises(CorruptError, match=message):
            load_bundle_spec(model.bundle)

    def test_weights_in_another_file(self, model: ToyModel, tmp_path: Path) -> None:
        """As ONNX stores large models: engines would read whatever file the model names."""
        import onnx

        file = model.bundle / "model.onnx"
        whole = onnx.load(str(file))
        secret = tmp_path / "secret"
        secret.write_bytes(b"\0" * 2**20)
        for attack in ("initializer", "constant", "subgraph"):
            changed = onnx.ModelProto()
            changed.CopyFrom(whole)
            tensor = changed.graph.initializer[0]
            if attack != "initializer":
                node = changed.graph.node.add(op_type="Constant", output=["leaked"])
                tensor = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
                if attack == "subgraph":
                    inner = changed.graph.node.add(op_type="If", output=["either"])
                    branch = inner.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
                    branch.node.append(node)
                    changed.graph.node.remove(node)
                    tensor = branch.node[0].attribute[0].t
                tensor.data_type = onnx.TensorProto.FLOAT
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=str(secret))
            file.write_bytes(changed.SerializeToString())
            raw = bundle_json(model)
            raw["files"]["model.onnx"] = sha256_of_file(file)
            write_bundle(model, raw)
            with pytest.raises(CorruptError, match="weights lie in another file"):
                load_bundle_spec(model.bundle)

    @pytest.mark.parametrize(
        "changes",
        [
            {"patch_size": [16, 20, 32]},
            {
                "channel_names": ["a", "b"],
                "normalization_schemes": ["NoNormalization"] * 2,
                "use_mask_for_norm": [False] * 2,
            },
            {"num_heads": 4, "labels": {"background": 0, "a": 1, "b": 2, "c": 3}},
            {"batch_size": 2},
            {"previous_labels": [1]},
        ],
    )
    def test_a_model_of_other_shapes(self, model: ToyModel, changes: dict[str, Any]) -> None:
        raw = {**bundle_json(model), **changes}
        if "batch_size" in changes:
            load_bundle_spec(model.bundle)  # any number of patches: also two
            write_bundle(model, raw)
            load_bundle_spec(model.bundle)
            return
        write_bundle(model, raw)
        with pytest.raises(CorruptError, match=r"not the model that bundle.json describes\n.*\n.*expected one"):
            load_bundle_spec(model.bundle)

    @pytest.mark.parametrize("content", [b"", b"\x3a", b"\x3a\xff\xff\xff\xff\x0f", b"\x0b", b"no model", b"\x3a\x00"])
    def test_damaged_models(self, model: ToyModel, content: bytes) -> None:
        file = model.bundle / "model.onnx"
        file.write_bytes(content)
        raw = bundle_json(model)
        raw["files"]["model.onnx"] = sha256_of_file(file)
        write_bundle(model, raw)
        with pytest.raises(CorruptError, match=r"no usable ONNX file|not the model"):
            load_bundle_spec(model.bundle)


class TestRanges:
    @pytest.mark.parametrize(
        "changes",
        [
            {"patch_size": [10**9] * 3},
            {"patch_size": [2**14] * 3},
            {"patch_size": [16, 20]},
            {"patch_size": [True, 20, 24]},
            {"spacing_mm": [1.0, -1.0, 1.0]},
            {"spacing_mm": [1.0, 1.0]},
            {"transpose_forward": [0, 0, 2]},
            {"transpose_backward": [1, 0, 2]},
            {"step_size": 1e-9},
            {"mirror_axes": [3]},
            {"mirror_axes": [0, 0]},
            {"normalization_schemes": []},
            {"use_mask_for_norm": [False, False]},
            {"num_heads": 10**9},
            {"labels": {"background": -1}},
            {"batch_size": 10**9},
            {"resampling": {}},
        ],
    )
    def test_bundle(self, model: ToyModel, changes: dict[str, Any]) -> None:
        write_bundle(model, {**bundle_json(model), **changes})
        with pytest.raises(CorruptError, match=next(iter(changes)).split("_")[0]):
            load_bundle_spec(model.bundle)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("n_conv_per_stage", [10**8, 1, 1]),
            ("n_conv_per_stage", 10**8),
            ("n_stages", 10**9),
            ("n_stages", -1),
            ("features_per_stage", [10**9] * 3),
            ("features_per_stage", [6, 8]),
            ("kernel_sizes", [[3, 3]] * 3),
            ("strides", [[0, 1, 1]] * 3),
            ("conv_op", "torch.nn.modules.conv.Conv2d"),
            ("nonlin_kwargs", {"negative_slope": 10**30}),
        ],
    )
    def test_architectures(self, model: ToyModel, field: str, value: Any) -> None:
        raw, plans = bundle_json(model), plans_json(model)
        raw["architecture"]["arch_kwargs"][field] = value
        plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"][field] = value
        write_bundle(model, raw)
        with pytest.raises(CorruptError, match=field if field != "nonlin_kwargs" else "finite number"):
            load_bundle_spec(model.bundle)
        with pytest.raises(MismatchError, match=field):
            configuration_of(plans, CONFIGURATION)

    @pytest.mark.parametrize(
        "configurations",
        [
            {CONFIGURATION: {"inherits_from": CONFIGURATION}},
            {CONFIGURATION: {"inherits_from": "b"}, "b": {"inherits_from": CONFIGURATION}},
            {CONFIGURATION: {"inherits_from": "nothing"}},
            {CONFIGURATION: {"inherits_from": ["b"]}},
            {CONFIGURATION: {}},
            {CONFIGURATION: {"UNet_class_name": "PlainConvUNet", "patch_size": [16, 16, 16]}},
            {CONFIGURATION: []},
            [],
        ],
    )
    def test_configurations(self, model: ToyModel, configurations: Any) -> None:
        with pytest.raises(MismatchError, match="cannot be used"):
            configuration_of({**plans_json(model), "configurations": configurations}, CONFIGURATION)

    def test_a_network_that_the_weights_do_not_fit_is_not_built(self, model: ToyModel) -> None:
        """16000 features: 28 GB of weights in one convolution, of which the checkpoint has none."""
        plans, dataset_json = plans_json(model), read_json(model.folder / "dataset.json")
        plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["features_per_stage"] = [16000] * 3
        path = model.folder / "fold_0" / "checkpoint_final.pth"
        weights = load_checkpoint(path)["network_weights"]
        with pytest.raises(MismatchError, match="do not fit the checkpoint"):
            check_fits(model_of(plans, CONFIGURATION, dataset_json), "nnUNetTrainer", weights, path)


class TestDocuments:
    @pytest.mark.parametrize("text", ["[" * 10**5, '{"a": ' * 500 + "1" + "}" * 500, "9" * 5000, '{"a": 1, "a": 2}'])
    @pytest.mark.parametrize("name", ["plans.json", "dataset.json", "bundle.json"])
    def test_json(self, model: ToyModel, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        folder = model.bundle if name == "bundle.json" else model.folder
        (folder / name).write_text(text)
        command = ["predict", "-i", "images", "-o", "out", "-m", str(folder), "-f", "0"]
        assert f"{name} is no usable JSON" in refused(capsys, command)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("r: 1\nr: 2", "'r' is there twice"),
            ("arch_kwargs: {a: 1, a: 2}", "'a' is there twice"),
            ("[" * 10**4, "nested too deep"),
            ("arch_kwargs: " + "{a: " * 100 + "1" + "}" * 100, "nested deeper"),
            (
                "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
                + "".join(
                    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
                ),
                "more than",
            ),
            ("arch_kwargs: &a {b: *a}", "nested deeper"),
            ("name: !!python/object/apply:os.system [id]", "could not determine a constructor"),
            ("r: " + "9" * 5000, "digits"),
            ("r: .nan", "finite"),
            ("min_features: " + "9" * 100, "64 bits"),
            ("x: " + "y" * 10**6, "more than 262144 bytes"),
        ],
    )
    def test_yaml(self, tmp_path: Path, text: str, message: str) -> None:
        file = tmp_path / "student.yaml"
        file.write_text(text)
        with pytest.raises(SpecError, match=message):
            load_yaml_spec(StudentSpec, file)

    def test_yaml_anchors_that_stay_small(self, tmp_path: Path) -> None:
        file = tmp_path / "student.yaml"
        file.write_text("arch_kwargs: {a: &k [3, 3], b: *k}\nnetwork_class_name: a.B\n")
        assert load_yaml_spec(StudentSpec, file).arch_kwargs == {"a": [3, 3], "b": [3, 3]}
