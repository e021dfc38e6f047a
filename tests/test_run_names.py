"""A run's name: given in training, taken by `export` and `predict`; what it may be, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from fastnnunet.api import find_bundle, find_run
from fastnnunet.api.names import RUNS, check_name, name_run, note_bundle
from fastnnunet.cli.guard import guarded
from fastnnunet.cli.main import main
from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, SpecError
from fastnnunet.specs.bundle import load_bundle_spec
from tests.tiny import DATASET

WORDS = "train -d 998 -f 0 -tf 0 1 -a 0 -e 1 --iterations 1 --val-iterations 1 --no-validate --threads 1"
TRAIN = [*WORDS.split(), *["--precision", "fp32", "-r", "4", "--name", "my_student"]]


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    """Exit code, standard output and error of a command."""
    code: object = 0
    try:
        guarded(lambda: main([str(word) for word in words]))
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return code or 0, said.out, said.err


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path / "results"


def test_train_export_predict(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, *TRAIN)
    assert code == 0, err
    assert "export it with: fastnnunet export onnx --name my_student" in out
    code, _, err = _run(capsys, "predict", "-i", "x", "-o", tmp_path / "out", "--name", "my_student")
    assert code == 2
    assert "make it with: fastnnunet export onnx --name my_student" in err
    code, out, err = _run(capsys, "export", "onnx", "--name", "my_student")
    assert code == 0, err
    bundle = find_bundle("my_student")
    assert f"bundle: {bundle}" in out
    assert load_bundle_spec(bundle).provenance["training"]["student"]["r"] == 4
    measured = load_bundle_spec(bundle).provenance["measured"]
    assert 0 <= measured["quality"]["dice"] <= 1
    assert measured["quality"]["held_out"] is True
    assert measured["speed"]["seconds_per_case"] > 0
    images = world / "raw" / DATASET / "imagesTs"
    words = ("--name", "my_student", "--backend", "onnxruntime", "--threads", 1)
    code, out, err = _run(capsys, "predict", "-i", images, "-o", tmp_path / "out", *words)
    assert code == 0, err
    assert list((tmp_path / "out").glob("*.nii.gz"))
    code, _, err = _run(capsys, *[word if word != "4" else "2" for word in TRAIN])
    assert code == 2
    assert "that name has another run" in err
    assert len(list(find_run("my_student").model.parent.glob("*r2*"))) == 0, "refused before anything is trained"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train -d 4 -f 0 -r 2 4 --name a", "got 2 students, expected one"),
        ("export onnx --name b -d 4 -a 0 -c 2d --batch 1", "leave out -c -a -d\n"),
        ("export onnx --name a", "names there are: b, c"),
        ("export onnx -d 4 -r 4 -f 0", "or the --name of a run"),
        ("predict -i x -o y --name a -m z", "leave out -m\n"),
        ("predict -i x -o y --name a", "names there are: b, c"),
        ("predict -i x -o y --name b -p nnUNetPlans", "leave out -p"),
        ("export onnx --name b", "is gone\ntrain it with"),
        (
            f"export onnx --name {'x' * 300}",
            "xxx...', expected letters",
        ),
        ("predict -i x -o y --name ../b", "expected letters, digits"),
    ],
)
def test_refusals(results: Path, capsys: pytest.CaptureFixture[str], words: str, told: str) -> None:
    for name in "cb":
        name_run(name, results / "Dataset004_A" / name, [0])
    code, _, err = _run(capsys, *words.split())
    assert code == 2
    assert told in err
    assert "Traceback" not in err


class TestNames:
    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "é", "a\n", ".hidden", "x" * 101])
    def test_no_file_names(self, results: Path, name: str) -> None:
        with pytest.raises(SpecError, match="expected letters"):
            name_run(name, results / "m", [0])
        assert not (results / RUNS).exists()

    def test_folds_add_up_and_a_bundle_stays(self, results: Path) -> None:
        model = results / "Dataset004_A" / "model"
        name_run("n", model, [1])
        assert find_run("n").bundle == results / RUNS / "n" / "bundle"
        note_bundle(find_run("n"), results.parent / "elsewhere")
        for fold in (0, 1, "all"):
            name_run("n", model, [fold])
        assert find_run("n").folds == (1, 0, "all")
        assert find_run("n").bundle == results.parent / "elsewhere"
        with pytest.raises(MismatchError, match="another run"):
            check_name("n", results / "Dataset004_A" / "other")

    def test_results_may_be_moved(self, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        name_run("n", results / "Dataset004_A" / "model", [0])
        moved = shutil.move(results, results.parent / "moved")
        monkeypatch.setenv("nnUNet_results", str(moved))
        assert find_run("n").model == Path(moved) / "Dataset004_A" / "model"
        assert find_run("n").bundle == Path(moved) / RUNS / "n" / "bundle"

    @pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"model": 1, "folds": [0], "bundle": "b"}), "{nul"])
    def test_damaged(self, results: Path, text: str) -> None:
        name_run("n", results / "m", [0])
        (results / RUNS / "n" / "run.json").write_text(text)
        with pytest.raises(CorruptError, match="damaged"):
            find_run("n")

    def test_without_results(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("nnUNet_results", raising=False)
        with pytest.raises(NotFoundError, match="nnUNet_results is not set"):
            find_run("n")


def test_a_name_is_taken_when_the_training_begins(results: Path) -> None:
    """Of two that train under one name the later is refused at once, not at its end."""
    from fastnnunet.api.distil import _naming
    from fastnnunet.api.names import find_trained
    from fastnnunet.events import Event, Message

    heard: list[Event] = []
    first, second = (_naming("n", results / model, heard.append) for model in ("first", "second"))
    first(Message(text="begun"))
    with pytest.raises(MismatchError, match="another run"):
        second(Message(text="begun"))
    assert heard == [Message(text="begun")]
    assert find_run("n").folds == ()
    with pytest.raises(NotFoundError, match="no fold that was trained to its end"):
        find_trained("n")
