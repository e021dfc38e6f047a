"""The report on students of unlabelled scans: numbers, pictures pixel by pixel, odd names, one and 300 cases."""

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from fastnnunet.bench.report.images.facts import ImagesFacts, LeftOutScan, ReportedStudent, value_names
from fastnnunet.bench.report.images.page import images_page, write_images_report
from fastnnunet.bench.report.images.pictures import (
    OTHER_LABEL,
    STUDENT_ONLY,
    TEACHER_ONLY,
    JudgedCase,
    ScanFiles,
    cases_to_show,
    judged_case,
    scan_picture,
)
from fastnnunet.errors import FastnnUNetError, ImageError, MismatchError, SpecError
from fastnnunet.evaluate.calibration import case_calibration, summarise
from fastnnunet.evaluate.fidelity import Fidelity, fidelity_gap, fidelity_of
from fastnnunet.outputs.colours import COLOURS

ODD = "<script>alert(1)</script>&'\"$x_"


def write(path: Path, array: np.ndarray, direction: tuple[float, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1), spacing=(1, 1, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing])
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))


def scan_files(folder: Path, **how: object) -> ScanFiles:
    """Four slices of 40 x 40 with most of the difference in the third; everything in the upper left of the array."""
    rng = np.random.default_rng(0)
    teacher = np.zeros((4, 40, 40), np.uint8)
    teacher[:, 8:20, 8:20] = 1
    student = teacher.copy()
    student[1, 8, 8] = 0
    student[2, 8:11, 8:20] = 0  # missed: 36
    student[2, 20:22, 8:20] = 2  # seen by the student alone: 24
    student[2, 14:18, 10:16] = 2  # another label: 24
    for name, array in (("teacher", teacher), ("student", student)):
        write(folder / name / "case.nii.gz", array, **how)
    write(folder / "images" / "case_0000.nii.gz", rng.normal(100, 30, (4, 40, 40)).astype(np.float32), **how)
    return ScanFiles(
        case="case",
        channels=(folder / "images" / "case_0000.nii.gz",),
        teacher=folder / "teacher" / "case.nii.gz",
        students={"r4": folder / "student" / "case.nii.gz"},
    )


def pixels(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def share_of(picture: np.ndarray, colour: str) -> float:
    """Pixels that a colour is mixed into with weight 0.7: none of grey could be so near."""
    grey = (picture - 0.7 * np.array(rgb(colour))) / 0.3
    return float(((grey.max(-1) - grey.min(-1) < 8) & (grey.min(-1) > -4)).mean())


def show(files: ScanFiles, **more: object) -> JudgedCase:
    return judged_case(files, "worst", 0.9, **{"reader_writer": "SimpleITKIO", "is_ct": False, **more})


def test_slice_and_differences_of_a_case(tmp_path: Path) -> None:
    found = show(scan_files(tmp_path))
    assert found.where.startswith("slice 3 of 4")
    assert found.values == (1, 2)
    assert [p.caption.split(":")[0] for p in found.pictures] == [
        "contours of teacher",
        "contours of r4",
        "where r4 and teacher differ",
    ]
    assert "differ: 84 of 1600 pixels" in found.pictures[2].caption
    teacher, student, differ = (pixels(p.png) for p in found.pictures)
    # cut to rows 0 to 37 and columns 0 to 35: 16 pixels around what is labelled
    assert teacher.shape == differ.shape == (480, round(480 * 36 / 38), 3)
    for colour, voxels in ((TEACHER_ONLY, 36), (STUDENT_ONLY, 24), (OTHER_LABEL, 24)):
        assert share_of(differ, colour) == pytest.approx(voxels / (38 * 36), rel=0.03)
    lines = (teacher == rgb(COLOURS[0])).all(-1)
    rows, columns = (np.flatnonzero(lines.any(axis=a)) for a in (1, 0))
    per_voxel = 480 / 38
    edges = [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]
    assert np.array(edges) / per_voxel == pytest.approx([8, 20, 8, 20], abs=0.1)
    middle = lines[round(14 * per_voxel)]
    assert 3 <= middle.sum() <= 5  # two lines of two pixels, not filled
    assert (student == rgb(COLOURS[1])).all(-1).any()
    assert not (teacher == rgb(COLOURS[1])).all(-1).any()


@pytest.mark.parametrize(
    ("direction", "upside_down", "mirrored"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), False, False),  # LPS: as DICOM has it
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), True, True),  # RAS: as NIfTI files are
        ((1, 0, 0, 0, 0, 1, 0, 1, 0), True, False),  # rows go to the head: coronal
        ((0, 0, 1, -1, 0, 0, 0, -1, 0), False, True),  # columns go to the front, rows to the feet: sagittal
    ],
)
def test_slices_hang_as_radiologists_hang_them(
    tmp_path: Path, direction: tuple[float, ...], upside_down: bool, mirrored: bool
) -> None:
    labels = np.zeros((3, 40, 40), np.uint8)
    labels[1, 2:6, 5:9] = 1
    write(tmp_path / "labels.nii.gz", labels, direction)
    write(tmp_path / "scan_0000.nii.gz", np.zeros((3, 40, 40), np.float32), direction)
    how = {"reader_writer": "SimpleITKIO", "is_ct": False, "labels": tmp_path / "labels.nii.gz"}
    rows, columns = np.nonzero((pixels(scan_picture((tmp_path / "scan_0000.nii.gz",), **how)) > 0).any(-1))
    y, x = ((rows.min() + rows.max() + 1) / 2 / 12, (columns.min() + columns.max() + 1) / 2 / 12)  # 12 pixels a voxel
    assert (y, x) == pytest.approx((40 - 4 if upside_down else 4, 40 - 7 if mirrored else 7), abs=0.2)


def test_windows(tmp_path: Path) -> None:
    """CT shows what lies around the labelled values, MR all but the extremes; pixels keep their shape."""
    labels = np.zeros((1, 40, 20), np.uint8)
    labels[0, 0:20] = 1
    scan = np.where(labels, 50, -1000).astype(np.float32)
    scan[0, 30:] = 3000
    scan[0, 20:25] = 0
    write(tmp_path / "ct_0000.nii.gz", scan, spacing=(2, 0.5, 1))
    write(tmp_path / "labels.nii.gz", labels, spacing=(2, 0.5, 1))
    how = {"reader_writer": "SimpleITKIO", "labels": tmp_path / "labels.nii.gz"}
    shown = pixels(scan_picture((tmp_path / "ct_0000.nii.gz",), is_ct=True, **how))
    assert shown.shape == (240, 480, 3)  # 20 mm x 40 mm, 6 pixels a row
    grey = [int(shown[round(6 * row), 240, 0]) for row in (10, 22.5, 27.5, 35)]
    assert grey == pytest.approx([127, 64, 0, 255], abs=2)  # -50 HU is black, 150 white
    plain = pixels(scan_picture((tmp_path / "ct_0000.nii.gz",), is_ct=False, **how))
    assert int(plain[60, 240, 0]) == pytest.approx(255 * 1050 / 4000, abs=3)


def test_pictures_in_colour(tmp_path: Path) -> None:
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[..., 0] = 200
    picture[10:20, 20:40] = (10, 20, 250)
    mask = np.zeros((30, 60), np.uint8)
    mask[10:20, 20:40] = 1
    Image.fromarray(picture).save(tmp_path / "cells_0000.png")
    for name in ("teacher.png", "r4.png"):
        Image.fromarray(mask).save(tmp_path / name)
    files = ScanFiles(
        case="cells",
        channels=(tmp_path / "cells_0000.png",),
        teacher=tmp_path / "teacher.png",
        students={"r4": tmp_path / "r4.png"},
    )
    found = show(files, reader_writer="NaturalImage2DIO")
    differ = pixels(found.pictures[2].png)
    assert "differ: 0 of 1800 pixels" in found.pictures[2].caption
    red, _, blue = differ[len(differ) // 2, differ.shape[1] // 2]
    assert blue > 200 > red
    assert differ[5, 5, 0] > 150 > differ[5, 5, 2]


def test_label_maps_of_another_image_are_refused(tmp_path: Path) -> None:
    files = scan_files(tmp_path)

    def refused(kind: type[FastnnUNetError], match: str) -> None:
        with pytest.raises(kind, match=match):
            show(files)

    write(files.teacher, np.zeros((4, 40, 40), np.uint8), (-1, 0, 0, 0, -1, 0, 0, 0, 1))
    refused(MismatchError, "case: direction of the image")
    write(files.teacher, np.zeros((4, 40, 41), np.uint8))
    refused(MismatchError, "label map of shape .4, 40, 41.")
    files.teacher.write_bytes(b"no image")
    refused(ImageError, "case.nii.gz")


def facts(dice: dict[str, dict[str, float]], **more: object) -> ImagesFacts:
    first = fidelity_of("r2", dice)
    second = fidelity_of("r4", {case: {k: v * 0.9 for k, v in d.items()} for case, d in dice.items()})
    rng = np.random.default_rng(1)
    p, q = (rng.dirichlet([0.2] * 3, (4, 8, 8)).transpose(3, 0, 1, 2) for _ in range(2))
    students = (
        ReportedStudent(
            tag="r2",
            parameters=7_810_000,
            bundle_bytes=31_400_000,
            fidelity=first,
            seconds_per_case=0.5,
            calibration=summarise(case_calibration(q, p)),
            curve=((0, 0.1), (1, 0.7)),
        ),
        ReportedStudent(tag="r4", parameters=1_950_000, bundle_bytes=7_900_000, fidelity=second),
    )
    known = {
        "model": "Dataset004 teacher",
        "configuration": "3d_fullres",
        "folds": ("0", "1", "2"),
        "mirrored": True,
        "created": "2026-01-02T03:04:05+00:00",
        "trained_scans": 77,
        "alpha": 0.5,
        "students": students,
        "teacher_seconds_per_case": 60.0,
        "gaps": (fidelity_gap(first, second),),
    }
    return ImagesFacts(**{**known, **more})


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href") or k.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_numbers_are_on_the_page(tmp_path: Path) -> None:
    dice = {"one": {"a": 0.9, "b": 0.5}, "two": {"a": 0.7, "b": float("nan")}, "three": {"a": 0.8, "b": 0.6}}
    page = facts(
        dice,
        pictures=(show(scan_files(tmp_path)),),
        left_out=(LeftOutScan(case="bad one", reason="nothing seen", numbers={"voxels": 3, "dice": 0.12345}),),
        left_out_rule="left out are scans in which nothing is seen",
        rare_labels={"b": 2},
        command="fastnnunet distill images -m '<model>'",
    )
    write_images_report(page, tmp_path / "out" / "report.html")
    found = Reader((tmp_path / "out" / "report.html").read_text())
    for text in (
        "r2 agrees with its teacher with a mean Dice of 0.675",  # of 0.8 and 0.55
        "on 3 scans held out",
        "It takes 500 ms a scan, 120 times faster than its teacher, and its bundle has 31.4 MB.",
        "teacher, 3 folds, mirrored",
        "7.81 million",
        "r2 less r4 on the same scans: +6.75 points of Dice",
        "b (2)",
        "two 0.700 0.630 0.700 – three",  # r2, r4, then the labels of r2
        "worst: case",
        "bad one nothing seen voxels 3, dice 0.123",
        "1 scan. Left out are scans in which nothing is seen",
        "fastnnunet distill images -m '<model>'",
        "77 scans with the teacher's labels and soft labels, none by hand",
    ):
        assert text in found.text
    for score in (s := page.students[0].calibration.teacher_border).brier, s.nll, s.kl, s.ece:
        assert f"{score:.4f}" in found.text
    assert found.tags.count("img") == 3
    assert all(link.startswith("data:") for link in found.links)
    data = next(link for link in found.links if link.startswith("data:image/png;base64,"))
    assert pixels(base64.b64decode(data.partition(",")[2])).shape[-1] == 3
    assert found.tags.count("svg") == 3
    assert "nan" not in found.text.lower()


def test_scans_that_were_kept() -> None:
    bad = LeftOutScan(case="bad", reason="nothing seen")
    rule = "left out are scans in which nothing is seen"
    dice = {"one": {"a": 0.9}, "two": {"a": 0.7}}
    found = Reader(images_page(facts(dice, left_out=(bad,), left_out_rule=rule, kept_all=True)))
    assert f"1 scan. They were kept nevertheless. Without --keep-all {rule}" in found.text
    assert "left out 0 scans" in found.text
    assert "With 2 held out it says little" in found.text


def test_plots_do_not_depend_on_what_others_have_set() -> None:
    """nnU-Net calls `seaborn.set(font_scale=2.5)`, for the whole process, whenever it plots a training."""
    import matplotlib as mpl

    page = facts({"one": {"a": 0.9}, "two": {"a": 0.7}})
    expected = images_page(page)
    larger = {name: 30 for name in ("font.size", "axes.labelsize", "xtick.labelsize", "legend.fontsize")}
    with mpl.rc_context(larger | {"axes.facecolor": "#eaeaf2"}):
        assert images_page(page) == expected
        assert mpl.rcParams["axes.labelsize"] == 30


@pytest.mark.parametrize(("alpha", "expected"), [(0, "labels, none"), (1, "soft labels, none")])
def test_it_tells_what_was_learnt(alpha: float, expected: str) -> None:
    found = Reader(images_page(facts({"one": {"a": 0.9}}, alpha=alpha)))
    assert f"77 scans with the teacher's {expected} by hand" in found.text


@pytest.mark.parametrize(("temperature", "at_end"), [(1.3, False), (7.9999, True), (0.25, True)])
def test_a_temperature_at_the_end_of_its_range_is_doubted(temperature: float, at_end: bool) -> None:
    page = facts({"one": {"a": 0.9}}, training="80 epochs; sgd")
    students = tuple(replace(student, temperature=temperature) for student in page.students)
    text = Reader(images_page(replace(page, students=students))).text
    doubted = "Of r2, r4 that is the end of the range that is looked at, 0.25 to 8: look at the training"
    assert (doubted in text) == at_end
    assert "80 epochs; sgd" in text


def test_names_do_no_harm() -> None:
    dice = {ODD: {ODD: 0.9}, "b\udcff": {ODD: 0.5}}
    clean = Reader(images_page(facts({"x": {"l": 0.9}, "y": {"l": 0.5}}, left_out=(LeftOutScan(case="", reason=""),))))
    odd = facts(
        dice,
        model=ODD,
        configuration=ODD,
        left_out=(LeftOutScan(case=ODD, reason=ODD, numbers={ODD: ODD}),),
        left_out_rule=ODD,
        rare_labels={ODD: 1},
        notes=(ODD,),
        hardware={ODD: ODD},
        command=ODD,
    )
    found = Reader(images_page(odd))
    assert "script" not in found.tags
    assert set(found.tags) - {"pre"} == set(clean.tags)
    assert found.links == clean.links
    assert found.text.count(ODD) > 10


def test_one_case_and_three_hundred(tmp_path: Path) -> None:
    one = facts({"alone": {"a": 0.91}}, students=(facts({"alone": {"a": 0.91}}).students[1],), gaps=())
    found = Reader(images_page(one))
    assert "With one scan held out there is no interval" in found.text
    assert "svg" not in found.tags
    assert "details" not in found.tags
    rng = np.random.default_rng(0)
    many = {f"scan_{i:03d}": {f"label {k}": float(rng.uniform()) for k in range(117)} for i in range(300)}
    write_images_report(facts(many), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2e6
    found = Reader((tmp_path / "report.html").read_text())
    assert all(case in found.text for case in many)
    assert "label 116" in found.text
    assert "details" in found.tags
    assert "105 more labels" in found.text


def test_which_cases_are_shown() -> None:
    def of(*dice: float) -> Fidelity:
        return fidelity_of("r4", {f"c{i}": {"a": d} for i, d in enumerate(dice)})

    assert cases_to_show(of(0.5, 0.9, 0.7, float("nan"))) == {"c1": "best", "c2": "median", "c0": "worst"}
    assert cases_to_show(of(0.1, 0.2, 0.3, 0.4)) == {"c3": "best", "c1": "median", "c0": "worst"}
    assert cases_to_show(of(0.5, 0.9)) == {"c1": "best", "c0": "worst"}
    assert cases_to_show(of(0.5, float("nan"))) == {"c0": "only"}
    assert cases_to_show(of(float("nan"))) == {}


def test_names_of_values() -> None:
    assert value_names({"background": 0, "liver": 1, "ignore": 2}) == {"liver": 1}
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    assert value_names(regions, (1, 2, 3)) == {"whole": 1, "core": 2, "enhancing": 3}


def test_facts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole = facts({"one": {"a": 0.9}})
    with pytest.raises(SpecError, match="no student"):
        facts({"one": {"a": 0.9}}, students=())
    with pytest.raises(SpecError, match="r4 was judged on other cases"):
        facts({"one": {"a": 0.9}}, students=(whole.students[0], facts({"two": {"a": 0.9}}).students[1]))
    (tmp_path / "file").write_text("")
    with pytest.raises(FastnnUNetError):
        write_images_report(whole, tmp_path / "file" / "report.html")
