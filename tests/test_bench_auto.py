"""Auto-size from training to choice on the tiny data, against nnU-Net's own Dice, and its refusals."""

import json

import numpy as np
import pytest

from fastnnunet.bench.auto import auto_size, validation_cases
from fastnnunet.cli.main import main
from fastnnunet.errors import MismatchError, SpecError
from tests.test_distill_train import build, make_job
from tests.tiny import DATASET


def nnunet_dice(labels, predictions, case):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    name = f"{case}.nii.gz"
    metrics = compute_metrics(str(labels / name), str(predictions / name), SimpleITKIO(), [1, 2])["metrics"]
    return np.nanmean([m["Dice"] for m in metrics.values()])


def test_trains_scores_and_chooses_from_the_command_line(world, tmp_path, monkeypatch, capsys):
    build()
    (tmp_path / "recipe.yaml").write_text("precision: fp32\nmirroring: false\n")
    monkeypatch.setenv("nnUNet_def_n_proc", "2")
    out = tmp_path / "out"
    words = (
        "distill auto -d 998 -f 0 -tf 0 1 -r 1 2 -e 1 --iterations 2 --val-iterations 1 --precision fp32 --threads 1 "
    )
    words += f"--device cpu --spec {tmp_path / 'recipe.yaml'} -o {out} --within 100"
    with pytest.raises(SystemExit) as done:
        main(words.split())
    printed = capsys.readouterr().out
    assert done.value.code == 0, printed
    record = json.loads(next(out.glob("auto_*.json")).read_text())
    assert next(out.glob("auto_*.png")).stat().st_size > 10_000
    assert "smallest student within 100 points: r2 (the whole interval is within the budget)" in printed
    assert record["choice"] == {"name": "r2", "found": True, "whole_interval_within": True}
    assert record["reference"]["folds"] == [0]
    assert record["students"]["r2"]["parameters"] < record["students"]["r1"]["parameters"]
    labels = world / "raw" / DATASET / "labelsTr"
    assert record["cases"] == list(validation_cases(make_job()))
    for name, dice in (("r2", record["students"]["r2"]["dice"]), ("reference", record["reference"]["dice"])):
        for case in record["cases"]:
            assert dice[case] == pytest.approx(nnunet_dice(labels, out / "predictions" / name, case), nan_ok=True)

    # a second time nothing is trained, and a budget nobody meets is exit code 1
    before = {p: p.stat().st_mtime_ns for p in (world / "results").rglob("checkpoint_final.pth")}
    with pytest.raises(SystemExit) as done:
        main([*words.split(), "--within", "0"])
    assert {p: p.stat().st_mtime_ns for p in (world / "results").rglob("checkpoint_final.pth")} == before
    last = json.loads(max(out.glob("auto_*.json")).read_text())
    assert done.value.code == (0 if last["choice"]["found"] else 1)


def test_no_validation_fold(world):
    with pytest.raises(MismatchError, match="fold all has no validation cases"):
        validation_cases(make_job(fold="all"))
    base = next((world / "preprocessed").glob("Dataset*"))
    (base / "splits_final.json").write_text(json.dumps([{"train": ["tiny_00"], "val": []}]))
    with pytest.raises(MismatchError, match="fold 0 has no validation cases"):
        validation_cases(make_job())


@pytest.mark.parametrize(
    ("sizes", "within", "reference", "message"),
    [((), 1, "ensemble", "at least one size"), ((2,), -1, "ensemble", "0 or more points"), ((2,), 1, "x", "got 'x'")],
)
def test_wrong_questions(tmp_path, sizes, within, reference, message):
    with pytest.raises(SpecError, match=message):
        auto_size(make_job(), sizes, within, tmp_path, reference)
