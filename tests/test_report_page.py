"""The page of a folder of predictions: what it says of volumes that are known, and that it needs nothing else."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from fastnnunet.cli.main import main
from fastnnunet.errors import CorruptError, NotFoundError, SpecError
from fastnnunet.evaluate.segmentations import pair_cases
from fastnnunet.images.tidy.folder import postprocess_folder, read_label_source
from fastnnunet.images.tidy.rules import cleanup_from_words
from fastnnunet.outputs.labelled import read_labelled
from fastnnunet.outputs.page.report import outliers, write_report
from fastnnunet.outputs.preview import preview
from fastnnunet.outputs.statistics import statistics, write_statistics
from fastnnunet.outputs.write import write_output

LABELS = {"background": 0, "liver": 1, "<b>spleen": 2}
SIDES = {"a": 6, "b": 6, "c": 7, "d": 6, "e": 7, "f": 2}  # of the cube that is the liver; f is the odd one


class Reader(HTMLParser):
    """Cells of the table, links, pictures and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.pictures += [values["src"]] if tag == "img" else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


def _labels(case: str) -> np.ndarray:
    labels = np.zeros((10, 11, 12), np.uint8)
    side = SIDES[case]
    labels[1 : 1 + side, 1 : 1 + side, 1 : 1 + side] = 1
    if case != "c":
        labels[9, 9:, 9:] = 2  # at the border
    return labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Label maps of six cases; three have statistics and pictures already."""
    out = tmp_path / "predictions"
    out.mkdir()
    dataset = {"labels": LABELS, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    (out / "dataset.json").write_text(json.dumps(dataset))
    (out / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    for case in SIDES:
        image = sitk.GetImageFromArray(_labels(case))
        image.SetSpacing((1, 2, 5))
        sitk.WriteImage(image, str(out / f"{case}.nii.gz"))
        if case in "abf":
            labelled = read_labelled(out / f"{case}.nii.gz", LABELS)
            write_statistics(statistics(labelled), out / f"{case}_statistics.json")
            (out / f"{case}_preview.png").write_bytes(preview(labelled))
    return out


def test_volumes_pictures_and_what_stands_out(folder: Path) -> None:
    done = write_report(folder)
    assert done.page == folder / "report.html"
    assert set(done.outliers) == {("f", "liver"), ("c", "<b>spleen")}
    html = done.page.read_text()
    found = Reader(html)
    table = {row[0]: row[1:] for row in found.rows}
    assert table["case"] == ["liver", "<b>spleen"]
    for case, side in SIDES.items():
        volume = side**3 * 10 / 1000
        assert float(table[case][0].split()[0]) == pytest.approx(volume, rel=0.005)
        assert ("(b)" in table[case][1]) == (case != "c")
    assert table["f"][0] == "0.08 !"
    assert table["c"][1] == "0 !"
    assert table["median"][0] == "2.16"
    assert (table["least"][0], table["most"][0]) == ("0.08", "3.43")
    assert "f: liver is 27 times smaller than the median" in found.text
    assert "c: <b>spleen is missing here, present in most cases" in found.text
    assert len(found.pictures) == 6
    for picture in found.pictures:
        kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", picture).groups()  # type: ignore[union-attr]
        assert kind == "jpeg"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size[0] >= 360
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    assert "<script" not in html


def test_images_make_pictures_and_intensities(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder.parent / "images"
    images.mkdir()
    for case in SIDES:
        image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(10, 11, 12)).astype(np.float32))
        image.SetSpacing((1, 2, 5))
        sitk.WriteImage(image, str(images / f"{case}_0000.nii.gz"))
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), "-i", str(images), "-o", str(folder.parent / "page.html")])
    assert end.value.code == 0
    assert "f: liver is 27 times smaller than the median" in capsys.readouterr().out
    with_images = Reader((folder.parent / "page.html").read_text()).pictures
    without = Reader(write_report(folder).page.read_text()).pictures
    assert [a == b for a, b in zip(with_images, without, strict=True)] == [True, True, False, False, False, True]
    image.SetSpacing((1, 2, 4))
    sitk.WriteImage(image, str(images / "c_0000.nii.gz"))
    done = write_report(folder, images=images)
    assert list(done.failed) == ["c"]
    assert "does not lie on the grid of its image" in done.failed["c"]


def test_statistics_alone_are_enough(folder: Path) -> None:
    for file in [*folder.glob("*.nii.gz"), *folder.glob("*.png"), folder / "dataset.json"]:
        file.unlink()
    done = write_report(folder)
    assert done.cases == 3
    assert done.outliers == {}  # too few to compare
    assert "predict with --preview" in done.page.read_text()


def test_what_is_no_folder_of_predictions(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"dataset\.json and plans\.json is missing, which predict writes"):
        write_report(tmp_path / "empty")
    with pytest.raises(NotFoundError, match="is a file, expected a folder of predictions"):
        write_report(folder / "dataset.json")
    with pytest.raises(SpecError, match=r"ending in \.html"):
        write_report(folder, folder / "page.txt")
    with pytest.raises(NotFoundError, match="--images"):
        write_report(folder, images=tmp_path / "nowhere")
    (folder / "a_statistics.json").write_text("{}")
    for file in [*folder.glob("*.nii.gz"), *folder.glob("[bf]_*")]:
        file.unlink()
    with pytest.raises(CorruptError, match=r"a_statistics\.json is no record"):  # of the only case
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_damaged_cases_are_named_beside_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a_preview.png").write_text("no picture")
    (folder / "c.nii.gz").write_bytes(b"\x1f\x8b cut off")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder)])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    html = (folder / "report.html").read_text()
    for reason in ("a_preview.png is damaged, expected a PNG", "c.nii.gz"):
        assert reason in told
        assert reason in html
    found = Reader(html)
    assert len(found.pictures) == 4
    assert not {"a", "c"} & {row[0] for row in found.rows}


def test_volumes_that_are_all_the_same_stand_out_when_one_is_not(folder: Path) -> None:
    same = [
        statistics(read_labelled(folder / f"{case}.nii.gz", LABELS, case=f"{case}{n}"))
        for n in range(3)
        for case in "ab"
    ]
    assert outliers(same) == {}
    other = statistics(read_labelled(folder / "e.nii.gz", LABELS, case="e"))
    assert list(outliers([*same, other])) == [("e", "liver")]


def test_other_outputs_among_label_maps_are_no_strangers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither `evaluate` nor `postprocess` warns of them."""
    write_report(folder)
    labelled = read_labelled(folder / "a.nii.gz", LABELS)
    write_output(labelled, "mesh", folder / "a.glb")
    (folder / "statistics.csv").write_text("case")
    for name in ("b.dcm", "b.rtstruct.dcm", "stranger.glb"):
        (folder / name).write_bytes(b"x")
    pair_cases(folder, folder, ".nii.gz")
    source = read_label_source(folder)
    cleanup = cleanup_from_words(LABELS, keep_largest=("all",))
    assert cleanup is not None
    postprocess_folder(folder, folder.parent / "cleaned", source, cleanup)
    told = caplog.text.splitlines()
    assert len(told) == 3  # of the two folders that are compared, and the one that is tidied
    assert all("stranger.glb" in line and "b.dcm" not in line for line in told)
