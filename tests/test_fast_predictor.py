"""`fastnnunet.FastPredictor` against nnUNetPredictor, method by method: same calls, same answers."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

import fastnnunet
from fastnnunet.errors import ImageError, SpecError
from tests.bundles import Toy, smooth_noise, write_image
from tests.teachers import make_teacher, nnunet_predictor

FOLDS = (0, 1)
PROPERTIES = {"spacing": [1.2, 0.9, 1.1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield make_teacher(Toy(mirror_axes=(0, 2)), tmp_path_factory.mktemp("teacher"), FOLDS)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return nnunet_predictor(folder, FOLDS)


@pytest.fixture
def ours(folder: Path) -> Any:
    predictor = fastnnunet.FastPredictor(device=torch.device("cpu"), allow_tqdm=False, backend="onnxruntime", threads=1)
    predictor.initialize_from_trained_model_folder(str(folder), FOLDS)
    return predictor


def _image(seed: int = 0) -> np.ndarray:
    return smooth_noise((14, 19, 25), seed, border=2)[None]


def _same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got == expected).mean() >= 0.9999


@pytest.mark.parametrize(
    "method",
    [
        "__init__",
        "initialize_from_trained_model_folder",
        "auto_detect_available_folds",
        "predict_from_files",
        "predict_from_files_sequential",
        "get_data_iterator_from_raw_npy_data",
        "predict_from_list_of_npy_arrays",
        "predict_from_data_iterator",
        "predict_single_npy_array",
        "predict_logits_from_preprocessed_data",
        "predict_sliding_window_return_logits",
    ],
)
def test_arguments_are_nnunets(method: str) -> None:
    expected = inspect.signature(getattr(nnUNetPredictor, method)).parameters
    got = inspect.signature(getattr(fastnnunet.FastPredictor, method)).parameters
    assert list(got)[: len(expected)] == list(expected)
    for name, parameter in expected.items():
        # nnU-Net's default device is a GPU that must be there; its counts of processes depend on the machine
        if parameter.default is not inspect.Parameter.empty and name != "device" and "num_processes" not in name:
            assert got[name].default == parameter.default, name
    extra = list(got.values())[len(expected) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra)


def test_single_array(ours: Any, theirs: Any, tmp_path: Path) -> None:
    image = _image()
    before = image.copy()
    _same(
        ours.predict_single_npy_array(image, dict(PROPERTIES)), theirs.predict_single_npy_array(image, dict(PROPERTIES))
    )
    got = ours.predict_single_npy_array(image, dict(PROPERTIES), None, None, True)
    expected = theirs.predict_single_npy_array(image, dict(PROPERTIES), None, None, True)
    _same(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], atol=5e-3)
    np.testing.assert_array_equal(image, before)
    with pytest.raises(ImageError, match="NaN"):
        ours.predict_single_npy_array(image * np.nan, dict(PROPERTIES))


def test_list_of_arrays_in_memory_and_to_files(ours: Any, theirs: Any, folder: Path, tmp_path: Path) -> None:
    images = [_image(1), _image(2)]
    expected = [theirs.predict_single_npy_array(image, dict(PROPERTIES)) for image in images]
    results = ours.predict_from_list_of_npy_arrays(images, None, [dict(PROPERTIES)] * 2, None)
    for got, want in zip(results, expected, strict=True):
        _same(got, want)
    _same(ours.predict_from_list_of_npy_arrays(images[0], None, dict(PROPERTIES), None)[0], expected[0])

    geometry = {"spacing": (1.1, 0.9, 1.2), "origin": (0.0, 0.0, 0.0), "direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)}
    properties = [{**PROPERTIES, "sitk_stuff": geometry} for _ in images]
    names = [str(tmp_path / name) for name in "ab"]
    assert ours.predict_from_list_of_npy_arrays(images, None, properties, names, save_probabilities=True) == [None] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n}{e}" for n in "ab" for e in (".nii.gz", ".npz", ".pkl")]
    _same(sitk.GetArrayFromImage(sitk.ReadImage(f"{names[1]}.nii.gz")), expected[1])


def test_what_nnunet_preprocessed(ours: Any, theirs: Any, tmp_path: Path) -> None:
    """Items of nnU-Net's own preprocessing, one of them as the file it hands over when a tensor is too large."""
    items = list(theirs.get_data_iterator_from_raw_npy_data([_image(3), _image(4)], None, [dict(PROPERTIES)] * 2, None))
    expected = [theirs.predict_logits_from_preprocessed_data(item["data"]) for item in items]
    for item, logits in zip(items, expected, strict=True):
        got = ours.predict_logits_from_preprocessed_data(item["data"])
        assert isinstance(got, torch.Tensor)
        assert got.dtype == logits.dtype
        torch.testing.assert_close(got, logits, atol=0.02, rtol=1e-2)
        as_array = ours.predict_logits_from_preprocessed_data(item["data"].numpy())
        assert isinstance(as_array, np.ndarray)
        np.testing.assert_array_equal(as_array, got.numpy())
    np.save(tmp_path / "big.npy", items[1]["data"].numpy())
    items[1]["data"] = str(tmp_path / "big.npy")
    for processes in (0, 3):
        got = ours.predict_from_data_iterator(iter(items[: 2 if processes else 1]), False, processes)
        _same(got[0], theirs.predict_single_npy_array(_image(3), dict(PROPERTIES)))
    _same(got[1], theirs.predict_single_npy_array(_image(4), dict(PROPERTIES)))
    assert list(tmp_path.iterdir()) == []


def test_logits_of_the_loaded_network(ours: Any, folder: Path) -> None:
    data = torch.from_numpy(smooth_noise((17, 24, 26), 5, mean=0, spread=1)[None])
    expected = nnunet_predictor(folder, FOLDS).predict_sliding_window_return_logits(data)  # fold 0 is loaded
    torch.testing.assert_close(ours.predict_sliding_window_return_logits(data), expected, atol=0.02, rtol=1e-2)


def test_settings_may_change_between_calls(ours: Any, folder: Path) -> None:
    data = torch.from_numpy(smooth_noise((17, 34, 26), 6, mean=0, spread=1)[None])
    outcomes = []
    for gaussian, mirroring, step in ((True, True, 0.5), (False, True, 0.5), (True, False, 0.5), (True, True, 1.0)):
        oracle = nnunet_predictor(folder, FOLDS, gaussian=gaussian, mirroring=mirroring, step_size=step)
        ours.use_gaussian, ours.use_mirroring, ours.tile_step_size = gaussian, mirroring, step
        got = ours.predict_logits_from_preprocessed_data(data)
        torch.testing.assert_close(got, oracle.predict_logits_from_preprocessed_data(data), atol=0.02, rtol=1e-2)
        outcomes.append(got)
    assert all((outcomes[0] - other).abs().max() > 0.1 for other in outcomes[1:])
    ours.tile_step_size = 2
    with pytest.raises(SpecError, match="tile_step_size"):
        ours.predict_logits_from_preprocessed_data(data)


class TestFiles:
    @pytest.fixture
    def images(self, tmp_path: Path) -> list[Path]:
        return [
            write_image(_image(seed)[0], tmp_path / "in" / f"{name}_0000.nii.gz", (1.1, 0.9, 1.2))
            for seed, name in enumerate(("a", "b", "c"))
        ]

    def test_folder(self, ours: Any, theirs: Any, images: list[Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert ours.predict_from_files(str(tmp_path / "in"), str(out), num_parts=2, part_id=0) == [None, None]
        (tmp_path / "theirs").mkdir()
        names = [str(tmp_path / "theirs" / name) for name in ("a", "c")]
        theirs.predict_from_files_sequential([[str(images[0])], [str(images[2])]], names)
        assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "theirs").iterdir()}
        for name in ("a", "c"):
            got, expected = (
                sitk.GetArrayFromImage(sitk.ReadImage(str(d / f"{name}.nii.gz"))) for d in (out, tmp_path / "theirs")
            )
            _same(got, expected)
        record = json.loads((out / "predict_from_raw_data_args.json").read_text())
        assert record["num_parts"] == 2
        assert record["list_of_lists_or_source_folder"] == str(tmp_path / "in")
        for file in ("plans.json", "dataset.json"):
            assert json.loads((out / file).read_text()) == json.loads((tmp_path / "theirs" / file).read_text())

    def test_lists(self, ours: Any, theirs: Any, images: list[Path], tmp_path: Path) -> None:
        lists = [[str(file)] for file in images[:2]]
        expected = theirs.predict_from_files_sequential(lists, None)
        for got in (ours.predict_from_files(lists, None), ours.predict_from_files_sequential(lists, None)):
            for mine, other in zip(got, expected, strict=True):
                _same(mine, other)
        names = [str(tmp_path / "named" / name) for name in ("x", "y")]
        ours.predict_from_files(lists, names)
        assert (tmp_path / "named" / "y.nii.gz").is_file()
        (tmp_path / "named" / "y.nii.gz").unlink()
        write_image(np.ones((2, 3, 4), np.uint8), tmp_path / "named" / "x.nii.gz")  # done before
        assert ours.predict_from_files(lists, names, overwrite=False) == [None]
        assert sitk.ReadImage(str(tmp_path / "named" / "x.nii.gz")).GetSize() == (4, 3, 2)
        with pytest.raises(SpecError, match="2 cases and 1 output"):
            ours.predict_from_files(lists, names[:1])

    def test_failures_come_at_the_end(self, ours: Any, images: list[Path], tmp_path: Path) -> None:
        images[1].write_bytes(images[1].read_bytes()[:500])
        with pytest.raises(ImageError, match=r"(?s)1 of 3 case\(s\) failed.*- b: .*truncated"):
            ours.predict_from_files(str(tmp_path / "in"), str(tmp_path / "out"))
        assert {p.name for p in (tmp_path / "out").glob("*.nii.gz")} == {"a.nii.gz", "c.nii.gz"}


def test_description(ours: Any, theirs: Any, folder: Path) -> None:
    assert ours.dataset_json == theirs.dataset_json
    assert ours.plans == json.loads((folder / "plans.json").read_text())
    assert ours.allowed_mirroring_axes == theirs.allowed_mirroring_axes
    assert ours.auto_detect_available_folds(folder) == [0, 1]
    detected = fastnnunet.FastPredictor(backend="onnxruntime")
    detected.initialize_from_trained_model_folder(folder, None)
    assert detected._predictor.spec.folds == ("0", "1")
    with pytest.raises(SpecError, match="initialize_from_trained_model_folder"):
        fastnnunet.FastPredictor().predict_single_npy_array(_image(), dict(PROPERTIES))


@pytest.mark.parametrize("spacing", [None, [1, 1], [0, 1, 1], [1, -1, 1], [1, np.nan, 1]])
def test_arrays_with_wrong_properties(ours: Any, spacing: Any) -> None:
    properties = {} if spacing is None else {"spacing": spacing}
    with pytest.raises(ImageError, match=r"properties\['spacing'\]: got .*, expected three numbers above 0"):
        ours.predict_single_npy_array(_image(), properties)


def test_lists_of_other_lengths(ours: Any) -> None:
    with pytest.raises(SpecError, match=r"got 2 image\(s\) but lists of \{1\}"):
        ours.predict_from_list_of_npy_arrays([_image(), _image(1)], None, [dict(PROPERTIES)], None)
    for wrong in (["x.nii.gz"], [[]]):
        with pytest.raises(SpecError, match="expected a list of its channels"):
            ours.predict_from_files(wrong, None)


def test_one_image_by_its_name(ours: Any, tmp_path: Path) -> None:
    """As the command takes it, where nnU-Net's method takes folders and lists."""
    file = write_image(_image()[0], tmp_path / "case_0000.nii.gz")
    (by_name,), (listed,) = ours.predict_from_files(str(file), None), ours.predict_from_files([[str(file)]], None)
    np.testing.assert_array_equal(by_name, listed)
    with pytest.raises(SpecError, match="would be replaced by its segmentation"):
        ours.predict_from_files([[str(file)]], [str(tmp_path / "case_0000")])


def test_importing_the_package_imports_nothing() -> None:
    code = (
        "import sys, fastnnunet\nprint('numpy' in sys.modules)\nfastnnunet.FastPredictor\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
