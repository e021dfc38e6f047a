"""Clients of the service, against it and against a server with faults: `remote`, and the module of 3D Slicer."""

import importlib.util
import json
import os
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.cli.main import main
from fastnnunet.connect.remote.archive import zip_series
from fastnnunet.connect.remote.client import TOKEN, service_at
from fastnnunet.connect.remote.job import predict_remotely
from fastnnunet.errors import ImageError, ServerError
from fastnnunet.events import Event, Message, Progress
from fastnnunet.release.measured import Quality, Speed, note
from fastnnunet.runtime.predict import Predictor
from tests.bundles import Toy, make_toy_model
from tests.dicom_files import write_series
from tests.web import Asked, Said, serving

fastapi = pytest.importorskip("fastapi", reason="the service needs fastapi, which is not installed")
from tests.serving import Serving  # noqa: E402
from tests.serving import serving as service_of  # noqa: E402

SECRET = "sesame-0123456789abcdef"
SHAPE = (17, 21, 25)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_toy_model(Toy(), tmp_path_factory.mktemp("toy")).bundle
    quality = Quality(dice=0.875, labels={}, cases=12, held_out=True, against="teacher")
    note(made, quality, Speed(seconds_per_case=0.062, cases=4, begins_with="file", cpu=None, threads=2))
    return made


@pytest.fixture(scope="module")
def running(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with service_of([bundle], SECRET, work=tmp_path_factory.mktemp("work")) as found:
        yield found


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, SECRET)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = sitk.GetImageFromArray(np.random.default_rng(0).normal(50, 30, SHAPE).astype(np.float32))
    made.SetSpacing((1.1, 0.9, 1.3))
    made.SetOrigin((-7, 3, 11))
    file = tmp_path_factory.mktemp("image") / "patient_0000.nii.gz"
    sitk.WriteImage(made, str(file))
    return file


@pytest.fixture(scope="module")
def expected(bundle: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> sitk.Image:
    (result,) = Predictor.load(bundle, "onnxruntime").predict_files(image, tmp_path_factory.mktemp("expected"))
    return sitk.ReadImage(str(result.output))


def same(file: Path, expected: sitk.Image) -> bool:
    got = sitk.ReadImage(str(file))
    geometries = [(i.GetSpacing(), i.GetOrigin(), i.GetDirection()) for i in (got, expected)]
    return geometries[0] == geometries[1] and bool(
        (sitk.GetArrayFromImage(got) == sitk.GetArrayFromImage(expected)).all()
    )


def run(*words: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["remote", *map(str, words)])
    assert caught.value.code == code


@pytest.mark.usefixtures("token")
def test_an_image_is_predicted_by_the_service(
    running: Serving, image: Path, expected: sitk.Image, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    service = service_at(running.url)
    file = predict_remotely(service, "bundle", [image], tmp_path / "new" / "folder", progress=events.append)
    assert file == tmp_path / "new" / "folder" / "patient.nii.gz"
    assert same(file, expected)
    assert Message(text="loading the model") in events
    assert running.service.store.jobs() == []  # nothing is left there

    run("models", "--url", running.url)
    told = capfd.readouterr().out
    assert told.startswith("bundle: ")
    assert told.endswith("; Dice 0.875 to its teacher on 12 held-out case(s), 0.062 s a case from file to file\n")
    ours = tmp_path / "x.nii.gz"
    run("predict", "--url", running.url, "-m", "bundle", "-i", image, "-o", ours)
    assert f"written: {ours}" in capfd.readouterr().out
    assert same(ours, expected)
    ours.write_bytes(b"mine")
    run("predict", "--url", running.url, "-m", "bundle", "-i", image, "-o", ours, code=2)
    assert "--overwrite" in capfd.readouterr().err
    assert ours.read_bytes() == b"mine"
    assert sorted(place.name for place in tmp_path.iterdir()) == ["new", "x.nii.gz"]


@pytest.mark.usefixtures("token")
def test_a_dicom_series_is_sent_as_a_zip_without_names(running: Serving, bundle: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "Doe", np.random.default_rng(1).integers(0, 1500, SHAPE), prefix="Doe")
    (wanted,) = Predictor.load(bundle, "onnxruntime").predict_files(tmp_path / "Doe", tmp_path / "expected")
    file = predict_remotely(service_at(running.url), "bundle", [tmp_path / "Doe"], tmp_path / "out")
    assert file.name == "Doe.nii.gz"
    assert same(file, sitk.ReadImage(str(wanted.output)))


def test_files_of_any_time_are_sent_and_too_large_a_series_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in write_series(tmp_path / "series", np.zeros((2, 4, 5))):
        os.utime(file, (0, 0))  # a zip tells no day before 1980
    zip_series(tmp_path / "series", tmp_path / "image.zip")
    with zipfile.ZipFile(tmp_path / "image.zip") as archive:
        assert archive.namelist() == ["00001.dcm", "00002.dcm"]
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    with pytest.raises(ImageError, match="too large to be sent"):
        zip_series(tmp_path / "series", tmp_path / "image.zip")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"-m": "nobody"}, "has no model 'nobody'; it has bundle"),
        ({"--url": "http://127.0.0.1:9"}, "nothing listens there"),
        ({"-i": "gone.nii.gz"}, "no image at gone.nii.gz"),
        ({"--answer": "poem"}, "--answer: got poem, expected some of labels"),
        ({"-o": "out/labels.dcm"}, "-o: got labels.dcm, expected a name ending in .nii .* for --answer labels"),
        ({"--answer": "mesh", "-o": "out/labels.nii.gz"}, "got labels.nii.gz, expected a name ending in .glb for"),
        ({"token": "another-0123456789"}, f"refuses (401): a token is needed.*{TOKEN}"),
        ({"token": ""}, f"refuses (401): a token is needed.*{TOKEN}"),
        ({"content": b"no image"}, "refuses (415)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    changes: dict[str, Any],
    words: str,
    running: Serving,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(TOKEN, changes.pop("token", SECRET))
    if "content" in changes:
        image = tmp_path / "bad.nii.gz"
        image.write_bytes(changes.pop("content"))
    given = {"--url": running.url, "-m": "bundle", "-i": str(image), "-o": "out", **changes}
    given["-o"] = str(tmp_path / given["-o"])
    run("predict", *(word for pair in given.items() for word in pair), code=2)
    said = capfd.readouterr().err.replace("\n", " ")
    before, _, after = words.partition(".*")
    assert before in said
    assert after in said
    assert "Traceback" not in said
    assert SECRET not in said
    assert not (tmp_path / "out").exists()


MODEL = {
    "id": "m",
    "name": "m",
    "channels": [{"name": "CT"}],
    "accepts": [".nii.gz"],
    "answers": ["labels"],
    "labels": [{"name": "liver", "value": 3, "colour": "#ff0033"}],
}
EVENTS = "/jobs/7/events"


def faulty(where: str, fault: Said) -> Callable[[Asked], Said]:
    """A service whose answer at one address is another."""
    job = {"id": "7", "state": "done", "error": ""}
    usual: dict[tuple[str, str], Any] = {
        ("GET", "/models"): {"models": [MODEL]},
        ("POST", "/models/m/jobs"): job,
        ("GET", "/jobs/7"): job,
        ("DELETE", "/jobs/7"): job,
    }

    def answer(asked: Asked) -> Said:
        if asked.path == where:
            return fault
        if asked.path == EVENTS:
            tiles = b'data: {"kind": "progress", "done": 3, "total": 8, "unit": "tiles"}\n\n'
            return Said(
                body=[b": alive\n\n" + tiles + b"event: sta", b'te\ndata: {"kind": "state", "state": "done"}\n\n']
            )
        if asked.path == "/jobs/7/result":
            return Said(body=b"labels", headers={"Content-Disposition": 'attachment; filename="labels.nii.gz"'})
        return Said(body=json.dumps(usual[asked.method, asked.path]).encode())

    return answer


FAILED = b'data: {"kind": "state", "state": "failed", "error": "the image\\u001b[0m is too large"}\n\n'


@pytest.mark.parametrize(
    ("where", "fault", "words"),
    [
        ("/models", Said(body=b"<html>"), "no JSON"),
        ("/models", Said(body=b"[]"), "no FastnnUNet service"),
        ("/models", Said(body=b'{"models": [{}]}'), "another version"),
        ("/models/m/jobs", Said(422, b'{"error": "two channels\\u001b[31m"}'), r"refuses \(422\): two channels\\x1b"),
        ("/models/m/jobs", Said(body=b'{"id": "../x"}'), "names no job"),
        (EVENTS, Said(body=FAILED), r"the job failed: the image\\x1b"),
        (EVENTS, Said(body=b"data: {"), "events that are no JSON"),
        (EVENTS, Said(body=b""), "ended early"),
        ("/jobs/7/result", Said(body=b"labels", cut=3), "broke its answer off"),
        ("/jobs/7/result", Said(500), "500"),
    ],
)
def test_faults_of_a_service_leave_no_file(
    where: str, fault: Said, words: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with serving(faulty(where, fault)) as web:
        service = service_at(web.url, tries=1)
        with pytest.raises(ServerError, match=words):
            predict_remotely(service, "m", [image], tmp_path / "x.nii.gz")
        assert list(tmp_path.iterdir()) == []
        deleted = [asked for asked in web.asked if asked.method == "DELETE"]
        assert len(deleted) == where.startswith("/jobs")
    with serving(faulty("", fault)) as web:
        events: list[Event] = []
        file = predict_remotely(service_at(web.url), "m", [image], tmp_path / "x.nrrd", progress=events.append)
        assert events == [Progress(what="predicting", done=3, total=8, unit="tiles")]
        assert (file.name, file.read_bytes()) == ("x.nrrd.nii.gz", b"labels")


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    """The module of 3D Slicer, with Slicer's own modules played."""
    scripted = types.ModuleType("slicer.ScriptedLoadableModule")
    for name in ("ScriptedLoadableModule", "ScriptedLoadableModuleLogic", "ScriptedLoadableModuleWidget"):
        setattr(
            scripted, name, type(name, (), {"__init__": lambda self, parent=None: None, "setup": lambda self: None})
        )
    played = {"slicer": mock.MagicMock(), "slicer.ScriptedLoadableModule": scripted}
    played |= {name: mock.MagicMock() for name in ("qt", "ctk")}
    played["qt"].QLineEdit.side_effect = lambda *_: mock.MagicMock()  # two of them hold two texts
    import fastnnunet.connect

    file = Path(fastnnunet.connect.__file__).parent / "slicer" / "FastnnUNet.py"
    spec = importlib.util.spec_from_file_location("FastnnUNet", file)
    assert spec is not None
    assert spec.loader is not None
    with mock.patch.dict(sys.modules, played):
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        yield found


def test_slicers_module_segments_by_the_service(
    module: types.ModuleType, running: Serving, image: Path, expected: sitk.Image, tmp_path: Path
) -> None:
    slicer = module.slicer
    slicer.util.saveNode.side_effect = lambda node, file: bool(os.link(image, file)) or True
    loaded: list[bool] = []
    label_map = mock.MagicMock()
    slicer.util.loadLabelVolume.side_effect = lambda file: loaded.append(same(Path(file), expected)) or label_map
    nodes = {name: mock.MagicMock() for name in ("vtkMRMLColorTableNode", "vtkMRMLSegmentationNode")}
    slicer.mrmlScene.AddNewNodeByClass.side_effect = lambda name, *_: nodes[name]
    service = module.SlicerService(running.url, SECRET)
    (model,) = service.models()
    states: list[str] = []
    volume = mock.MagicMock()

    made = module.FastnnUNetLogic().segment(service, model, volume, lambda state: not states.append(state))
    assert made is nodes["vtkMRMLSegmentationNode"]
    assert loaded == [True]
    assert set(states) <= {"waiting", "running"}
    colours = nodes["vtkMRMLColorTableNode"]
    assert colours.SetNumberOfColors.mock_calls == [mock.call(3)]
    assert [call.args[:2] for call in colours.SetColor.mock_calls] == [(0, "background"), (1, "a"), (2, "b")]
    made.SetReferenceImageGeometryParameterFromVolumeNode.assert_called_once_with(volume)
    imported = slicer.modules.segmentations.logic().ImportLabelmapToSegmentationNode
    imported.assert_called_once_with(label_map, made)
    assert running.service.store.jobs() == []
    assert module.colours_of(MODEL["labels"]) == [(3, "liver", 1.0, 0.0, 0.2)]

    with pytest.raises(module.SlicerServiceError, match="cancelled"):
        module.FastnnUNetLogic().segment(service, model, volume, lambda _: False)
    with pytest.raises(module.SlicerServiceError, match=r"refuses \(401\): a token is needed"):
        module.SlicerService(running.url).models()
    with pytest.raises(module.SlicerServiceError, match="cannot be reached"):
        module.SlicerService("http://127.0.0.1:9").models()


def test_slicers_widget_tells_what_became_of_a_click(module: types.ModuleType) -> None:
    widget = module.FastnnUNetWidget()
    widget.layout = mock.MagicMock()
    widget.setup()
    with serving(faulty("/jobs/7", Said(body=b'{"id": "7", "state": "failed", "error": "no"}'))) as web:
        widget.url.text, widget.token.text = web.url, ""
        widget.onConnect()
        assert [model["id"] for model in widget.models] == ["m"]
        widget.model.currentIndex = -1
        widget.onApply()
        assert "choose a volume" in widget.status.text
        assert widget.applyButton.enabled is True
    with serving(lambda _: Said(body=b"<html>")) as web:
        widget.url.text = web.url
        widget.onConnect()
        assert "no JSON" in widget.status.text
