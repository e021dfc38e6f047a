"""`fastnnunet-engine` and the example in C on files: what `fastnnunet predict` writes, says and refuses."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.cli.main import main
from fastnnunet.engines.devices import cuda_device_count
from fastnnunet.images.tidy.rules import cleanup_from_words
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec, write_bundle_json
from tests import engine
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series
from tests.test_locate import give_locator, image_with_target
from tests.test_runtime_parity import SCENARIOS, _write_case
from tests.test_threads import _second_fold


@pytest.fixture(scope="module")
def program() -> Path:
    return engine.build() / "bin" / "fastnnunet-engine"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_toy_model(Toy(mirror_axes=(0,)), tmp_path_factory.mktemp("toy")).bundle
    _second_fold(made)
    return made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate("ab"):
        array = smooth_noise((12, 25 + number, 20), number, border=2)
        write_image(array, tmp_path / "in" / f"{name}_0000.nii.gz", (1.1, 1.0, 0.9))
    return tmp_path / "in"


def run(program: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**engine.environment(), **variables}
    return subprocess.run(list(map(str, (program, *words))), capture_output=True, text=True, env=environment)


def assert_same_file(got: Path, expected: Path) -> None:
    """Byte for byte; of gzip what is packed, since every library packs otherwise."""
    left, right = (path.read_bytes() for path in (got, expected))
    if got.name.endswith(".gz"):
        left, right = gzip.decompress(left), gzip.decompress(right)
    assert left == right, f"{got.name} differs"


def assert_same_folder(got: Path, expected: Path) -> None:
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in expected.iterdir())
    for path in expected.iterdir():
        if path.name != "predict_from_raw_data_args.json":
            assert_same_file(got / path.name, path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_folder(backend: str, program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    done = run(
        program, "predict", "-i", images, "-o", tmp_path / "got", "-m", bundle, "--backend", backend, "--threads", 1
    )
    assert done.returncode == 0, done.stderr
    assert f"2 case(s) predicted with {backend} into" in done.stdout
    Predictor.load(bundle, backend, threads=1).predict_files(images, tmp_path / "expected")
    assert_same_folder(tmp_path / "got", tmp_path / "expected")
    got, expected = (
        json.loads((tmp_path / side / "predict_from_raw_data_args.json").read_text()) for side in ("got", "expected")
    )
    assert got["fastnnunet"].pop("library")
    assert got["fastnnunet"] == expected["fastnnunet"]
    assert got.keys() == expected.keys()


@pytest.mark.parametrize("name", ["transposed", "cropped_masked_two_channels", "regions", "reoriented", "2d"])
def test_kinds_of_images(name: str, program: Path, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    bundle = make_toy_model(scenario.toy, tmp_path).bundle
    _write_case(scenario, tmp_path / "in", "case")
    Predictor.load(bundle, "onnxruntime", threads=1).predict_files(tmp_path / "in", tmp_path / "expected")
    words = ("predict", "-i", tmp_path / "in", "-o", tmp_path / "got", "-m", bundle)
    done = run(program, *words, "--backend", "onnxruntime", "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert_same_folder(tmp_path / "got", tmp_path / "expected")


def test_flags(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    spec = load_bundle_spec(bundle)
    words = ("-f", "1", "-step_size", "0.9", "--disable_tta")
    tidy = ("--keep-largest", "each", "--min-size", "20mm3", "--fill-holes", "a", "b")
    image = images / "a_0000.nii.gz"
    done = run(
        program, "predict", "-i", image, "-o", tmp_path / "got.nii.gz", "-m", bundle, "--backend=onnxruntime", *words,
        *tidy, "--output-format=image", "--threads", 1, "-npp", 0, "-nps", 0, "--verbose", "--profile",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "network sees (1, " in done.stderr
    assert "a: read" in done.stdout
    cleanup = cleanup_from_words(spec.labels, keep_largest=["each"], min_size="20mm3", fill_holes=["a", "b"])
    predictor = Predictor.load(bundle, "onnxruntime", threads=1, folds=["1"], step_size=0.9, mirroring=False)
    predictor.predict_files(image, tmp_path / "expected.nii.gz", cleanup=cleanup)
    assert_same_file(tmp_path / "got.nii.gz", tmp_path / "expected.nii.gz")
    untidy = tmp_path / "untidy.nii.gz"
    predictor.predict_files(image, untidy)
    assert gzip.decompress(untidy.read_bytes()) != gzip.decompress((tmp_path / "expected.nii.gz").read_bytes())


def test_probabilities(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    """The archive holds what Python's holds; the labels come from it; what is not complete is predicted again."""
    words = ("predict", "-i", images, "-m", bundle, "--backend", "onnxruntime", "--threads", 1, "--save_probabilities")
    done = run(program, *words, "-o", tmp_path / "got")
    assert done.returncode == 0, done.stderr
    predictor = Predictor.load(bundle, "onnxruntime", threads=1)
    predictor.predict_files(images, tmp_path / "expected", save_probabilities=True)
    for name in ("a", "b"):
        assert_same_file(tmp_path / "got" / f"{name}.nii.gz", tmp_path / "expected" / f"{name}.nii.gz")
        got, expected = (np.load(tmp_path / side / f"{name}.npz") for side in ("got", "expected"))
        assert got.files == expected.files == ["probabilities"]
        np.testing.assert_array_equal(got["probabilities"], expected["probabilities"])
        with zipfile.ZipFile(tmp_path / "got" / f"{name}.npz") as archive:
            assert archive.testzip() is None  # checksums
    record = json.loads((tmp_path / "got" / "predict_from_raw_data_args.json").read_text())
    assert record["save_probabilities"] is True
    archive = tmp_path / "got" / "a.npz"
    archive.write_bytes(archive.read_bytes()[:-40])
    again = run(program, *words, "-o", tmp_path / "got", "--continue_prediction")
    assert "a.npz is damaged or not complete" in again.stderr
    assert "1 case(s) predicted" in again.stdout
    (tmp_path / "got" / "b.npz").unlink()
    assert "1 case(s) predicted" in run(program, *words, "-o", tmp_path / "got", "--continue_prediction").stdout


def test_postprocessing_files(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    """nnU-Net's own .json, several steps in it; a pickle is refused, with the ways there are."""
    name = "remove_all_but_largest_component_from_segmentation"
    steps = [{"labels_or_regions": [[1, 2]]}, {"labels_or_regions": [2], "background_label": 1}]
    rules = tmp_path / "postprocessing.json"
    rules.write_text(json.dumps({"postprocessing_fns": [name, name], "postprocessing_kwargs": steps}))
    image, words = images / "a_0000.nii.gz", ("-m", bundle, "--backend", "onnxruntime", "--threads", 1)
    done = run(program, "predict", "-i", image, "-o", tmp_path / "got.nii.gz", *words, "-pp_pkl_file", rules)
    assert done.returncode == 0, done.stderr
    predictor = Predictor.load(bundle, "onnxruntime", threads=1)
    cleanup = cleanup_from_words(predictor.spec.labels, postprocessing_file=rules)
    predictor.predict_files(image, tmp_path / "expected.nii.gz", cleanup=cleanup)
    assert_same_file(tmp_path / "got.nii.gz", tmp_path / "expected.nii.gz")
    engine.Engine(bundle).predict_files([image], tmp_path / "c.nii.gz", postprocessing=rules, save_probabilities=1)
    assert_same_file(tmp_path / "c.nii.gz", tmp_path / "expected.nii.gz")
    assert np.load(tmp_path / "c.npz")["probabilities"].shape == (3, 12, 25, 20)  # as they are before tidying
    predictor.predict_files(image, tmp_path / "untidy.nii.gz")
    untidy, tidy = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"{n}.nii.gz"))) for n in ("untidy", "got"))
    assert (untidy != tidy).any()
    (tmp_path / "postprocessing.pkl").write_bytes(b"\x80\x04N.")
    pickled = run(
        program,
        "predict",
        "-i",
        image,
        "-o",
        tmp_path / "x.nii.gz",
        *words,
        "-pp_pkl_file",
        tmp_path / "postprocessing.pkl",
    )
    assert pickled.returncode == 2
    assert "reads no pickles" in pickled.stderr
    assert "fastnnunet postprocess -i LABELS -o TIDIED -pp_pkl_file" in pickled.stderr
    assert not (tmp_path / "x.nii.gz").exists()


def test_a_locator(program: Path, images: Path, tmp_path: Path) -> None:
    bundle = make_toy_model(Toy(), tmp_path).bundle
    give_locator(bundle, margin_mm=2)
    file = write_image(60 + 40 * image_with_target()[0], tmp_path / "in" / "case_0000.nii.gz")
    for flag, locate in (("--locate", True), ("--no-locate", False)):
        words = ("predict", "-i", file.parent, "-o", tmp_path / f"got{flag}", "-m", bundle, "--backend", "onnxruntime")
        done = run(program, *words, "--threads", 1, flag)
        assert done.returncode == 0, done.stderr
        assert ("in the locator's box" in done.stdout) == locate
        predictor = Predictor.load(bundle, "onnxruntime", threads=1, locate=locate)
        predictor.predict_files(file.parent, tmp_path / f"expected{flag}")
        assert_same_folder(tmp_path / f"got{flag}", tmp_path / f"expected{flag}")
    assert "locator: margin 2 mm" in run(program, "info", "-m", bundle).stdout


def test_a_cascade(program: Path, images: Path, tmp_path: Path) -> None:
    bundle = make_toy_model(Toy(channels=3), tmp_path).bundle
    spec = load_bundle_spec(bundle)
    one = {name: getattr(spec, name)[:1] for name in ("channel_names", "normalization_schemes", "use_mask_for_norm")}
    write_bundle_json(replace(spec, previous_labels=(1, 2), **one), bundle / "bundle.json")
    for file in images.iterdir():
        image = sitk.ReadImage(str(file))
        labels = sitk.Cast(sitk.Clamp(image, sitk.sitkFloat32, 0, 120) / 60, sitk.sitkUInt8)
        (tmp_path / "previous").mkdir(exist_ok=True)
        sitk.WriteImage(labels, str(tmp_path / "previous" / file.name.replace("_0000", "")))
    words = ("predict", "-i", images, "-o", tmp_path / "got", "-m", bundle, "--threads", 1, "--backend", "onnxruntime")
    assert "it needs the segmentations of the previous stage" in run(program, *words).stderr
    done = run(program, *words, "-prev_stage_predictions", tmp_path / "previous")
    assert done.returncode == 0, done.stderr
    predictor = Predictor.load(bundle, "onnxruntime", threads=1)
    predictor.predict_files(images, tmp_path / "expected", previous=tmp_path / "previous")
    assert_same_folder(tmp_path / "got", tmp_path / "expected")


def test_dicom(program: Path, bundle: Path, tmp_path: Path) -> None:
    """Folders of slices: one by itself, and several as cases."""
    for number, name in enumerate("ab"):
        write_series(tmp_path / "in" / name, smooth_noise((16, 22, 27), number, mean=900).astype(np.int16))
    predictor = Predictor.load(bundle, "onnxruntime", threads=1)
    for source in (tmp_path / "in", tmp_path / "in" / "a"):
        got, expected = tmp_path / f"got_{source.name}", tmp_path / f"expected_{source.name}"
        words = ("predict", "-i", source, "-o", got, "-m", bundle, "--backend", "onnxruntime", "--threads", 1)
        done = run(program, *words)
        assert done.returncode == 0, done.stderr
        predictor.predict_files(source, expected)
        assert_same_folder(got, expected)


def test_some_cases_fail(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    (images / "c_0000.nii.gz").write_bytes((images / "a_0000.nii.gz").read_bytes()[:300])
    (images / "d_0001.nii.gz").write_bytes(b"")
    (images / "e.nii.gz").write_bytes(b"")
    (images / "notes.txt").write_text("x")
    words = ("predict", "-i", images, "-o", tmp_path / "out", "-m", bundle, "--backend", "onnxruntime", "--threads", 1)
    done = run(program, *words)
    assert done.returncode == 1
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz"]
    for text in (
        "failed: c: ",
        "d has no d_0000.nii.gz",
        "e.nii.gz has no channel number",
        "notes.txt",
        "3 case(s) failed",
    ):
        assert text in done.stderr
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.nii.gz")}
    (tmp_path / "out" / "b.nii.gz").write_bytes((tmp_path / "out" / "b.nii.gz").read_bytes()[:50])
    again = run(program, *words, "--continue_prediction")
    assert "1 case(s) predicted" in again.stdout
    assert "b.nii.gz is damaged or not complete" in again.stderr
    assert (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns == times["a.nii.gz"]
    assert sitk.ReadImage(str(tmp_path / "out" / "b.nii.gz")).GetSize() == (20, 26, 12)


def test_parts(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    words = ("predict", "-i", images, "-o", tmp_path / "out", "-m", bundle, "--threads", 1, "-num_parts", 2)
    assert run(program, *words, "-part_id", 1).returncode == 0
    assert [p.name for p in (tmp_path / "out").glob("*.nii.gz")] == ["b.nii.gz"]


@pytest.mark.parametrize(
    "words",
    [
        ["-i", "IN/nothing", "-o", "OUT", "-m", "BUNDLE"],
        ["-i", "IN", "-o", "IN", "-m", "BUNDLE", "-step_size", "2"],
        ["-i", "IN", "-o", "OUT.nii.gz", "-m", "BUNDLE"],
        ["-i", "IN/a_0000.nii.gz", "-o", "IN/a_0000.nii.gz", "-m", "BUNDLE"],
        ["-i", "IN/a_0000.nii.gz", "-o", "OUT.mha", "-m", "BUNDLE"],
        ["-i", "IN", "-o", "BUNDLE", "-m", "BUNDLE"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "--keep-largest", "liver"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "--min-size", "small"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "-prev_stage_predictions", "IN"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "-num_parts", "2", "-part_id", "2"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "-f", "7"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "--memory-limit", "4X"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "-step_size", "0"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "-step_size", "-0.0"],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "--memory-limit", ""],
        ["-i", "IN", "-o", "OUT", "-m", "BUNDLE", "--memory-limit="],
        ["-i", "", "-o", "OUT", "-m", "BUNDLE"],
    ],
    ids=" ".join,
)
def test_refusals_are_those_of_python(
    words: list[str], program: Path, bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"IN": str(images), "BUNDLE": str(bundle), "OUT": str(tmp_path / "out")}
    words = [next((w.replace(k, v, 1) for k, v in places.items() if w.startswith(k)), w) for w in words]
    words += ["--backend", "onnxruntime"]
    before = {p: p.read_bytes() for p in images.iterdir()}
    done = run(program, "predict", *words)
    with pytest.raises(SystemExit) as caught:
        main(["predict", *words])
    assert done.returncode == caught.value.code == 2
    assert done.stderr == capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert {p: p.read_bytes() for p in images.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "-i is missing"),
        (["guess"], "expected predict, info or bench"),
        (["predict", "-i", "a", "-o", "b", "-m", "c", "-d", "4"], "use `fastnnunet predict`"),
        (["predict", "-i", "a", "-o", "b", "-m", "c", "--output-format", "mesh"], "use `fastnnunet predict`"),
        (["predict", "-i", "a", "-o", "b", "-m", "c", "--nonsense"], "is none of its options"),
        (["predict", "-i", "a", "-o", "b", "-m"], "-m needs a value"),
        (["predict", "-i", "a", "-o", "b", "-m", "c", "--threads", "many"], "expected a whole number from 1 on"),
        (["bench", "-m", "nowhere"], "no bundle at nowhere"),
    ],
)
def test_words_of_its_own(words: list[str], message: str, program: Path) -> None:
    done = run(program, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")


def test_info_bench_and_help(program: Path, bundle: Path) -> None:
    told = run(program, "info", "-m", bundle).stdout
    for text in ("toy (3d_toy)", "patch: 16 x 20 x 24", "folds: 0 1", "label b: 2", "onnxruntime: can be used"):
        assert text in told
    record = json.loads(run(program, "bench", "-m", bundle, "--runs", 2, "--shape", 10, 30, 20, "--threads", 1).stdout)
    assert record["shape"] == [10, 30, 20]
    assert len(record["runs"]) == 2
    assert all(value > 0 for one in record["runs"] for value in one.values())
    assert "-prev_stage_predictions" in run(program, "predict", "--help").stdout
    assert run(program, "--version").stdout.startswith("fastnnunet-engine ")


def test_the_example_in_c(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    done = run(program.parents[1] / "examples" / "predict", bundle, tmp_path / "got.nii.gz", images / "a_0000.nii.gz")
    assert done.returncode == 0, done.stderr
    assert "tiles" in done.stderr
    backend = json.loads(done.stdout.split(": ", 1)[1])["backend"]
    Predictor.load(bundle, backend).predict_files(images / "a_0000.nii.gz", tmp_path / "expected.nii.gz")
    assert_same_file(tmp_path / "got.nii.gz", tmp_path / "expected.nii.gz")
    wrong = run(program.parents[1] / "examples" / "predict", bundle, tmp_path / "x.nii.gz", tmp_path / "nothing.nii.gz")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: image not found")


def test_interrupted(program: Path, bundle: Path, tmp_path: Path) -> None:
    image = write_image(smooth_noise((60, 60, 60), 0), tmp_path / "in" / "a_0000.nii.gz")
    words = ["predict", "-i", image.parent, "-o", tmp_path / "out", "-m", bundle, "--threads", 1, "-step_size", "0.05"]
    process = subprocess.Popen(list(map(str, (program, *words))), env=engine.environment(), stderr=subprocess.PIPE)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr is not None
    assert b"interrupted; finished cases are kept" in process.stderr.read()
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("backend", "variable"), [("onnxruntime", "FASTNNUNET_ONNXRUNTIME"), ("openvino", "FASTNNUNET_OPENVINO")]
)
def test_no_library(backend: str, variable: str, program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    words = ("predict", "-i", images, "-o", tmp_path / "out", "-m", bundle, "--backend", backend)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere.so", images / "a_0000.nii.gz"):
        done = run(program, *words, **{variable: str(place)})
        assert done.returncode == 2
        assert f"install it: pip install {backend}" in done.stderr
        assert variable in done.stderr
    assert not (tmp_path / "out").exists()
    assert "tensorrt" in run(program, "info", **{variable: str(tmp_path / "empty")}).stdout


def test_no_gpu(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    """What the GPU would be for comes second (tests/test_engine_device.py)."""
    if cuda_device_count() > 0:
        pytest.skip("there is one")
    words = ("predict", "-i", images, "-o", tmp_path / "out", "-m", bundle, "-device", "cuda:1")
    done = run(program, *words, "--backend", "onnxruntime")
    assert done.returncode == 2
    assert done.stderr.startswith("error: -device cuda:1 needs an NVIDIA GPU with a current driver: ")
    assert not (tmp_path / "out").exists()


def test_openvino_computes_on_no_gpu(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    words = ("predict", "-i", images, "-o", tmp_path / "out", "-m", bundle, "-device", "cuda:1")
    said = run(program, *words, "--backend", "openvino").stderr
    assert said.startswith("error: backend openvino computes on cpu, not on cuda:1\n")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    done = run(program, "predict", "-i", images, "-o", tmp_path / "out" / "deeper", "-m", bundle)
    assert done.returncode == 2
    assert "cannot make the folder" in done.stderr
    words = ["predict", "-i", images, "-o", tmp_path / "small", "-m", bundle, "--save_probabilities", "--threads", 1]
    full = subprocess.run(
        list(map(str, (program, *words))),
        capture_output=True,
        text=True,
        env=engine.environment(),
        restore_signals=False,  # Python minds no SIGXFSZ
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
    )
    assert full.returncode == 2, "a full disk is no fault of one image of many"
    assert full.stderr.startswith("error: no room left to write "), full.stderr
    assert not any(".partial" in file.name or "b." in file.name for file in (tmp_path / "small").iterdir())
    with pytest.raises(engine.EngineError) as caught:
        engine.Engine(bundle).predict_files([images / "a_0000.nii.gz"], tmp_path / "missing" / "a.nii.gz")
    assert caught.value.status == engine.NO_ROOM


def test_its_size(program: Path) -> None:
    """Program and library, without what they were compiled with to be debugged; the record has them at -O3."""
    strip = shutil.which("strip")
    if strip is None:
        pytest.skip("no strip")
    if engine.sanitizers():
        pytest.skip("with sanitizers it is another program")
    sizes = 0
    for path in (program, program.parents[1] / "lib" / "libfastnnunet.so"):
        subprocess.run([strip, "-o", os.devnull, path], check=True)
        sizes += path.stat().st_size
    assert sizes < 8 * 2**20


def test_compiled_models_of_openvino_are_kept(program: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    """The second process finds what OpenVINO made of the model; a damaged file is made again."""
    pytest.importorskip("openvino")
    home: dict[str, Any] = {"FASTNNUNET_CACHE_HOME": str(tmp_path / "home")}
    words = ("predict", "-i", images, "-m", bundle, "--backend", "openvino", "--threads", 1)
    run(program, *words, "-o", tmp_path / "first", **home)
    files = sorted((tmp_path / "home" / "compiled").iterdir())
    assert len(files) == 2  # a network for each fold
    content = {path: path.read_bytes() for path in files}
    files[0].write_bytes(content[files[0]][:-10])
    files[1].write_bytes(b"0" * 64 + b"junk" * 99)
    run(program, *words, "-o", tmp_path / "second", **home)
    assert sorted((tmp_path / "home" / "compiled").iterdir()) == files
    assert all(len(path.read_bytes()) == len(content[path]) for path in files)
    run(program, *words, "-o", tmp_path / "third", **home)
    for name in ("second", "third"):
        assert_same_folder(tmp_path / name, tmp_path / "first")
    assert np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "third" / "a.nii.gz")))).size > 1
