"""RTSTRUCT as output: contours filled again by scikit-image, in the coordinates that pydicom reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation
from skimage.draw import polygon2mask

from fastnnunet.errors import ImageError, MismatchError
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.images.finished import is_segmentation
from fastnnunet.images.io import image_io
from fastnnunet.outputs.dicom.codes import label_codes
from fastnnunet.outputs.dicom.contours import polygons
from fastnnunet.outputs.dicom.rtstruct import check_rtstruct, write_rtstruct
from fastnnunet.outputs.labelled import LabelledImage, grid_of, read_labelled, structures_of
from tests.dicom_files import labelled_series, write_series

SHAPE = (4, 9, 8)
LABELS = {"background": 0, "liver": 1, "kidney_left": 2, "never there": 4, "both": [1, 2], "ignore": 5}
ORIENTATIONS = {
    "axial": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "axial, column negated": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "axial, row negated": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "oblique": (0.8, 0.6, 0.0, 0.0, 0.0, -1.0),
}


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans()))
def test_polygons_enclose_the_mask_and_nothing_else(mask: np.ndarray) -> None:
    found = polygons(mask)
    filled = sum((polygon2mask(mask.shape, p[:, ::-1]).astype(int) for p in found), np.zeros(mask.shape, int))
    np.testing.assert_array_equal(filled, mask)
    assert sum(map(_area, found)) == pytest.approx(mask.sum())


def test_holes_in_holes_and_at_the_border() -> None:
    mask = np.ones((15, 15), bool)
    mask[2:13, 2:13] = 0
    mask[4:11, 4:11] = 1
    mask[5:10:2, 5:10:2] = 0  # nine holes of the inner island, in rows
    found = polygons(mask)
    assert len(found) == 2
    filled = sum(polygon2mask(mask.shape, p[:, ::-1]).astype(int) for p in found)
    np.testing.assert_array_equal(filled, mask)
    (square,) = polygons(np.ones((1, 1), bool))
    assert sorted(map(tuple, square.tolist())) == [(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]


def _labels() -> np.ndarray:
    labels = np.random.default_rng(0).choice(np.array((0, 1, 1, 2), np.uint8), SHAPE)
    labels[2] = 0  # a slice without a contour
    return labels


def _filled(file: Path, slices: list[Path]) -> dict[str, np.ndarray]:
    """Name -> mask (slice, row, column), by contours in patient coordinates and the headers of the images alone."""
    structure_set = pydicom.dcmread(file)
    images = [pydicom.dcmread(f, stop_before_pixels=True) for f in slices]
    index_of = {image.SOPInstanceUID: index for index, image in enumerate(images)}
    names = {roi.ROINumber: roi.ROIName for roi in structure_set.StructureSetROISequence}
    masks = {name: np.zeros(SHAPE, int) for name in names.values()}
    for roi in structure_set.ROIContourSequence:
        for contour in roi.get("ContourSequence", ()):
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            points = np.reshape([float(v) for v in contour.ContourData], (-1, 3))
            assert len(points) == contour.NumberOfContourPoints
            (reference,) = contour.ContourImageSequence
            index = index_of[reference.ReferencedSOPInstanceUID]
            image = images[index]
            row, column = np.reshape(np.array(image.ImageOrientationPatient, float), (2, 3))
            offsets = points - np.array(image.ImagePositionPatient, float)
            np.testing.assert_allclose(offsets @ np.cross(row, column), 0, atol=1e-3)
            rows, columns = offsets @ column / image.PixelSpacing[0], offsets @ row / image.PixelSpacing[1]
            masks[names[roi.ReferencedROINumber]][index] += polygon2mask(SHAPE[1:], np.stack([rows, columns], -1))
    return masks


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_contours_are_the_label_map(orientation: str, tmp_path: Path) -> None:
    slices = write_series(tmp_path / "ct", np.zeros(SHAPE), orientation=ORIENTATIONS[orientation])
    labels, file = _labels(), tmp_path / "rs.dcm"
    labelled = labelled_series(labels, tmp_path / "ct", LABELS)
    write_rtstruct(labelled, file)
    masks = _filled(file, slices)
    assert list(masks) == ["liver", "kidney_left", "never there", "both"]
    for name, values in {"liver": (1,), "kidney_left": (2,), "never there": (4,), "both": (1, 2)}.items():
        np.testing.assert_array_equal(masks[name], np.isin(labels, values), err_msg=name)


@settings(max_examples=8, deadline=None)
@given(
    quaternion=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1),
    order=st.permutations(range(3)),
    flips=st.tuples(*[st.booleans()] * 3),
)
def test_any_orientation_and_any_order_of_axes(
    quaternion: tuple[float, ...], order: list[int], flips: tuple[bool, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The label map may run along other axes than the slices, as files in another orientation do."""
    tmp_path = tmp_path_factory.mktemp("any")
    cosines = Rotation.from_quat(quaternion).as_matrix()
    slices = write_series(tmp_path / "ct", np.zeros(SHAPE), orientation=[*cosines[:, 0], *cosines[:, 1]])
    on_slices = labelled_series(_labels(), tmp_path / "ct", LABELS)
    # by ITK, which has its own way to keep a voxel where it is
    image = sitk.GetImageFromArray(_labels())
    image.SetSpacing((1.1, 0.7, 2.5))
    image.SetOrigin(on_slices.affine[:3, 3].tolist())
    image.SetDirection((on_slices.affine[:3, :3] / (1.1, 0.7, 2.5)).ravel().tolist())
    turned = sitk.Flip(sitk.PermuteAxes(image, order), flips)
    sitk.WriteImage(turned, str(tmp_path / "turned.nii.gz"))
    labelled = read_labelled(tmp_path / "turned.nii.gz", LABELS)
    write_rtstruct(replace(labelled, series=on_slices.series), tmp_path / "rs.dcm")
    masks = _filled(tmp_path / "rs.dcm", slices)
    for name, values in {"liver": (1,), "kidney_left": (2,)}.items():
        np.testing.assert_array_equal(masks[name], np.isin(_labels(), values))


@pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_label_maps_of_every_reader_come_back_to_the_slices(reader: str, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 3000, SHAPE)
    slices = write_series(tmp_path / "ct", stored, orientation=ORIENTATIONS["oblique"], rescale=[(1, 0)])
    series = DicomSeries(folder=tmp_path / "ct")
    image_CZYX, properties = image_io(reader).read([series])
    affine, _ = grid_of(properties)
    labelled = LabelledImage(
        case="a",
        labels_ZYX=(image_CZYX[0] > 1500).astype(np.uint8),
        affine=affine,
        structures=structures_of({"background": 0, "bright": 1}),
        series=series,
    )
    write_rtstruct(labelled, tmp_path / "rs.dcm")
    np.testing.assert_array_equal(_filled(tmp_path / "rs.dcm", slices)["bright"], stored > 1500)


@pytest.mark.filterwarnings("ignore:Invalid value for VR DA")
def test_references_names_and_codes(tmp_path: Path) -> None:
    slices = write_series(tmp_path / "ct", np.zeros(SHAPE), PatientBirthDate="1950.12.11", Manufacturer="Maker")
    names = {"background": 0, "kidney_left": 1, "Läsion\\links": 2}
    write_rtstruct(labelled_series(_labels(), tmp_path / "ct", names), tmp_path / "rs.dcm")
    found, source = pydicom.dcmread(tmp_path / "rs.dcm"), pydicom.dcmread(slices[0])
    assert found.SOPClassUID == found.file_meta.MediaStorageSOPClassUID == pydicom.uid.RTStructureSetStorage
    assert found.Modality == "RTSTRUCT"
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert found[name].value == source[name].value
    assert found.PatientBirthDate == "19501211"
    (frame,) = found.ReferencedFrameOfReferenceSequence
    (series,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert series.SeriesInstanceUID == source.SeriesInstanceUID != found.SeriesInstanceUID
    assert [i.ReferencedSOPInstanceUID for i in series.ContourImageSequence] == [
        pydicom.dcmread(f).SOPInstanceUID for f in slices
    ]
    assert {i.ReferencedSOPClassUID for i in series.ContourImageSequence} == {source.SOPClassUID}
    regions, observations = found.StructureSetROISequence, found.RTROIObservationsSequence
    assert [r.ROIName for r in regions] == ["kidney_left", "Läsion/links"]
    assert regions[0].ROIVolume == pytest.approx((_labels() == 1).sum() * 2.5 * 0.7 * 1.1 / 1000)
    assert [o.ReferencedROINumber for o in observations] == [r.ROINumber for r in regions] == [1, 2]
    code = observations[0].RTROIIdentificationCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning) == ("64033007", "SCT", "Kidney")
    assert is_segmentation(image_io("SimpleITKIO"), tmp_path / "rs.dcm")
    cut = (tmp_path / "rs.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(cut[: len(cut) // 2])
    assert not is_segmentation(image_io("SimpleITKIO"), tmp_path / "cut.dcm")


@pytest.mark.parametrize("kind", ["empty", "one voxel", "all"])
def test_small_and_large(kind: str, tmp_path: Path) -> None:
    slices = write_series(tmp_path / "ct", np.zeros(SHAPE))
    labels = np.full(SHAPE, kind == "all", np.uint8)
    if kind == "one voxel":
        labels[3, 8, 7] = 1
    write_rtstruct(labelled_series(labels, tmp_path / "ct", LABELS), tmp_path / "rs.dcm")
    np.testing.assert_array_equal(_filled(tmp_path / "rs.dcm", slices)["liver"], labels)


def test_long_contours_are_read_back(tmp_path: Path) -> None:
    """More than 64 kB of text in one contour, which explicit encodings cannot have."""
    shape = (1, 60, 61)
    labels = np.ones(shape, np.uint8)
    labels[0, 1:-1:2, 1:-1:2] = 0
    write_series(tmp_path / "ct", np.zeros(shape))
    write_rtstruct(labelled_series(labels, tmp_path / "ct", {"b": 0, "a": 1}), tmp_path / "rs.dcm")
    (contour,) = pydicom.dcmread(tmp_path / "rs.dcm").ROIContourSequence[0].ContourSequence
    assert len("\\".join(map(str, contour.ContourData))) > 2**16
    points = np.reshape([float(v) for v in contour.ContourData], (-1, 3)) - (-12.5, 3.0, 40.0)
    filled = polygon2mask(shape[1:], np.stack([points[:, 1] / 0.7, points[:, 0] / 1.1], -1))
    np.testing.assert_array_equal(filled, labels[0])


def test_what_it_cannot_refer_to(tmp_path: Path) -> None:
    structures: Any = structures_of(LABELS)
    codes = label_codes(structures)
    write_series(tmp_path / "nowhere", np.zeros(SHAPE), FrameOfReferenceUID=None)
    with pytest.raises(ImageError, match=r"no FrameOfReferenceUID.*\n.*leave dicom-seg and rtstruct out"):
        check_rtstruct(DicomSeries(folder=tmp_path / "nowhere"), structures=structures, model="toy", codes=codes)
    write_series(tmp_path / "ct", np.zeros(SHAPE))
    check_rtstruct(DicomSeries(folder=tmp_path / "ct"), structures=structures, model="toy", codes=codes)
    moved = labelled_series(_labels(), tmp_path / "ct", LABELS)
    moved.affine[0, 3] += 5
    with pytest.raises(MismatchError, match="does not lie on the slices"):
        write_rtstruct(moved, tmp_path / "rs.dcm")
    assert not (tmp_path / "rs.dcm").exists()
