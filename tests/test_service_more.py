"""Answers of a job that are asked for later, without another prediction, and the scan as an answer."""

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from fastnnunet.release.measured import Quality, Speed, note, validated
from fastnnunet.service.jobs import JobStore
from fastnnunet.service.models import load_models
from fastnnunet.service.refusals import RefusedError
from fastnnunet.specs.bundle import load_bundle_spec
from tests.bundles import Toy, described, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series
from tests.serving import Serving, serving, until

INTERCEPT = -1024  # of `write_series`


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("more")


@pytest.fixture(scope="module")
def serve(where: Path) -> Iterator[Serving]:
    usual = make_toy_model(Toy(), where).bundle.rename(where / "usual")
    flat = Toy(dims=2, channels=3, spacing=(1.0, 1.0), file_ending=".png", reader_writer="NaturalImage2DIO")
    bundles = [
        usual,
        described(usual, "nrrd", file_ending=".nrrd"),
        described(usual, "turned", reader_writer="SimpleITKIOWithReorient"),
        described(usual, "nibabel", reader_writer="NibabelIOWithReorient"),
        described(usual, "tiff", reader_writer="Tiff3DIO", file_ending=".tif"),
        make_toy_model(flat, where / "flat").bundle.rename(where / "colours"),
    ]
    with serving(bundles, work=where / "work") as found:
        yield found


@pytest.fixture(scope="module")
def series(where: Path) -> bytes:
    """A zip of a DICOM series."""
    stored = smooth_noise((12, 16, 18), 5).astype(np.int16)
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as archive:
        for file in write_series(where / "series", stored):
            archive.write(file, file.name)
    return into.getvalue()


def done(serve: Serving, content: bytes, model: str, **query: str | list[str]) -> str:
    """The address of a job that is over."""
    taken = serve.client.post(f"/models/{model}/jobs", content=content, params=query)
    assert taken.status_code == 202, taken.text
    place = f"/jobs/{taken.json()['id']}"
    until(lambda: serve.client.get(place).json()["state"] in ("done", "failed"))
    assert serve.client.get(place).json()["error"] == ""
    return place


def stages(answer: httpx.Response) -> list[str]:
    return [part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")]


def nifti(content: bytes) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(content))


def sitk_image(content: bytes, file: Path) -> sitk.Image:
    file.write_bytes(content)
    return sitk.ReadImage(str(file))


def test_further_answers_are_those_of_a_prediction_of_their_own(serve: Serving, where: Path) -> None:
    image = write_image(smooth_noise((12, 16, 18), 3), where / "a.nii.gz", (1.1, 1.0, 0.9), (-3.0, 4.0, 5.5))
    uploads = {name: image.read_bytes() for name in ("usual", "nrrd", "turned")}
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)).save(picture, "png")
    volume = io.BytesIO()
    frames = [Image.fromarray(plane) for plane in smooth_noise((12, 16, 18), 3).clip(0, 255).astype(np.uint8)]
    frames[0].save(volume, "tiff", save_all=True, append_images=frames[1:])
    uploads |= {"colours": picture.getvalue(), "tiff": volume.getvalue()}
    for model, content in uploads.items():
        place = done(serve, content, model)
        others: list[Any] = ["mesh", "stl", "statistics", "preview", ["labels", "image"]] if model == "usual" else []
        for answer in ("nifti", "image", *others):
            more = serve.client.get(f"{place}/result", params={"answer": answer})
            assert more.status_code == 200, (model, answer, more.text)
            wanted = serve.client.post(f"/models/{model}/predict", content=content, params={"answer": answer})
            assert more.content == wanted.content, (model, answer)
            assert more.headers["content-type"] == wanted.headers["content-type"]
            if answer not in ("labels", "nifti"):  # which may be what the job was made with
                assert "infer" not in stages(more)
            assert "infer" in stages(wanted)
        assert serve.client.get(f"{place}/result").content == serve.client.get(f"{place}/result?answer=labels").content
        assert serve.client.delete(place).status_code == 200
    until(lambda: serve.service.store.jobs() == [])


def test_the_network_runs_once(serve: Serving, series: bytes, tmp_path: Path) -> None:
    place = done(serve, series, "usual", answer="statistics")
    told = serve.client.get(f"{place}/result")
    assert "infer" in stages(told)
    labels = np.asarray(nifti(serve.client.get(f"{place}/result?answer=nifti").content).dataobj)
    stored = smooth_noise((12, 16, 18), 5).astype(np.int16).transpose(2, 1, 0) + INTERCEPT
    for one in told.json()["structures"]:  # of the voxels as they were read, not as the network saw them
        intensity = one["intensity"]["channel0"]
        assert intensity["mean"] == pytest.approx(stored[np.isin(labels, one["values"])].mean())
        assert intensity["max"] == stored[np.isin(labels, one["values"])].max()
    before = serve.client.get(f"{place}/events").text
    assert before.count('"state": "running"') == 1
    child = serve.service.pids
    for answer in ("labels", "nifti", "dicom-seg", "dicom-seg-labelmap", "rtstruct", "mesh", "image", "preview"):
        more = serve.client.get(f"{place}/result", params={"answer": answer})
        assert more.status_code == 200, more.text
        assert stages(more) == ["queued", "read", "write", "total"], answer
    assert serve.client.get(f"{place}/events").text == before
    assert serve.service.pids == child
    wrong = serve.client.get(f"{place}/result", params={"answer": "pickle"})
    assert wrong.status_code == 422
    jobs = serve.service.store.folder / "jobs"
    until(lambda: [path.name for path in jobs.iterdir()] == [place[6:]])  # those of the answers are removed after them
    serve.client.delete(place)


@pytest.mark.parametrize("model", ["usual", "nrrd", "turned", "nibabel"])
def test_the_scan_lies_under_its_labels(serve: Serving, series: bytes, where: Path, tmp_path: Path, model: str) -> None:
    affine = np.array([[0.0, -0.9, 0.1, 7.0], [-1.1, 0.0, 0.0, -3.0], [0.0, 0.12, 1.3, 5.0], [0, 0, 0, 1]])
    voxels = smooth_noise((18, 16, 12), 8)
    oblique = nibabel.Nifti1Image(voxels.astype(np.float32), affine)
    oblique.set_qform(affine, 1)
    oblique.set_sform(oblique.get_qform(), 1)  # ITK takes no shear
    for content, dtype in ((oblique.to_bytes(), np.float32), (series, np.int16)):
        place = done(serve, content, model)
        scan, labels = (serve.client.get(f"{place}/result?answer={name}").content for name in ("image", "nifti"))
        first, second = nifti(scan), nifti(labels)
        assert first.shape == second.shape
        assert np.abs(first.affine - second.affine).max() < 1e-6
        assert first.get_data_dtype() == dtype
        one, other = sitk_image(scan, tmp_path / "scan.nii.gz"), sitk_image(labels, tmp_path / "labels.nii.gz")
        for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(one, what)(), getattr(other, what)(), atol=1e-5), what
        if content is series:
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(where / "series")))
            read = reader.Execute()
            assert np.allclose(one.GetOrigin(), read.GetOrigin(), atol=1e-4)
            assert np.array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(read))
        else:
            assert np.array_equal(np.asarray(first.dataobj), voxels.astype(np.float32))
            assert np.abs(first.affine - oblique.affine).max() < 1e-5
        serve.client.delete(place)


def test_pictures_keep_their_colours(serve: Serving, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 256, (12, 30, 40), np.uint8)
    frames, packed = [Image.fromarray(plane) for plane in volume], io.BytesIO()
    frames[0].save(packed, "tiff", save_all=True, append_images=frames[1:])
    pixels, file = rng.integers(0, 256, (30, 40, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    for model, content in (("tiff", packed.getvalue()), ("colours", file.getvalue())):
        place = done(serve, content, model)
        scan, labels = (nifti(serve.client.get(f"{place}/result?answer={n}").content) for n in ("image", "nifti"))
        assert scan.shape == labels.shape
        assert np.abs(scan.affine - labels.affine).max() < 1e-6
        found = np.asarray(scan.dataobj)
        if model == "colours":
            assert scan.header["datatype"] == 128  # RGB24 of nifti1.h
            found = np.stack([found[:, :, 0][name].T for name in "RGB"], axis=-1)
            assert np.array_equal(found, pixels)
        else:
            assert np.array_equal(found.T, volume)
        serve.client.delete(place)


def test_inputs_make_room_and_what_needs_them_is_refused(serve: Serving, series: bytes, tmp_path: Path) -> None:
    place = done(serve, series, "usual")
    job = serve.service.store.get(place[6:])
    kept = sum(file.stat().st_size for file in job.folder.rglob("*") if file.is_file())
    assert kept - 2000 < job.size_bytes <= kept
    before, serve.service.store.room_bytes = serve.service.store.room_bytes, job.size_bytes + 1
    try:
        other = serve.client.post("/models/usual/predict", content=series[:-30])  # refused once it is read
        assert other.status_code in (422, 503)
    finally:
        serve.service.store.room_bytes = before
    assert job.inputs == ()
    assert not (job.folder / "input").exists()
    for answer in ("image", "preview", "statistics", "rtstruct"):
        refused = serve.client.get(f"{place}/result?answer={answer}")
        assert refused.status_code == 410
        assert "made of the image" in refused.json()["error"]
    for answer in ("labels", "nifti", "mesh", "stl"):
        assert serve.client.get(f"{place}/result?answer={answer}").status_code == 200
    serve.client.delete(place)
    assert serve.client.get(f"{place}/result?answer=mesh").status_code == 404


def test_what_is_kept_outlives_the_service(serve: Serving, series: bytes, where: Path, tmp_path: Path) -> None:
    with serving([where / "usual"], work=tmp_path / "work") as first:
        place = done(first, series, "usual")
        wanted = first.client.get(f"{place}/result?answer=image").content
        size = first.service.store.get(place[6:]).size_bytes
    with serving([where / "usual"], work=tmp_path / "work") as again:
        assert abs(again.service.store.get(place[6:]).size_bytes - size) < 2000  # of its own record
        assert again.client.get(f"{place}/result?answer=image").content == wanted
        assert again.client.get("/ready").json()["loaded"] == []  # the network was not even read


def test_a_job_that_is_in_use_is_neither_cleaned_nor_robbed(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "work", room_bytes=10000, keep_s=0.01)
    store.open()
    job = store.new("model", ["labels"], 8000, is_kept=True)
    job.inputs = ((job.folder / "input" / "0.nii", "nifti"),)
    job.inputs[0][0].write_bytes(bytes(6000))
    (job.folder / "result").mkdir()
    (job.folder / "result" / "labels.nii").write_bytes(bytes(100))
    store.end(job, "done", result=job.folder / "result" / "labels.nii")
    more = store.new_of(job, ["nifti"])
    job.over = 0.0
    store.clean()
    with pytest.raises(RefusedError, match="is full"):
        store.new("model", ["labels"], 6000, is_kept=True)
    assert job.inputs[0][0].is_file()
    store.remove(more)
    store.new("model", ["labels"], 6000, is_kept=True)
    assert job.inputs == ()
    store.clean()
    assert not job.folder.exists()
    store.close()


def test_names_in_a_query_that_mean_nothing_are_refused(serve: Serving, series: bytes, where: Path) -> None:
    for address in ("/models/usual/predict", "/models/usual/jobs"):
        refused = serve.client.post(f"{address}?answr=mesh", content=series)
        assert refused.status_code == 400
        assert refused.json()["error"] == "no such parameter: 'answr'; there are answer, series"
    told = serve.client.get("/models?x=1")
    assert (told.status_code, told.json()["error"]) == (400, "no such parameter: 'x'; this address has none")
    image = write_image(smooth_noise((12, 16, 18), 3), where / "b.nii.gz").read_bytes()
    refused = serve.client.post("/models/usual/predict?series=1.2.3", content=image)
    assert refused.status_code == 422
    assert "no DICOM series" in refused.json()["error"]
    assert serve.client.get("/?utm=x").status_code in (200, 400)


def test_a_model_tells_units_and_what_was_measured_of_it(serve: Serving, where: Path) -> None:
    usual = where / "usual"
    known = load_bundle_spec(usual).provenance
    quality = Quality(dice=0.875, labels={"a": 0.9, "b": 0.85}, cases=12, held_out=True, against="labels")
    speed = Speed(seconds_per_case=0.0625, cases=4, begins_with="file", cpu="a processor", threads=2)
    ct = described(usual, "ct", channel_names=("CT",))
    note(ct, quality, speed)
    assert {**load_bundle_spec(ct).provenance, "measured": None} == {**known, "measured": None}
    hostile = described(usual, "hostile", provenance={"measured": {"quality": {"dice": "<b>"}, "speed": [1]}})
    served = load_models([ct, hostile, usual, where / "colours"], ["labels"]).models
    assert served["ct"].measured["quality"] == asdict(quality)
    assert served["ct"].measured["speed"] == asdict(speed)
    assert {"quality", "speed"} & {*served["hostile"].measured, *served["usual"].measured} == set()
    assert [served[name].channels[0].unit for name in ("ct", "usual")] == ["HU", None]
    assert [served[name].labels[0].volume_unit for name in ("ct", "colours")] == ["ml", None]
    assert serve.client.get("/models/usual").json()["labels"][0]["volume_unit"] == "ml"


def test_what_validation_found_is_read_by_name(tmp_path: Path) -> None:
    """As nnU-Net 2.8 writes `summary.json`: values, and regions as tuples of values."""
    (tmp_path / "validation").mkdir()
    written = {
        "foreground_mean": {"Dice": 0.7},
        "mean": {"(1, 2)": {"Dice": 0.8}, "2": {"Dice": 0.6}, "3": {"Dice": float("nan")}},
        "metric_per_case": [{}, {}, {}],
    }
    (tmp_path / "validation" / "summary.json").write_text(json.dumps(written))
    labels = {"background": 0, "whole": [1, 2], "core": 2, "never": 3}
    found = validated(tmp_path, labels, "0")
    assert found == Quality(dice=0.7, labels={"whole": 0.8, "core": 0.6}, cases=3, held_out=True, against="labels")
    assert validated(tmp_path, labels, "all") == replace(found, held_out=False)
    for damaged in ("", "[]", json.dumps({**written, "foreground_mean": {"Dice": None}})):
        (tmp_path / "validation" / "summary.json").write_text(damaged)
        assert validated(tmp_path, labels, "0") is None
    assert validated(tmp_path / "elsewhere", labels, "0") is None
