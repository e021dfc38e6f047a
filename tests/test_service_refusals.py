"""`fastnnunet serve` against clients that mean no good: every refusal is one sentence, and the service lives."""

import gzip
import io
import os
import signal
import socket
import struct
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.errors import FastnnUNetError, SpecError
from fastnnunet.service import devices
from fastnnunet.service.jobs import JobStore
from fastnnunet.service.models import Served
from fastnnunet.service.refusals import RefusedError
from fastnnunet.service.run import check_token, listening
from fastnnunet.service.run import serve as serve_bundles
from fastnnunet.service.spec import ServiceSpec
from fastnnunet.service.worker import Loading
from fastnnunet.system.children import Children
from tests.bundles import Toy, make_toy_model, smooth_noise
from tests.dicom_files import write_series
from tests.serving import Serving, children, serving, serving_process, until

TOKEN = "a-token-of-many-characters"
UPLOAD = 1 << 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("service")).bundle


@pytest.fixture(scope="module")
def image() -> bytes:
    """A NIfTI file, not packed."""
    return nibabel.Nifti1Image(smooth_noise((14, 12, 10), 1), np.diag([1.0, 1.0, 1.2, 1.0])).to_bytes()


@pytest.fixture(scope="module")
def serve(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    limits = {"upload": "1M", "unpacked": "4M", "files": 50, "voxels": 10**6}
    with serving([bundle], work=tmp_path_factory.mktemp("refusals") / "work", **limits) as found:
        yield found


def post(serve: Serving, content: bytes, **headers: str) -> httpx.Response:
    return serve.client.post("/models/bundle/predict", content=content, headers=headers)


def refused(answer: httpx.Response, *statuses: int) -> str:
    """The sentence of a refusal."""
    assert answer.status_code in (statuses or range(400, 500)), (answer.status_code, answer.text)
    assert list(answer.json()) == ["error"]
    sentence = answer.json()["error"]
    assert 10 < len(sentence) <= 1000
    assert sentence.isprintable()
    assert "/tmp" not in sentence
    return sentence


def wrong_headers(image: bytes) -> Iterator[tuple[str, bytes]]:
    """Fields of a NIfTI header (https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h) that cannot be."""
    nan, inf = float("nan"), float("inf")
    changes = {
        "h40": (0, -1, 8, 32767),  # dim[0]
        "h42": (0, -1, -32768, 32767, 15),  # dim[1] to dim[3]
        "h44": (0, -5, 32767, 13),
        "h46": (0, -1, 32767, 11),
        "h70": (0, 1, 3, 32, 128, 1792, 2304, 9999),  # data type
        "f80": (0.0, nan, inf, 1e30),  # pixdim; the last is a voxel larger than a country
        "f84": (0.0, nan, -inf, 1e-30),
        "f88": (0.0, nan, inf, 1e-12),
        "f108": (-1.0, 1e9, nan, 16.0, 1e30),  # where the voxels begin
        "f112": (inf, -inf),  # slope
        "f280": (nan, inf),  # sform
        "f296": (nan, inf),
        "f312": (nan, inf),
        "i0": (0, 347, -1, 540),  # size of the header
        "i344": (0, 0x0031696E, 0x7FFFFFFF),  # magic
    }
    for field, values in changes.items():
        for value in values:
            content = bytearray(image)
            struct.pack_into(f"<{field[0]}", content, int(field[1:]), value)
            yield f"{field}={value}", bytes(content)


def cut_off(image: bytes) -> Iterator[tuple[str, bytes]]:
    packed = gzip.compress(image, mtime=0)
    for content, name in ((image, "nii"), (packed, "gz")):
        for share in (0.01, 0.1, 0.3, 0.5, 0.9, 0.99):
            yield f"{name} {share}", content[: int(share * len(content))]
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    yield "gz flipped", bytes(damaged)
    yield "gz checksum", packed[:-8] + bytes(8)
    yield "gz and more", packed + b"more than there should be"
    header = bytearray(image[:352])
    struct.pack_into("<4h", header, 40, 3, 1000, 1000, 30000)
    yield "gz bomb", gzip.compress(bytes(header) + bytes(1 << 24), mtime=0)
    struct.pack_into("<4h", header, 40, 3, 300, 300, 300)
    yield "gz too large", gzip.compress(bytes(header) + bytes(300**3 * 4), 9, mtime=0)


def others(image: bytes, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Other kinds, and files whose headers name other files."""
    yield "nothing", b""
    yield "pickle", b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    yield "text", b"hello"
    yield "html", b"<html><script>alert(1)</script></html>"
    yield "elf", b"\x7fELF" + bytes(400)
    yield "png", b"\x89PNG\r\n\x1a\n" + bytes(400)
    yield "gz of text", gzip.compress(b"hello" * 1000)
    yield "gz of a pickle", gzip.compress(b"\x80\x04" + bytes(500))
    yield "tar", b"x" * 257 + b"ustar" + bytes(500)
    pair = bytearray(image)
    pair[344:348] = b"ni1\0"
    yield "pair", bytes(pair)
    for name in ("/etc/passwd", "../../secret.raw", "other.raw", "LIST\n/etc/passwd", "%03d.raw 1 3 1"):
        text = (
            f"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nendian: little\ndata file: {name}\n\n"
        )
        yield f"nrrd {name[:9]}", text.encode()
    meta = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = "
    for name in ("/etc/passwd", "LIST", "x.raw"):
        yield f"mha {name}", f"{meta}{name}\n".encode()
    yield "mha large", meta.replace("4 4 4", "90000 90000 90000").encode() + b"LOCAL\n" + bytes(128)
    yield "mha cut", meta.encode() + b"LOCAL\n" + bytes(100)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16)), str(folder / "x.nrrd"))
    yield "nrrd cut", (folder / "x.nrrd").read_bytes()[:-30]


def zipped(*members: tuple[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w", kind) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return into.getvalue()


def zips(folder: Path) -> Iterator[tuple[str, bytes]]:
    stored = smooth_noise((6, 8, 9), 2).astype(np.int16)
    one = [(file.name, file.read_bytes()) for file in write_series(folder / "one", stored)]
    two = [(f"b/{file.name}", file.read_bytes()) for file in write_series(folder / "two", stored)]
    good = zipped(*one)
    link = zipfile.ZipInfo("slice")
    link.external_attr = 0o120777 << 16
    linked = io.BytesIO()
    with zipfile.ZipFile(linked, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    secret = bytearray(good)
    for at in (6, good.rfind(b"PK\x01\x02") + 8):
        secret[at] |= 1
    yield "two series", zipped(*one, *two)
    yield "a gap", zipped(*(one[:2] + one[3:]))
    for name in ("../x.dcm", "/x.dcm", "a/../../x.dcm", "..\\x.dcm", "C:\\x.dcm", "a:b"):
        yield f"climbs {name}", zipped((name, one[0][1]))
    yield "link", linked.getvalue()
    yield "encrypted", bytes(secret)
    yield "bzip2", zipped(one[0], kind=zipfile.ZIP_BZIP2)
    yield "bomb", zipped(*((f"{n}.dcm", bytes(1 << 20)) for n in range(5)))
    yield "zip in a zip", zipped(("inner.zip", good))
    yield "of pickles", zipped(("data.pkl", b"\x80\x04" + bytes(300)))
    yield "of text", zipped(*one, ("notes.txt", b"not a slice" * 40))
    yield "empty file", zipped(*one, ("empty.dcm", b""))
    yield "many files", zipped(*((f"{n}", b"") for n in range(60)))
    yield "empty", zipped()
    yield "hidden only", zipped((".DS_Store", b"x"))
    yield "cut", good[: len(good) // 2]
    yield "no end", good[:-22]
    yield "flipped", good[:60] + bytes([good[60] ^ 0xFF]) + good[61:]
    end = good.rfind(b"PK\x05\x06")
    yield "entries", good[: end + 8] + struct.pack("<2H", 40000, 40000) + good[end + 12 :]
    yield "directory", good[: end + 12] + struct.pack("<L", 1 << 31) + good[end + 16 :]
    yield "64 bit", good[: end + 12] + b"\xff" * 8 + good[end + 20 :]
    liar = bytearray(zipped(("x.dcm", bytes(128) + b"DICM" + bytes(1 << 16))))
    struct.pack_into("<L", liar, liar.rfind(b"PK\x01\x02") + 24, 200)  # it says 200 bytes
    yield "liar", bytes(liar)
    cut = [(name, content[: len(content) - 40]) for name, content in one]
    yield "cut slices", zipped(*cut)


def test_a_hundred_uploads_that_are_no_image(serve: Serving, image: bytes, tmp_path: Path) -> None:
    cases = dict([*wrong_headers(image), *cut_off(image), *others(image, tmp_path), *zips(tmp_path)])
    assert len(cases) >= 100
    with ThreadPoolExecutor(4) as pool:
        answers = dict(zip(cases, pool.map(lambda content: post(serve, content), cases.values()), strict=True))
    wrong = {}
    for name, answer in answers.items():
        try:
            refused(answer)
        except AssertionError as e:
            wrong[name] = str(e)[:200]
    assert wrong == {}
    sentences = {name: answer.json()["error"] for name, answer in answers.items()}
    assert "2 DICOM series" in sentences["two series"]
    assert "leads out of its folder" in sentences["climbs ../x.dcm"]
    assert answers["pickle"].status_code == answers["png"].status_code == 415
    assert answers["bomb"].status_code == 413
    assert "names another file" in sentences["nrrd /etc/pass"]
    assert "at most 1000000" in sentences["gz too large"]
    assert post(serve, image).status_code == 200
    until(lambda: not list((serve.service.store.folder / "jobs").iterdir()))


def test_sizes_are_counted_while_they_come(serve: Serving, image: bytes) -> None:
    refused(post(serve, bytes(UPLOAD + 1)), 413)
    answer = serve.client.post("/models/bundle/predict", content=(bytes(1 << 16) for _ in range(17)))  # no length
    refused(answer, 413)
    many = [("image", ("x", image))] * 3
    refused(serve.client.post("/models/bundle/predict", files=many), 400)
    refused(serve.client.post("/models/bundle/predict", files={"other": image}), 400)
    refused(serve.client.post("/models/bundle/predict", data={"image": "text"}), 415)
    broken = serve.client.post(
        "/models/bundle/predict",
        content=b"--x\r\nnonsense",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    refused(broken, 400)
    no_boundary = {"Content-Type": "multipart/form-data"}
    refused(serve.client.post("/models/bundle/predict", content=b"--x", headers=no_boundary), 400)
    refused(serve.client.post("/infer/bundle", files={"file": image}, data={"params": "[1"}), 422)
    assert post(serve, image).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:80"}, 421),
        ({"Host": "10.0.0.7"}, 421),  # no address of this service, which listens on the loopback alone
        ({"Host": "localhost:x"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_pages_of_other_sites_are_not_let_in(serve: Serving, headers: dict[str, str], status: int) -> None:
    answer = serve.client.get("/models", headers=headers)
    assert answer.status_code == status, answer.text
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "http" not in answer.headers["content-security-policy"]  # nothing is loaded from elsewhere


def test_its_own_page_may_ask(serve: Serving) -> None:
    assert serve.client.get("/models", headers={"Origin": serve.url}).status_code == 200
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert serve.client.options("/models", headers=preflight).status_code == 403


def test_other_machines_need_a_token(bundle: Path, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.0.2", "::"):
        with pytest.raises(SpecError, match="there is no token"):
            check_token(ServiceSpec(host=host), None)
        check_token(ServiceSpec(host=host), TOKEN)
    check_token(ServiceSpec(), None)
    for token in ("short", "with a line\nbreak in it", "ä" * 20):
        with pytest.raises(SpecError, match="expected at least 16"):
            check_token(ServiceSpec(), token)
    with serving([bundle], TOKEN, work=tmp_path / "work") as serve:
        assert serve.client.get("/health").status_code == 200
        for path in ("/models", "/ready", "/info/", "/openapi.json", "/jobs/x", "/nothing"):
            assert serve.client.get(path).status_code == 401, path
            assert serve.client.get(path, headers={"Authorization": f"Bearer {TOKEN}x"}).status_code == 401
            right = serve.client.get(path, headers={"Authorization": f"Bearer {TOKEN}"})
            assert right.status_code == (404 if path in ("/jobs/x", "/nothing") else 200)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "foo"}, "backend: got 'foo', expected auto or one of"),
        (
            {"backend": "onnxruntime", "precision": "bf16"},
            "onnxruntime computes in fp32 or int8 only, got precision 'bf16'",
        ),
        ({"backend": "onnxruntime", "precision": "int8"}, "this bundle has no int8 model for onnxruntime"),
        ({"devices": ("cuda:99",)}, "-device cuda:99"),
        ({"host": "no.such.host.invalid"}, "--host: got 'no.such.host.invalid', expected an address"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_listens(
    bundle: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(FastnnUNetError) as refused:
        serve_bundles([bundle], ServiceSpec(port=0, work=tmp_path / "work", **fields), token=TOKEN)
    assert message in str(refused.value)
    assert not (tmp_path / "work").exists()


def test_no_answer_waits_for_an_acknowledgement() -> None:
    """A connection without TCP_NODELAY holds the body back for 40 ms, since its head is not acknowledged at once."""
    with (
        listening(ServiceSpec(port=0)) as listener,
        socket.create_connection(listener.getsockname()[:2], timeout=10),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_options_that_cannot_be_are_named_as_they_are_given() -> None:
    with pytest.raises(SpecError) as refused:
        ServiceSpec(port=70000, queue=0, idle_s=-1, room="much", host_names=("http://scanner",))
    for option in ("--port: got 70000", "--queue: got 0", "--idle: got -1", "--room: got 'much'", "--host-name: got"):
        assert option in str(refused.value)


def test_the_queue_is_bounded_models_are_unloaded_and_a_dead_child_is_replaced(
    bundle: Path, image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving([bundle], work=tmp_path / "work", queue=1, idle_s=1.0) as serve:
        place = "/models/bundle/jobs"
        right = post(serve, image).content

        def running() -> bool:
            return serve.client.get("/ready").json()["running"] == 1

        (child,) = serve.service.pids
        os.kill(child, signal.SIGSTOP)
        first = serve.client.post(place, content=image).json()["id"]
        until(running)
        second = serve.client.post(place, content=image).json()["id"]
        full = post(serve, image)
        refused(full, 503)
        assert int(full.headers["retry-after"]) >= 1
        assert serve.client.get("/ready").status_code == 503
        assert serve.client.get(f"/jobs/{second}/result").status_code == 409
        assert serve.client.delete(f"/jobs/{second}").json()["state"] == "cancelled"
        refused(serve.client.get(f"/jobs/{second}/result"), 410)
        with pytest.raises(httpx.ReadTimeout):  # a client that leaves takes its place with it
            serve.client.post("/models/bundle/predict", content=image, timeout=0.5)
        until(lambda: serve.client.get("/ready").json()["waiting"] == 0)
        os.kill(child, signal.SIGCONT)
        until(lambda: serve.client.get(f"/jobs/{first}").json()["state"] == "done")
        assert serve.client.get(f"/jobs/{first}/result").content == right

        monkeypatch.setattr(devices, "_GRACE_S", 0.1)
        monkeypatch.setattr(serve.service.devices[0], "time_limit_s", 0.1)
        os.kill(child, signal.SIGSTOP)
        assert "took more than" in refused(post(serve, image), 504)
        monkeypatch.undo()

        third = serve.client.post(place, content=image).json()["id"]
        os.kill(until(lambda: serve.service.pids)[0], signal.SIGKILL)
        until(lambda: serve.client.get(f"/jobs/{third}").json()["state"] == "failed")
        refused(serve.client.get(f"/jobs/{third}/result"), 500)
        assert post(serve, image).content == right

        until(lambda: serve.service.pids == [] and serve.client.get("/ready").json()["loaded"] == [])


def test_a_child_that_died_while_nobody_asked_is_forgotten(tmp_path: Path) -> None:
    thread = devices.DeviceThread(
        devices.Waiting(1, 1),
        JobStore(tmp_path, room_bytes=1, keep_s=1),
        Served({}, {"old": tmp_path, "new": tmp_path}, {}),
        Loading(backend="auto", precision="fp32", threads=1, device=None, most_voxels=1, most_bytes=1),
        idle_s=60,
        time_limit_s=1,
    )
    context = Children()
    ours, theirs = context.Pipe()
    child = context.Process(target=time.sleep, args=(0,))
    child.start()
    child.join()
    theirs.close()
    thread._child, now = (child, ours), time.monotonic()
    thread._used = {"old": now - 61, "new": now}
    thread._unload_idle()  # which told the child, and ended the thread with the error of doing so
    assert (thread.pid, thread.loaded) == (None, [])


def test_the_work_folder_is_bounded_cleaned_and_of_one_service(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "work", room_bytes=1000, keep_s=0.05)
    store.open()
    with pytest.raises(FastnnUNetError, match="another service is at work"):
        JobStore(tmp_path / "work", room_bytes=1000, keep_s=1).open()
    first = store.new("model", ["labels"], 800, is_kept=True)
    with pytest.raises(RefusedError, match="is full") as refusal:
        store.new("model", ["labels"], 201, is_kept=True)
    assert refusal.value.status == 503
    with pytest.raises(RefusedError, match="is full"):
        store.grow(first, 201)
    (first.folder / "result").mkdir()
    (first.folder / "result" / "labels.nii").write_bytes(bytes(300))
    store.end(first, "done", result=first.folder / "result" / "labels.nii")
    assert store.get(first.id).size_bytes == 300
    store.new("model", ["labels"], 700, is_kept=False)
    assert (store.folder / "jobs").stat().st_mode & 0o77 == 0
    time.sleep(0.1)
    store.clean()
    assert not first.folder.exists()
    with pytest.raises(RefusedError, match="kept for"):
        store.get(first.id)
    store.close()
    again = JobStore(tmp_path / "work", room_bytes=1000, keep_s=1)
    again.open()
    assert list((again.folder / "jobs").iterdir()) == []  # what belonged to nobody is gone
    again.close()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_a_service_that_was_killed_serves_whole_results_and_says_what_is_lost(
    bundle: Path, image: bytes, tmp_path: Path
) -> None:
    place, work = "/models/bundle/jobs", tmp_path / "work"
    with serving_process([bundle], work) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        done = client.post(place, content=image).json()["id"]
        until(lambda: client.get(f"/jobs/{done}").json()["state"] == "done", 60)
        whole = client.get(f"/jobs/{done}/result").content
        (child,) = children(process.pid)
        os.kill(child, signal.SIGSTOP)
        lost = [client.post(place, content=image).json()["id"] for _ in range(2)]
        until(lambda: client.get(f"/jobs/{lost[0]}").json()["state"] == "running")
        (work / "jobs" / lost[0] / "partial" / "result").mkdir(parents=True)
        (work / "jobs" / lost[0] / "partial" / "result" / "labels.nii.gz").write_bytes(whole[:100])
        process.kill()
        process.wait(10)
        os.kill(child, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{child}").exists())
    with serving_process([bundle], work) as (again, url), httpx.Client(base_url=url, timeout=60) as client:
        assert client.get(f"/jobs/{done}/result").content == whole
        for job in lost:
            for answer in (client.get(f"/jobs/{job}"), client.get(f"/jobs/{job}/result")):
                assert "send the image again" in refused(answer, 410)
        assert sorted(p.name for p in (work / "jobs" / lost[0]).iterdir()) == ["job.json"]
        other = httpx.post(f"{url}/models/bundle/predict", content=image, timeout=60)
        assert other.content == whole
        again.terminate()
        assert again.wait(30) == 0


def test_the_page_is_served_from_here_alone(serve: Serving) -> None:
    kinds = {"/": "text/html", "/page/page.js": "text/javascript", "/page/page.css": "text/css"}
    for path, kind in kinds.items():
        answer = serve.client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"].partition(";")[0] == kind
        assert "://" not in answer.text
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd", "/page/"):
        assert serve.client.get(path).status_code == 404, path


def test_a_wrong_address_method_or_answer_is_said_with_what_is_right(serve: Serving, image: bytes) -> None:
    assert "/openapi.json" in refused(serve.client.get("/nothing"), 404)
    answer = serve.client.get("/models/bundle/predict")
    assert refused(answer, 405) == "this address does not take GET, expected POST"
    assert answer.headers["allow"] == "POST"
    place = "/models/bundle/predict"
    wrong = serve.client.post(place, params={"answer": ["labels", "mash"]}, content=image)
    assert refused(wrong, 422).startswith("answer: got 'mash', expected some of labels, nifti")


def test_an_image_that_cannot_be_used_is_refused_without_a_place(serve: Serving) -> None:
    voxels = smooth_noise((14, 12, 10), 1)
    voxels[0, 0, 0] = np.nan
    content = nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes()
    said = refused(post(serve, content), 422)
    assert said.endswith("1 of 1680 voxels are NaN or infinite, expected numbers; repair the image")
