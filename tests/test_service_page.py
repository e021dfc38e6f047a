"""The page of the service in a browser: what it shows and hands out is what the service answers."""

import colorsys
import gzip
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fastnnunet.release.measured import Quality, Speed, note
from tests.browsers import chromium
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series
from tests.serving import Serving, serving, until

PATIENCE_MS = 60_000
SOFTWARE = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def serve(where: Path) -> Iterator[Serving]:
    two = make_toy_model(Toy(channels=2), where / "two").bundle
    flat = Toy(dims=2, channels=3, spacing=(1.0, 1.0), file_ending=".png", reader_writer="NaturalImage2DIO")
    pictures = make_toy_model(flat, where / "pictures").bundle
    bundles = [make_toy_model(Toy(), where).bundle, two.rename(two.with_name("two"))]
    note(
        bundles[1],
        Quality(dice=0.875, labels={}, cases=12, held_out=True, against="teacher"),
        Speed(seconds_per_case=0.0625, cases=4, begins_with="file", cpu=None, threads=2),
    )
    bundles.append(pictures.rename(pictures.with_name("pictures")))
    with serving(bundles, work=where / "work") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium(*SOFTWARE) as found:
        yield found


class Page:
    """An open page, and what went wrong on it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: m.type == "error" and self.problems.append(m.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("body[data-state=ready]")

    def until(self, state: str) -> None:
        self.page.wait_for_selector("body[data-state=shown], body[data-state=failed]")
        assert self.page.get_attribute("body", "data-state") == state, self.page.inner_text("#problem")

    def downloaded(self, answer: str) -> bytes:
        with self.page.expect_download() as downloading:
            self.page.click(f"#downloads button:text-is('{answer}')")
        return downloading.value.path().read_bytes()

    def volumes(self) -> dict[str, float]:
        rows = self.page.eval_on_selector_all(
            "#legend tbody tr", "rows => rows.map(r => [r.cells[1].innerText.trim(), r.cells[2].innerText])"
        )
        return {name: float(volume) for name, volume in rows}

    def canvas(self) -> np.ndarray:
        """What is drawn, (y, x, RGB)."""
        self.page.wait_for_timeout(300)
        return np.asarray(Image.open(io.BytesIO(self.page.locator("#canvas").screenshot())).convert("RGB"))

    def drawn(self, colour: str) -> int:
        """Pixels of the canvas in the hue of a colour."""
        return int(self.hue(colour).sum())

    def hue(self, colour: str) -> np.ndarray:
        """Which pixels of the canvas are of the hue of a colour, (y, x)."""
        picture = Image.fromarray(self.canvas()).convert("HSV")
        hue, saturation, value = (band.astype(int) for band in np.moveaxis(np.asarray(picture), -1, 0))
        red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        wanted = round(255 * colorsys.rgb_to_hsv(red, green, blue)[0])
        distance = np.abs(hue - wanted)
        return (np.minimum(distance, 255 - distance) < 8) & (saturation > 60) & (value > 40)


@pytest.fixture
def opened(serve: Serving, browser: Any) -> Iterator[Page]:
    page = Page(browser, serve.url)
    yield page
    page.context.close()


def test_an_example_is_predicted_drawn_and_counted(opened: Page, serve: Serving) -> None:
    page = opened.page
    page.click("#example")
    opened.until("shown")
    content = gzip.decompress(opened.downloaded("nifti"))
    labels = np.asarray(nibabel.Nifti1Image.from_bytes(content).dataobj)
    structures = serve.client.get("/models/bundle").json()["labels"]
    expected = {one["name"]: (labels == one["value"]).sum() / 1000 for one in structures}  # voxels of 1 mm
    assert min(expected.values()) > 0
    assert opened.volumes() == {name: pytest.approx(volume, abs=0.006) for name, volume in expected.items()}
    stages = page.inner_text("#times").split()
    seconds = {name: float(value) for name, value in zip(stages[::2], stages[1::2], strict=True)}
    assert list(seconds) == [
        *("upload", "queued", "load", "read", "preprocess", "infer", "postprocess", "write", "total")
    ]
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), abs=0.05 + 0.05 * sum(seconds.values()))
    for one in structures:
        before = opened.drawn(one["colour"])
        page.uncheck(f"#shown-{one['value']}")
        assert opened.drawn(one["colour"]) < before / 4
        assert before > 1000
        page.check(f"#shown-{one['value']}")
    page.fill("#opacity", "0")
    assert opened.drawn(structures[0]["colour"]) < before / 4
    for name in ("Axial", "3D"):
        page.click(f"#views button:text-is('{name}')")
        assert page.get_attribute(f"#views button:text-is('{name}')", "aria-pressed") == "true"
    assert opened.problems == []
    assert any(url.endswith("/events") for url in opened.requests)
    assert all(url.startswith((serve.url, "data:", "blob:")) for url in opened.requests), "nothing from elsewhere"
    until(lambda: len(serve.service.store.jobs()) == 1)  # of those that answers of it were, nothing is left
    (job,) = serve.service.store.jobs()  # further answers are asked of it
    page.click("#example")
    page.wait_for_function("document.body.dataset.state === 'busy'")
    opened.until("shown")
    until(lambda: job not in serve.service.store.jobs())
    page.goto("about:blank")
    until(lambda: serve.service.store.jobs() == [])  # nobody will ask for it any more


def test_files_of_several_channels_and_what_is_handed_out(opened: Page, serve: Serving, tmp_path: Path) -> None:
    files = [write_image(smooth_noise((12, 16, 18), n), tmp_path / f"case_000{n}.nii.gz") for n in (0, 1)]
    page = opened.page
    assert page.inner_text("#measured") == ""
    page.select_option("#model", "two")
    assert (
        page.inner_text("#measured")
        == "Dice 0.875 to its teacher on 12 held-out cases; 0.063 s a case from file to file"
    )
    page.set_input_files("#files", files[:1])
    page.click("#predict")
    opened.until("failed")
    send = [("image", ("x", file.read_bytes())) for file in files]
    refused = serve.client.post("/models/two/predict", files=send[:1])
    assert page.inner_text("#problem") == refused.json()["error"]

    page.set_input_files("#files", files[::-1])  # their names say which channel each is
    assert page.inner_text("#channels").splitlines() == ["channel0: case_0000.nii.gz", "channel1: case_0001.nii.gz"]
    page.click("#predict")
    page.wait_for_selector("body[data-state=shown]")
    assert page.inner_text("#problem") == ""
    offered = page.locator("#downloads button").all_inner_texts()
    known = serve.client.get("/models/two").json()["answers"]
    assert offered == [answer for answer in known if answer not in ("dicom-seg", "dicom-seg-labelmap", "rtstruct")]
    before = len([url for url in opened.requests if url.endswith("/events")])
    for answer in ("nifti", "labels", "image", "mesh", "statistics"):
        expected = serve.client.post("/models/two/predict", files=send, params={"answer": answer}).content
        assert opened.downloaded(answer) == expected
    assert len([url for url in opened.requests if url.endswith("/events")]) == before, "predicted again"
    assert opened.problems == []


def box(mask: np.ndarray) -> np.ndarray:
    """First and last row and column of a mask, without single pixels at its border."""
    return np.array([np.flatnonzero(mask.sum(axis=axis) > 3)[[0, -1]] for axis in (1, 0)]).ravel()


def test_a_zip_of_a_series_is_drawn_with_its_labels_in_place(opened: Page, serve: Serving, tmp_path: Path) -> None:
    stored = (300 + 100 * smooth_noise((12, 16, 18), 5)).astype(np.int16)
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for file in write_series(tmp_path / "series", stored, spacing_zyx=(1.0, 1.0, 1.0)):
            archive.write(file, file.name)
    page = opened.page
    page.set_input_files("#files", tmp_path / "series.zip")
    page.click("#predict")
    opened.until("shown")
    scan, labels = (
        nibabel.Nifti1Image.from_bytes(gzip.decompress(opened.downloaded(name))) for name in ("image", "nifti")
    )
    assert np.array_equal(np.asarray(scan.dataobj), stored.transpose(2, 1, 0) - 1024)  # the intercept of these files
    assert np.array_equal(scan.affine, labels.affine)
    page.click("#views button:text-is('Axial')")
    structures = serve.client.get("/models/bundle").json()["labels"]
    page.fill("#opacity", "1")
    of_labels = box(sum(opened.hue(one["colour"]) for one in structures) > 0)
    for one in structures:
        page.uncheck(f"#shown-{one['value']}")
    shown = opened.canvas().astype(int)
    assert np.ptp(shown[shown.max(axis=2) > 40], axis=1).max() < 130  # grey but for the cross and its words
    of_scan = box((shown.max(axis=2) > 40) & (np.ptp(shown, axis=2) < 20))
    voxel = (of_scan[1] - of_scan[0]) / 16
    assert np.abs(of_labels - of_scan).max() < 1.5 * voxel
    if place := os.environ.get("SCREENSHOTS"):
        page.fill("#opacity", "0.5")
        for one in structures:
            page.check(f"#shown-{one['value']}")
        page.click("#views button:text-is('Planes and 3D')")
        page.wait_for_timeout(500)
        page.screenshot(path=f"{place}/series.png", full_page=True)
    assert opened.problems == []


def test_of_several_series_one_is_chosen(opened: Page, serve: Serving, tmp_path: Path) -> None:
    uids = ["1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"]
    packed = tmp_path / "study.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for seed, uid in enumerate(uids):
            stored = (60 * smooth_noise((10, 14, 16), seed)).astype(np.int16)
            for file in write_series(tmp_path / uid, stored, series_uid=uid, SeriesDescription=f"Knee {seed}"):
                archive.write(file, f"{uid}/{file.name}")
    page = opened.page
    page.set_input_files("#files", str(packed))
    assert page.is_hidden("#series-row")
    page.click("#predict")
    opened.until("failed")
    assert page.inner_text("#problem") == "The scan holds several series. Choose one and predict again."
    choices = page.eval_on_selector_all("#series option", "all => all.map(one => [one.value, one.textContent])")
    assert choices == [[uid, f"10 image(s), CT, Knee {seed} ({uid})"] for seed, uid in enumerate(uids)]
    page.select_option("#series", uids[1])
    page.click("#predict")
    opened.until("shown")
    wanted = serve.client.post(f"/models/bundle/predict?series={uids[1]}", content=packed.read_bytes())
    assert opened.downloaded("nifti") == wanted.content
    page.set_input_files("#files", str(packed.rename(tmp_path / "other.zip")))  # another scan, another choice
    page.wait_for_selector("#series-row", state="hidden")


def test_a_picture_is_drawn_as_it_is_stored(opened: Page, tmp_path: Path) -> None:
    pixels = np.full((60, 80, 3), 128, np.uint8)
    pixels[5:20, 10:30] = (255, 0, 0)
    pixels[40:55, 50:70] = (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    page = opened.page
    page.select_option("#model", "pictures")
    page.set_input_files("#files", tmp_path / "a.png")
    page.click("#predict")
    opened.until("shown")
    if place := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(500)
        page.screenshot(path=f"{place}/picture.png", full_page=True)
    page.fill("#opacity", "0")
    red, blue = (np.argwhere(opened.hue(colour)).mean(axis=0) for colour in ("#ff0000", "#0000ff"))
    assert (red < blue).all(), "upside down or mirrored"
    assert page.locator("#views button").all_inner_texts() == ["Axial"]
    page.fill("#opacity", "1")
    shown = sum(opened.drawn(colour) for colour in ("#e69f00", "#56b4e9"))
    assert shown > 1000
    assert opened.problems == []


def test_dropped_files_and_a_token(where: Path, browser: Any) -> None:
    with serving([where / "bundle"], "a token of twenty characters", work=where / "locked") as locked:
        opened = Page(browser, locked.url)
        page = opened.page
        assert page.inner_text("#problem") == locked.client.get("/models").json()["error"]
        page.fill("#token", "a token of twenty characters")
        page.keyboard.press("Tab")
        page.wait_for_selector("#model option", state="attached")
        assert page.inner_text("#problem") == ""
        dropped = page.evaluate_handle(
            "() => { const d = new DataTransfer(); d.items.add(new File(['x'], 'a.zip')); return d; }"
        )
        page.dispatch_event("#canvas", "drop", {"dataTransfer": dropped})
        page.wait_for_selector("#channels li")
        assert page.inner_text("#channels") == "channel0: a.zip"
        assert page.is_enabled("#predict")
        opened.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_keyboard_names_and_colours(serve: Serving, browser: Any, scheme: str) -> None:
    opened = Page(browser, serve.url, color_scheme=scheme)
    page, reached = opened.page, []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]")
        )
    assert [name for name, _ in reached if name] == ["model", "files", "example", "canvas"]
    assert all(outline == "solid" for name, outline in reached if name)
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, select, canvas, progress, section, form')].filter(e =>"
        " !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.id)"
    )
    assert nameless == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every(v => v < 128)")
    assert dark == (scheme == "dark")
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert opened.problems == []
    opened.context.close()
