"""`fastnnunet predict` as a user types it: exit codes, one message, nothing half-written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import Toy, ToyModel, make_toy_model, smooth_noise, write_image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastnnunet.cli.main", "predict", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_folder(model: ToyModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_image(smooth_noise((12, 25, 20), 0), tmp_path / "in" / f"{name}_0000.nii.gz")
    arguments = ("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model.bundle, "--threads", 1)
    done = _run(*arguments, "--backend", "onnxruntime", "-step_size", "0.7", "--save_probabilities")
    assert done.returncode == 0, done.stderr
    assert "2 case(s) predicted with onnxruntime" in done.stdout
    assert "infer" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(f"{case}{ending}" for case in "ab" for ending in (".nii.gz", ".npz", ".pkl")),
        *("plans.json", "dataset.json", "predict_from_raw_data_args.json"),
    }
    again = _run(*arguments, "--continue_prediction", "--disable_progress_bar")
    assert again.returncode == 0
    assert "0 case(s) predicted" in again.stdout
    assert again.stderr == ""


def test_a_failing_case_in_a_folder_is_exit_1(model: ToyModel, tmp_path: Path) -> None:
    good = write_image(smooth_noise((12, 15, 20), 0), tmp_path / "in" / "good_0000.nii.gz")
    (tmp_path / "in" / "bad_0000.nii.gz").write_bytes(good.read_bytes()[:2000])
    done = _run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model.bundle, "--backend", "onnxruntime")
    assert done.returncode == 1
    assert "1 case(s) predicted" in done.stdout
    assert "failed: bad:" in done.stderr
    assert "truncated" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "good.nii.gz").is_file()
    assert not (tmp_path / "out" / "bad.nii.gz").exists()


@pytest.mark.parametrize("wrong", ["image", "bundle", "backend", "threads", "step", "precision"])
def test_wrong_input_is_exit_2_with_one_message(wrong: str, model: ToyModel, tmp_path: Path) -> None:
    file = write_image(smooth_noise((12, 15, 20), 0), tmp_path / "a_0000.nii.gz")
    if wrong == "image":
        file.write_bytes(file.read_bytes()[:2000])
    options: dict[str, object] = {"-i": file, "-o": tmp_path / "out", "-m": model.bundle, "--backend": "onnxruntime"}
    options |= {
        "bundle": {"-m": tmp_path / "none"},
        "backend": {"--backend": "caffe"},
        "threads": {"--threads": 0},
        "step": {"-step_size": 2},
        "precision": {"--precision": "bf16"},
    }.get(wrong, {})
    done = _run(*(token for option in options.items() for token in option))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a_0000.nii.gz"]
