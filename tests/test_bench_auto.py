"""Auto-size from training to choice on the tiny data, against nnU-Net's own Dice, and its refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastnnunet.cli.main import main
from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.release.auto import auto_size, validation_cases
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.student import StudentSpec
from tests.test_distill_train import SHORT, build, make_job
from tests.tiny import DATASET


def nnunet_dice(labels, predictions, case):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    name = f"{case}.nii.gz"
    metrics = compute_metrics(str(labels / name), str(predictions / name), SimpleITKIO(), [1, 2])["metrics"]
    return np.nanmean([m["Dice"] for m in metrics.values()])


def test_trains_scores_and_chooses_from_the_command_line(world, tmp_path, monkeypatch, capsys):
    build()
    (tmp_path / "recipe.yaml").write_text("precision: fp32\nmirroring: false\nengine: torch\n")
    monkeypatch.setenv("nnUNet_def_n_proc", "2")
    out = tmp_path / "out"
    words = (
        "distill auto -d 998 -f 0 -tf 0 1 -r 1 2 --family width lite -e 1 --iterations 2 --val-iterations 1 "
        "--precision fp32 --threads 1 "
    )
    words += f"--device cpu --spec {tmp_path / 'recipe.yaml'} -o {out} --within 100"
    with pytest.raises(SystemExit) as done:
        main(words.split())
    printed, progress = capsys.readouterr()
    assert done.value.code == 0, printed
    assert "r1_width r2_width r1_lite r2_lite fold 0 epoch 1/1" in progress
    record = json.loads(next(out.glob("auto_*.json")).read_text())
    assert next(out.glob("auto_*.png")).stat().st_size > 10_000
    students = record["students"]
    assert list(students) == ["r1_width", "r2_width", "r1_lite", "r2_lite"]
    smallest = min(students, key=lambda name: students[name]["parameters"])
    assert f"smallest student within 100 points: {smallest} (the whole interval is within the budget)" in printed
    assert record["choice"] == {"name": smallest, "found": True, "whole_interval_within": True}
    assert record["reference"]["folds"] == [0]
    labels = world / "raw" / DATASET / "labelsTr"
    assert record["cases"] == list(validation_cases(make_job()))
    for name, dice in (("r2_lite", students["r2_lite"]["dice"]), ("reference", record["reference"]["dice"])):
        for case in record["cases"]:
            assert dice[case] == pytest.approx(nnunet_dice(labels, out / "predictions" / name, case), nan_ok=True)

    # a second time nothing is trained
    before = {p: p.stat().st_mtime_ns for p in (world / "results").rglob("checkpoint_final.pth")}
    with pytest.raises(SystemExit) as done:
        main([*words.split(), "--within", "0", "--prefer", "fastest"])
    assert {p: p.stat().st_mtime_ns for p in (world / "results").rglob("checkpoint_final.pth")} == before
    last = json.loads(max(out.glob("auto_*.json")).read_text())
    good = {name: row for name, row in last["students"].items() if row["points"]["mean"] >= -1e-9}
    assert done.value.code == (0 if good else 1)
    assert last["choice"]["found"] == bool(good)
    if good:
        assert last["choice"]["name"] == min(good, key=lambda name: good[name]["ms_per_patch"])


def test_controls(world, tmp_path):
    """Every size twice: with soft labels and without, of which the better is taken, not the faster of two equals."""
    build()
    record = auto_size(make_job(), [StudentSpec(r=2), StudentSpec(r=3)], 100, tmp_path, prefer="fastest", control=True)
    students = record["students"]
    assert list(students) == ["r2", "r3", "r2_control", "r3_control"]
    for r in (2, 3):
        soft, control = students[f"r{r}"], students[f"r{r}_control"]
        assert (soft["soft_labels"], control["soft_labels"]) == (True, False)
        assert soft["ms_per_patch"] == control["ms_per_patch"]
        made = [load_bundle_spec(tmp_path / "bundles" / n).provenance["training"] for n in (f"r{r}", f"r{r}_control")]
        assert [m["distill"]["alpha"] for m in made] == [0.5, 0]
        assert [m["cache_key"] is None for m in made] == [False, True]
    r = record["choice"]["name"][1]
    assert record["choice"]["name"] == max((f"r{r}", f"r{r}_control"), key=lambda name: students[name]["mean_dice"])
    with pytest.raises(SpecError, match="control: got alpha 0"):
        auto_size(make_job(distill=replace(SHORT, alpha=0.0)), [StudentSpec(r=2)], 1, tmp_path / "other", control=True)


def test_no_validation_fold(world):
    with pytest.raises(MismatchError, match="fold all has no validation cases"):
        validation_cases(make_job(fold="all"))
    base = next((world / "preprocessed").glob("Dataset*"))
    (base / "splits_final.json").write_text(json.dumps([{"train": ["tiny_00"], "val": []}]))
    with pytest.raises(MismatchError, match="fold 0 has no validation cases"):
        validation_cases(make_job())


@pytest.mark.parametrize(
    ("sizes", "within", "options", "message"),
    [
        ((), 1, {}, "at least one size"),
        ((2,), -1, {}, "0 or more points"),
        ((2,), 1, {"reference": "x"}, "reference: got 'x'"),
        ((2,), 1, {"prefer": "x"}, "prefer: got 'x'"),
    ],
)
def test_wrong_questions(tmp_path, sizes, within, options, message):
    with pytest.raises(SpecError, match=message):
        auto_size(make_job(), [StudentSpec(r=r) for r in sizes], within, tmp_path, **options)
