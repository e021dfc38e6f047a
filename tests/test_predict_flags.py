"""The flags of `fastnnunet predict` against the argument parsers of nnU-Net's two predict commands."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from nnunetv2.inference import predict_from_raw_data

from fastnnunet.cli.main import app, main, spread_multi_values
from fastnnunet.cli.predict import PROFILE_FILE
from tests.bundles import Toy, ToyModel, make_toy_model, smooth_noise, write_image

ENTRY_POINTS = ("predict_entry_point", "predict_entry_point_modelfolder")
# nnU-Net's values that this command takes as None: what they mean depends on the machine, or on the model named
LEFT_OPEN = {"-f", "-step_size", "-chk", "-device", "-c", "-d", "-m"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


def nnunet_parser(entry_point: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser nnU-Net makes, caught when it is about to parse."""

    class CaughtError(Exception):
        pass

    def catch(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise CaughtError(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(CaughtError) as caught:
            getattr(predict_from_raw_data, entry_point)()
    return caught.value.args[0]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_every_flag_of_nnunet(entry_point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {
        flag: parameter
        for parameter in typer.main.get_command(app).commands["predict"].params  # type: ignore[attr-defined]
        for flag in parameter.opts
    }
    for action in nnunet_parser(entry_point, monkeypatch)._actions:
        for flag in set(action.option_strings) - {"-h", "--help"}:  # which click adds in its own way
            assert flag in ours, flag
            assert ours[flag].help, f"{flag} is not explained"
            takes_value = action.nargs != 0
            assert ours[flag].is_flag != takes_value, flag
            if takes_value and not action.required and flag not in LEFT_OPEN:
                assert ours[flag].default == action.default, flag


@pytest.mark.parametrize(
    "words",
    [
        "-f 0 1 2 3 4 -i a -o b",
        "-i a -f all -o b",
        "-i a -o b -f 3",
        "-f 0 all -step_size 0.7 -i a -npp 2 -o b --disable_tta",
        "-i a -o b --save_probabilities -f 1 2 --continue_prediction -device cpu -nps 0 -chk x.pth",
        "-o b --verbose -num_parts 3 -i a -part_id 1 -prev_stage_predictions p --not_on_device",
    ],
)
def test_parses_as_argparse_does(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*words.split(), "-d", "4", "-c", "3d_fullres", "-p", "P", "-tr", "T"]
    expected = vars(nnunet_parser("predict_entry_point", monkeypatch).parse_args(argv))
    command = typer.main.get_command(app).commands["predict"]  # type: ignore[attr-defined]
    context = command.make_context("predict", spread_multi_values(["predict", *argv])[1:])
    got = context.params
    names = {"i": "source", "o": "output", "d": "dataset", "p": "plans", "tr": "trainer", "c": "configuration"}
    names |= {"f": "folds", "chk": "checkpoint"}
    for name, value in expected.items():
        mine = got[names.get(name, name)]
        if mine is None or mine == ():  # left open, where nnU-Net's default would stand
            assert f"-{name}" not in argv
            continue
        both = (mine, value) if isinstance(value, list) else (str(mine), str(value))
        assert both[0] == both[1], name


def test_a_second_model_is_a_mistake() -> None:
    argv = ["predict", "-m", "a", "b", "-f", "0", "1"]
    assert spread_multi_values(argv) == ["predict", "-m", "a", "b", "-f", "0", "-f", "1"]


def test_counts_from_the_environment(
    model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnUNet_npp and nnUNet_nps, parts of a folder, the profile."""
    for name in "abc":
        write_image(smooth_noise((12, 18, 20), 0), tmp_path / "in" / f"{name}_0000.nii.gz")
    monkeypatch.setenv("nnUNet_npp", "0")
    monkeypatch.setenv("nnUNet_nps", "0")
    words = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model.bundle, "-num_parts", 2, "-part_id", 0]
    with pytest.raises(SystemExit) as done:
        main(["predict", *map(str, words), "--backend", "onnxruntime", "--profile", "--profile_json", "--verbose"])
    assert done.value.code == 0
    out = capsys.readouterr()
    assert "a: image (1, 12, 18, 20), network sees (1, 12, 18, 20)" in out.err
    table = [line for line in out.out.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in table] == ["a", "c"]
    profile = json.loads((tmp_path / "out" / PROFILE_FILE).read_text())
    assert [case["case"] for case in profile["cases"]] == ["a", "c"]
    assert all(case["infer_s"] > 0 for case in profile["cases"])
    assert profile["wall_s"] >= sum(case["infer_s"] for case in profile["cases"])
    record = json.loads((tmp_path / "out" / "predict_from_raw_data_args.json").read_text())
    assert (record["num_processes_preprocessing"], record["num_parts"]) == (0, 2)


def test_help_ends_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    shown = capsys.readouterr().out
    assert shown.index("Examples:") > shown.index("--profile")
    assert "fastnnunet predict -i imagesTs" in shown[shown.index("Examples:") :]
