"""Output folders that a full disk, a crash, another process or a failing image have been at: whole files or none."""

import errno
import gzip
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from isal import igzip

import fastnnunet
from fastnnunet.errors import DiskSpaceError, FastnnUNetError, ImageError
from fastnnunet.images.finished import is_archive, is_pickle, is_segmentation
from fastnnunet.images.io import image_io
from fastnnunet.runtime.pipeline import WriteGate, run_pipeline
from fastnnunet.runtime.predict import Predictor
from fastnnunet.service.refusals import RefusedError
from fastnnunet.service.uploads.archives import unpack
from fastnnunet.system.files import atomic_output, files_together, replace_folder, room_for
from fastnnunet.system.whole import is_whole
from tests.bundles import Toy, ToyModel, make_toy_model, smooth_noise, write_image

SIDE_FILES = ["dataset.json", "plans.json", "predict_from_raw_data_args.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(dims=2, spacing=(1.0, 1.0)), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def predictor(model: ToyModel) -> Predictor:
    return Predictor.load(model.bundle, "onnxruntime", threads=1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        write_image(smooth_noise((3, 40, 50), seed), tmp_path / "in" / f"{name}_0000.nii.gz")
    return tmp_path / "in"


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def _read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


class TestContinue:
    @pytest.fixture
    def done(self, predictor: Predictor, images: Path, tmp_path: Path) -> Path:
        predictor.predict_files(images, tmp_path / "out", save_probabilities=True)
        return tmp_path / "out"

    @pytest.mark.parametrize("file", ["b.nii.gz", "b.npz", "b.pkl"])
    @pytest.mark.parametrize("left", ["nothing", "a byte", "half", "all but the end", "zeros", "noise", "no file"])
    def test_what_is_not_whole_is_predicted_again(
        self, file: str, left: str, done: Path, predictor: Predictor, images: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        content = (done / file).read_bytes()
        damaged = {
            "nothing": b"",
            "a byte": content[:1],
            "half": content[: len(content) // 2],
            "all but the end": content[:-1],
            "zeros": bytes(len(content)),
            "noise": np.random.default_rng(0).bytes(len(content)),
        }
        if left == "no file":
            (done / file).unlink()
        else:
            (done / file).write_bytes(damaged[left])
        again = predictor.predict_files(images, done, overwrite=False, save_probabilities=True)
        assert [(result.case_id, result.error) for result in again] == [("b", None)]
        assert (f"{file} is damaged" in caplog.text) == (left != "no file")
        if file != "b.npz":  # an archive holds the time
            assert (done / file).read_bytes() == content
        assert predictor.predict_files(images, done, overwrite=False, save_probabilities=True) == []

    def test_probabilities_do_not_matter_where_they_are_not_wanted(
        self, done: Path, predictor: Predictor, images: Path
    ) -> None:
        (done / "b.npz").write_bytes(b"")
        assert predictor.predict_files(images, done, overwrite=False) == []

    def test_what_other_programs_wrote_is_whole(self, model: ToyModel, images: Path, tmp_path: Path) -> None:
        """Of other writers: nibabel, NIfTI-2, several gzip members, and bytes after the end."""
        import nibabel

        labels = np.random.default_rng(0).integers(0, 3, (50, 40, 3)).astype(np.uint8)
        out = tmp_path / "out"
        out.mkdir()
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), out / "a.nii.gz")
        nibabel.save(nibabel.Nifti2Image(labels, np.eye(4)), out / "b.nii.gz")
        whole = gzip.decompress((out / "a.nii.gz").read_bytes())
        (out / "c.nii.gz").write_bytes(gzip.compress(whole[:5000]) + gzip.compress(whole[5000:]))
        predictor = _fast_predictor(model)
        before = {p: p.read_bytes() for p in out.iterdir()}
        assert predictor.predict_from_files(str(images), str(out), overwrite=False) == []
        assert {p: p.read_bytes() for p in out.glob("*.nii.gz")} == before

    @pytest.mark.parametrize(
        ("reader", "ending"),
        [
            ("SimpleITKIO", ".nii.gz"),
            ("SimpleITKIO", ".nii"),
            ("SimpleITKIO", ".mha"),
            ("SimpleITKIO", ".nrrd"),
            ("NibabelIO", ".nii.gz"),
            ("Tiff3DIO", ".tif"),
            ("NaturalImage2DIO", ".png"),
            ("NaturalImage2DIO", ".bmp"),
        ],
    )
    def test_every_format(self, reader: str, ending: str, tmp_path: Path) -> None:
        """What a writer wrote is whole, and a file that lacks its second half is not."""
        writer, file = image_io(reader), tmp_path / f"case{ending}"
        geometry = {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}
        properties = {"spacing": [1, 1, 1], "sitk_stuff": geometry, "nibabel_stuff": {"original_affine": np.eye(4)}}
        depth = 1 if reader == "NaturalImage2DIO" else 5
        labels = np.random.default_rng(0).integers(0, 3, (depth, 40, 50)).astype(np.uint8)
        writer.write(labels, file, properties)
        assert is_segmentation(writer, file)
        content = file.read_bytes()
        for size in (len(content) // 2, 10, 0):
            file.write_bytes(content[:size])
            assert not is_segmentation(writer, file)

    def test_dicom_seg(self, tmp_path: Path) -> None:
        import pydicom
        from pydicom.dataset import FileMetaDataset

        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.3"
        data.Rows, data.Columns, data.BitsAllocated, data.PixelData = 40, 40, 8, bytes(1600)
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        file = tmp_path / "case.dcm"
        data.save_as(file, enforce_file_format=True)
        reader = image_io("SimpleITKIO")
        assert is_segmentation(reader, file)
        content = file.read_bytes()
        for size in (len(content) - 1, len(content) // 2, 200, 10, 0):
            file.write_bytes(content[:size])
            assert not is_segmentation(reader, file)

    def test_archives_and_pickles(self, tmp_path: Path) -> None:
        """Pickles are not executed, archives hold probabilities."""
        np.savez_compressed(tmp_path / "other.npz", something=np.zeros(3))
        assert not is_archive(tmp_path / "other.npz")

        class Touch:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "ran",)

        (tmp_path / "a.pkl").write_bytes(pickle.dumps(Touch()))
        assert is_pickle(tmp_path / "a.pkl")
        assert not (tmp_path / "ran").exists()


class TestFullDisk:
    """Simulated by a limit on the size of files, by a write that fails, and by ITK's silence about both."""

    @pytest.fixture
    def no_room(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """Every write of a text, byte or gzip file, and ITK's, from the n-th on finds the disk full."""
        count = 0

        def allow(number: int) -> None:
            nonlocal count
            count = number

        def failing(real: Callable[..., Any], path_at: int | None) -> Callable[..., Any]:
            def write(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count -= 1
                if count >= 0:
                    return real(*arguments, **options)
                if path_at is not None:
                    Path(arguments[path_at]).touch()
                raise OSError(errno.ENOSPC, "No space left on device")

            return write

        for owner, name in ((Path, "write_text"), (Path, "write_bytes"), (np, "savez_compressed")):
            monkeypatch.setattr(owner, name, failing(getattr(owner, name), 0))
        monkeypatch.setattr(sitk, "WriteImage", failing(sitk.WriteImage, 1))
        monkeypatch.setattr(igzip, "IGzipFile", failing(igzip.IGzipFile, None))
        return allow

    @pytest.mark.parametrize("probabilities", [False, True])
    @pytest.mark.parametrize("number", range(6))
    def test_at_the_nth_write_of_a_folder(
        self, number: int, probabilities: bool, predictor: Predictor, images: Path, tmp_path: Path, no_room: Any
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        no_room(number)
        with pytest.raises(DiskSpaceError, match=r"no room left to write .*out"):
            predictor.predict_files(images, out, save_probabilities=probabilities)
        parts = 3 if probabilities else 1  # of a case
        cases = max(0, number - 3) // parts
        endings = (".nii.gz", ".npz", ".pkl")[:parts]
        expected = [f"{case}{ending}" for case in "abc"[:cases] for ending in endings]
        assert _names(out) == sorted([*expected, *(SIDE_FILES if cases else [])])

    def test_a_list_of_arrays(self, model: ToyModel, tmp_path: Path, no_room: Any) -> None:
        ours = _fast_predictor(model)
        names = [str(tmp_path / "out" / name) for name in "abc"]
        (tmp_path / "out").mkdir()
        no_room(1)
        with pytest.raises(DiskSpaceError, match=r"(?s)1 of .* case\(s\) failed.*no room left to write .*b\.nii\.gz"):
            ours.predict_from_list_of_npy_arrays([_array(n) for n in range(3)], None, [GEOMETRY] * 3, names)
        assert _names(tmp_path / "out") == ["a.nii.gz"]

    def test_tiff_with_its_json(self, tmp_path: Path, no_room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The JSON of the spacing comes first; with the case of a gate it goes with the label map."""
        import tifffile

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tifffile, "imwrite", full)
        no_room(9)
        with pytest.raises(DiskSpaceError), WriteGate().writing():
            image_io("Tiff3DIO").write(np.ones((2, 3, 4), np.uint8), tmp_path / "a.tif", {"spacing": [1, 1, 1]})
        assert _names(tmp_path) == []

    @pytest.mark.skipif(os.name == "nt", reason="limits as POSIX has them")
    @pytest.mark.parametrize("command", ["predict", "predict one", "predict arrays", "postprocess", "evaluate"])
    def test_commands(self, command: str, model: ToyModel, predictor: Predictor, tmp_path: Path) -> None:
        """ITK writes a NIfTI file as far as it gets and says nothing."""
        noise = np.random.default_rng(0)
        images = tmp_path / "in"
        for name in "ab":
            write_image(noise.standard_normal((4, 60, 70)).astype(np.float32), images / f"{name}_0000.nii.gz")
        words = {
            "predict": ["predict", "-i", images, "-o", "out", "-m", model.bundle, "--backend", "onnxruntime"],
            "predict one": ["predict", "-i", images / "a_0000.nii.gz", "-o", "out", "-m", model.bundle],
            "predict arrays": ["predict", "-i", images, "-o", "out", "-m", model.bundle, "--save_probabilities"],
            "postprocess": ["postprocess", "-i", "done", "-o", "out", "--min-size", "2"],
            "evaluate": ["evaluate", "-p", "done", "-g", "done", "-o", "out/report.json"],
        }[command]
        if command in ("postprocess", "evaluate"):
            predictor.predict_files(images, tmp_path / "done")
            for name in "ab":  # which nothing compresses
                write_image(noise.integers(0, 3, (4, 60, 70)).astype(np.uint8), tmp_path / "done" / f"{name}.nii.gz")
        limit = 100 if command == "evaluate" else 2500
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error:") == 1
        assert "no room left to write out" in done.stderr
        assert "Traceback" not in done.stderr
        assert [str(p) for p in (tmp_path / "out").rglob("*")] == []


LIMITED = """
import resource, sys
from fastnnunet.cli.main import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main(sys.argv[2:])
"""
GEOMETRY = {
    "spacing": [1.0, 1.0, 1.0],
    "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)},
}


def _fast_predictor(model: ToyModel) -> Any:
    ours = fastnnunet.FastPredictor(device="cpu", allow_tqdm=False, backend="onnxruntime", threads=1)
    ours.initialize_from_trained_model_folder(model.bundle)
    return ours


def _array(seed: int) -> np.ndarray:
    return smooth_noise((3, 30, 40), seed)[None]


class TestOneFailsOthersStay:
    @pytest.mark.parametrize("processes", [0, 3])
    @pytest.mark.parametrize("bad", [0, 1, 2])
    def test_an_array(self, bad: int, processes: int, model: ToyModel, tmp_path: Path) -> None:
        ours, arrays = _fast_predictor(model), [_array(n) for n in range(3)]
        expected = [ours.predict_single_npy_array(array, GEOMETRY) for array in arrays]
        arrays[bad] = arrays[bad] * np.nan
        names = [str(tmp_path / name) for name in "abc"]
        for ofiles in (names, None):
            with pytest.raises(ImageError, match=r"(?s)1 of 3 case\(s\) failed.*NaN") as caught:
                ours.predict_from_list_of_npy_arrays(arrays, None, [GEOMETRY] * 3, ofiles, 3, False, processes)
            results = caught.value.results
            assert results is not None
            for number, (result, name) in enumerate(zip(results, names, strict=True)):
                if number == bad:
                    assert result is None
                    assert name in str(caught.value) or f"image {bad}:" in str(caught.value)
                else:
                    got = _read(Path(f"{name}.nii.gz")) if ofiles else result
                    np.testing.assert_array_equal(got, expected[number])
        assert _names(tmp_path) == [f"{name}.nii.gz" for n, name in enumerate("abc") if n != bad]

    @pytest.mark.parametrize("kind", [ImageError, ZeroDivisionError, KeyboardInterrupt])
    def test_an_iterator_that_fails(self, kind: type[BaseException], model: ToyModel, tmp_path: Path) -> None:
        """The case before it, which is in the network or being written then, is finished."""
        ours = _fast_predictor(model)
        items = list(
            ours.get_data_iterator_from_raw_npy_data(
                [_array(0), _array(1)], None, [GEOMETRY] * 2, [str(tmp_path / name) for name in "ab"]
            )
        )

        def feed() -> Any:
            yield from items
            raise kind("no more")

        with pytest.raises(kind, match="no more"):
            ours.predict_from_data_iterator(feed())
        assert _names(tmp_path) == ["a.nii.gz", "b.nii.gz"]

    @pytest.mark.parametrize("where", ["network", "consumer"])
    def test_ctrl_c(self, where: str, tmp_path: Path) -> None:
        """What has been through the network is written, though its label map had yet to be made; nothing after it."""
        gate, interrupted = WriteGate(), threading.Event()

        def infer(item: int, loaded: int) -> int:
            if item == 2 and where == "network":
                interrupted.set()
                raise KeyboardInterrupt
            return loaded

        def finish(item: int, inferred: int) -> int:
            if item == 1:
                assert interrupted.wait(10)
            with gate.writing(), atomic_output(tmp_path / str(item)) as partial:
                partial.write_text("whole")
            return item

        def consume() -> None:
            outcomes = run_pipeline(range(5), lambda item: item, infer, finish, gate, threaded=True)
            with closing(outcomes):
                for item, _ in outcomes:
                    if item == 0 and where == "consumer":
                        interrupted.set()
                        raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            consume()
        assert _names(tmp_path) == ["0", "1"]
        with pytest.raises(FastnnUNetError, match="interrupted"):
            finish(3, 3)

    def test_an_interrupted_run_leaves_the_files_of_others_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two runs in two threads of a process; the one gives up a file that takes too long."""
        monkeypatch.setattr("fastnnunet.runtime.pipeline._GRACE_S", 0.05)
        gates = [WriteGate(), WriteGate()]
        begun, go_on = [threading.Event(), threading.Event()], threading.Event()
        failed: list[FastnnUNetError] = []

        def write(number: int) -> None:
            try:
                with gates[number].writing(), atomic_output(tmp_path / str(number)) as partial:
                    partial.write_text("whole")
                    begun[number].set()
                    go_on.wait(10)
            except FastnnUNetError as e:
                failed.append(e)

        threads = [threading.Thread(target=write, args=(number,)) for number in (0, 1)]
        for thread, event in zip(threads, begun, strict=True):
            thread.start()
            assert event.wait(10)
        gates[0].close()
        go_on.set()
        for thread in threads:
            thread.join()
        assert _names(tmp_path) == ["1"]
        assert "interrupted" in str(failed[0])


class TestTwoAtOnce:
    def test_files_of_one_name(self, tmp_path: Path) -> None:
        """Two writers of one file at the same time, of this process, or of machines that gave two the same number."""
        with atomic_output(tmp_path / "a.txt") as first, atomic_output(tmp_path / "a.txt") as second:
            assert first != second
            first.write_text("first")
            second.write_text("second")
        assert (tmp_path / "a.txt").read_text() == "first"  # which came to its end last
        assert _names(tmp_path) == ["a.txt"]

    def test_together_or_not_at_all(self, tmp_path: Path) -> None:
        def fail() -> None:
            with files_together():
                with atomic_output(tmp_path / "a") as partial:
                    partial.write_text("whole")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert _names(tmp_path) == []
        with files_together():
            for name in "ab":
                with atomic_output(tmp_path / name) as partial:
                    partial.write_text(name)
            assert not {"a", "b"} & set(_names(tmp_path))
        assert _names(tmp_path) == ["a", "b"]

    @pytest.mark.parametrize("options", [(), ("--save_probabilities",), ("--save_probabilities", "--c")])
    def test_two_processes(
        self, options: tuple[str, ...], model: ToyModel, predictor: Predictor, images: Path, tmp_path: Path
    ) -> None:
        for number in range(12):
            write_image(smooth_noise((2, 30, 40), number), images / f"case{number:02d}_0000.nii.gz")
        words = ["-i", images, "-o", tmp_path / "out", "-m", model.bundle, "--backend", "onnxruntime", "--threads", 1]
        command = [sys.executable, "-m", "fastnnunet.cli.main", "predict", *map(str, words), *options]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for process in running:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
            assert "failed" not in stderr
        predictor.predict_files(images, tmp_path / "alone", save_probabilities=bool(options))
        assert _names(tmp_path / "out") == _names(tmp_path / "alone")
        for file in (tmp_path / "alone").iterdir():
            other = tmp_path / "out" / file.name
            if file.suffix == ".npz":
                np.testing.assert_array_equal(np.load(other)["probabilities"], np.load(file)["probabilities"])
            elif file.name == "predict_from_raw_data_args.json":
                assert json.loads(other.read_text())["save_probabilities"] == bool(options)
            else:
                assert other.read_bytes() == file.read_bytes()


def test_the_ends_of_files(tmp_path: Path) -> None:
    """What headers say is compared with what there is; other formats do not tell."""
    import nibabel

    labels = np.random.default_rng(0).integers(0, 200, (7, 5, 3)).astype(np.int16)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for ending in (".nii", ".nii.gz"):
            file = tmp_path / f"a{ending}"
            nibabel.save(kind(labels, np.eye(4)), file)
            assert is_whole(file) is True
            content = file.read_bytes()
            for size in (len(content) - 1, len(content) - 8, len(content) // 2, 1, 0):
                file.write_bytes(content[:size])
                assert not is_whole(file)
    (tmp_path / "a.txt").write_text("anything")
    assert is_whole(tmp_path / "a.txt") is None


def test_a_folder_that_cannot_be_replaced_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, place = tmp_path / "made", tmp_path / "place"
    for folder in (made, place):
        folder.mkdir()
        (folder / "which").write_text(folder.name)
    rename = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source == made:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="cross-device"):
            replace_folder(made, place)
    assert {p.name: (p / "which").read_text() for p in tmp_path.iterdir()} == {"made": "made", "place": "place"}
    replace_folder(made, place)
    assert {p.name: (p / "which").read_text() for p in tmp_path.iterdir()} == {"place": "made"}


def test_an_upload_that_the_disk_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "series.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("slice.dcm", bytes(128) + b"DICM" + bytes(100))
    opened = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "wb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RefusedError, match="no room left") as refused:
        unpack(packed, tmp_path / "slices", most_bytes=1000)
    assert refused.value.status == 507


class TestLibrariesThatDoNotSayWhy:
    """blosc2 calls a full disk an "Error while creating the NDArray"."""

    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No file takes a byte more."""
        real = Path.open

        def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if "a" in mode:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(path, mode, *arguments, **options)

        monkeypatch.setattr(Path, "open", opened)

    @pytest.mark.usefixtures("full")
    @pytest.mark.parametrize("said", [RuntimeError("Error while creating"), OSError(errno.ENOSPC, "No space left")])
    def test_a_full_disk_is_told(self, said: Exception, tmp_path: Path) -> None:
        with (
            pytest.raises(DiskSpaceError, match=r"no room left to write .*cases"),
            room_for(tmp_path / "cases", tmp_path),
        ):
            raise said

    def test_where_there_is_room_it_is_what_they_said(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="Error while creating"), room_for(tmp_path / "cases", tmp_path):
            raise RuntimeError("Error while creating")
