"""The predictor on files and folders: names, side files, resuming, failing cases."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.errors import CorruptError, FastnnUNetError, ImageError, NotFoundError, SpecError
from fastnnunet.runtime.predict import Predictor
from tests.bundles import Toy, ToyModel, make_toy_model, nnunet_predict, smooth_noise, write_image

SHAPE = (12, 18, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def predictor(model: ToyModel) -> Predictor:
    return Predictor.load(model.bundle, "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.load(make_toy_model(Toy(channels=2), tmp_path_factory.mktemp("two")).bundle, "onnxruntime")


def _image(file: Path, seed: int = 0, **geometry: Any) -> Path:
    return write_image(smooth_noise(SHAPE, seed), file, **geometry)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def _labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_folder_as_nnunet(model: ToyModel, predictor: Predictor, tmp_path: Path) -> None:
    files = {name: [_image(tmp_path / "in" / f"{name}_0000.nii.gz", seed)] for seed, name in enumerate(("b", "a_1"))}
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "._b_0000.nii.gz").write_bytes(b"what macOS leaves behind")
    nnunet_predict(model, files, tmp_path / "expected", save_probabilities=True)
    seen: list[str] = []
    results = predictor.predict_files(
        tmp_path / "in",
        tmp_path / "new" / "got",
        save_probabilities=True,
        progress=lambda e: seen.append(f"{e.note} {e.done}/{e.total}" if getattr(e, "unit", "") == "cases" else ""),
    )
    got = tmp_path / "new" / "got"
    assert _names(got) == _names(tmp_path / "expected")
    assert [text for text in seen if text] == ["a_1 0/2", "b 1/2", "b 2/2"]
    assert [r.case_id for r in results] == ["a_1", "b"]
    assert all(r.error is None and r.times.infer_s > 0 and r.times.total_s > r.times.infer_s for r in results)
    for name in ("plans.json", "dataset.json"):
        theirs, ours = ((f / name).read_text() for f in (tmp_path / "expected", got))
        assert list(json.loads(ours).items()) == list(json.loads(theirs).items())
    ours = json.loads((got / "predict_from_raw_data_args.json").read_text())
    theirs = json.loads((tmp_path / "expected" / "predict_from_raw_data_args.json").read_text())
    assert theirs.keys() <= ours.keys()
    assert ours["list_of_lists_or_source_folder"] == str(tmp_path / "in")
    assert ours["fastnnunet"]["backend"] == "onnxruntime"


def test_nnunet_can_ensemble_our_probabilities(model: ToyModel, predictor: Predictor, tmp_path: Path) -> None:
    from nnunetv2.ensembling.ensemble import merge_files
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    _image(tmp_path / "in" / "a_0000.nii.gz")
    out = tmp_path / "out"
    predictor.predict_files(tmp_path / "in", out, save_probabilities=True)
    plans = PlansManager(str(out / "plans.json"))
    manager = plans.get_label_manager(json.loads((out / "dataset.json").read_text()))
    merge_files(
        [str(out / "a.npz")] * 2, str(tmp_path / "merged"), ".nii.gz", plans.image_reader_writer_class(), manager
    )
    np.testing.assert_array_equal(_labels(tmp_path / "merged.nii.gz"), _labels(out / "a.nii.gz"))


def test_labels_keep_the_order_regions_depend_on(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    model = make_toy_model(Toy(labels=labels, regions_class_order=[1, 2]), tmp_path)
    _image(tmp_path / "in" / "a_0000.nii.gz")
    Predictor.load(model.bundle, "onnxruntime").predict_files(tmp_path / "in", tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]) == list(labels)


def test_single_image_to_folder_or_file(predictor: Predictor, tmp_path: Path) -> None:
    _image(tmp_path / "case_0000.nii.gz")
    (tmp_path / "plain.nii.gz").write_bytes((tmp_path / "case_0000.nii.gz").read_bytes())
    predictor.predict_files(tmp_path / "case_0000.nii.gz", tmp_path / "folder")
    assert "case.nii.gz" in _names(tmp_path / "folder")
    predictor.predict_files(tmp_path / "plain.nii.gz", tmp_path / "folder")
    predictor.predict_files(tmp_path / "plain.nii.gz", tmp_path / "files" / "seg.nii.gz", save_probabilities=True)
    assert _names(tmp_path / "files") == ["seg.nii.gz", "seg.npz", "seg.pkl"]  # no side files beside a single file
    np.testing.assert_array_equal(*(_labels(tmp_path / "folder" / f"{name}.nii.gz") for name in ("case", "plain")))


def test_other_formats_for_a_single_image(predictor: Predictor, tmp_path: Path) -> None:
    _image(tmp_path / "case_0000.mha")
    predictor.predict_files(tmp_path / "case_0000.mha", tmp_path / "out")
    assert "case.nii.gz" in _names(tmp_path / "out")


def test_array_equals_files(predictor: Predictor, tmp_path: Path) -> None:
    file = _image(tmp_path / "a_0000.nii.gz", spacing_xyz=(1.1, 0.9, 1.3))
    predictor.predict_files(file, tmp_path / "s.nii.gz")
    array = smooth_noise(SHAPE, 0)[None]
    before = array.copy()
    prediction = predictor.predict_array(array, {"spacing": [1.3, 0.9, 1.1]}, return_probabilities=True)
    np.testing.assert_array_equal(array, before)
    assert (
        prediction.segmentation_ZYX == _labels(tmp_path / "s.nii.gz")
    ).mean() >= 0.9999  # the file's spacing is float32
    assert prediction.probabilities_HZYX is not None
    np.testing.assert_allclose(prediction.probabilities_HZYX.sum(0), 1, atol=1e-6)
    with pytest.raises(ImageError, match="NaN"):
        predictor.predict_array(array * np.nan, {"spacing": [1, 1, 1]})


def test_step_size(model: ToyModel, tmp_path: Path) -> None:
    files = [write_image(smooth_noise((20, 40, 40), 0), tmp_path / "a_0000.nii.gz")]
    nnunet_predict(model, {"a": files}, tmp_path / "expected", step_size=1.0)
    Predictor.load(model.bundle, "onnxruntime", step_size=1.0).predict_files(files[0], tmp_path / "a.nii.gz")
    expected, got = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(f)))
        for f in (tmp_path / "expected" / "a.nii.gz", tmp_path / "a.nii.gz")
    )
    assert (got == expected).mean() >= 0.9999
    for wrong in (0.0, 1.5):
        with pytest.raises(SpecError, match="step_size"):
            Predictor.load(model.bundle, "onnxruntime", step_size=wrong)


def test_a_failing_case_does_not_stop_the_others(predictor: Predictor, tmp_path: Path) -> None:
    for name in ("a", "c"):
        _image(tmp_path / "in" / f"{name}_0000.nii.gz")
    (tmp_path / "in" / "b_0000.nii.gz").write_bytes((tmp_path / "in" / "a_0000.nii.gz").read_bytes()[:3000])
    write_image(np.full(SHAPE, np.nan, np.float32), tmp_path / "in" / "d_0000.nii.gz")
    _image(tmp_path / "in" / "e_0001.nii.gz")
    _image(tmp_path / "in" / "unnumbered.nii.gz")
    for channel in (0, 1):
        _image(tmp_path / "in" / f"f_000{channel}.nii.gz")
    results = predictor.predict_files(tmp_path / "in", tmp_path / "out")
    errors = {r.case_id: str(r.error) for r in results if r.error}
    assert list(errors) == ["b", "d", "e", "f", "unnumbered"]
    assert "truncated" in errors["b"]
    assert "NaN" in errors["d"]
    assert "e_0000.nii.gz" in errors["e"]
    assert "2 channel(s)" in errors["f"]
    assert "unnumbered_0000.nii.gz" in errors["unnumbered"]
    segmentations = [n for n in _names(tmp_path / "out") if n.endswith(".nii.gz")]
    assert segmentations == ["a.nii.gz", "c.nii.gz"]


@pytest.mark.parametrize("bad", ["truncated", "nan", "missing", "text"])
def test_a_bad_single_image_leaves_nothing(predictor: Predictor, bad: str, tmp_path: Path) -> None:
    file = tmp_path / "a_0000.nii.gz"
    if bad == "truncated":
        content = _image(file).read_bytes()
        file.write_bytes(content[: len(content) // 2])
    elif bad == "nan":
        write_image(np.full(SHAPE, np.nan, np.float32), file)
    elif bad == "text":
        file.write_text("hello")
    for output in (tmp_path / "out", tmp_path / "seg.nii.gz"):
        with pytest.raises(FastnnUNetError, match="a_0000"):
            predictor.predict_files(file, output)
    assert set(_names(tmp_path)) <= {"a_0000.nii.gz"}


def test_channels_of_a_single_image(two_channels: Predictor, tmp_path: Path) -> None:
    first = _image(tmp_path / "a_0000.nii.gz", 0)
    with pytest.raises(ImageError, match=r"1 channel\(s\).*the model needs 2 channel\(s\) \(channel0, channel1\)"):
        two_channels.predict_files(first, tmp_path / "out")
    second = _image(tmp_path / "a_0001.nii.gz", 1)
    with pytest.raises(ImageError, match="channel 1 of an image"):
        two_channels.predict_files(second, tmp_path / "out")
    two_channels.predict_files(first, tmp_path / "out")
    _image(tmp_path / "a_0002.nii.gz", 2)  # a third file is not asked for
    two_channels.predict_files(first, tmp_path / "seg.nii.gz")
    assert (tmp_path / "seg.nii.gz").is_file()
    results = two_channels.predict_files(tmp_path, tmp_path / "out")
    assert "3 channel(s)" in str(results[0].error)


def test_wrong_places(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="input not found"):
        predictor.predict_files(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"NAME_0000\.nii\.gz or folders of DICOM files, found nothing"):
        predictor.predict_files(tmp_path / "empty", tmp_path / "out")
    file = _image(tmp_path / "in" / "a_0000.nii.gz")
    with pytest.raises(SpecError, match="is a folder"):
        predictor.predict_files(tmp_path / "in", tmp_path / "seg.nii.gz")
    with pytest.raises(SpecError, match=r"writes \.nii\.gz"):
        predictor.predict_files(file, tmp_path / "seg.mha")
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(FastnnUNetError, match="cannot create the output folder"):
        predictor.predict_files(file, tmp_path / "occupied")
    assert _names(tmp_path) == ["empty", "in", "occupied"]


def test_continue(predictor: Predictor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        _image(tmp_path / "in" / f"{name}_0000.nii.gz")
    out = tmp_path / "out"
    predictor.predict_files(tmp_path / "in", out)
    os.utime(out / "a.nii.gz", (0, 0))
    (out / "b.nii.gz").unlink()
    again = predictor.predict_files(tmp_path / "in", out, overwrite=False)
    assert [r.case_id for r in again] == ["b"]
    assert (out / "a.nii.gz").stat().st_mtime == 0
    assert predictor.predict_files(tmp_path / "in", out, overwrite=False) == []
    # probabilities are part of what must be there
    with_probabilities = predictor.predict_files(tmp_path / "in", out, overwrite=False, save_probabilities=True)
    assert [r.case_id for r in with_probabilities] == ["a", "b"]


def test_a_changed_bundle_is_refused(tmp_path: Path) -> None:
    model = make_toy_model(Toy(), tmp_path)
    onnx = bytearray((model.bundle / "model.onnx").read_bytes())
    onnx[-100] ^= 1
    (model.bundle / "model.onnx").write_bytes(onnx)
    with pytest.raises(CorruptError, match=r"model\.onnx was changed"):
        Predictor.load(model.bundle, "onnxruntime")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schemes": ["MyNormalization"]}, "'MyNormalization'"),
        ({"resampling": {k: {"fn": "my_fn", "kwargs": {}} for k in ("data", "seg", "probabilities")}}, "'my_fn'"),
        ({"reader_writer": "MyIO"}, "'MyIO'"),
    ],
)
def test_what_the_runtime_does_not_have_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = make_toy_model(Toy(**changes), tmp_path)
    _image(tmp_path / "in" / "a_0000.nii.gz")
    with pytest.raises(SpecError, match=words):
        Predictor.load(model.bundle, "onnxruntime").predict_files(tmp_path / "in", tmp_path / "out")


def test_pictures(tmp_path: Path) -> None:
    toy = Toy(
        dims=2,
        channels=3,
        spacing=(1.0, 1.0),
        schemes=["RGBTo01Normalization"] * 3,
        file_ending=".png",
        reader_writer="NaturalImage2DIO",
    )
    model = make_toy_model(toy, tmp_path)
    pixels = np.stack([smooth_noise((33, 47), c).clip(0, 255) for c in range(3)], -1).astype(np.uint8)
    file = tmp_path / "in" / "a_0000.png"
    file.parent.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(file))
    nnunet_predict(model, {"a": [file]}, tmp_path / "expected")
    Predictor.load(model.bundle, "onnxruntime").predict_files(tmp_path / "in", tmp_path / "out")
    expected, got = (_labels(tmp_path / folder / "a.png") for folder in ("expected", "out"))
    assert len(np.unique(expected)) > 1
    assert (got == expected).mean() >= 0.9999


def test_an_image_of_zeros(model: ToyModel, predictor: Predictor, tmp_path: Path) -> None:
    file = write_image(np.zeros(SHAPE, np.float32), tmp_path / "a_0000.nii.gz")
    nnunet_predict(model, {"a": [file]}, tmp_path / "expected")
    predictor.predict_files(file, tmp_path / "out")
    expected, got = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / d / "a.nii.gz"))) for d in ("expected", "out")
    )
    np.testing.assert_array_equal(got, expected)
