"""`fastnnunet watch`: what is complete, what is done once, and what survives a killed process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from fastnnunet.api.predict import IMAGE
from fastnnunet.connect.watch.arrivals import Arrivals, all_cases, found_cases, left_over
from fastnnunet.connect.watch.ledger import FOLDER, MOST_CRASHES, Ledger
from fastnnunet.connect.watch.spec import WatchSpec
from fastnnunet.connect.watch.watcher import Watched, watch
from fastnnunet.errors import FastnnUNetError, NotFoundError, SpecError
from fastnnunet.events import Event, Message
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.run.kept import KeptModelSpec
from tests.bundles import Toy, ToyModel, make_toy_model
from tests.dicom_files import write_series

SHAPE = (17, 21, 25)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


def write_image(file: Path, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Path:
    array = np.random.default_rng(seed).normal(50, 30, shape).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file))
    return file


def settings_of(toy: ToyModel) -> KeptModelSpec:
    return KeptModelSpec(bundle=toy.bundle, backend="onnxruntime", threads=1)


def once(toy: ToyModel, folders: tuple[Path, Path], outputs: OutputSpec = IMAGE) -> tuple[Watched, list[str]]:
    said: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, Message):
            said.append(event.text)

    source, output = folders
    spec = WatchSpec(source=source, output=output, settle_s=0, every_s=0.01, once=True)
    return watch(settings_of(toy), spec, outputs, progress=hear), said


def records(output: Path) -> dict[str, dict[str, object]]:
    return {file.stem: json.loads(file.read_text()) for file in (output / FOLDER).iterdir()}


def test_an_image_is_complete_once_it_was_left_alone(toy: ToyModel, folders: tuple[Path, Path]) -> None:
    source, _ = folders
    now = [0.0]
    arrivals = Arrivals(source, toy.spec, 10, clock=lambda: now[0])

    def look(at: float) -> tuple[list[str], bool]:
        now[0] = at
        complete, is_more_to_come = arrivals.look()
        return [arrival.case.case_id for arrival in complete], is_more_to_come

    assert look(0) == ([], False)
    growing = source / "a_0000.nii.gz"
    growing.write_bytes(b"x")
    assert look(1) == ([], True)
    growing.write_bytes(b"xx")
    assert look(9) == ([], True)
    write_series(source / "ct", np.zeros((2, 3, 4)))
    assert look(18.9) == ([], True)
    write_series(source / "ct", np.zeros((1, 3, 4)), prefix="more")
    assert look(19) == (["a"], True)  # ten seconds after it grew
    os.utime(growing, ns=(1, 1))
    assert look(28.9) == ([], True)
    assert look(29) == (["ct"], True)
    assert look(38.9) == (["a", "ct"], False)
    (source / ".hidden_0000.nii.gz").write_bytes(b"x")
    (source / "b_0000.nii.gz.part").write_bytes(b"x")
    assert look(50) == (["a", "ct"], False)
    os.replace(source / "b_0000.nii.gz.part", source / "b_0000.nii.gz")
    assert look(51) == (["a", "ct"], True)
    assert look(61) == (["a", "b", "ct"], False)
    growing.unlink()
    shutil.rmtree(source / "ct")
    assert look(62) == (["b"], False)


def test_channels_are_waited_for_and_names_are_of_one_image(toy: ToyModel, folders: tuple[Path, Path]) -> None:
    source, _ = folders
    two = replace(toy.spec, channel_names=("T1", "T2"))
    (source / "a_0000.nii.gz").touch()
    (source / "b_0001.nii.gz").touch()
    (source / "c.nii.gz").touch()
    assert [(case.case_id, case.problem) for case in found_cases(all_cases(source, two), two)] == []
    (source / "a_0001.nii.gz").touch()
    (source / "notes.txt").touch()
    assert left_over(source, all_cases(source, two), two) == [
        "1 file(s) that do not end in .nii.gz: notes.txt",
        "2 of images that lack some of 2 channels, NAME_0000 and on: b_0001.nii.gz, c.nii.gz",
    ]
    assert left_over(source, all_cases(source, toy.spec), toy.spec) == [
        "1 file(s) that do not end in .nii.gz: notes.txt"
    ]
    (case,) = found_cases(all_cases(source, two), two)
    assert (case.case_id, [file.name for file in case.files]) == ("a", ["a_0000.nii.gz", "a_0001.nii.gz"])
    write_series(source / "c", np.zeros((1, 2, 2)))
    by_name = {case.case_id: case for case in found_cases(all_cases(source, toy.spec), toy.spec)}
    assert sorted(by_name) == ["a", "b", "c"]
    for name in ("a", "c"):
        assert f"two images are called {name}" in str(by_name[name].problem)


def test_every_image_is_predicted_once_and_a_bad_one_is_remembered(toy: ToyModel, folders: tuple[Path, Path]) -> None:
    source, output = folders
    image = write_image(source / "a_0000.nii.gz")
    (source / "bad.nii.gz").write_bytes(b"no image")
    write_series(source / "ct", np.random.default_rng(1).integers(0, 1500, SHAPE))
    assert once(toy, folders)[0] == Watched(done=2, failed=1)

    # as `predict` does
    expected = source.parent / "expected"
    predictor = Predictor.load(toy.bundle, "onnxruntime", threads=1)
    for place, name in ((image, "a"), (source / "ct", "ct")):
        predictor.predict_files(place, expected)
        got, wanted = (sitk.ReadImage(str(folder / f"{name}.nii.gz")) for folder in (output, expected))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(wanted))
        assert (got.GetSpacing(), got.GetOrigin()) == (wanted.GetSpacing(), wanted.GetOrigin())
    found = records(output)
    assert {name: record["state"] for name, record in found.items()} == {"a": "done", "bad": "failed", "ct": "done"}
    assert "bad.nii.gz" in str(found["bad"]["message"])
    written = ["a.nii.gz", "ct.nii.gz", "dataset.json", FOLDER, "plans.json"]
    assert sorted(file.name for file in output.iterdir()) == written
    assert json.loads((output / "dataset.json").read_text())["labels"] == toy.spec.dataset_json["labels"]

    times = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    (source / "a.txt").touch()
    watched, said = once(toy, folders)
    assert watched == Watched()
    assert said[1:] == [f"{source}: not predicted: 1 file(s) that do not end in .nii.gz: a.txt"]  # [0]: what is watched
    assert {file: file.stat().st_mtime_ns for file in output.iterdir()} == times
    write_image(source / "bad.nii.gz")
    write_image(image, seed=5)
    assert once(toy, folders)[0] == Watched(done=2)
    assert records(output)["bad"]["state"] == "done"

    both = OutputSpec(formats=("dicom-seg", "image"), statistics=True)
    assert once(toy, folders, both)[0] == Watched(done=1, failed=2)  # two are no DICOM
    assert pydicom.dcmread(output / "ct.dcm").Modality == "SEG"
    assert "ct" in (output / "statistics.csv").read_text()


def test_an_image_that_nobody_thought_of_does_not_end_it(
    toy: ToyModel, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that is too large for this machine: started again, it would end over it again."""
    source, output = folders
    for number, name in enumerate(("a", "b", "c")):
        write_image(source / f"{name}_0000.nii.gz", number)
    errors, infer = [MemoryError("too large"), ZeroDivisionError("no")], Predictor.infer

    def fail_twice(predictor: Predictor, *arguments: Any, **more: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return infer(predictor, *arguments, **more)

    monkeypatch.setattr(Predictor, "infer", fail_twice)
    assert once(toy, folders)[0] == Watched(done=1, failed=2)
    found = records(output)
    assert "not enough memory (too large)" in str(found["a"]["message"])
    assert "unexpected ZeroDivisionError: no" in str(found["b"]["message"])
    assert once(toy, folders)[0] == Watched()


def test_what_a_killed_process_left_is_finished(toy: ToyModel, folders: tuple[Path, Path]) -> None:
    source, output = folders
    image = write_image(source / "a_0000.nii.gz")
    assert once(toy, folders)[0] == Watched(done=1)
    file = output / FOLDER / "a.json"
    begun = {**json.loads(file.read_text()), "state": "begun"}
    result = output / "a.nii.gz"

    # killed before the result was there
    result.unlink()
    file.write_text(json.dumps(begun))
    assert once(toy, folders)[0] == Watched(done=1)
    assert result.is_file()
    # killed between the result and its record
    file.write_text(json.dumps(begun))
    os.utime(file, ns=(0, 0))
    (output / "dataset.json").unlink()
    inode = result.stat().st_ino
    assert once(toy, folders)[0] == Watched(done=1)
    assert result.stat().st_ino == inode
    assert (output / "dataset.json").is_file(), "what the folder tells of its label maps is missing"
    assert records(output)["a"]["state"] == "done"
    # an image that kills every process is left alone
    result.unlink()
    file.write_text(json.dumps({**begun, "crashes": MOST_CRASHES - 1}))
    assert once(toy, folders)[0] == Watched(failed=1)
    assert f"ended {MOST_CRASHES} times" in str(records(output)["a"]["message"])
    assert once(toy, folders)[0] == Watched()
    # a damaged record is none
    file.write_text("{")
    assert once(toy, folders)[0] == Watched(done=1)
    write_image(image, seed=7)
    assert once(toy, folders)[0] == Watched(done=1)


def test_a_stop_leaves_nothing_half_done(toy: ToyModel, folders: tuple[Path, Path]) -> None:
    source, output = folders
    write_image(source / "a_0000.nii.gz")
    stop = threading.Event()

    def stop_at_work(event: Event) -> None:
        if not isinstance(event, Message):
            stop.set()

    spec = WatchSpec(source=source, output=output, settle_s=0, every_s=0.01)
    assert watch(settings_of(toy), spec, stop=stop, progress=stop_at_work) == Watched()
    assert [file.name for file in output.iterdir()] == [FOLDER]
    assert records(output) == {}
    assert once(toy, folders)[0] == Watched(done=1)


def test_a_folder_that_is_gone_for_a_while_is_waited_for(toy: ToyModel, folders: tuple[Path, Path]) -> None:
    source, output = folders
    write_image(source / "a_0000.nii.gz")
    spec = WatchSpec(source=source, output=output, settle_s=0, every_s=0.01)
    away = source.rename(source.with_name("away"))
    with pytest.raises(NotFoundError, match="no folder to watch"):
        replace(spec)
    stop, said = threading.Event(), []

    def hear(event: Event) -> None:
        if isinstance(event, Message):
            said.append(event.text)
            if "waiting until it can be read" in event.text:
                away.rename(source)
            elif "done in" in event.text:
                stop.set()

    assert watch(settings_of(toy), spec, stop=stop, progress=hear) == Watched(done=1)
    assert len(said) == 3  # what is watched, the trouble once, and what was done


def test_one_process_for_one_output_folder(toy: ToyModel, folders: tuple[Path, Path]) -> None:
    source, output = folders
    with Ledger(output, "x").held(), pytest.raises(FastnnUNetError, match="another process"):
        once(toy, folders)
    with pytest.raises(NotFoundError, match="no folder to watch"):
        WatchSpec(source=source / "gone", output=output)
    for inside in (source, source / "out"):
        with pytest.raises(SpecError, match="in the watched folder"):
            WatchSpec(source=source, output=inside)
    with pytest.raises(SpecError, match=r"--settle(.|\n)*--every"):
        WatchSpec(source=source, output=output, settle_s=-1, every_s=0)


@contextmanager
def started(*words: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnnunet", "watch", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(is_there: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not is_there():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process could mind")
def test_the_command_survives_sigkill_and_ends_with_sigterm(toy: ToyModel, folders: tuple[Path, Path]) -> None:
    source, output = folders
    words = ["-i", source, "-o", output, "-m", toy.bundle, "--backend", "onnxruntime", "--threads", 1]
    words += ["--settle", 0, "--every", 0.05]
    write_image(source / "a.nii.gz", shape=(40, 120, 120))  # for as long as it takes to kill a process
    record, result = output / FOLDER / "a.json", output / "a.nii.gz"
    with started(*map(str, words)) as process:
        until(record.is_file, process)
        process.kill()
        process.wait()
    assert not result.is_file()
    assert json.loads(record.read_text())["state"] == "begun"
    with started(*map(str, words)) as process:
        until(result.is_file, process)
        write_image(source.parent / "b.nii.gz").rename(source / "b.nii.gz")
        until((output / "b.nii.gz").is_file, process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "image(s) predicted into" in said
    assert "Traceback" not in said
    assert sitk.ReadImage(str(result)).GetSize() == (120, 120, 40)
    assert not list(output.glob(".partial*"))
