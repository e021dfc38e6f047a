"""The demo at toy size: the same steps on five small volumes and narrow networks, interrupted once on the way."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastnnunet.errors import MismatchError
from pipelines import demo, demo_stages
from pipelines.demo_stages import Demo, DemoSpec
from pipelines.steps import Report
from tests.tiny import draw_few_voxels

TOY = DemoSpec(n_train=5, n_test=2, iterations=1, teacher_epochs=1, student_epochs=1, repeat=1)
FEATURES = [8, 16, 16]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Plan networks of three narrow stages after nnU-Net has planned its own; keep the environment as it was."""
    plan = demo_stages.prepare

    def prepare(what: Demo, report: Report, fresh: bool) -> None:
        plan(what, report, fresh)
        file = what.preprocessed / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs.update(n_stages=3, features_per_stage=FEATURES, kernel_sizes=[[3, 3, 3]] * 3)
        kwargs.update(
            strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]], n_conv_per_stage=[1] * 3, n_conv_per_stage_decoder=[1] * 2
        )
        file.write_text(json.dumps(plans))

    monkeypatch.setattr(demo_stages, "prepare", prepare)
    draw_few_voxels(monkeypatch)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_n_proc_DA", "nnUNet_def_n_proc"):
        monkeypatch.setenv(name, "1")  # so that what the demo sets is undone afterwards
    monkeypatch.setattr(demo_stages, "available_cores", lambda: 1)
    return tmp_path / "demo_out"


def test_runs_resumes_and_leaves_table_and_picture(
    narrow: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = demo_stages.label

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_stages, "label", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main(narrow, TOY)
    teachers = {p: p.stat().st_mtime_ns for p in narrow.rglob("fold_*/checkpoint_final.pth")}
    assert len(teachers) == 5
    monkeypatch.setattr(demo_stages, "label", real)
    demo.main(narrow, TOY)
    assert teachers == {p: p.stat().st_mtime_ns for p in teachers}

    record = json.loads((narrow / "demo.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["ensemble", "one fold", "student_r2", "student_r4"]
    for row in record["rows"]:
        assert set(row["dice"]) == {"liver", "kidneys", "spine", "tumour"}
        assert row["seconds_per_case"] > 0
        assert row["parameters"] > 0
        assert row["size_bytes"] > 0
    assert record["rows"][0]["times_faster_than_ensemble"] == 1.0
    assert len(record["held_out_cases"]) == 2
    assert record["cache"]["cases"] == 5
    assert record["cache"]["bytes_per_voxel"] < record["cache"]["float16_bytes_per_voxel"] == 10
    assert record["cache"]["largest_error"] < 1 / 255
    assert set(record["elapsed_s"]) >= {"data", "prepare", "teacher_4", "cache", "students", "bundle_4", "measure"}
    assert (narrow / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("ensemble", "one fold", "student r2", "student r4", "tumour", "bytes per voxel"):
        assert text in printed
    next_command = shlex.split(printed.splitlines()[-1].split(": ", 1)[1])
    assert next_command[1] == "predict"
    assert subprocess.run(next_command, check=False, capture_output=True, text=True).returncode == 0
    assert {p.name for p in (narrow / "predicted").glob("*.nii.gz")} == {"ct_005.nii.gz", "ct_006.nii.gz"}

    # a third run only prints again
    before = {p: p.stat().st_mtime_ns for p in narrow.rglob("*") if p.is_file() and p.parent != narrow}
    demo.main(narrow, TOY)
    assert {p: m for p, m in before.items() if p.stat().st_mtime_ns != m and "spec.json" not in p.name} == {}
    with pytest.raises(MismatchError, match="seed"):
        demo.main(
            narrow, DemoSpec(n_train=5, n_test=2, iterations=1, teacher_epochs=1, student_epochs=1, repeat=1, seed=1)
        )


@pytest.mark.parametrize(
    "code",
    [
        "import pipelines.demo",
        # what a process does that nnU-Net starts while it preprocesses
        "import multiprocessing.spawn as spawn; spawn._fixup_main_from_name('pipelines.demo')",
    ],
)
def test_torch_is_imported_without_a_word(code: str) -> None:
    code = f"{code}; import sys, nnunetv2.training.nnUNetTrainer.nnUNetTrainer; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
