"""What is written of a prediction beside the label map: statistics and previews, against SimpleITK and Pillow."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from fastnnunet.cli.main import main
from fastnnunet.errors import CorruptError, ImageError, MismatchError, SpecError
from fastnnunet.images.io import image_io
from fastnnunet.outputs.colours import cielab_of, colour_of, rgb_of
from fastnnunet.outputs.labelled import LabelledImage, grid_of, read_labelled, structures_of
from fastnnunet.outputs.preview import preview
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.outputs.statistics import gather, read_statistics, statistics, table, write_statistics
from fastnnunet.outputs.write import write_output
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series

SHAPE = (9, 12, 11)
LABELS = {"background": 0, "liver": 1, "spleen": 3, "never there": 4, "ignore": 5}
TURNED = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0, -0.6, 0.8, 0.0)  # rows of a rotation, axes x, y, z in columns


def _files(folder: Path, direction: tuple[float, ...] = TURNED) -> tuple[Path, Path]:
    """An image and a label map on an oblique grid."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name, array in {
        "image": rng.normal(40, 90, SHAPE).astype(np.float32),
        "labels": rng.choice(np.array((0, 0, 1, 3), np.uint8), SHAPE),
    }.items():
        if name == "labels":
            array[0], array[:, -1], array[..., 0] = 0, 0, 0
            array[array == 3] *= (np.indices(SHAPE)[2] > 5)[array == 3]
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((0.7, 1.1, 2.5))
        image.SetOrigin((-12.5, 3.0, 40.0))
        image.SetDirection(direction)
        sitk.WriteImage(image, str(folder / f"{name}.nii.gz"))
    return folder / "image.nii.gz", folder / "labels.nii.gz"


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_statistics_are_those_of_simpleitk(reader: str, tmp_path: Path) -> None:
    image, labels = _files(tmp_path)
    labelled = read_labelled(labels, LABELS, image=(image,), reader_writer=reader, channel_names=("CT",))
    found = {s.label: s for s in statistics(labelled).structures}
    assert list(found) == ["liver", "spleen", "never there"]

    label_map, grey = sitk.ReadImage(str(labels)), sitk.ReadImage(str(image))
    shapes, intensities = sitk.LabelShapeStatisticsImageFilter(), sitk.LabelIntensityStatisticsImageFilter()
    shapes.Execute(label_map)
    intensities.Execute(label_map, grey)
    for value, name in ((1, "liver"), (3, "spleen")):
        ours = found[name]
        assert ours.voxels == shapes.GetNumberOfPixels(value)
        assert ours.volume_ml == pytest.approx(shapes.GetPhysicalSize(value) / 1000, rel=1e-5)
        assert ours.centroid_mm == pytest.approx(shapes.GetCentroid(value), abs=1e-3)
        voxels = sitk.GetArrayFromImage(grey)[sitk.GetArrayFromImage(label_map) == value]
        got = ours.intensity["CT"]
        assert (got.min, got.max) == (intensities.GetMinimum(value), intensities.GetMaximum(value))
        assert got.mean == pytest.approx(intensities.GetMean(value), rel=1e-6)
        assert got.std == pytest.approx(np.std(voxels.astype(float)), rel=1e-6)
        assert got.median == pytest.approx(np.median(voxels), rel=1e-6)
        assert ours.touches_border
    empty = found["never there"]
    assert (empty.voxels, empty.volume_ml, empty.centroid_mm, empty.intensity) == (0, 0, None, {})
    assert not empty.touches_border


def _toy(labels_ZYX: np.ndarray, labels: dict[str, Any] = LABELS, **more: Any) -> LabelledImage:
    return LabelledImage(
        case="toy",
        labels_ZYX=labels_ZYX,
        affine=np.diag((1.0, 2.0, 3.0, 1.0)),
        structures=structures_of(labels),
        **more,
    )


def test_one_voxel_regions_and_the_border() -> None:
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1, 2, 3], labels[4, 4, 4] = 1, 2
    regions = {"background": 0, "whole": [1, 2], "core": 2, "inner": [1]}
    whole, core, inner = statistics(_toy(labels, regions)).structures
    assert [s.voxels for s in (whole, core, inner)] == [2, 1, 1]
    assert [s.touches_border for s in (whole, core, inner)] == [True, True, False]
    assert inner.centroid_mm == (3, 4, 3)
    assert whole.centroid_mm == (3.5, 6, 7.5)
    assert inner.volume_ml == 0.006


def test_record_and_table_come_back(tmp_path: Path) -> None:
    image, labels = _files(tmp_path)
    found = statistics(read_labelled(labels, LABELS, image=(image,), channel_names=("CT",)))
    write_statistics(found, tmp_path / "a_statistics.json")
    assert read_statistics(tmp_path / "a_statistics.json") == found
    rows = list(csv.DictReader(io.StringIO(table([found, found]))))
    assert [row["label"] for row in rows] == ["liver", "spleen", "never there"] * 2
    assert float(rows[1]["CT_median"]) == found.structures[1].intensity["CT"].median
    assert float(rows[0]["centroid_z_mm"]) == found.structures[0].centroid_mm[2]
    assert rows[2]["CT_mean"] == rows[2]["centroid_x_mm"] == ""
    for text in ("{}", "[]", '{"case": 1, "structures": [{}]}', "{"):
        (tmp_path / "a_statistics.json").write_text(text)
        with pytest.raises(CorruptError, match="no record of"):
            read_statistics(tmp_path / "a_statistics.json")


def _panels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_preview_shows_each_side_where_radiologists_have_it() -> None:
    """Labels at the right, front and head of the patient are at the left, top and top, however the array runs."""
    labels = np.zeros((20, 20, 20), np.uint8)  # head, back, left
    labels[2:18, 2:18, 2:6] = 1
    for flips in [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)]:
        step = np.diag(np.array(flips[::-1], float))
        affine = np.eye(4)
        affine[:3, :3] = step
        stored = labels[tuple(slice(None, None, f) for f in flips)]
        png = preview(
            LabelledImage(case="a", labels_ZYX=stored, affine=affine, structures=structures_of({"b": 0, "right": 1}))
        )
        picture = _panels(png)
        seen = (picture == rgb_of(colour_of(1))).all(axis=-1)[:360]
        columns = np.flatnonzero(seen[:, :376].any(axis=0))  # of the axial plane
        assert 30 < columns.min() < 60
        assert 100 < columns.max() < 130
        assert seen[:, 376:744].any()  # coronal, and sagittal at its middle
        assert seen[:, 744:].any()


def test_preview_of_axes_in_another_order() -> None:
    labels_SPL = np.zeros((12, 16, 20), np.uint8)
    labels_SPL[8:11, 3:6, 2:7] = 1
    grey = np.random.default_rng(0).normal(size=labels_SPL.shape).astype(np.float32)
    structures = structures_of({"b": 0, "a": 1})
    straight = LabelledImage(
        case="a", labels_ZYX=labels_SPL, affine=np.eye(4), structures=structures, image_CZYX=grey[None]
    )
    affine = np.eye(4)[:, [1, 2, 0, 3]]  # x of the array runs to the back, y to the head, z to the left
    other = LabelledImage(
        case="a",
        labels_ZYX=labels_SPL.transpose(2, 0, 1),
        affine=affine,
        structures=structures,
        image_CZYX=grey.transpose(2, 0, 1)[None],
    )
    assert preview(straight) == preview(other)


@pytest.mark.parametrize("shape", [(1, 9, 7), (4, 1, 6), (1, 1, 1), (3, 4, 5)])
def test_preview_of_nothing_and_of_flat_images(shape: tuple[int, ...]) -> None:
    picture = _panels(preview(_toy(np.zeros(shape, np.uint8), image_CZYX=np.zeros((1, *shape), np.float32))))
    assert picture.shape[0] > 16
    many = {"background": 0, **{f"a long name of a label {n}": n for n in range(1, 90)}}
    preview(_toy(np.arange(np.prod(shape)).reshape(shape).astype(np.uint8), many))


def test_colours_are_apart_and_as_highdicom_has_them() -> None:
    colours = [colour_of(n) for n in range(1, 118)]
    assert len(set(colours)) == len(colours)
    from highdicom.color import CIELabColor

    for colour in colours[::7]:
        np.testing.assert_allclose(cielab_of(colour), CIELabColor.from_string(colour).value, atol=250)


@pytest.mark.parametrize("reader", ["NaturalImage2DIO", "Tiff3DIO", "SimpleITKIO"])
def test_grids_without_a_patient(reader: str, tmp_path: Path) -> None:
    if reader == "Tiff3DIO":
        labels = np.ones((3, 4, 5), np.uint8)
        image_io(reader).write(labels, tmp_path / "a.tif", {"spacing": [3.0, 2.0, 1.0]})
        found = read_labelled(tmp_path / "a.tif", LABELS, reader_writer=reader)
        assert statistics(found).structures[0].volume_ml == pytest.approx(0.36)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5), np.uint8)), str(tmp_path / "a.png"))
        found = read_labelled(tmp_path / "a.png", LABELS, reader_writer=reader)
        assert statistics(found).structures[0].volume_ml is None
    assert not found.in_patient
    assert statistics(found).coordinates.startswith("mm from the first voxel")


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    image, labels = _files(tmp_path / "a")
    other, _ = _files(tmp_path / "b", tuple(np.eye(3).ravel()))
    with pytest.raises(MismatchError, match="does not lie on the grid of its image"):
        read_labelled(labels, LABELS, image=(other,))
    with pytest.raises(ImageError, match="not a label map"):
        read_labelled(image, LABELS)
    with pytest.raises(MismatchError, match="expected a label map on the grid"):
        _toy(np.zeros((2, 2, 2), np.uint8), image_CZYX=np.zeros((1, 3, 2, 2), np.float32))


def test_grid_of_four_axes(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), np.float32), isVector=False)
    image.SetSpacing((1, 2, 3, 4))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    _, properties = image_io("SimpleITKIO").read([tmp_path / "a.nii.gz"])
    affine, in_patient = grid_of(properties)
    np.testing.assert_allclose(np.diag(affine), (1, 2, 3, 1))
    assert in_patient


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": ("nifti", "nifti")}, "expected each once"),
        ({"formats": ("gif",)}, "got 'gif', expected some of image"),
        ({"formats": ()}, "got none"),
        ({"segmentation_type": "fractional"}, "expected one of binary, labelmap"),
    ],
)
def test_outputs_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        OutputSpec(**options)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two cases, with everything that needs no DICOM."""
    folder = tmp_path_factory.mktemp("predicted")
    bundle = make_toy_model(Toy(), folder).bundle
    for name in "ab":
        write_image(smooth_noise((16, 22, 27), ord(name)), folder / "in" / f"{name}_0000.nii.gz", (1.1, 1.0, 0.9))
    words = ("predict", "-i", folder / "in", "-o", folder / "out", "-m", bundle, "--threads", "1")
    with pytest.raises(SystemExit) as end:
        main([*map(str, words), "--statistics", "--preview", "--output-format", "image"])
    assert end.value.code == 0
    return folder


def test_predict_writes_them(predicted: Path) -> None:
    out = predicted / "out"
    names = {p.name for p in out.iterdir()}
    assert {"a.nii.gz", "a_statistics.json", "a_preview.png", "statistics.csv", "plans.json"} <= names
    label_map = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "b.nii.gz")))
    rows = [r for r in csv.DictReader((out / "statistics.csv").open()) if r["case"] == "b"]
    assert {int(r["values"]): int(r["voxels"]) for r in rows} == {
        int(r["values"]): int((label_map == int(r["values"])).sum()) for r in rows
    }
    assert sum(int(r["voxels"]) for r in rows) == np.count_nonzero(label_map) > 0
    record = json.loads((out / "a_statistics.json").read_text())
    assert record["shape_zyx"] == [16, 22, 27]
    assert Image.open(out / "a_preview.png").size[0] >= 360


def test_a_case_without_its_side_files_is_predicted_again(predicted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = predicted / "out"
    (out / "b_preview.png").unlink()
    bundle = next(predicted.glob("**/bundle.json")).parent
    words = ("predict", "-i", predicted / "in", "-o", out, "-m", bundle, "--threads", "1", "--c")
    with pytest.raises(SystemExit):
        main([*map(str, words), "--statistics", "--preview"])
    assert "1 case(s) predicted" in capsys.readouterr().out
    assert (out / "b_preview.png").is_file()


def test_dicom_of_what_is_none_is_refused_at_once(predicted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = next(predicted.glob("**/bundle.json")).parent
    words = ("predict", "-i", predicted / "in", "-o", predicted / "seg", "-m", bundle, "--threads", "1")
    for more, said in (
        (["--output-format", "dicom-seg"], "give the folder of its DICOM slices"),
        (["--output-format", "nifti", "rtstruct"], "an RTSTRUCT has to refer to"),
        (["--label-codes", "x.yaml"], "codes are written into DICOM alone"),
        (["--segmentation-type", "labelmap"], "add --output-format dicom-seg"),
        (["--output-format", "nifti", "image"], "leave one out"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*map(str, words), *more])
        assert end.value.code == 2
        assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (predicted / "seg").exists()


def test_one_file_has_everything_beside_it(predicted: Path) -> None:
    bundle = next(predicted.glob("**/bundle.json")).parent
    image, file = predicted / "in" / "a_0000.nii.gz", predicted / "single" / "liver.nii.gz"
    words = ("predict", "-i", image, "-o", file, "-m", bundle, "--threads", "1", "--statistics", "--preview")
    with pytest.raises(SystemExit) as end:
        main([*map(str, words), "--output-format", "nifti", "mesh"])
    assert end.value.code == 0
    beside = ("liver.glb", "liver_stl", "liver_statistics.json", "liver_statistics.csv", "liver_preview.png")
    assert {p.name for p in file.parent.iterdir()} == {"liver.nii.gz", *beside}
    (row, *_) = csv.DictReader((file.parent / "liver_statistics.csv").open())
    assert row["case"] == "a"


def test_one_file_of_another_format_is_refused(predicted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = next(predicted.glob("**/bundle.json")).parent
    image, file = predicted / "in" / "a_0000.nii.gz", predicted / "stl" / "liver.stl"
    with pytest.raises(SystemExit) as end:
        main([*map(str, ("predict", "-i", image, "-o", file, "-m", bundle)), "--output-format", "mesh"])
    assert end.value.code == 2
    assert "this run writes .glb files" in capsys.readouterr().err
    assert not file.parent.exists()


def test_a_table_leaves_out_what_is_no_record(predicted: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = predicted / "strangers"
    folder.mkdir()
    (folder / "b_statistics.json").write_text("{}")
    (folder / "a_statistics.json").write_bytes((predicted / "out" / "a_statistics.json").read_bytes())
    assert [found.case for found in gather(folder)] == ["a"]
    assert "left out of statistics.csv" in caplog.text


def test_kinds_that_there_are_not(tmp_path: Path) -> None:
    labelled = _toy(np.ones((2, 2, 2), np.uint8))
    with pytest.raises(SpecError, match="got 'gif'"):
        write_output(labelled, "gif", tmp_path / "a.gif")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"no DICOM series.*\n.*nifti, mesh"):
        write_output(labelled, "rtstruct", tmp_path / "a.dcm")
    write_output(labelled, "nifti", tmp_path / "a.nrrd")
    assert sitk.ReadImage(str(tmp_path / "a.nrrd")).GetSpacing() == (1, 2, 3)


def test_dicom_in_everything_out(predicted: Path) -> None:
    """All formats of one prediction are the same label map, and say the codes that lie in the bundle."""
    import highdicom as hd
    import pydicom

    bundle = next(predicted.glob("**/bundle.json")).parent
    spec = json.loads((bundle / "bundle.json").read_text())
    first, *others = [name for name in spec["labels"] if name != "background"]
    (bundle / "label_codes.yaml").write_text(f"{first}: {{type: Kidney, laterality: Left}}\n")
    stored = (300 * smooth_noise((16, 22, 27), 5)).astype(np.int16)
    write_series(predicted / "dicom" / "p1", stored, spacing_zyx=(1.1, 1.0, 0.9), orientation=(1, 0, 0, 0, -1, 0))
    out = predicted / "formats"
    words = ("predict", "-i", predicted / "dicom", "-o", out, "-m", bundle, "--threads", "1")
    formats = ("--output-format", "dicom-seg", "rtstruct", "nifti", "mesh", "--segmentation-type", "labelmap")
    try:
        with pytest.raises(SystemExit) as end:
            main([*map(str, words), *formats, "--statistics", "--preview"])
    finally:
        (bundle / "label_codes.yaml").unlink()
    assert end.value.code == 0
    endings = (".dcm", ".rtstruct.dcm", ".nii.gz", ".glb", "_preview.png", "_statistics.json", "_stl")
    assert {f"p1{ending}" for ending in endings} <= {p.name for p in out.iterdir()}
    label_map = sitk.ReadImage(str(out / "p1.nii.gz"))
    labels_ZYX = sitk.GetArrayFromImage(label_map)
    segmentation = hd.seg.segread(out / "p1.dcm")
    assert segmentation.get_segment_description(1).segmented_property_type.meaning == "Kidney"
    volume = segmentation.get_volume(combine_segments=True)
    for index in np.argwhere(volume.array):
        place = volume.affine[:3, :3] @ index + volume.affine[:3, 3]
        assert label_map.GetPixel(label_map.TransformPhysicalPointToIndex(place.tolist())) == volume.array[tuple(index)]
    assert np.count_nonzero(volume.array) == np.count_nonzero(labels_ZYX) > 0
    found = {s.label: s for s in read_statistics(out / "p1_statistics.json").structures}
    structure_set = pydicom.dcmread(out / "p1.rtstruct.dcm")
    for region in structure_set.StructureSetROISequence:
        assert float(region.ROIVolume) == pytest.approx(found[region.ROIName].volume_ml, rel=1e-5)
    assert structure_set.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0].CodeMeaning == "Kidney"
    assert {p.stem for p in (out / "p1_stl").iterdir()} == {name for name in (first, *others) if found[name].voxels}
