"""What lies in a folder of images: nnU-Net is the oracle for what is predicted, and everything else is named."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from fastnnunet import FastPredictor
from fastnnunet.cli.main import main
from fastnnunet.errors import ImageError, NotFoundError, SpecError, printable
from fastnnunet.images.cases import find_cases, single_case
from fastnnunet.nnunet.unlabelled.image_folder import find_images
from fastnnunet.system.files import check_output_folder
from tests.bundles import Toy, ToyModel, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series

SHAPE = (12, 18, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@dataclass(frozen=True)
class _Spec:
    """What finding cases needs to know of a bundle."""

    file_ending: str = ".nii.gz"
    channel_names: tuple[str, ...] = ("CT",)


SPEC: Any = _Spec()


def _predict(model: ToyModel, source: object, out: object, *words: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(
            ["predict", "-i", str(source), "-o", str(out), "-m", str(model.bundle), "--backend", "onnxruntime", *words]
        )
    assert isinstance(done.value.code, int)
    return done.value.code


def _image(file: Path, seed: int = 0) -> Path:
    return write_image(smooth_noise(SHAPE, seed), file)


def _strangers(folder: Path) -> tuple[str, ...]:
    """Everything but images; what is said of each kind."""
    (folder / "gone_0000.nii.gz").symlink_to(folder / "nowhere")
    (folder / "circle_0000.nii.gz").symlink_to(folder / "circle_0000.nii.gz")
    (folder / "folder_0000.nii.gz").mkdir()
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe_0000.nii.gz")
    with socket.socket(socket.AF_UNIX) as s:
        here = Path.cwd()
        os.chdir(folder)  # names of sockets are short
        s.bind("socket_0000.nii.gz")
        os.chdir(here)
    (folder / "device_0000.nii.gz").symlink_to("/dev/zero")
    (folder / "capital_0000.NII.GZ").write_bytes(b"")
    (folder / "x_0000.nrrd").write_bytes(b"")
    (folder / "notes\x1b[31m\n.txt").write_bytes(b"")
    (folder / "._x_0000.nii.gz").write_bytes(b"macOS")
    (folder / "dataset.json").write_text("{}")
    return (
        "2 broken link(s): circle_0000.nii.gz, gone_0000.nii.gz",
        "1 folder(s) called like .nii.gz files: folder_0000.nii.gz",
        "1 folder(s): sub",
        "3 pipe(s), socket(s) or device(s): device_0000.nii.gz, pipe_0000.nii.gz, socket_0000.nii.gz",
        "1 file(s) whose ending is not spelled .nii.gz: capital_0000.NII.GZ",
        r"2 file(s) that do not end in .nii.gz: notes\x1b[31m\n.txt, x_0000.nrrd",
    )


def test_what_is_not_predicted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a_0000", "b_0000"):
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "link_0000.nii.gz").symlink_to("a_0000.nii.gz")
    told = _strangers(tmp_path)
    cases = find_cases(tmp_path, SPEC)
    (tmp_path / "circle_0000.nii.gz").unlink()  # nnU-Net ends with an OSError there
    visible = [
        files
        for files in create_lists_from_splitted_dataset_folder(str(tmp_path), ".nii.gz", num_processes=1)
        if not Path(files[0]).name.startswith(".")
    ]
    assert [[str(f) for f in case.files] for case in cases] == visible
    for words in told:
        assert f"{tmp_path}: not predicted: {words}" in caplog.text
    assert len(caplog.records) == len(told)
    assert "\x1b" not in caplog.text
    assert "macOS" not in caplog.text
    assert "dataset.json" not in caplog.text


def test_the_exit_code_is_that_of_the_images(
    model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    told = _strangers(source)
    assert _predict(model, source, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    for words in told:
        assert words in message
    assert not (tmp_path / "out").exists()
    _image(source / "x_0000.nii.gz")
    assert _predict(model, source, tmp_path / "out") == 0
    assert (tmp_path / "out" / "x.nii.gz").is_file()
    assert all(words in caplog.text for words in told)


def test_files_that_belong_to_images_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a_0000.tif", "a.json", "b_0000.tif", "b_0000.json"):
        (tmp_path / name).touch()
    find_cases(tmp_path, _Spec(file_ending=".tif"))  # type: ignore[arg-type]
    (tmp_path / "mhd").mkdir()
    for name in ("a_0000.mhd", "a_0000.zraw"):
        (tmp_path / "mhd" / name).touch()
    find_cases(tmp_path / "mhd", _Spec(file_ending=".mhd"))  # type: ignore[arg-type]
    assert caplog.text == ""
    find_cases(tmp_path, _Spec(file_ending=".tif"))  # type: ignore[arg-type]
    assert "not predicted: 1 folder(s): mhd" in caplog.text


@pytest.mark.parametrize(
    "name", ["a\nb", "a\x1b[31mb", "a\tb", "[red]", "[a]b[b]", "a b", "-a", "é", "\u202eabc", "a'\"$(b)"]
)
def test_odd_names_are_predicted_and_escaped(
    name: str, model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    _image(tmp_path / "in" / f"{name}_0000.nii.gz")
    (tmp_path / "in" / f"{name}bad_0000.nii.gz").write_bytes(b"\x1f\x8b no gzip")
    (expected,) = create_lists_from_splitted_dataset_folder(str(tmp_path / "in"), ".nii.gz", [name], num_processes=1)
    assert expected == [str(tmp_path / "in" / f"{name}_0000.nii.gz")]
    assert _predict(model, tmp_path / "in", tmp_path / "out", "--verbose", "--profile") == 1
    assert (tmp_path / "out" / f"{name}.nii.gz").is_file()
    said = capsys.readouterr()
    assert f"failed: {printable(name)}bad: " in said.err
    assert not {"\x1b", "\t", "\u202e"} & {*said.err, *said.out}
    assert "a\nb" not in said.err


def test_names_of_outputs_that_are_too_long_fail_before_the_work(
    model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "x" * 250
    write_series(tmp_path / "in" / long, np.zeros((12, 18, 20)), spacing_zyx=(1, 1, 1))
    write_series(tmp_path / "in" / "short", np.zeros((12, 18, 20)), spacing_zyx=(1, 1, 1))
    assert _predict(model, tmp_path / "in", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"failed: {long}: the name of its output has 257 bytes" in message
    assert (tmp_path / "out" / "short.nii.gz").is_file()
    # the longest that there can be
    name = "é" * 121 + "_0000.nii.gz"
    _image(tmp_path / "files" / f"y{name}")
    assert len(os.fsencode(f"y{name}")) == 255
    assert _predict(model, tmp_path / "files", tmp_path / "out2", "--save_probabilities") == 0
    assert (tmp_path / "out2" / ("y" + "é" * 121 + ".npz")).is_file()


@pytest.mark.parametrize("option", ["-i", "-o", "-m", "--output", "--output="])
def test_an_empty_argument_is_refused(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [option] if option.endswith("=") else [option, ""]
    with pytest.raises(SystemExit) as done:
        main(["predict", "-i", "in", "-o", "out", "-m", "model", *words])
    assert done.value.code == 2
    assert f"error: an empty value {'in' if option.endswith('=') else 'behind'} {option}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_name_is_refused_by_the_predictor(model: ToyModel) -> None:
    predictor = FastPredictor(allow_tqdm=False, backend="onnxruntime")
    predictor.initialize_from_trained_model_folder(model.bundle)
    for source, output in (("", "out"), ("in", ""), ([["in"]], [""])):
        with pytest.raises(SpecError, match="empty name"):
            predictor.predict_from_files(source, output)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda p: p.symlink_to(p), lambda p: None, lambda p: p.symlink_to("/dev/zero")]
)
def test_an_input_that_is_no_file_is_refused_at_once(
    make: Callable[[Path], None], model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "x_0000.nii.gz")
    assert _predict(model, tmp_path / "x_0000.nii.gz", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("error: input ") == 1
    assert _predict(model, tmp_path / ("y" * 300), tmp_path / "out") == 2
    assert _predict(model, tmp_path, tmp_path / "out", "-prev_stage_predictions", "y" * 300) == 2


def test_output_folders_that_cannot_be_are_refused_before(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, words in (
        ("y" * 256, "256 bytes"),
        ("link", "a link that leads nowhere"),
        ("link/sub", "leads nowhere"),
    ):
        with pytest.raises(Exception, match=words):
            check_output_folder(tmp_path / folder)
    check_output_folder(tmp_path / ("y" * 255))


def test_a_folder_in_place_of_an_output_fails_before_the_work(
    model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _image(tmp_path / "in" / "x_0000.nii.gz")
    (tmp_path / "out" / "x.nii.gz").mkdir(parents=True)
    assert _predict(model, tmp_path / "in", tmp_path / "out") == 1
    assert "is a folder" in capsys.readouterr().err


def test_dicom_deeper_in_a_folder_is_pointed_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for series in ("SE0", "SE1"):
        write_series(tmp_path / "study" / "PAT" / "ST0" / series, np.zeros((3, 4, 5)))
    (tmp_path / "study" / "circle").symlink_to(tmp_path / "study")
    with pytest.raises(
        NotFoundError, match=r"deeper in it, in PAT/ST0/SE0, PAT/ST0/SE1 .predict them with -i (.*).\)"
    ) as e:
        find_cases(tmp_path / "study", SPEC)
    assert f"-i {tmp_path / 'study' / 'PAT' / 'ST0'})" in str(e.value)
    assert len(find_cases(tmp_path / "study" / "PAT" / "ST0", SPEC)) == 2
    write_series(tmp_path / "study" / "direct", np.zeros((3, 4, 5)))
    assert [case.case_id for case in find_cases(tmp_path / "study", SPEC)] == ["direct"]
    assert "not predicted: 2 folder(s): PAT, circle" in caplog.text
    assert "DICOM files deeper in it, in PAT/ST0/SE0" in caplog.text


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_slice_of_a_volume_is_refused(
    kind: str, model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = write_series(tmp_path / "in", np.zeros((1, 18, 20)), spacing_zyx=(1, 1, 1))
    file = file.rename(file.with_suffix(".dcm"))
    assert _predict(model, file if kind == "file" else tmp_path / "in", tmp_path / "out") == 2
    assert "is one DICOM slice, and this model segments volumes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # of a file of another format one slice is what nnU-Net takes it for
    write_image(smooth_noise((1, 18, 20), 0), tmp_path / "flat_0000.nii.gz")
    assert _predict(model, tmp_path / "flat_0000.nii.gz", tmp_path / "out") == 0


def test_one_slice_is_an_image_of_a_flat_model(tmp_path: Path) -> None:
    flat = make_toy_model(Toy(dims=2, spacing=(1.0, 1.0)), tmp_path / "toy")
    write_series(tmp_path / "in", np.zeros((1, 24, 32)), spacing_zyx=(1, 1, 1))
    assert _predict(flat, tmp_path / "in", tmp_path / "out") == 0
    assert sitk.ReadImage(str(tmp_path / "out" / "in.nii.gz")).GetSize() == (32, 24, 1)


def test_images_without_labels_are_listed_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a_0000", "b\nc_0000"):
        (tmp_path / f"{name}.nii.gz").touch()
    told = _strangers(tmp_path)
    assert list(find_images(tmp_path, ".nii.gz", 1)) == ["a", "b\nc"]
    for words in told:
        assert f"--images: {tmp_path}: not used: {words}" in caplog.text
    with pytest.raises(ImageError) as caught:
        find_images(tmp_path, ".nii.gz", 2)
    assert r"  - b\nc: got channels" in str(caught.value)


@pytest.mark.parametrize("command", ["evaluate", "postprocess"])
def test_folders_of_label_maps_are_listed_alike(
    command: str, model: ToyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("p", "g"):
        (tmp_path / folder).mkdir()
        if folder == "p" or command == "evaluate":
            told = _strangers(tmp_path / folder)
        write_image(np.ones(SHAPE, np.uint8), tmp_path / folder / "a.nii.gz")
        for name in ("plans.json", "dataset.json"):
            (tmp_path / folder / name).write_bytes((model.folder / name).read_bytes())
    words = {
        "evaluate": ["-p", str(tmp_path / "p"), "-g", str(tmp_path / "g")],
        "postprocess": ["-i", str(tmp_path / "p"), "-o", str(tmp_path / "out"), "--keep-largest", "all"],
    }[command]
    with pytest.raises(SystemExit) as done:
        main([command, *words])
    assert done.value.code == 0
    for kind in told:
        assert (
            f"{tmp_path / 'p'}: not {'compared' if command == 'evaluate' else 'postprocessed'}: {kind}" in caplog.text
        )


def test_a_single_image_of_an_odd_name(tmp_path: Path) -> None:
    case = single_case(tmp_path / "a\nb_0000.nii.gz", SPEC)
    assert case.case_id == "a\nb"
    assert str(case.told(ImageError(f"cannot read {case.files[0]}"))) == f"cannot read {tmp_path}/a\\nb_0000.nii.gz"
