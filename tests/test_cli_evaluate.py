"""`fastnnunet evaluate`: numbers against nnU-Net's folder evaluation, and one clear message for each bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.cli.main import main
from fastnnunet.evaluate.segmentations import labels_from_dataset_json

Capture = pytest.CaptureFixture[str]
LABELS = {"background": 0, "organ": [1, 2], "core": [2], "other": 3, "ignore": 4}


def write(path: Path, array: np.ndarray, spacing_xyz: tuple[float, ...] = (1.0, 1.5, 2.0), **geometry: tuple) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_xyz)
    if "origin" in geometry:
        image.SetOrigin(geometry["origin"])
    sitk.WriteImage(image, str(path))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases of random blocks; truth and prediction differ; labels 3 is absent from both in case c."""
    rng = np.random.default_rng(7)
    predictions, labels = tmp_path / "pred", tmp_path / "truth"
    for case, classes in (("a", 5), ("b", 5), ("c", 3)):
        truth = rng.integers(0, classes, (4, 5, 6), dtype=np.uint8).repeat(3, 0).repeat(3, 1).repeat(3, 2)
        guess = np.where(rng.random(truth.shape) < 0.9, truth, 0).astype(np.uint8)
        guess[guess == 4] = 0
        write(labels / f"{case}.nii.gz", truth)
        write(predictions / f"{case}.nii.gz", guess)
    description = {"channel_names": {"0": "CT"}, "labels": LABELS, "regions_class_order": [1, 2, 3]}
    (tmp_path / "dataset.json").write_text(json.dumps(description | {"numTraining": 3, "file_ending": ".nii.gz"}))
    return predictions, labels


def run(*args: object) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as info:
        main([str(a) for a in args])
    return int(info.value.code or 0)


def test_agrees_with_nnunet(folders: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    evaluation = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    predictions, labels = folders
    out = tmp_path / "reports" / "report.json"
    assert run("evaluate", "-p", predictions, "-g", labels, "-o", out, "--tolerance", 2) == 0
    found = json.loads(out.read_text())
    assert found["tolerance_mm"] == 2.0
    assert found["ignore_label"] == 4
    keys = {"organ": (1, 2), "core": (2,), "other": 3}
    for entry in found["cases"]:
        name = f"{entry['case']}.nii.gz"
        oracle = evaluation.compute_metrics(
            str(labels / name), str(predictions / name), SimpleITKIO(), list(keys.values()), 4
        )["metrics"]
        for label, key in keys.items():
            expected = oracle[key]["Dice"]
            got = entry["metrics"][label]["dice"]
            assert got is None if np.isnan(expected) else got == pytest.approx(expected, abs=1e-12)
    assert found["mean"]["other"]["cases"] == 2  # the case without it is left out of the mean
    of_other = [c["metrics"]["other"]["dice"] for c in found["cases"]]
    assert of_other[2] is None
    assert found["mean"]["other"]["dice"] == pytest.approx(np.mean(of_other[:2]))
    means = [found["mean"][n]["dice"] for n in keys]
    assert found["mean"]["foreground_mean"]["dice"] == pytest.approx(np.mean(means))
    printed = capsys.readouterr().out
    assert "surface Dice 2 mm" in printed
    assert f"{np.mean(means):.3f}" in printed


def test_workers_change_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    reports = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        assert run("evaluate", "-p", folders[0], "-g", folders[1], "-o", out, "-np", processes) == 0
        reports.append(json.loads(out.read_text())["cases"])
    assert reports[0] == reports[1]


def test_without_dataset_json_labels_are_the_values_found(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "dataset.json").unlink()
    out = tmp_path / "report.json"
    assert run("evaluate", "-p", folders[0], "-g", folders[1], "-o", out) == 0
    assert json.loads(out.read_text())["labels"] == {"1": [1], "2": [2], "3": [3], "4": [4]}


def test_plane_images(tmp_path: Path) -> None:
    square = np.zeros((12, 12), np.uint8)
    square[2:8, 2:8] = 1
    for folder, array in (("p", np.roll(square, 1, 1)), ("g", square)):
        write(tmp_path / folder / "x.png", array, (1.0, 1.0))
    out = tmp_path / "report.json"
    assert run("evaluate", "-p", tmp_path / "p", "-g", tmp_path / "g", "-o", out, "--tolerance", 0) == 0
    metrics = json.loads(out.read_text())["cases"][0]["metrics"]["1"]
    assert metrics["dice"] == pytest.approx(30 / 36)
    assert metrics["hd95_mm"] == 1.0
    assert 0.3 < metrics["surface_dice"] < 0.7  # top and bottom outlines coincide, left and right do not


def test_missing_files_are_named(folders: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    predictions, labels = folders
    (predictions / "b.nii.gz").unlink()
    (labels / "c.nii.gz").unlink()
    out = tmp_path / "report.json"
    assert run("evaluate", "-p", predictions, "-g", labels, "-o", out) == 2
    message = capsys.readouterr().err
    assert "without a prediction: b" in message
    assert "without a label: c" in message
    assert "--chill" in message
    assert not out.exists()
    assert run("evaluate", "-p", predictions, "-g", labels, "-o", out, "--chill") == 0
    found = json.loads(out.read_text())
    assert [c["case"] for c in found["cases"]] == ["a"]
    assert (found["without_prediction"], found["without_label"]) == (["b"], ["c"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"array": np.zeros((12, 15, 17), np.uint8)}, "shape"),
        ({"spacing_xyz": (1.0, 1.5, 2.1)}, "spacing_mm"),
        ({"origin": (0.0, 0.0, 3.0)}, "origin"),
    ],
)
def test_geometry_mismatch_is_named(
    folders: tuple[Path, Path], tmp_path: Path, capsys: Capture, change: dict, expected: str
) -> None:
    write(folders[0] / "b.nii.gz", **({"array": np.zeros((12, 15, 18), np.uint8)} | change))
    out = tmp_path / "report.json"
    assert run("evaluate", "-p", folders[0], "-g", folders[1], "-o", out) == 2
    message = capsys.readouterr().err
    assert "case b" in message
    assert f"{expected}:" in message
    assert not list(tmp_path.glob("*report*"))


def test_bad_input_is_one_message(folders: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    predictions, labels = folders
    base = ("evaluate", "-p", predictions, "-g", labels)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"labels": 3}')
    cases = [
        (("evaluate", "-p", tmp_path / "nowhere", "-g", labels), "prediction folder not found"),
        (("evaluate", "-p", tmp_path / "broken.json", "-g", labels), "prediction folder expected, got a file"),
        (("evaluate", "-p", tmp_path / "empty", "-g", labels), "nothing to compare"),
        ((*base, "-dj", tmp_path / "nowhere.json"), "dataset.json not found"),
        ((*base, "-dj", tmp_path / "broken.json"), "not an nnU-Net dataset.json"),
        ((*base, "--tolerance", -1), "expected 0 mm or more"),
        ((*base, "-o", tmp_path / "report.txt"), "ending in .json"),
    ]
    for args, expected in cases:
        assert run(*args) == 2
        captured = capsys.readouterr()
        assert expected in captured.err
        assert captured.err.startswith("error: ")
        assert "Traceback" not in captured.err
    truncated = predictions / "a.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:20])
    assert run(*base) == 2
    assert "a.nii.gz" in capsys.readouterr().err
    write(truncated, np.full((12, 15, 18), 0.5, np.float32))
    assert run(*base) == 2
    assert "not whole numbers" in capsys.readouterr().err


def test_background_and_ignore_are_not_scored(folders: tuple[Path, Path]) -> None:
    labels = labels_from_dataset_json(folders[0].parent / "dataset.json")
    assert labels.names == {"organ": (1, 2), "core": (2,), "other": (3,)}
    assert (labels.ignore, labels.file_ending) == (4, ".nii.gz")
