"""`fastnnunet postprocess` beside nnUNetv2_apply_postprocessing; the same options, and DICOM, with `predict`."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from scipy import ndimage

from fastnnunet.cli.main import spread_multi_values
from tests.bundles import Toy, ToyModel, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series

SHAPE = (9, 14, 13)


def _run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "fastnnunet.cli.main", command, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet")}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def _map(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 0.7)
    labels = np.where(noise > np.quantile(noise, 0.85), rng.integers(1, 4, SHAPE), 0)
    return ndimage.median_filter(labels, 2).astype(np.uint8)


def _side_files(folder: Path, reader: str, file_ending: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    dataset = {"labels": labels, "channel_names": {"0": "MR"}, "file_ending": file_ending}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    plans = {"image_reader_writer": reader, "dataset_name": "Dataset001_toy", "plans_name": "p", "configurations": {}}
    (folder / "plans.json").write_text(json.dumps(plans))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


def _read(file: Path) -> np.ndarray:
    return tifffile.imread(file) if file.name.endswith(".tif") else sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


@pytest.mark.parametrize(("reader", "ending"), [("SimpleITKIO", ".nii.gz"), ("Tiff3DIO", ".tif")])
def test_as_nnunet(reader: str, ending: str, tmp_path: Path) -> None:
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
    from nnunetv2.postprocessing.remove_connected_components import (
        load_postprocess_save,
        remove_all_but_largest_component_from_segmentation,
    )

    _side_files(tmp_path / "in", reader, ending)
    for seed, name in enumerate(("one", "two")):
        if ending == ".tif":
            tifffile.imwrite(tmp_path / "in" / f"{name}.tif", _map(seed))
            (tmp_path / "in" / f"{name}.json").write_text('{"spacing": [2.5, 0.7, 1]}')
        else:
            write_image(_map(seed), tmp_path / "in" / f"{name}{ending}", (0.7, 1.1, 2.5), (1.0, 2.0, 3.0))
    steps = ([remove_all_but_largest_component_from_segmentation], [{"labels_or_regions": (1, 2)}])
    (tmp_path / "postprocessing.pkl").write_bytes(pickle.dumps(steps))

    done = _run(
        "postprocess", "-i", tmp_path / "in", "-o", tmp_path / "out", "-pp_pkl_file", tmp_path / "postprocessing.pkl"
    )
    assert done.returncode == 0, done.stderr
    assert "2 label map(s) postprocessed" in done.stdout
    (tmp_path / "expected").mkdir()
    for name in ("one", "two"):
        source, expected = (str(tmp_path / folder / f"{name}{ending}") for folder in ("in", "expected"))
        load_postprocess_save(source, expected, recursive_find_reader_writer_by_name(reader)(), *steps)
        assert (_read(Path(expected)) != _read(Path(source))).any()
        if ending == ".tif":
            np.testing.assert_array_equal(_read(tmp_path / "out" / f"{name}.tif"), _read(Path(expected)))
        else:
            ours = tmp_path / "out" / f"{name}{ending}"
            assert gzip.decompress(ours.read_bytes()) == gzip.decompress(Path(expected).read_bytes())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "expected").iterdir()}


def test_options_and_a_broken_file(tmp_path: Path) -> None:
    _side_files(tmp_path / "in", "SimpleITKIO", ".nii.gz")
    labels = _map(0)
    good = write_image(labels, tmp_path / "in" / "good.nii.gz")
    (tmp_path / "in" / "bad.nii.gz").write_bytes(good.read_bytes()[:200])
    for name, change in (("ct", -2.0), ("soft", 0.5), ("nan", np.nan)):  # images among the label maps
        write_image((labels + np.where(labels == 1, change, 0)).astype(np.float32), tmp_path / "in" / f"{name}.nii.gz")
    done = _run(
        *("postprocess", "-i", tmp_path / "in", "-o", tmp_path / "out", "-np", 1),
        *("--keep-largest", "b", "--min-size", "5", "--fill-holes"),
    )
    assert done.returncode == 1
    assert "failed: bad.nii.gz:" in done.stderr
    assert "failed: nan.nii.gz: " in done.stderr
    for name in ("ct", "soft"):
        assert f"{name}.nii.gz is not a label map: it holds values" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.nii.gz"]
    expected = labels.copy()
    for label in (1, 2, 3):
        components, count = ndimage.label(labels == label, np.ones((3, 3, 3)))
        sizes = ndimage.sum_labels(labels == label, components, range(1, count + 1))
        for component, size in enumerate(sizes, 1):
            if size < 5 or (label == 2 and size < sizes.max()):
                expected[components == component] = 0
    for label in (1, 2, 3):  # no label of this map encloses another one
        expected[ndimage.binary_fill_holes(expected == label) & (expected == 0)] = label
    assert (expected != labels).any()
    np.testing.assert_array_equal(_read(tmp_path / "out" / "good.nii.gz"), expected)


@pytest.mark.parametrize("wrong", ["nothing", "no folder", "no plans", "label", "pickle"])
def test_wrong_input_is_exit_2_with_one_message(wrong: str, tmp_path: Path) -> None:
    _side_files(tmp_path / "in", "SimpleITKIO", ".nii.gz")
    write_image(_map(0), tmp_path / "in" / "a.nii.gz")
    options: dict[str, object] = {"-i": tmp_path / "in", "-o": tmp_path / "out", "--keep-largest": "all"}
    if wrong == "nothing":
        del options["--keep-largest"]
    elif wrong == "no folder":
        options["-i"] = tmp_path / "none"
    elif wrong == "no plans":
        (tmp_path / "in" / "plans.json").unlink()
    elif wrong == "label":
        options["--keep-largest"] = "lung"
    else:
        (tmp_path / "p.pkl").write_bytes(pickle.dumps(os.getcwd))
        options["-pp_pkl_file"] = tmp_path / "p.pkl"
    done = _run("postprocess", *(token for option in options.items() for token in option))
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_options_without_a_value() -> None:
    assert spread_multi_values(["postprocess", "--keep-largest", "--fill-holes", "-o", "x"]) == [
        *("postprocess", "--keep-largest", "all", "--fill-holes", "each", "-o", "x")
    ]
    assert spread_multi_values(["predict", "--keep-largest", "a", "b", "--fill-holes"]) == [
        *("predict", "--keep-largest", "a", "--keep-largest", "b", "--fill-holes", "each")
    ]


def _stored(seed: int = 0) -> np.ndarray:
    return (smooth_noise((12, 20, 18), seed) * 10).round()


def test_dicom_folder_in_segmentation_out(model: ToyModel, tmp_path: Path) -> None:
    """The label map is that of the same voxels in a NIfTI file, as a file of the model and as DICOM SEG."""
    import highdicom as hd
    import pydicom

    spacing = {"spacing_zyx": (1.5, 0.9, 0.9), "origin": (0, 0, 0)}
    for name, seed in (("p1", 0), ("p2", 1)):
        write_series(tmp_path / "in" / name, _stored(seed), **spacing)
    write_image((_stored() - 1024).astype(np.float32), tmp_path / "a_0000.nii.gz", (0.9, 0.9, 1.5))
    common = ("-m", model.bundle, "--backend", "onnxruntime", "--threads", 1, "--disable_progress_bar")
    done = _run("predict", "-i", tmp_path / "a_0000.nii.gz", "-o", tmp_path / "a.nii.gz", *common)
    assert done.returncode == 0, done.stderr
    expected = _read(tmp_path / "a.nii.gz")
    assert len(np.unique(expected)) > 1

    done = _run("predict", "-i", tmp_path / "in", "-o", tmp_path / "out", *common)
    assert done.returncode == 0, done.stderr
    assert "2 case(s) predicted" in done.stdout
    np.testing.assert_array_equal(_read(tmp_path / "out" / "p1.nii.gz"), expected)

    done = _run(
        *("predict", "-i", tmp_path / "in" / "p1", "-o", tmp_path / "seg", *common),
        *("--output-format", "dicom-seg", "--keep-largest", "each", "--save_probabilities"),
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "seg").iterdir()} >= {"p1.dcm", "p1.npz", "p1.pkl", "dataset.json"}
    cleaned = expected.copy()
    for label in (1, 2):
        components, count = ndimage.label(expected == label, np.ones((3, 3, 3)))
        sizes = ndimage.sum_labels(expected == label, components, range(1, count + 1))
        cleaned[np.isin(components, 1 + np.flatnonzero(sizes < sizes.max(initial=0)))] = 0
    segmentation = hd.seg.segread(tmp_path / "seg" / "p1.dcm")
    slices = sorted((pydicom.dcmread(f) for f in (tmp_path / "in" / "p1").iterdir()), key=lambda s: s.InstanceNumber)
    got = segmentation.get_pixels_by_source_instance(
        [s.SOPInstanceUID for s in slices], combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(got, cleaned)
    assert [s.SegmentLabel for s in segmentation.SegmentSequence] == ["a", "b"]
    again = _run(
        *("predict", "-i", tmp_path / "in" / "p1", "-o", tmp_path / "seg", *common, "--output-format", "dicom-seg"),
        "--continue_prediction",
    )
    assert "0 case(s) predicted" in again.stdout


@pytest.mark.parametrize("wrong", ["two series", "missing slice", "no such series", "series of files", "seg of files"])
def test_dicom_that_cannot_be_predicted(wrong: str, model: ToyModel, tmp_path: Path) -> None:
    source = tmp_path / "in"
    files = write_series(source, _stored(), series_uid="1.2.3")
    options: list[Any] = []
    if wrong == "two series":
        write_series(source, _stored(1), series_uid="1.2.4", prefix="other")
    elif wrong == "missing slice":
        files[5].unlink()
    elif wrong == "no such series":
        options = ["--series", "1.2.9"]
    else:
        options = ["--series", "1.2.3"] if wrong == "series of files" else ["--output-format", "dicom-seg"]
        source = write_image(smooth_noise((12, 15, 20), 0), tmp_path / "a_0000.nii.gz")
    done = _run(
        "predict", "-i", source, "-o", tmp_path / "out", "-m", model.bundle, "--backend", "onnxruntime", *options
    )
    words = {
        "two series": "holds 2 DICOM series",
        "missing slice": "1 slice(s) are missing",
        "no such series": "no series 1.2.9",
        "series of files": "--series chooses",
        "seg of files": "is no DICOM series",
    }
    assert done.returncode == 2
    assert words[wrong] in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("out/*")) == []
    if wrong == "two series":
        assert "1.2.3, 12 image(s), CT" in done.stderr
        assert "1.2.4, 12 image(s), CT" in done.stderr
        done = _run("predict", "-i", source, "-o", tmp_path / "out", "-m", model.bundle, "--series", "1.2.4")
        assert done.returncode == 0, done.stderr
