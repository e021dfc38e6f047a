"""What users get wrong, one by one: a message that says how to mend it, exit code, nothing half-written."""

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fastnnunet.api.conversions import device_name
from fastnnunet.cli.main import main
from fastnnunet.engines import devices, registry
from fastnnunet.engines.devices import Device
from fastnnunet.engines.registry import choose_engine
from fastnnunet.errors import BackendError, CorruptError, FastnnUNetError, NewerFormatError, SpecError
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.system.files import check_output_folder
from tests.bundles import Toy, ToyModel, make_toy_model, nnunet_predict, smooth_noise, write_image
from tests.readonly import read_only

SHAPE = (12, 18, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(channels=2), tmp_path_factory.mktemp("toy"))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "cuda_device_count", lambda: 0)


def _predict(model: ToyModel, source: Path, out: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(
            ["predict", "-i", str(source), "-o", str(out), "-m", str(model.bundle), "--backend", "onnxruntime", *words]
        )
    assert isinstance(done.value.code, int)
    return done.value.code


def _image(file: Path, seed: int = 0, shape: tuple[int, ...] = SHAPE, **geometry: tuple[float, ...]) -> Path:
    return write_image(smooth_noise(shape, seed), file, **geometry)


def _edit_header(file: Path, offset: int, values: bytes) -> None:
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[offset : offset + len(values)] = values
    file.write_bytes(gzip.compress(bytes(content)))


def _missing_channel(folder: Path) -> None:
    (folder / "bad_0001.nii.gz").unlink()


def _missing_first_channel(folder: Path) -> None:
    (folder / "bad_0000.nii.gz").unlink()


def _other_shape(folder: Path) -> None:
    _image(folder / "bad_0001.nii.gz", 1, (12, 18, 21))


def _other_spacing(folder: Path) -> None:
    _image(folder / "bad_0001.nii.gz", 1, spacing_xyz=(1.0, 1.0, 2.0))


def _zero_sized(folder: Path) -> None:
    _edit_header(folder / "bad_0000.nii.gz", 42, struct.pack("<h", 0))  # dim[1]


def _not_a_number(folder: Path) -> None:
    image = smooth_noise(SHAPE, 0)
    image[3, 4, 5] = np.nan
    write_image(image, folder / "bad_0000.nii.gz")


def _infinite(folder: Path) -> None:
    write_image(np.full(SHAPE, np.inf, np.float32), folder / "bad_0000.nii.gz")


def _broken_offset(folder: Path) -> None:
    _edit_header(folder / "bad_0000.nii.gz", 108, struct.pack("<f", np.nan))  # vox_offset


def _broken_dimensions(folder: Path) -> None:
    _edit_header(folder / "bad_0000.nii.gz", 40, struct.pack("<4h", 3, 20, -18, 12))


def _broken_datatype(folder: Path) -> None:
    _edit_header(folder / "bad_0000.nii.gz", 70, struct.pack("<h", 9999))


def _nan_spacing(folder: Path) -> None:
    _edit_header(folder / "bad_0000.nii.gz", 80, struct.pack("<f", float("nan")))  # pixdim[1]


def _no_voxel_left(folder: Path) -> None:
    for channel in range(2):
        _edit_header(folder / f"bad_000{channel}.nii.gz", 80, struct.pack("<f", 0.001))


def _header_only(folder: Path) -> None:
    (folder / "bad_0000.nii.gz").write_bytes(gzip.compress(bytes(100)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing_channel, r"1 channel\(s\).*the model needs 2 channel\(s\) \(channel0, channel1\)"),
        (_missing_first_channel, r"bad has no bad_0000\.nii\.gz"),
        (_other_shape, "channels do not fit together: shape"),
        (_nan_spacing, "damaged header: its spacing is"),
        (_no_voxel_left, r"nothing of the image would be left: \(12, 18, 20\) voxels.*check its spacing"),
        (_other_spacing, "channels do not fit together: spacing"),
        (_zero_sized, "damaged NIfTI header"),
        (_not_a_number, "1 of 8640 voxels are NaN or infinite"),
        (_infinite, "4320 of 8640 voxels are NaN or infinite"),
        (_broken_offset, "damaged NIfTI header"),
        (_broken_dimensions, "damaged NIfTI header"),
        (_broken_datatype, "data type 9999"),
        (_header_only, "is not a NIfTI image"),
    ],
)
def test_a_bad_case_is_told_and_the_others_are_predicted(
    spoil: Callable[[Path], None],
    words: str,
    model: ToyModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("bad", "good"):
        for channel in (0, 1):
            _image(tmp_path / "in" / f"{name}_{channel:04d}.nii.gz", channel)
    spoil(tmp_path / "in")
    assert _predict(model, tmp_path / "in", tmp_path / "out", "--disable_progress_bar") == 1
    shown = capsys.readouterr()
    failure = pytest.raises(FastnnUNetError, match=words)
    with failure:
        raise FastnnUNetError(" ".join(shown.err.split()))
    assert "failed: bad:" in shown.err
    assert "1 case(s) predicted" in shown.out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"good.nii.gz", "plans.json", "dataset.json", "predict_from_raw_data_args.json"}


def test_the_failure_of_an_only_image_is_told_once(
    model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [_image(tmp_path / f"case_000{channel}.nii.gz", channel) for channel in range(2)]
    files[1].write_bytes(files[1].read_bytes()[:100])
    assert _predict(model, files[0], tmp_path / "out.nii.gz") == 2
    said = capsys.readouterr().err
    assert said.count("case_0001.nii.gz") == said.count("error: ") == 1
    assert "failed: " not in said


def test_a_constant_image_as_nnunet(model: ToyModel, tmp_path: Path) -> None:
    files = [write_image(np.full(SHAPE, 7 - 7 * c, np.float32), tmp_path / f"a_000{c}.nii.gz") for c in (0, 1)]
    nnunet_predict(model, {"a": files}, tmp_path / "theirs")
    assert _predict(model, files[0], tmp_path / "ours") == 0
    ours, theirs = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / who / "a.nii.gz"))) for who in ("ours", "theirs")
    )
    assert (ours == theirs).mean() >= 0.999  # the network sees zeros: labels hang on its last digits


def test_an_empty_image_of_another_format(tmp_path: Path) -> None:
    """NRRD may have an axis of no voxels."""
    nrrd = make_toy_model(Toy(file_ending=".nrrd"), tmp_path)
    (tmp_path / "in").mkdir()
    header = "NRRD0004\ntype: float\ndimension: 3\nsizes: 0 4 5\nencoding: raw\nendian: little\n\n"
    (tmp_path / "in" / "a_0000.nrrd").write_bytes(header.encode())
    assert _predict(nrrd, tmp_path / "in", tmp_path / "out") == 1
    assert not (tmp_path / "out").exists()


class TestOutputFolder:
    def test_without_permission(self, model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for channel in (0, 1):
            _image(tmp_path / "in" / f"a_{channel:04d}.nii.gz", channel)
        (tmp_path / "closed").mkdir()
        for out in (tmp_path / "closed", tmp_path / "closed" / "new"):
            with read_only(tmp_path / "closed"):
                assert _predict(model, tmp_path / "in", out) == 2
            assert "cannot write to the output folder" in capsys.readouterr().err
        assert list((tmp_path / "closed").iterdir()) == []

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(FastnnUNetError, match="is a file"):
                check_output_folder(folder)
        check_output_folder(tmp_path / "not" / "there" / "yet")


def test_a_bundle_of_a_newer_version(model: ToyModel, tmp_path: Path) -> None:
    raw = json.loads((model.bundle / "bundle.json").read_text())
    raw |= {"format_version": 99, "something_new": True}
    (tmp_path / "bundle.json").write_text(json.dumps(raw))
    with pytest.raises(NewerFormatError, match=r"(?s)format version 99, this fastnnunet reads up to \d+.*pip install"):
        load_bundle_spec(tmp_path)
    assert _predict(replace(model, bundle=tmp_path), tmp_path, tmp_path / "out") == 2


def test_a_bundle_of_the_first_format_is_read(model: ToyModel, tmp_path: Path) -> None:
    """Written before there were ensembles."""
    from fastnnunet.specs.canonical import sha256_of

    for file in ("model.onnx", "parity.npz"):
        (tmp_path / file).write_bytes((model.bundle / file).read_bytes())
    raw = json.loads((model.bundle / "bundle.json").read_text())
    for later in ("model_files", "folds", "self_sha256"):
        del raw[later]
    raw["format_version"] = 1
    (tmp_path / "bundle.json").write_text(json.dumps({**raw, "self_sha256": sha256_of(raw)}))
    assert load_bundle_spec(tmp_path).model_files == ("model.onnx",)


class TestDevices:
    def test_a_gpu_that_is_not_there(
        self, model: ToyModel, tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in").mkdir()
        for words in (["-device", "cuda"], ["-device", "cuda", "--backend", "auto"]):
            assert _predict(model, tmp_path / "in", tmp_path / "out", *words) == 2
            assert "a GPU is asked for (-device cuda) but there is none" in capsys.readouterr().err
        assert _predict(model, tmp_path / "in", tmp_path / "out", "-device", "gpu0") == 2
        assert "got 'gpu0', expected cpu, cuda, or cuda:1" in capsys.readouterr().err

    def test_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu, gpu, other_gpu = Device(), Device("cuda"), Device("cuda", 1)
        monkeypatch.setattr(registry, "cuda_device_count", lambda: 2)
        monkeypatch.setattr(registry, "is_installed", lambda name: name != "openvino")
        assert choose_engine("auto") == choose_engine("auto", "cpu") == ("onnxruntime", cpu)
        assert choose_engine("auto", "cuda") == choose_engine("tensorrt") == ("tensorrt", gpu)
        assert choose_engine("onnxruntime") == ("onnxruntime", cpu)
        assert choose_engine("onnxruntime", "cuda:0") == ("onnxruntime", gpu)
        assert choose_engine("tensorrt", "cuda:1") == ("tensorrt", other_gpu)
        with pytest.raises(
            BackendError, match=r"-device cuda:2: this process sees 2 GPU\(s\), expected cuda to cuda:1"
        ):
            choose_engine("auto", "cuda:2")
        assert choose_engine("torch", "cuda") == ("torch", gpu)
        with pytest.raises(BackendError, match="openvino computes on cpu, not on cuda"):
            choose_engine("openvino", "cuda")
        with pytest.raises(BackendError, match="tensorrt computes on cuda, not on cpu"):
            choose_engine("tensorrt", "cpu")
        for device in ("tpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0"):
            with pytest.raises(SpecError, match=f"device: got '{device}'"):
                choose_engine("auto", device)

    def test_fastest_on_a_gpu_without_tensorrt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        monkeypatch.setattr(registry, "cuda_device_count", lambda: 1)
        monkeypatch.setattr(registry, "is_installed", lambda name: name != "tensorrt")
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        with pytest.raises(BackendError, match=r"(?s)pip install 'fastnnunet\[rtx\]'.*pip install onnxruntime-gpu"):
            choose_engine("auto", "cuda")
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
        assert choose_engine("auto", "cuda") == ("onnxruntime", Device("cuda"))

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (None, None),
            ("mps", "cpu"),
            ("cuda:0", "cuda"),
            (torch.device("cuda", 1), "cuda:1"),
            (torch.device("mps"), "cpu"),
        ],
    )
    def test_names(self, given: Any, expected: str | None) -> None:
        assert device_name(given) == expected

    def test_without_a_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> None:
            raise OSError(name)

        monkeypatch.setattr(devices.ctypes, "CDLL", absent)
        assert devices.cuda_device_count.__wrapped__() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "x", "-d", "4"], "either -m .* or -d"),
        ([], "either -m .* or -d"),
        (["-d", "4"], "-d needs a configuration"),
        (["-m", "BUNDLE", "-part_id", "2", "-num_parts", "2"], "-part_id 2 of -num_parts 2"),
        (["-m", "BUNDLE", "-part_id", "-1"], "-part_id -1 of -num_parts 1"),
        (["-m", "BUNDLE", "-chk", "checkpoint_best.pth"], "has one checkpoint"),
        (["-m", "BUNDLE", "-f", "x"], "'x' is no fold"),
        (["-m", "BUNDLE", "-step_size", "0"], "step_size"),
    ],
)
def test_flags_that_contradict(
    words: list[str], message: str, model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for channel in (0, 1):
        _image(tmp_path / "in" / f"a_{channel:04d}.nii.gz", channel)
    words = [str(model.bundle) if word == "BUNDLE" else word for word in words]
    with pytest.raises(SystemExit) as done:
        main(["predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *words])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    with pytest.raises(FastnnUNetError, match=message):
        raise FastnnUNetError(error)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


class TestNames:
    """Odd names of files."""

    def test_the_input_is_never_replaced(self, model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        for channel in range(2):
            _image(tmp_path / f"case_000{channel}.nii.gz", channel)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        for out in (tmp_path / "case_0001.nii.gz", tmp_path / "case_0000.nii.gz"):
            assert _predict(model, tmp_path / "case_0000.nii.gz", out) == 2
            assert "would be replaced by its segmentation" in capsys.readouterr().err
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("case", ["pat.nii", "pat.img", "pat.hdr.x", "pät ient"])
    def test_endings_in_the_middle(self, model: ToyModel, tmp_path: Path, case: str) -> None:
        source, out = tmp_path / "in", tmp_path / "out"
        source.mkdir()
        for channel in range(2):
            _image(source / "plain_0000.nii.gz", channel).rename(source / f"{case}_000{channel}.nii.gz")
        assert _predict(model, source, out) == 0
        assert [p.name for p in out.iterdir() if "json" not in p.name] == [f"{case}.nii.gz"]

    def test_upper_case(self, model: ToyModel, tmp_path: Path) -> None:
        for channel in range(2):
            _image(tmp_path / "plain.nii.gz", channel).rename(tmp_path / f"UP_000{channel}.NII.GZ")
        assert _predict(model, tmp_path / "UP_0000.NII.GZ", tmp_path / "out") == 0
        assert (tmp_path / "out" / "UP.nii.gz").is_file()

    def test_not_utf8(self, model: ToyModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        source, out = tmp_path / "in", tmp_path / "out"
        source.mkdir()
        for channel in range(2):
            _image(source / f"good_000{channel}.nii.gz", channel)
            image = _image(source / "plain.nii.gz", channel)
            image.rename(source / f"caf\udce9_000{channel}.nii.gz")
        assert _predict(model, source, out) == 1
        assert (out / "good.nii.gz").is_file()
        assert "is a file name that is not UTF-8; rename the file" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "null", '{"self_sha256": "x", "format_version": "nine"}'])
def test_a_bundle_json_of_another_kind(content: str, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(CorruptError, match="is damaged"):
        load_bundle_spec(tmp_path)


class TestEvaluate:
    """Files that ITK would read without complaint."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        labels = np.zeros((8, 10, 12), np.uint8)
        labels[2:6, 2:8, 2:9] = 1
        labels[4] = np.random.default_rng(0).integers(0, 2, (10, 12))
        for name in ("predictions", "labels"):
            (tmp_path / name).mkdir()
            write_image(labels, tmp_path / name / "case.nii.gz")
        return tmp_path / "predictions", tmp_path / "labels"

    def _evaluate(self, folders: tuple[Path, Path], *words: str) -> int:
        with pytest.raises(SystemExit) as done:
            main(["evaluate", "-p", str(folders[0]), "-g", str(folders[1]), *words])
        assert isinstance(done.value.code, int)
        return done.value.code

    def test_truncated(self, folders: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
        file = folders[0] / "case.nii.gz"
        file.write_bytes(file.read_bytes()[:-40])
        assert self._evaluate(folders) == 2
        assert "case.nii.gz is truncated" in capsys.readouterr().err

    def test_hidden_twins(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "._case.nii.gz").write_bytes(b"Mac")
        (folders[1] / "._other.nii.gz").write_bytes(b"Mac")
        assert self._evaluate(folders) == 0

    def test_no_place_for_the_report(
        self, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "taken.json").mkdir()
        assert self._evaluate(folders, "-o", str(tmp_path / "taken.json")) == 2
        assert "is a folder, expected a file name" in capsys.readouterr().err
        assert self._evaluate(folders, "-o", str(folders[0] / "case.nii.gz" / "x.json")) == 2
        assert "is a file; give another one" in capsys.readouterr().err
