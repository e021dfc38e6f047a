"""Names in models from strangers: nothing that they name runs, unless it is allowed to."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastnnunet.engines.torch import load_network
from fastnnunet.errors import FastnnUNetError, MismatchError, NotFoundError
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.files.plans import configuration_of, label_manager_of, read_json, trainer_class
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.checks.networks import ALLOW_CODE_VARIABLE, allow_code, find_layer, find_network
from fastnnunet.specs.student import StudentSpec
from tests.bundles import ToyModel
from tests.hostile_models import CONFIGURATION, bundle_json, plans_json, put, refused, strings, write_bundle
from tests.hostile_models import model as model  # a fixture
from tests.hostile_models import toy as toy

DNA = "dynamic_network_architectures"
PREDICT = ["predict", "-o", "out", "--backend", "torch"]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that appears when a module `evil` is imported; a class and a function of it are there to be named."""
    file = tmp_path / "canary"
    classes = "class Net(torch.nn.Module):\n    pass\ndef run(**_):\n    pass\n"
    (tmp_path / "evil.py").write_text(f"import torch\nopen({str(file)!r}, 'w').close()\n{classes}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield file
    sys.modules.pop("evil", None)


class TestNames:
    """Every name in plans.json or bundle.json is tried, as a module of the attacker and by way of trusted modules."""

    PAYLOADS = ("evil.Net", "evil.run", "evil", "torch.nn.parallel.distributed.os.system", "os.system", "builtins.exec")

    def _payloads(self, canary: Path, architecture: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Architectures that run `touch CANARY` wherever names are looked up as Python does."""
        command = {"command": f"touch {canary}"}
        kwargs = architecture["arch_kwargs"]
        for name in self.PAYLOADS:
            for field in ("conv_op", "norm_op", "dropout_op", "nonlin"):
                changed = {**kwargs, field: name, "norm_op_kwargs": command, "nonlin_kwargs": command}
                yield {**architecture, "arch_kwargs": changed}
            yield {**architecture, "network_class_name": name, "arch_kwargs": command, "_kw_requires_import": []}
            yield {**architecture, "arch_kwargs": {**kwargs, "any": name}, "_kw_requires_import": ["any"]}

    def test_every_text_of_plans(self, model: ToyModel, canary: Path) -> None:
        plans, dataset_json = plans_json(model), read_json(model.folder / "dataset.json")
        tried = [put(plans, path, name) for path in strings(plans) for name in self.PAYLOADS]
        config = plans["configurations"][CONFIGURATION]
        tried += [
            put(plans, ("configurations", CONFIGURATION, "architecture"), payload)
            for payload in self._payloads(canary, config["architecture"])
        ]
        refusals = 0
        for changed in tried:
            try:
                manager, _ = configuration_of(changed, CONFIGURATION)
                build_network(model_of(changed, CONFIGURATION, dataset_json))
                label_manager_of(manager, dataset_json)
            except MismatchError:
                refusals += 1
            assert not canary.exists()
        assert refusals > len(tried) / 2

    def test_every_text_of_a_bundle(self, model: ToyModel, canary: Path) -> None:
        raw = bundle_json(model)
        tried = [put(raw, p, name) for p in strings(raw) if p[0] != "files" for name in self.PAYLOADS[::3]]
        tried += [{**raw, "architecture": payload} for payload in self._payloads(canary, raw["architecture"])]
        refusals = 0
        for changed in tried:
            write_bundle(model, changed)
            try:
                spec = load_bundle_spec(model.bundle)
                load_network(spec, model.bundle / spec.model_file)
            except FastnnUNetError:
                refusals += 1
            assert not canary.exists()
        assert refusals >= 36  # the architectures at least

    @pytest.mark.parametrize(
        "payload", [("nonlin", "torch.nn.parallel.distributed.os.system"), ("conv_op", "evil.Net")]
    )
    def test_commands(
        self, model: ToyModel, canary: Path, payload: tuple[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        field, name = payload
        command = {"command": f"touch {canary}"}
        raw, plans = bundle_json(model), plans_json(model)
        raw["architecture"]["arch_kwargs"] |= {field: name, "nonlin_kwargs": command}
        plans["configurations"][CONFIGURATION]["architecture"] = raw["architecture"]
        write_bundle(model, raw)
        (model.folder / "plans.json").write_text(json.dumps(plans))
        for arguments in (
            [*PREDICT, "-i", "images", "-m", str(model.bundle)],
            [*PREDICT, "-i", "images", "-m", str(model.folder), "-f", "0"],
            ["export", "onnx", "-m", str(model.folder), "-f", "0", "-o", "exported"],
        ):
            said = refused(capsys, arguments)
            assert name in said
            assert "--allow-code" in said
            assert not canary.exists()
        assert not Path("exported").exists()

    def test_code_runs_where_it_is_allowed(self, model: ToyModel, canary: Path) -> None:
        """The same names do run then: the canary sings."""
        plans = plans_json(model)
        plans["configurations"][CONFIGURATION]["architecture"]["network_class_name"] = "evil.Net"
        with allow_code():
            configuration_of(plans, CONFIGURATION)
            assert find_network("evil.Net").__module__ == "evil"
        assert canary.exists()
        with pytest.raises(MismatchError, match=r"'evil\.Net'"):  # imported by now, and still not to be used
            configuration_of(plans, CONFIGURATION)

    def test_the_option_lasts_as_long_as_its_command(
        self, canary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv(ALLOW_CODE_VARIABLE, raising=False)
        refused(capsys, ["predict", "-i", "images", "-o", "out", "-m", "nowhere", "--allow-code"])
        assert ALLOW_CODE_VARIABLE not in os.environ

    @pytest.mark.parametrize(
        "name",
        [
            *(f"{DNA}.architectures.unet.{kind}" for kind in ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")),
            f"{DNA}.architectures.residual_unet.ResidualEncoderUNet",  # as nnU-Net writes it for plans before 2.5
            f"{DNA}.architectures.PlainConvUNet",
            f"{DNA}.architectures.primus.Primus",
            "fastnnunet.nnunet.student.primus.PrimusStudent",
        ],
    )
    def test_networks_that_nnunet_writes(self, name: str) -> None:
        assert find_network(name).__name__ == name.rsplit(".", 1)[-1]

    def test_layers_that_nnunet_writes(self) -> None:
        from dynamic_network_architectures.building_blocks import helper, residual

        layers = [
            operation
            for dims in (1, 2, 3)
            for operation in (
                helper.convert_dim_to_conv_op(dims),
                helper.get_matching_instancenorm(dimension=dims),
                helper.get_matching_batchnorm(dimension=dims),
                helper.get_matching_dropout(dimension=dims),
            )
        ]
        for layer in (*layers, residual.BasicBlockD, residual.BottleneckD):
            assert find_layer(f"{layer.__module__}.{layer.__name__}", "layer") is layer  # as its planners write them
        for short in ("LeakyReLU", "ReLU", "GELU", "InstanceNorm3d", "Conv2d", "Dropout3d"):
            assert find_layer(f"torch.nn.{short}", "layer").__name__ == short

    @pytest.mark.parametrize(
        "name",
        [
            *("torch.nn.Module", "torch.nn.Sequential", "torch.nn.DataParallel", "torch.nn.functional.relu"),
            *("torch.load", "torch.hub.load", "torch.nn.modules.conv.F.torch.os.system", "LeakyReLU", "", ".", "exec"),
            *(
                f"{DNA}.architectures.unet.nn.LeakyReLU",
                f"{DNA}.architectures.dinov2_eva.Eva",
                "torch.nn.LeakyReLU.apply",
            ),
            *(
                "torch.nn.modules.linear.Parameter",
                "torch.nn.__loader__",
                "torch.nn.\nReLU",
                None,
                3,
                ["torch.nn.ReLU"],
            ),
        ],
    )
    def test_other_names(self, name: Any) -> None:
        for find in (find_network, find_layer):
            with pytest.raises(MismatchError, match=r"--allow-code|expected the name"):
                find(name, "field")

    @pytest.mark.parametrize("name", ["os", "np", "join", "nnUNetPredictor", "__builtins__", "", "a.b", 3, None])
    def test_trainers(self, name: Any) -> None:
        """What a checkpoint names as its trainer: nnU-Net takes any attribute of its modules."""
        with pytest.raises(NotFoundError, match="is not installed"):
            trainer_class(name)

    @pytest.mark.parametrize(
        ("field", "name"),
        [
            *(("image_reader_writer", name) for name in ("os", "np", "sitk", "a.b", "__builtins__")),
            *(("label_manager", name) for name in ("torch", "np", "determine_num_input_channels", None)),
            *((f"resampling_fn_{kind}", "torch") for kind in ("data", "seg", "probabilities")),
            *(("preprocessor_name", name) for name in ("multiprocessing", "os.system")),
        ],
    )
    def test_what_nnunet_finds_in_its_modules(self, model: ToyModel, field: str, name: Any) -> None:
        plans = plans_json(model)
        where = plans if field in plans else plans["configurations"][CONFIGURATION]
        where[field] = name
        with pytest.raises(MismatchError, match=field):
            configuration_of(plans, CONFIGURATION)

    def test_students(self, model: ToyModel, canary: Path) -> None:
        from fastnnunet.nnunet.student.plans import student_architecture

        student = StudentSpec(network_class_name="evil.Net", arch_kwargs={}, name="mine")
        with pytest.raises(MismatchError, match=r"'evil.Net'.*\n.*--allow-code"):
            student_architecture(plans_json(model), CONFIGURATION, student, None)
        assert not canary.exists()
