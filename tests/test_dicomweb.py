"""`fastnnunet dicomweb` against an archive in this process, with the faults that archives have."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest

from fastnnunet.cli.main import main
from fastnnunet.connect.dicomweb.archive import FoundSeries
from fastnnunet.connect.dicomweb.choose import choose_series
from fastnnunet.connect.dicomweb.identity import identity_of
from fastnnunet.connect.dicomweb.spec import DicomWebSpec
from fastnnunet.connect.http import WebServer
from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.runtime.predict import Predictor
from tests.bundles import Toy, ToyModel, make_toy_model
from tests.dicom_files import write_series
from tests.web import Asked, Said, serving

SHAPE = (9, 22, 26)
TOKEN = "sesame-0123456789"
STUDY, ACCESSION = "1.2.3", "A7"
CT, SCOUT, OTHER = "1.2.3.1", "1.2.3.2", "1.2.3.3"
JSON = {"Content-Type": "application/dicom+json"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    stored = np.random.default_rng(3).integers(0, 1500, SHAPE)
    named = {"StudyInstanceUID": STUDY, "SeriesDescription": "portal venous", "PatientName": "Doe^Jane"}
    return write_series(tmp_path_factory.mktemp("ct") / "ct", stored, series_uid=CT, spacing_zyx=(1, 1, 1), **named)


@dataclass
class Archive:
    """The three services over a list of files; `fault` may answer first."""

    files: list[bytes]
    series: list[dict[str, Any]]
    fault: Callable[[Asked], Said | None] = lambda _: None
    stored: list[pydicom.Dataset] = field(default_factory=list)

    def __call__(self, asked: Asked) -> Said:
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            return Said(401)
        said = self.fault(asked)
        if said is not None:
            return said
        if asked.path == "/dicom-web/studies":
            found = asked.query["AccessionNumber"] == [ACCESSION]
            return self.json([{"0020000D": {"vr": "UI", "Value": [STUDY]}}] if found else [])
        if asked.path == f"/dicom-web/studies/{STUDY}/series":
            return self.json(self.series)
        if asked.path == f"/dicom-web/studies/{STUDY}/series/{CT}":
            return multipart(self.files)
        if asked.method == "POST" and asked.path == f"/dicom-web/studies/{STUDY}":
            head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
            parts = message_from_bytes(head + asked.body).get_payload()
            new = [pydicom.dcmread(pydicom.filebase.DicomBytesIO(part.get_payload(decode=True))) for part in parts]
            self.stored += new
            named = [{"00081155": {"vr": "UI", "Value": [data.SOPInstanceUID]}} for data in new]
            return self.json({"00081199": {"vr": "SQ", "Value": named}})
        if asked.path.endswith("/instances"):
            uids = [data.SOPInstanceUID for data in self.stored if f"/{data.SeriesInstanceUID}/" in asked.path]
            found = [{"00080018": {"vr": "UI", "Value": [u]}} for u in uids if u in asked.query["SOPInstanceUID"]]
            return self.json(found)
        return Said(404)

    @staticmethod
    def json(value: Any) -> Said:
        return Said(204) if value == [] else Said(body=json.dumps(value).encode(), headers=JSON)


def multipart(files: list[bytes], kind: str = "application/dicom") -> Said:
    parts = [b"--frontier\r\nContent-Type: %s\r\n\r\n%s\r\n" % (kind.encode(), content) for content in files]
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary="frontier"'}
    return Said(body=[*parts, b"--frontier--\r\n"], headers=headers)


def described(uid: str, modality: str, count: int, description: str) -> dict[str, Any]:
    return {
        "0020000E": {"vr": "UI", "Value": [uid]},
        "00080060": {"vr": "CS", "Value": [modality]},
        "0008103E": {"vr": "LO", "Value": [description]},
        "00201209": {"vr": "IS", "Value": [count]},
    }


@pytest.fixture
def archive(slices: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Archive, str]]:
    monkeypatch.setenv("FASTNNUNET_DICOMWEB_TOKEN", TOKEN)
    series = [described(CT, "CT", SHAPE[0], "portal venous"), described("1.2.3.9", "SEG", 1, "earlier")]
    made = Archive([file.read_bytes() for file in slices], series)
    with serving(made) as web:
        yield made, f"{web.url}/dicom-web"


def run(url: str, bundle: Path, *words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["dicomweb", "--url", url, "-m", str(bundle), "--backend", "onnxruntime", "--tries", "2", *words])
    assert caught.value.code == code


def refused(capfd: pytest.CaptureFixture[str], url: str, bundle: Path, *words: str) -> str:
    run(url, bundle, *words, code=2)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "Doe" not in said
    assert TOKEN not in said
    return said


def test_a_series_is_predicted_and_stored_once(
    archive: tuple[Archive, str], toy: ToyModel, slices: list[Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here, url = archive
    run(url, toy.bundle, "--accession", ACCESSION, "--modality", "ct", "--description", "VENOUS")
    (stored,) = here.stored
    said = capfd.readouterr()
    assert f"stored dicom-seg {stored.SOPInstanceUID}" in said.out
    assert "Doe" not in said.out + said.err
    assert TOKEN not in said.out + said.err
    assert (stored.StudyInstanceUID, stored.PatientName) == (STUDY, "Doe^Jane")
    assert stored.file_meta.MediaStorageSOPInstanceUID == stored.SOPInstanceUID

    # voxel by voxel what `predict` gives for the same slices
    predictor = Predictor.load(toy.bundle, "onnxruntime")
    writer = predictor.writer(OutputSpec(formats=("dicom-seg",)))
    (expected,) = predictor.predict_files(slices[0].parent, tmp_path / "out", writer=writer)
    source = [pydicom.dcmread(file).SOPInstanceUID for file in slices]
    got, wanted = (
        hd.seg.Segmentation.from_dataset(data).get_pixels_by_source_instance(
            source, assert_missing_frames_are_empty=True
        )
        for data in (stored, pydicom.dcmread(expected.output))
    )
    assert len(np.unique(got)) > 1
    np.testing.assert_array_equal(got, wanted)

    run(url, toy.bundle, "--study", STUDY, "--series", CT)
    assert "there already" in capfd.readouterr().out
    assert len(here.stored) == 1
    run(url, toy.bundle, "--study", STUDY, "--keep-largest", "all")  # something else
    assert len({data.SeriesInstanceUID for data in here.stored}) == 2


def test_an_rtstruct_is_stored_beside_a_segmentation_that_is_there(
    archive: tuple[Archive, str], toy: ToyModel, slices: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    here, url = archive
    words = ["--study", STUDY, "--segmentation-type", "labelmap", "--store", "dicom-seg"]
    run(url, toy.bundle, *words)
    run(url, toy.bundle, *words, "rtstruct")
    segmentation, structures = here.stored
    assert (segmentation.SegmentationType, structures.Modality) == ("LABELMAP", "RTSTRUCT")
    assert len({CT, segmentation.SeriesInstanceUID, structures.SeriesInstanceUID}) == 3
    assert {roi.ROIName for roi in structures.StructureSetROISequence} == {"a", "b"}
    source = {pydicom.dcmread(file).SOPInstanceUID for file in slices}
    contours = [contour for roi in structures.ROIContourSequence for contour in roi.ContourSequence]
    assert {contour.ContourImageSequence[0].ReferencedSOPInstanceUID for contour in contours} <= source
    said = capfd.readouterr().out
    assert f"there already, nothing stored: dicom-seg {segmentation.SOPInstanceUID}" in said
    assert f"stored rtstruct {structures.SOPInstanceUID}" in said
    run(url, toy.bundle, *words, "rtstruct")
    assert len(here.stored) == 2
    run(url, toy.bundle, "--study", STUDY)  # a binary one is something else
    assert len(here.stored) == 3


def cut(said: Said) -> Said:
    assert isinstance(said.body, list)
    return Said(body=said.body[:4], headers=said.headers)


WADO, QIDO, STOW = f"/series/{CT}", "/series", f"/studies/{STUDY}"
FAILED = {"00081198": {"Value": [{"00081197": {"Value": [0xA700]}}]}}
PAGE = Said(body=b"<html>Doe", headers={"Content-Type": "text/html"})


@pytest.mark.parametrize(
    ("where", "said", "words"),
    [
        (QIDO, Said(403), "403: these credentials have no permission"),
        (QIDO, Said(404), "404: there is nothing"),
        (QIDO, Said(500, b"Doe"), "500"),
        (QIDO, PAGE, "text/html that is no JSON"),
        (QIDO, Said(body=b'{"a": 1}', headers=JSON), "no list of DICOM objects"),
        (QIDO, Said(204), "has no series of the study"),
        (WADO, Said(503), "503"),
        (WADO, PAGE, "text/html, expected multipart/related"),
        (WADO, multipart([b"{}"], "application/json"), "a part of application/json"),
        (WADO, multipart([]), "sent 0 of the 9"),
        (WADO, multipart([b"no DICOM"] * 9), "holds no DICOM images"),
        (STOW, Said(413), "413: this is more than it takes"),
        (STOW, Said(409, json.dumps(FAILED).encode()), "did not store 1 object"),
        (STOW, Said(202, json.dumps(FAILED).encode(), JSON), "no room left"),
        (STOW, Said(200, b"{}", JSON), "does not say that it stored"),
        (STOW, Said(200), "does not have it now"),
        (STOW, PAGE, "does not have it now"),
    ],
)
def test_what_archives_answer_wrongly_is_refused(
    where: str,
    said: Said,
    words: str,
    archive: tuple[Archive, str],
    toy: ToyModel,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, url = archive
    here.fault = lambda asked: said if asked.path.endswith(where) else None
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert words in refused(capfd, url, toy.bundle, "--study", STUDY)
    assert here.stored == []
    assert list(tmp_path.glob("fastnnunet-dicomweb-*")) == []


def test_broken_off_and_incomplete_series_and_limits(
    archive: tuple[Archive, str], toy: ToyModel, capfd: pytest.CaptureFixture[str]
) -> None:
    here, url = archive
    tries: list[Asked] = []

    def once(asked: Asked) -> Said | None:
        if not asked.path.endswith(WADO):
            return None
        tries.append(asked)
        return cut(multipart(here.files)) if len(tries) == 1 else multipart(here.files)

    here.fault = once
    run(url, toy.bundle, "--study", STUDY)
    assert len(tries) == 2
    assert len(here.stored) == 1
    here.stored.clear()
    here.fault = lambda asked: cut(multipart(here.files)) if asked.path.endswith(WADO) else None
    assert "its last part is not complete" in refused(capfd, url, toy.bundle, "--study", STUDY)
    here.fault = lambda asked: multipart(here.files[:8]) if asked.path.endswith(WADO) else None
    assert "sent 8 of the 9" in refused(capfd, url, toy.bundle, "--study", STUDY)
    here.fault = lambda _: None
    assert "more than 1000 bytes" in refused(capfd, url, toy.bundle, "--study", STUDY, "--largest", "1000")
    assert "more than 8 files" in refused(capfd, url, toy.bundle, "--study", STUDY, "--slices", "8")
    assert here.stored == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process could mind")
def test_sigterm_leaves_no_image_behind(
    archive: tuple[Archive, str], toy: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, url = archive
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[bool] = []

    def end(asked: Asked) -> Said | None:
        if asked.path.endswith(WADO):
            seen.append(bool(list(tmp_path.glob("fastnnunet-dicomweb-*"))))
            os.kill(os.getpid(), signal.SIGTERM)
        return None

    here.fault = end
    before = signal.getsignal(signal.SIGINT)
    try:
        run(url, toy.bundle, "--study", STUDY, code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [True]
    assert list(tmp_path.iterdir()) == []
    assert here.stored == []


def test_credentials_are_wanted(
    archive: tuple[Archive, str], toy: ToyModel, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTNNUNET_DICOMWEB_TOKEN")
    said = refused(capfd, archive[1], toy.bundle, "--study", STUDY)
    assert "401: it wants credentials" in said
    assert "FASTNNUNET_DICOMWEB_TOKEN" in said


FOUND = [
    FoundSeries(uid=CT, modality="CT", description="Abdomen 1.0", count=80),
    FoundSeries(uid=SCOUT, modality="CT", description="Scout", count=2),
    FoundSeries(uid=OTHER, modality="MR", description="T2"),
    FoundSeries(uid="1.2.3.9", modality="SEG", description="Abdomen"),
]


def asked_for(**more: Any) -> DicomWebSpec:
    return DicomWebSpec(url="http://h", study=STUDY, **more)


def test_one_series_is_chosen_or_all_that_fit_are_listed() -> None:
    assert [s.uid for s in choose_series(FOUND, asked_for(description="abdomen"), 1)] == [CT]
    assert [s.uid for s in choose_series(FOUND, asked_for(modality="MR"), 1)] == [OTHER]
    assert [s.uid for s in choose_series(FOUND, asked_for(series=(OTHER, CT)), 2)] == [OTHER, CT]
    with pytest.raises(SpecError, match="3 series of the study fit") as caught:
        choose_series(FOUND, asked_for(), 1)
    assert re.findall(r"1\.2\.3\.\d", str(caught.value)) == [CT, SCOUT, OTHER]
    assert f"{CT}, CT, 80 image(s), Abdomen 1.0" in str(caught.value)
    with pytest.raises(NotFoundError, match="no series of the study fits"):
        choose_series(FOUND, asked_for(modality="PT"), 1)
    with pytest.raises(NotFoundError, match=r"no series 1\.9"):
        choose_series(FOUND, asked_for(series=("1.9",)), 1)
    with pytest.raises(SpecError, match="expected one for each of the model's 2"):
        choose_series(FOUND, asked_for(series=(CT,)), 2)
    with pytest.raises(SpecError, match="takes 2 channels"):
        choose_series(FOUND, asked_for(), 2)


def test_what_is_asked_for_is_checked_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        DicomWebSpec(
            url="http://h", study="../x", accession="7", series=("1.2", "1.2"), store=(), largest="big", tries=0
        )
    for word in ("which study", "--study: got", "the same one twice", "--store", "--largest", "--tries"):
        assert word in str(caught.value)
    assert WebServer(url="http://10.0.0.7:8042/dicom-web").is_open_to_others
    assert not WebServer(url="http://127.0.0.1:8042/dicom-web").is_open_to_others


def test_a_model_of_pictures_is_refused_before_the_archive_is_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = make_toy_model(Toy(reader_writer="NaturalImage2DIO"), tmp_path).bundle
    said = refused(capfd, "http://127.0.0.1:9", bundle, "--study", STUDY)
    assert "a model of pictures (NaturalImage2DIO), which takes no DICOM" in said


def test_an_identity_is_of_what_was_made_of_what() -> None:
    made = [
        identity_of("dicom-seg", *known)
        for known in (([CT], "a", {}), ([OTHER], "a", {}), ([CT], "b", {}), ([CT], "a", {"precision": "int8"}))
    ]
    uids = [uid for one in made for uid in (one.series_uid, one.instance_uid)]
    assert len(set(uids)) == 8
    assert all(pydicom.uid.UID(uid).is_valid and uid.startswith("2.25.") for uid in uids)
    assert made[0] == identity_of("dicom-seg", [CT], "a", {})
