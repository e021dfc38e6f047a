"""The page of the service in a browser: what it shows and hands out is what the service answers."""

import colorsys
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from tests.browsers import chromium
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.serving import Serving, serving

PATIENCE_MS = 60_000
SOFTWARE = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def serve(where: Path) -> Iterator[Serving]:
    two = make_toy_model(Toy(channels=2), where / "two").bundle
    bundles = [make_toy_model(Toy(), where).bundle, two.rename(two.with_name("two"))]
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

    def drawn(self, colour: str) -> int:
        """Pixels of the canvas in the hue of a colour."""
        self.page.wait_for_timeout(300)
        picture = Image.open(io.BytesIO(self.page.locator("#canvas").screenshot())).convert("HSV")
        hue, saturation, value = (band.astype(int) for band in np.moveaxis(np.asarray(picture), -1, 0))
        red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        wanted = round(255 * colorsys.rgb_to_hsv(red, green, blue)[0])
        distance = np.abs(hue - wanted)
        return int(((np.minimum(distance, 255 - distance) < 8) & (saturation > 60) & (value > 40)).sum())


@pytest.fixture
def opened(serve: Serving, browser: Any) -> Iterator[Page]:
    page = Page(browser, serve.url)
    yield page
    page.context.close()


def viewed(serve: Serving) -> str:
    """The answer that the page asks for first, and hands out without another prediction."""
    answers = serve.client.get("/models/bundle").json()["answers"]
    return "nifti" if "nifti" in answers else "labels"


def test_an_example_is_predicted_drawn_and_counted(opened: Page, serve: Serving) -> None:
    page = opened.page
    page.click("#example")
    opened.until("shown")
    content = gzip.decompress(opened.downloaded(viewed(serve)))
    labels = np.asarray(nibabel.Nifti1Image.from_bytes(content).dataobj)
    structures = serve.client.get("/models/bundle").json()["labels"]
    expected = {one["name"]: (labels == one["value"]).sum() / 1000 for one in structures}  # voxels of 1 mm
    assert min(expected.values()) > 0
    assert opened.volumes() == {name: pytest.approx(volume, abs=0.006) for name, volume in expected.items()}
    assert {"read", "infer", "total"} <= set(page.inner_text("#times").split())
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
    assert serve.service.store.jobs() == [], "what was fetched is not kept"


def test_files_of_several_channels_and_what_is_handed_out(opened: Page, serve: Serving, tmp_path: Path) -> None:
    files = [write_image(smooth_noise((12, 16, 18), n), tmp_path / f"case_000{n}.nii.gz") for n in (0, 1)]
    page = opened.page
    page.select_option("#model", "two")
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
    for answer in (viewed(serve), "labels"):
        expected = serve.client.post("/models/two/predict", files=send, params={"answer": answer}).content
        assert opened.downloaded(answer) == expected
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
