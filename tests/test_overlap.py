"""No output of a run may be an input of it, whatever the two are called; refused before anything is written."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from fastnnunet import FastPredictor
from fastnnunet.cli.main import main
from fastnnunet.errors import SpecError
from fastnnunet.images.cases import Case
from fastnnunet.images.overlap import refuse_overlap
from fastnnunet.runtime.predict import Planned, Predictor
from tests.bundles import Toy, ToyModel, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series

SHAPE = (12, 18, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tiff_model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(file_ending=".tif", reader_writer="Tiff3DIO"), tmp_path_factory.mktemp("tiff"))


@pytest.fixture
def predictor(model: ToyModel) -> FastPredictor:
    made = FastPredictor(allow_tqdm=False, backend="onnxruntime")
    made.initialize_from_trained_model_folder(model.bundle)
    return made


def _state(folder: Path) -> dict[str, str]:
    """Every file with the digest of its content."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def _refused(root: Path, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must be refused with one message and leave everything as it is."""
    before = _state(root)
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    message = capsys.readouterr().err
    assert done.value.code == 2, message
    assert message.count("error:") == 1
    assert _state(root) == before
    return message


def _image(file: Path, seed: int = 0) -> Path:
    return write_image(smooth_noise(SHAPE, seed), file)


def test_the_segmentation_of_one_case_is_the_image_of_another(
    model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _image(tmp_path / "in" / "x_0000.nii.gz")
    _image(tmp_path / "in" / "x_0000_0000.nii.gz", 1)
    common = ("predict", "-i", tmp_path / "in", "-m", model.bundle, "--backend", "onnxruntime")
    for more in ((), ("-num_parts", 2, "-part_id", 0), ("-num_parts", 2, "-part_id", 1), ("--continue_prediction",)):
        message = _refused(tmp_path, capsys, *common, "-o", tmp_path / "in", *more)
        assert "x_0000.nii.gz is an input of this run" in message
    # into another folder the two are two
    with pytest.raises(SystemExit) as done:
        main([*map(str, common), "-o", str(tmp_path / "out")])
    assert done.value.code == 0
    assert (tmp_path / "out" / "x_0000.nii.gz").is_file()


def _by_link(image: Path, output: Path) -> None:
    output.symlink_to(image)


def _by_hard_link(image: Path, output: Path) -> None:
    os.link(image, output)


def _by_link_of_input(image: Path, output: Path) -> None:
    image.rename(output)
    image.symlink_to(output)


@pytest.mark.parametrize("tie", [_by_link, _by_hard_link, _by_link_of_input])
@pytest.mark.parametrize("what", ["x.nii.gz", "x.npz", "plans.json"])
def test_links_do_not_hide_an_input(
    tie: Callable[[Path, Path], None], what: str, model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = _image(tmp_path / "in" / "x_0000.nii.gz")
    (tmp_path / "out").mkdir()
    tie(image, tmp_path / "out" / what)
    words = ("predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model.bundle, "--save_probabilities")
    assert f"{what}, is an input of this run" in _refused(tmp_path, capsys, *words)


def test_a_linked_folder_is_the_folder(model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _image(tmp_path / "in" / "x_0000.nii.gz")
    _image(tmp_path / "in" / "x_0000_0000.nii.gz", 1)
    (tmp_path / "out").symlink_to(tmp_path / "in")
    _refused(tmp_path, capsys, "predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model.bundle)
    _refused(tmp_path, capsys, "predict", "-i", tmp_path / "out", "-o", tmp_path / "in" / "." / "", "-m", model.bundle)


def test_the_spacing_of_tiff_images(tiff_model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for case in ("a", "dataset"):
        tifffile.imwrite(tmp_path / "in" / f"{case}_0000.tif", smooth_noise(SHAPE, 0))
        (tmp_path / "in" / f"{case}.json").write_text(json.dumps({"spacing": [1, 1, 1]}))
    words = ("predict", "-i", tmp_path / "in", "-m", tiff_model.bundle, "--backend", "onnxruntime", "-o")
    assert "two outputs of this run are one file" in _refused(tmp_path, capsys, *words, tmp_path / "out")
    for file in ("dataset_0000.tif",):
        (tmp_path / "in" / file).unlink()
    assert ".json is an input of this run" in _refused(tmp_path, capsys, *words, tmp_path / "in")


def test_slices_are_inputs(model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_series(tmp_path / "scan", np.zeros(SHAPE), spacing_zyx=(1, 1, 1))
    files[3].rename(tmp_path / "scan" / "scan.dcm")
    words = (
        "predict",
        "-i",
        tmp_path / "scan",
        "-o",
        tmp_path / "scan",
        "-m",
        model.bundle,
        "--backend",
        "onnxruntime",
    )
    assert "scan.dcm is an input" in _refused(tmp_path, capsys, *words, "--output-format", "dicom-seg")
    write_series(tmp_path / "two" / "a", np.zeros(SHAPE), spacing_zyx=(1, 1, 1))
    write_series(tmp_path / "two" / "a_0000", np.zeros(SHAPE), spacing_zyx=(1, 1, 1))
    words = ("predict", "-i", tmp_path / "two", "-o", tmp_path / "out", "-m", model.bundle, "--backend", "onnxruntime")
    assert "two outputs of this run are one file" in _refused(tmp_path, capsys, *words)


def test_segmentations_of_the_previous_stage_are_inputs(model: ToyModel, tmp_path: Path) -> None:
    (tmp_path / "previous").mkdir()
    (tmp_path / "previous" / "x.nii.gz").touch()
    case = Case("x", (_image(tmp_path / "x_0000.nii.gz"),))
    plan = Planned(case=case, output=tmp_path / "previous" / "x.nii.gz", previous=tmp_path / "previous" / "x.nii.gz")
    predictor = Predictor.load(model.bundle, backend="onnxruntime")
    with pytest.raises(SpecError, match=r"x\.nii\.gz is an input of this run"):
        list(predictor.predict_planned([plan]))
    with pytest.raises(SpecError, match=r"x\.nii\.gz is an input of this run"):
        predictor.refuse_overlap([plan], [])


def test_lists_of_files(predictor: FastPredictor, tmp_path: Path) -> None:
    first, second = _image(tmp_path / "a" / "x_0000.nii.gz"), _image(tmp_path / "b" / "x_0000.nii.gz", 1)
    before = _state(tmp_path)
    sources = [[str(first)], [str(second)]]
    with pytest.raises(SpecError, match="two outputs of this run are one file"):
        predictor.predict_from_files(sources, str(tmp_path / "out"))
    with pytest.raises(SpecError, match="two outputs of this run are one file"):
        predictor.predict_from_files(sources, [str(tmp_path / "out" / "y"), str(tmp_path / "out" / "." / "y")])
    with pytest.raises(SpecError, match=r"b/x_0000\.nii\.gz is an input of this run"):
        predictor.predict_from_files(sources, [str(tmp_path / "out" / "y"), str(tmp_path / "b" / "x_0000")])
    with pytest.raises(SpecError, match=r"b/x_0000\.nii\.gz is an input of this run"):
        predictor.predict_from_files(sources, [str(tmp_path / "b" / "x_0000"), str(tmp_path / "z")])
    assert _state(tmp_path) == before
    assert not (tmp_path / "out").exists()
    predictor.predict_from_files(sources, [str(tmp_path / "out" / "y"), str(tmp_path / "out" / "z")])
    assert {"y.nii.gz", "z.nii.gz"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_postprocessing_in_place_is_refused(
    model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(np.ones(SHAPE, np.uint8), tmp_path / "in" / "a.nii.gz")
    for name in ("plans.json", "dataset.json"):
        (tmp_path / "in" / name).write_bytes((model.folder / name).read_bytes())
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in ("in", "link"):
        words = ("postprocess", "-i", tmp_path / "in", "-o", tmp_path / out, "--keep-largest", "all")
        assert "a.nii.gz" in _refused(tmp_path, capsys, *words)


def test_a_report_does_not_replace_what_it_is_made_of(
    model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("p", "g"):
        write_image(np.ones(SHAPE, np.uint8), tmp_path / folder / "a.nii.gz")
    for place in ("g/dataset.json", "p/plans.json", "described.json"):
        (tmp_path / place).write_bytes((model.folder / "dataset.json").read_bytes())
    common = ("evaluate", "-p", tmp_path / "p", "-g", tmp_path / "g")
    _refused(tmp_path, capsys, *common, "-o", tmp_path / "g" / "dataset.json")
    _refused(tmp_path, capsys, *common, "-o", tmp_path / "p" / "plans.json")
    _refused(tmp_path, capsys, *common, "-dj", tmp_path / "described.json", "-o", tmp_path / "described.json")


@pytest.mark.parametrize("kind", ["bundle", "folder"])
def test_a_model_keeps_its_plans(
    kind: str, model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _image(tmp_path / "in" / "x_0000.nii.gz")
    shutil.copytree(getattr(model, kind), tmp_path / "model")
    words = ("predict", "-i", tmp_path / "in", "-o", tmp_path / "model", "-m", model.bundle, "--backend", "onnxruntime")
    assert "is the folder of a model" in _refused(tmp_path, capsys, *words)


def test_letter_case_where_it_matters_not(tmp_path: Path) -> None:
    """A link of the swapped name stands for a file system that takes both for one."""
    outputs = [tmp_path / "Folder" / "A.nii.gz", tmp_path / "Folder" / "a.nii.gz"]
    (tmp_path / "Folder").mkdir()
    refuse_overlap([], outputs)
    (tmp_path / "fOLDER").symlink_to(tmp_path / "Folder")
    with pytest.raises(SpecError, match="two outputs of this run are one file"):
        refuse_overlap([], outputs)
    refuse_overlap([], [outputs[0], outputs[1].with_name("b.nii.gz")])


def test_predictions_among_the_images_are_gone_on_with(
    model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case in ("x", "y"):
        _image(tmp_path / "in" / f"{case}_0000.nii.gz")
    words = ["predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "in"), "-m", str(model.bundle)]
    for more in ([], ["--continue_prediction"]):
        with pytest.raises(SystemExit) as done:
            main([*words, *more])
        assert done.value.code == 0
        (tmp_path / "in" / "y.nii.gz").unlink()
    assert "x.nii.gz is an input of this run" in _refused(tmp_path, capsys, *words)
    # beside the image that it was made from, a file without channel number is a case that fails
    with pytest.raises(SystemExit) as done:
        main([*words[:4], str(tmp_path / "out"), *words[5:]])
    assert done.value.code == 1
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["x.nii.gz", "y.nii.gz"]


def test_outputs_of_an_earlier_run_are_replaced(model: ToyModel, tmp_path: Path) -> None:
    _image(tmp_path / "in" / "x_0000.nii.gz")
    for _ in range(2):
        with pytest.raises(SystemExit) as done:
            main(["predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(model.bundle)])
        assert done.value.code == 0
