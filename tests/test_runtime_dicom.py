"""DICOM series as input: voxels, geometry, choice of a series, and what is no image refused."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from fastnnunet.errors import ImageError, NotFoundError, SpecError
from fastnnunet.images.cases import find_cases, is_single_image, single_case
from fastnnunet.images.dicom.series import DicomSeries, is_dicom_folder, slice_files
from fastnnunet.images.io import image_io
from fastnnunet.outputs.dicom.slices import on_slices
from fastnnunet.outputs.labelled import LabelledImage, grid_of
from tests.dicom_files import write_series

SHAPE = (6, 7, 5)
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)  # rows lie in the axial plane, columns go down


def _stored(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-50, 3000, shape)


def _read(folder: Path, reader: str = "SimpleITKIO", uid: str | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    return image_io(reader).read([DicomSeries(folder=folder, uid=uid)])


@dataclass(frozen=True)
class _Spec:
    """What finding cases needs to know of a bundle."""

    file_ending: str = ".nii.gz"
    channel_names: tuple[str, ...] = ("CT",)


@pytest.fixture
def spec() -> Any:
    return _Spec()


@pytest.fixture
def spec_of_two() -> Any:
    return _Spec(channel_names=("CT", "PET"))


@pytest.mark.parametrize("compressed", [False, True])
def test_voxels_and_geometry(compressed: bool, tmp_path: Path) -> None:
    stored = _stored()
    files = write_series(tmp_path, stored, compressed=compressed)
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / ".hidden").write_bytes(b"x" * 300)
    assert slice_files(DicomSeries(folder=tmp_path)) == tuple(files)
    image_CZYX, properties = _read(tmp_path)
    assert image_CZYX.dtype == np.float32
    np.testing.assert_array_equal(image_CZYX[0], stored - 1024)
    np.testing.assert_allclose(properties["spacing"], (2.5, 0.7, 1.1))
    np.testing.assert_allclose(properties["sitk_stuff"]["spacing"], (1.1, 0.7, 2.5))
    np.testing.assert_allclose(properties["sitk_stuff"]["origin"], (-12.5, 3.0, 40.0))
    np.testing.assert_allclose(properties["sitk_stuff"]["direction"], np.eye(3).ravel())


def test_each_slice_has_its_own_rescaling(tmp_path: Path) -> None:
    """As in PET; the first slice needs no fractions, the others do."""
    stored = _stored()
    rescale = [(1.0, 0.0), *((0.25 * i, 3.5) for i in range(1, SHAPE[0]))]
    write_series(tmp_path, stored, rescale=rescale)
    slopes, intercepts = np.array(rescale).T
    np.testing.assert_array_equal(_read(tmp_path)[0][0], stored * slopes[:, None, None] + intercepts[:, None, None])


@pytest.mark.parametrize("orientation", [(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), OBLIQUE])
def test_every_reader_sees_it_as_it_would_the_same_image_as_nifti(orientation: Any, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", _stored(), orientation=orientation)
    series = sitk.ImageSeriesReader()
    series.SetFileNames(series.GetGDCMSeriesFileNames(str(tmp_path / "dicom")))
    sitk.WriteImage(series.Execute(), str(tmp_path / "a_0000.nii.gz"))
    for reader in ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"):
        got, properties = _read(tmp_path / "dicom", reader)
        expected, expected_properties = image_io(reader).read([tmp_path / "a_0000.nii.gz"])
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_allclose(properties["spacing"], expected_properties["spacing"], rtol=1e-6)
        # a segmentation written with either geometry is the same file but for the rounding to float32 in NIfTI
        labels = (got[0] > 500).astype(np.uint8)
        for name, stuff in (("a", properties), ("b", expected_properties)):
            image_io(reader).write(labels, tmp_path / f"{name}.nii.gz", stuff)
        ours, theirs = (sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in "ab")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))
        for what in ("Origin", "Spacing", "Direction"):
            np.testing.assert_allclose(getattr(ours, f"Get{what}")(), getattr(theirs, f"Get{what}")(), atol=1e-5)
        series, (affine, _) = DicomSeries(folder=tmp_path / "dicom"), grid_of(properties)
        labelled = LabelledImage(case="a", labels_ZYX=labels, affine=affine, structures=(), series=series)
        np.testing.assert_array_equal(on_slices(labelled), _stored() - 1024 > 500)


def test_two_series_are_refused_naming_both(tmp_path: Path) -> None:
    write_series(tmp_path, _stored(), series_uid="1.2.3", SeriesDescription="Body 3.0")
    write_series(tmp_path, _stored(seed=1)[:2], series_uid="1.2.4", prefix="other", Modality="PT")
    with pytest.raises(ImageError, match="holds 2 DICOM series") as caught:
        _read(tmp_path)
    assert "1.2.3, 6 image(s), CT, Body 3.0" in str(caught.value)
    assert "1.2.4, 2 image(s), PT" in str(caught.value)
    assert "--series UID" in str(caught.value)
    np.testing.assert_array_equal(_read(tmp_path, uid="1.2.4")[0][0], _stored(seed=1)[:2] - 1024)
    with pytest.raises(ImageError, match=r"no series 1\.2\.5, expected one of"):
        _read(tmp_path, uid="1.2.5")


def test_what_refers_to_a_series_may_lie_beside_it(tmp_path: Path) -> None:
    """A DICOM SEG has pixels, a structured report has none: neither is a second series to choose from."""
    write_series(tmp_path, _stored())
    segmentation = "1.2.840.10008.5.1.4.1.1.66.4"
    write_series(tmp_path, _stored()[:1], prefix="seg", SOPClassUID=segmentation, Modality="SEG")
    report = dict.fromkeys(("PixelData", "Rows", "Columns", "ImagePositionPatient"))
    write_series(
        tmp_path, _stored()[:1], prefix="sr", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR", **report
    )
    assert _read(tmp_path)[0].shape == (1, *SHAPE)


@pytest.mark.parametrize("missing", [1, 3, 4])
def test_a_missing_slice_is_refused(missing: int, tmp_path: Path) -> None:
    files = write_series(tmp_path, _stored())
    files[missing].unlink()
    with pytest.raises(ImageError, match=r"1 slice\(s\) are missing: 5\.00 mm between") as caught:
        _read(tmp_path)
    assert f"{files[missing - 1].name} and {files[missing + 1].name}, expected 2.50 mm" in str(caught.value)


def _stack(heights: list[float], shift_y: float = 0.0) -> list[tuple[float, ...]]:
    return [(0.0, shift_y * height, height) for height in heights]


@pytest.mark.parametrize(
    ("heights", "shift", "words"),
    [
        ([0, 2, 4, 6.7, 8.7, 10.7], 0.0, "not evenly spaced: 2.00 to 2.70 mm"),
        ([0, 1, 2, 3, 5, 7], 0.0, r"2 slice\(s\) are missing: 2\.00 mm between"),
        ([0, 2, 4, 4, 6, 8], 0.0, "at the same position"),
        ([0, 2, 4, 6, 8, 10], np.tan(np.radians(10.0)), "a gantry tilt of 10.0 degrees"),
    ],
)
def test_slices_that_form_no_grid_are_refused(heights: Any, shift: float, words: str, tmp_path: Path) -> None:
    write_series(tmp_path, _stored(), positions=_stack(heights, shift))
    with pytest.raises(ImageError, match=words):
        _read(tmp_path)


def test_positions_rounded_by_the_scanner_are_a_grid(tmp_path: Path) -> None:
    heights = [round(i * 0.625, 2) for i in range(SHAPE[0])]
    write_series(tmp_path, _stored(), positions=_stack(heights))
    np.testing.assert_allclose(_read(tmp_path)[1]["spacing"][0], 0.625, atol=0.002)


def test_slices_of_different_kinds_are_refused(tmp_path: Path) -> None:
    uid = {"series_uid": "1.2.3"}
    write_series(tmp_path / "size", _stored(), **uid)
    write_series(tmp_path / "size", _stored((1, 9, 9)), origin=(0, 0, 90), prefix="scout", **uid)
    with pytest.raises(ImageError, match="expected slices of one size"):
        _read(tmp_path / "size")
    write_series(tmp_path / "turned", _stored(), **uid)
    turned = {"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0), "prefix": "scout"}
    write_series(tmp_path / "turned", _stored()[:1], **turned, **uid)
    with pytest.raises(ImageError, match="the orientation is"):
        _read(tmp_path / "turned")
    write_series(tmp_path / "spacing", _stored(), **uid)
    write_series(tmp_path / "spacing", _stored()[:1], origin=(-12.5, 3, 55), spacing_zyx=(2.5, 1, 1), prefix="x", **uid)
    with pytest.raises(ImageError, match="the pixel spacing is"):
        _read(tmp_path / "spacing")
    write_series(tmp_path / "nowhere", _stored(), ImagePositionPatient=None)
    with pytest.raises(ImageError, match="does not say its position"):
        _read(tmp_path / "nowhere")
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    pixels = np.zeros((7, 5, 3), np.int16).tobytes()
    write_series(tmp_path / "colour", _stored(), **colour, PixelData=pixels, PixelRepresentation=0)
    with pytest.raises(ImageError, match="3 colour samples"):
        _read(tmp_path / "colour")
    write_series(tmp_path / "frames", _stored()[:1], NumberOfFrames=2, PixelData=_stored()[:2].astype("<i2").tobytes())
    with pytest.raises(ImageError, match="2 frames"):
        _read(tmp_path / "frames")


@pytest.mark.parametrize("keep", [0, 0.01, 0.5, 0.97])
@pytest.mark.parametrize("index", [0, 2, 5])
def test_a_truncated_slice_is_refused(keep: float, index: int, tmp_path: Path) -> None:
    files = write_series(tmp_path, _stored((6, 40, 40)))
    content = files[index].read_bytes()
    files[index].write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ImageError, match=files[index].name):
        _read(tmp_path)


def test_one_slice_is_an_image(tmp_path: Path) -> None:
    write_series(tmp_path, _stored()[:1])
    assert _read(tmp_path)[0].shape == (1, 1, *SHAPE[1:])


def test_readers_of_pictures_refuse_dicom(tmp_path: Path) -> None:
    write_series(tmp_path, _stored())
    for reader in ("NaturalImage2DIO", "Tiff3DIO"):
        with pytest.raises(ImageError, match="convert"):
            _read(tmp_path, reader)


def test_a_folder_of_dicom_is_one_case(spec: Any, tmp_path: Path) -> None:
    folder = tmp_path / "patient"
    write_series(folder, _stored())
    assert is_dicom_folder(folder)
    assert not is_dicom_folder(tmp_path)
    assert is_single_image(folder, spec)
    assert single_case(folder, spec).case_id == "patient"
    assert single_case(folder, spec, "1.2").channels == (DicomSeries(folder=folder, uid="1.2"),)
    # images of the model's own format go before
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 2, 2), np.uint8)), str(folder / "a_0000.nii.gz"))
    assert not is_single_image(folder, spec)
    assert [case.case_id for case in find_cases(folder, spec)] == ["a"]
    with pytest.raises(SpecError, match="--series"):
        single_case(folder / "a_0000.nii.gz", spec, "1.2")


def test_a_folder_of_folders_is_a_case_each(spec: Any, spec_of_two: Any, tmp_path: Path) -> None:
    for name in ("b", "a_0000", "a_0001"):
        write_series(tmp_path / name, _stored())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("nothing")
    cases = find_cases(tmp_path, spec)
    assert [(case.case_id, len(case.series), case.problem) for case in cases] == [("a", 2, None), ("b", 1, None)]
    first, second = find_cases(tmp_path, spec_of_two)
    assert [s.name for s in first.series] == ["a_0000", "a_0001"]
    assert second.problem is not None
    assert "expected a name such as b_0000" in second.problem
    assert single_case(tmp_path / "a_0000", spec_of_two) == first
    with pytest.raises(ImageError, match="channel 1 of an image"):
        single_case(tmp_path / "a_0001", spec_of_two)
    with pytest.raises(NotFoundError, match="or folders of DICOM files"):
        find_cases(tmp_path / "notes", spec)


def test_channels_of_other_geometry_are_refused(tmp_path: Path) -> None:
    for name, spacing in (("a_0000", (2.5, 1.0, 1.0)), ("a_0001", (2.0, 1.0, 1.0))):
        write_series(tmp_path / name, _stored(), spacing_zyx=spacing)
    series = [DicomSeries(folder=tmp_path / f"a_000{channel}") for channel in range(2)]
    with pytest.raises(ImageError, match=r"spacing is .* in a_0000 and .* in a_0001"):
        image_io("SimpleITKIO").read(series)


def _unzip(shared: Path, name: str, where: Path) -> Path:
    archive = shared / "data" / "volumes" / name
    if not archive.is_file():
        pytest.skip(f"real data not found: {archive}")
    with zipfile.ZipFile(archive) as z:
        z.extractall(where)
    return where


def test_real_ct_in_jpeg_2000(shared: Path, tmp_path: Path) -> None:
    """Against pydicom's decoder, and the grid of a label map that others made of this series."""
    folder = _unzip(shared, "ct_abdomen_dicom.zip", tmp_path / "ct")
    image_CZYX, properties = _read(folder)
    slices = sorted((pydicom.dcmread(f) for f in folder.iterdir()), key=lambda s: s.ImagePositionPatient[2])
    assert "JPEG 2000" in slices[0].file_meta.TransferSyntaxUID.name
    for index in (0, 7, 19):
        np.testing.assert_array_equal(image_CZYX[0, index], slices[index].pixel_array.astype(float) - 1024)
    image_io("SimpleITKIO").write(np.zeros(image_CZYX.shape[1:], np.uint8), tmp_path / "s.nii.gz", properties)
    labels = sitk.ReadImage(str(shared / "data" / "volumes" / "ct_abdomen_dicom_seg.nii.gz"))
    ours, theirs = (sitk.DICOMOrient(i, "LPS") for i in (sitk.ReadImage(str(tmp_path / "s.nii.gz")), labels))
    assert ours.GetSize() == theirs.GetSize()
    for what in ("Origin", "Spacing", "Direction"):
        np.testing.assert_allclose(getattr(ours, f"Get{what}")(), getattr(theirs, f"Get{what}")(), atol=1e-4)


def test_real_mr(shared: Path, tmp_path: Path) -> None:
    folder = _unzip(shared, "hippocampus_crop_dicom.zip", tmp_path / "mr")
    image_CZYX, properties = _read(folder)
    slices = sorted((pydicom.dcmread(f) for f in folder.iterdir()), key=lambda s: s.ImagePositionPatient[2])
    np.testing.assert_array_equal(image_CZYX[0], np.stack([s.pixel_array for s in slices]))
    assert properties["spacing"] == [1.0, 1.0, 1.0]
