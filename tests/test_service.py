"""`fastnnunet serve`: what it answers is what `predict` writes, and what it refuses leaves it as it was."""

import email
import email.policy
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import highdicom
import httpx
import hypothesis
import nibabel
import numpy as np
import pydicom
import pytest
import schemathesis
import SimpleITK as sitk
from PIL import Image

from fastnnunet.api import predict
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series
from tests.serving import Serving, serving, until

SETTINGS = {"backend": "onnxruntime", "threads": 1}


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def bundle(where: Path) -> Path:
    return make_toy_model(Toy(), where).bundle


@pytest.fixture(scope="module")
def two_channels(where: Path) -> Path:
    made = make_toy_model(Toy(channels=2), where / "two").bundle
    return made.rename(made.with_name("two"))


@pytest.fixture(scope="module")
def pictures(where: Path) -> Path:
    toy = Toy(dims=2, spacing=(1.0, 1.0), file_ending=".png", reader_writer="NaturalImage2DIO")
    made = make_toy_model(toy, where / "pictures").bundle
    return made.rename(made.with_name("pictures"))


@pytest.fixture(scope="module")
def image(where: Path) -> Path:
    return write_image(smooth_noise((12, 16, 18), 3), where / "a_0000.nii.gz", (1.1, 1.0, 0.9), (-3.0, 4.0, 5.5))


@pytest.fixture(scope="module")
def serve(where: Path, bundle: Path, two_channels: Path, pictures: Path) -> Iterator[Serving]:
    with serving([bundle, two_channels, pictures], work=where / "work") as found:
        yield found


def expected(model: Path, source: Path, out: Path) -> bytes:
    """The label map that `predict` writes."""
    (case,) = predict(model, source, out, **SETTINGS).cases
    assert case.output is not None
    return case.output.read_bytes()


def ask(serve: Serving, *files: Path, model: str = "bundle", **query: str | list[str]) -> httpx.Response:
    return serve.client.post(
        f"/models/{model}/predict", files=[("image", ("x", file.read_bytes())) for file in files], params=query
    )


def test_the_label_map_is_that_of_predict_bit_for_bit(
    serve: Serving, bundle: Path, image: Path, tmp_path: Path
) -> None:
    wanted = expected(bundle, image, tmp_path)
    assert len(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz"))))) > 1
    answer = ask(serve, image)
    assert answer.status_code == 200, answer.text
    assert answer.content == wanted
    assert answer.headers["content-type"] == "application/gzip"
    raw = serve.client.post("/models/bundle/predict", content=image.read_bytes())
    assert raw.content == wanted
    for ending in (".nii", ".nrrd", ".mha"):
        other = tmp_path / f"b{ending}"
        sitk.WriteImage(sitk.ReadImage(str(image)), str(other), ending != ".mha")
        assert ask(serve, other).content == expected(bundle, other, tmp_path / ending[1:]), ending


def test_a_zip_of_a_series_and_several_channels(
    serve: Serving, bundle: Path, two_channels: Path, tmp_path: Path
) -> None:
    stored = smooth_noise((12, 16, 18), 5).astype(np.int16)
    write_series(tmp_path / "series", stored)
    packed = tmp_path / "series.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (tmp_path / "series").iterdir():
            archive.write(file, f"study/{file.name}")
        archive.writestr("__MACOSX/._x", b"not a slice")
        archive.writestr("DICOMDIR", b"nor this")
    labels = ask(serve, packed)
    assert labels.content == expected(bundle, tmp_path / "series", tmp_path / "out")
    seg = ask(serve, packed, answer="dicom-seg")
    assert seg.headers["content-type"] == "application/dicom"
    contours = ask(serve, packed, answer="rtstruct")
    found = pydicom.dcmread(io.BytesIO(contours.content))
    assert [str(roi.ROIName) for roi in found.StructureSetROISequence] == ["a", "b"]
    segments = highdicom.seg.segread(io.BytesIO(seg.content))
    wanted = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(labels.content)).dataobj)
    volume = segments.get_volume(combine_segments=True).array
    assert np.bincount(volume.ravel())[1:].tolist() == np.bincount(wanted.ravel().astype(int))[1:].tolist()

    channels = [
        write_image(smooth_noise((12, 16, 18), seed), tmp_path / "two" / f"c_000{seed}.nii.gz") for seed in (0, 1)
    ]
    answer = ask(serve, *channels, model="two")
    assert answer.content == expected(two_channels, tmp_path / "two", tmp_path / "out two")
    assert ask(serve, *channels[::-1], model="two").content != answer.content
    few = ask(serve, channels[0], model="two")
    assert few.status_code == 422
    assert "each of the model's 2 channel(s): channel0, channel1" in few.json()["error"]


def test_pictures_are_for_models_of_pictures(serve: Serving, pictures: Path, image: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a_0000.png"
    Image.fromarray(smooth_noise((30, 40), 4).clip(0, 255).astype(np.uint8)).save(picture)
    of_series = {"dicom-seg", "dicom-seg-labelmap", "rtstruct"}
    offered = {model["id"]: set(model["answers"]) for model in serve.client.get("/models").json()["models"]}
    assert offered["pictures"] == offered["bundle"] - of_series
    answer = ask(serve, picture, model="pictures")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == expected(pictures, picture, tmp_path / "out")
    for wrong, model in ((picture, "bundle"), (image, "pictures")):
        assert ask(serve, wrong, model=model).status_code == 415


def test_models_health_and_readiness(serve: Serving, bundle: Path) -> None:
    assert serve.client.get("/health").json()["status"] == "ok"
    assert serve.client.head("/health").status_code == 200
    assert serve.client.get("/ready").json()["ready"] is True
    first, second, third = serve.client.get("/models").json()["models"]
    assert (third["dimensions"], third["accepts"]) == (2, [".png", ".bmp", ".tif"])
    assert (first["id"], second["id"]) == ("bundle", "two")
    assert [label["name"] for label in first["labels"]] == ["a", "b"]
    assert [label["value"] for label in first["labels"]] == [1, 2]
    assert all(len(label["colour"]) == 7 for label in first["labels"])
    assert [channel["name"] for channel in second["channels"]] == ["channel0", "channel1"]
    assert first["spacing_mm"] == [1.0, 1.0, 1.0]
    assert serve.client.get("/models/two").json() == second
    assert serve.client.get("/models/three").status_code == 404


def test_eight_clients_at_once(serve: Serving, bundle: Path, tmp_path: Path) -> None:
    images = [write_image(smooth_noise((10, 12, 14), seed), tmp_path / f"{seed}_0000.nii.gz") for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: ask(serve, image), images))
    predict(bundle, tmp_path, tmp_path / "out", **SETTINGS)
    assert [answer.status_code for answer in answers] == [200] * 8
    for seed, answer in enumerate(answers):
        assert answer.content == (tmp_path / "out" / f"{seed}.nii.gz").read_bytes(), seed
    assert len({answer.content for answer in answers}) == 8


def test_jobs_with_events_and_results(serve: Serving, bundle: Path, image: Path, tmp_path: Path) -> None:
    taken = serve.client.post("/models/bundle/jobs", content=image.read_bytes())
    assert taken.status_code == 202
    place = f"/jobs/{taken.json()['id']}"
    events = [
        json.loads(line[6:]) for line in serve.client.get(f"{place}/events").text.splitlines() if line[:5] == "data:"
    ]
    assert events[0] == {"number": 0, "kind": "state", "state": "running"}
    assert events[-1]["state"] == "done"
    assert any(event["kind"] == "progress" and event["unit"] == "tiles" for event in events)
    told = serve.client.get(place).json()
    assert (told["state"], told["status"]) == ("done", 200)
    assert told["kept_until"] > told["over"]
    wanted = expected(bundle, image, tmp_path)
    assert serve.client.get(f"{place}/result").content == serve.client.get(f"{place}/result").content == wanted
    assert serve.client.delete(place).status_code == 200
    assert serve.client.get(place).status_code == serve.client.get(f"{place}/result").status_code == 404
    bad = serve.client.post("/models/bundle/jobs", content=image.read_bytes()[:1500]).json()["id"]
    until(lambda: serve.client.get(f"/jobs/{bad}").json()["state"] == "failed")
    refused = serve.client.get(f"/jobs/{bad}/result")
    assert refused.status_code == 422
    assert "truncated" in refused.json()["error"]


def test_several_answers_are_a_zip(serve: Serving, image: Path) -> None:
    answer = ask(serve, image, answer=["statistics", "labels", "preview"])
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert list(files) == ["statistics.json", "labels.nii.gz", "preview.png"]
    assert files["labels.nii.gz"] == ask(serve, image).content
    found = nibabel.Nifti1Image.from_bytes(gzip.decompress(files["labels.nii.gz"]))
    told = json.loads(files["statistics.json"])["structures"]
    counts = [int((np.asarray(found.dataobj) == value).sum()) for value in (1, 2)]
    assert [one["voxels"] for one in told] == counts
    assert min(counts) > 0
    assert told[0]["volume_ml"] == pytest.approx(counts[0] * 1.1 * 1.0 * 0.9 / 1000)
    assert files["preview.png"].startswith(b"\x89PNG")
    meshes = ask(serve, image, answer=["mesh", "stl"])
    with zipfile.ZipFile(io.BytesIO(meshes.content)) as archive:
        assert archive.namelist() == ["mesh.glb", "stl/a.stl", "stl/b.stl"]
        assert archive.read("mesh.glb").startswith(b"glTF")
    alone = ask(serve, image, answer="preview")
    assert alone.headers["content-type"] == "image/png"
    assert alone.content == files["preview.png"]
    for wrong in ("pickle", ["dicom-seg", "dicom-seg-labelmap"], "dicom-seg"):
        refused = ask(serve, image, answer=wrong)
        assert refused.status_code == 422, wrong
    assert "dicom-seg refers to a DICOM series, which this image is not" in refused.json()["error"]
    both = ask(serve, image, answer=["labels", "nifti"])  # of this model one file
    with zipfile.ZipFile(io.BytesIO(both.content)) as archive:
        assert archive.namelist() == ["labels.nii.gz", "nifti.nii.gz"]
        assert archive.read("labels.nii.gz") == archive.read("nifti.nii.gz") == files["labels.nii.gz"]


def test_clients_of_monai_label(serve: Serving, image: Path) -> None:
    """As its client asks and reads: https://github.com/Project-MONAI/MONAILabel, monailabel/client/client.py."""
    told = serve.client.get("/info/").json()
    assert told["models"]["bundle"]["type"] == "segmentation"
    assert told["models"]["bundle"]["labels"] == {"a": 1, "b": 2}
    assert told["labels"] == ["a", "b"]
    form = {"files": {"file": ("scan.nii.gz", image.read_bytes())}, "data": {"params": '{"client_id": "x"}'}}
    answer = serve.client.post("/infer/bundle?image=scan", **form)
    head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
    params, labels = email.message_from_bytes(head + answer.content, policy=email.policy.HTTP).iter_parts()
    assert params.get_param("name", header="content-disposition") == "params"
    assert json.loads(params.get_payload())["label_names"] == {"a": 1, "b": 2}
    assert labels.get_filename() == "labels.nii.gz"
    wanted = ask(serve, image).content
    assert wanted in answer.content
    assert serve.client.post("/infer/bundle?output=image", **form).content == wanted
    assert serve.client.post("/infer/bundle?output=json", **form).json()["label_names"] == {"a": 1, "b": 2}
    assert serve.client.post("/infer/bundle", data={"params": "{}"}).status_code == 415
    assert serve.client.post("/infer/other", **form).status_code == 404


def test_the_log_names_nobody(serve: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uid = "1.2.826.0.1.3680043.8.498.1"
    stored = smooth_noise((4, 16, 18), 5).astype(np.int16)
    write_series(tmp_path / "series", stored, series_uid=uid, PatientName="Doe^Jane", SeriesDescription="Knee")
    packed = tmp_path / "Doe_Jane.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for number, file in enumerate((tmp_path / "series").iterdir()):
            if number != 1:
                archive.write(file, f"Doe Jane/{file.name}")
    caplog.set_level("DEBUG")
    with packed.open("rb") as f:
        answer = serve.client.post(f"/models/bundle/predict?series={uid}", files={"image": ("Doe_Jane.zip", f)})
    assert answer.status_code == 422  # a slice is missing
    damaged = b"--x\r\nDoe Jane\r\n--x--"
    answer = serve.client.post(
        "/models/bundle/predict", content=damaged, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == 400
    assert not [record for record in caplog.records if "multipart" in record.name]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith(("fastnnunet", "uvicorn"))]
    assert any("POST /models/{model}/predict 422" in line for line in lines)
    assert not [line for line in lines for word in ("Doe", "Jane", "Knee", uid, "P1") if word in line]


def test_all_that_the_schema_allows(serve: Serving) -> None:
    """No status or answer that the schema does not know, and nothing that fails."""
    schema = schemathesis.openapi.from_url(f"{serve.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:

        @hypothesis.settings(max_examples=4, deadline=None, database=None, derandomize=True)
        @hypothesis.given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate()

        check()
    assert serve.client.get("/health").status_code == 200
