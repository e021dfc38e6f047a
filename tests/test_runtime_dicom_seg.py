"""DICOM SEG as output: read back with pydicom and highdicom, voxel by voxel."""

import zipfile
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.sr.codedict import codes

from fastnnunet.errors import ImageError, MismatchError, SpecError
from fastnnunet.images.dicom.series import DicomSeries, slice_files
from fastnnunet.images.io import image_io
from fastnnunet.outputs.colours import colour_of, rgb_of
from fastnnunet.outputs.dicom.seg import check_segmentation_type, write_dicom_seg
from fastnnunet.outputs.labelled import LabelledImage, grid_of, structures_of
from tests.dicom_files import labelled_series, write_series

SHAPE = (6, 7, 5)
LABELS = {"background": 0, "liver": 1, "spleen": 2, "gap": 4, "never there": 5, "ignore": 6}
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


def _labels(values: tuple[int, ...] = (0, 1, 2, 4)) -> np.ndarray:
    labels = np.random.default_rng(0).choice(np.array(values, np.uint8), SHAPE)
    labels[0] = 0  # a slice without any segment is left out of the file
    return labels


def _write(folder: Path, labels_ZYX: np.ndarray, labels: dict[str, Any] = LABELS) -> Path:
    file = folder.parent / "seg.dcm"
    write_dicom_seg(labelled_series(labels_ZYX, folder, labels), file)
    return file


@pytest.mark.parametrize("orientation", [(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), OBLIQUE])
def test_voxels_frames_and_references(orientation: Any, tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", np.zeros(SHAPE), orientation=orientation)
    labels = _labels()
    file = _write(tmp_path / "ct", labels)
    segmentation = hd.seg.segread(file)
    source = [pydicom.dcmread(f) for f in files]
    uids = [s.SOPInstanceUID for s in source]

    described = [segmentation.get_segment_description(n) for n in segmentation.segment_numbers]
    assert [d.SegmentLabel for d in described] == ["liver", "spleen", "gap", "never there"]
    assert {d.SegmentAlgorithmType for d in described} == {"AUTOMATIC"}
    got = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    expected = np.stack([labels == value for value in (1, 2, 4, 5)], axis=-1)
    np.testing.assert_array_equal(got, expected)

    # with pydicom alone: every frame lies where its source slice does
    plain = pydicom.dcmread(file)
    assert plain.SOPClassUID == pydicom.uid.SegmentationStorage
    assert plain.SegmentationType == "BINARY"
    assert plain.Modality == "SEG"
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert plain[name].value == source[0][name].value
    assert plain.SeriesInstanceUID != source[0].SeriesInstanceUID
    assert plain.ReferencedSeriesSequence[0].SeriesInstanceUID == source[0].SeriesInstanceUID
    shared = plain.SharedFunctionalGroupsSequence[0]
    measures = shared.PixelMeasuresSequence[0]
    np.testing.assert_allclose([*measures.PixelSpacing, measures.SpacingBetweenSlices], (0.7, 1.1, 2.5))
    np.testing.assert_allclose(shared.PlaneOrientationSequence[0].ImageOrientationPatient, orientation)
    seen = 0
    for frame, mask in zip(plain.PerFrameFunctionalGroupsSequence, plain.pixel_array, strict=True):
        referenced = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        index = uids.index(referenced)
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(position, source[index].ImagePositionPatient)
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        np.testing.assert_array_equal(mask, labels[index] == (1, 2, 4, 5)[number - 1])
        seen += int(mask.sum())
    assert seen == np.count_nonzero(labels)


def test_regions_overlap(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", np.zeros(SHAPE))
    labels = _labels((0, 1, 2, 3))
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    segmentation = hd.seg.segread(_write(tmp_path / "ct", labels, regions))
    uids = [pydicom.dcmread(f).SOPInstanceUID for f in files]
    got = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(got, np.stack([labels >= value for value in (1, 2, 3)], axis=-1))


CODED = {"background": 0, "kidney_left": 1, "liver_tumor": 2, "something": 4}
NEGATED, SAGITTAL = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def _in_patient(plain: pydicom.Dataset, number_of_segment: bool) -> dict[tuple[float, ...], int]:
    """Place in mm -> segment of every voxel that has one, by hand from the headers of a segmentation."""
    shared, found = plain.SharedFunctionalGroupsSequence[0], {}
    row, column = np.reshape(np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float), (2, 3))
    height, width = shared.PixelMeasuresSequence[0].PixelSpacing
    frames = plain.pixel_array.reshape(-1, plain.Rows, plain.Columns)
    for groups, frame in zip(plain.PerFrameFunctionalGroupsSequence, frames, strict=True):
        origin = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        for y, x in np.argwhere(frame):
            place = tuple((origin + x * width * row + y * height * column).round(3).tolist())
            segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber if number_of_segment else 0
            assert place not in found
            found[place] = segment or int(frame[y, x])
    return found


@pytest.mark.parametrize("orientation", [NEGATED, SAGITTAL, OBLIQUE])
@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_both_kinds_put_voxels_where_the_images_have_them(kind: Any, orientation: Any, tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", np.zeros(SHAPE), orientation=orientation)
    labels_ZYX = _labels()
    file = tmp_path / "seg.dcm"
    write_dicom_seg(labelled_series(labels_ZYX, tmp_path / "ct", CODED), file, segmentation_type=kind)
    plain = pydicom.dcmread(file)
    assert plain.SegmentationType == kind.upper()
    expected = {}
    numbers = {1: 1, 2: 2, 4: 3}
    for z, y, x in np.argwhere(labels_ZYX):
        source = pydicom.dcmread(files[z], stop_before_pixels=True)
        row, column = np.reshape(np.array(source.ImageOrientationPatient, float), (2, 3))
        place = np.array(source.ImagePositionPatient, float)
        place = place + x * source.PixelSpacing[1] * row + y * source.PixelSpacing[0] * column
        expected[tuple(place.round(3).tolist())] = numbers[int(labels_ZYX[z, y, x])]
    assert _in_patient(plain, kind == "binary") == expected
    uids = [pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in files]
    got = hd.seg.segread(file).get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(got, np.array([0, 1, 2, 0, 3])[labels_ZYX])


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_codes_and_colours(kind: Any, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros(SHAPE))
    file = tmp_path / "seg.dcm"
    write_dicom_seg(labelled_series(_labels(), tmp_path / "ct", CODED), file, segmentation_type=kind)
    segmentation = hd.seg.segread(file)
    kidney, tumour, other = (segmentation.get_segment_description(n) for n in (1, 2, 3))
    assert kidney.segmented_property_type == codes.SCT.Kidney
    assert kidney.segmented_property_category == codes.cid7150.AnatomicalStructure
    modifier = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert modifier.CodeValue == codes.SCT.Left.value
    assert tumour.segmented_property_type == codes.SCT.Neoplasm
    assert tumour.segmented_property_category == codes.cid7150.MorphologicallyAbnormalStructure
    assert tumour.anatomic_regions == [codes.SCT.Liver]
    assert other.segmented_property_type == codes.SCT.AnatomicalStructure
    for number, description in enumerate((kidney, tumour, other), 1):
        lab = hd.color.CIELabColor.from_dicom_value(list(description.RecommendedDisplayCIELabValue))
        np.testing.assert_allclose(lab.to_rgb(clip=True), rgb_of(colour_of(number)), atol=2)


def test_label_maps_of_regions_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    regions = structures_of({"background": 0, "whole": [1, 2], "core": 2})
    with pytest.raises(SpecError, match=r"regions of this model overlap.*\n.*leave the option out"):
        check_segmentation_type("labelmap", regions)
    check_segmentation_type("binary", regions)


@pytest.mark.parametrize("kind", ["empty", "one voxel", "all"])
def test_label_maps_of_little_and_much(kind: str, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros(SHAPE))
    labels_ZYX = np.full(SHAPE, kind == "all", np.uint8)
    labels_ZYX[5, 6, 4] |= kind == "one voxel"
    labelled = labelled_series(labels_ZYX, tmp_path / "ct", CODED)
    write_dicom_seg(labelled, tmp_path / "seg.dcm", segmentation_type="labelmap")
    assert pydicom.dcmread(tmp_path / "seg.dcm").pixel_array.sum() == labels_ZYX.sum()


def test_an_empty_segmentation_is_written(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros(SHAPE))
    segmentation = hd.seg.segread(_write(tmp_path / "ct", np.zeros(SHAPE, np.uint8)))
    assert segmentation.number_of_segments == 4
    assert not segmentation.pixel_array.any()


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_label_maps_of_every_reader_come_back_to_the_slices(reader: str, tmp_path: Path) -> None:
    """Thresholded in the reader's own axes, each frame is the thresholded slice it refers to."""
    stored = np.random.default_rng(0).integers(0, 3000, SHAPE)
    files = write_series(tmp_path / "ct", stored, orientation=OBLIQUE, rescale=[(1, 0)])
    io = image_io(reader)
    image_CZYX, properties = io.read([DicomSeries(folder=tmp_path / "ct")])
    series, (affine, _) = DicomSeries(folder=tmp_path / "ct"), grid_of(properties)
    labels_ZYX = (image_CZYX[0] > 1500).astype(np.uint8)
    structures = structures_of({"background": 0, "bright": 1})
    labelled = LabelledImage(case="ct", labels_ZYX=labels_ZYX, affine=affine, structures=structures, series=series)
    write_dicom_seg(labelled, tmp_path / "seg.dcm")
    segmentation = hd.seg.segread(tmp_path / "seg.dcm")
    uids = [pydicom.dcmread(f).SOPInstanceUID for f in files]
    got = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(got[..., 0], stored > 1500)


def test_lost_identities(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = dict.fromkeys(("PatientID", "PatientName", "StudyInstanceUID"))
    write_series(tmp_path / "anonymous", np.zeros(SHAPE), **empty)
    plain = pydicom.dcmread(_write(tmp_path / "anonymous", _labels()))
    assert plain.PatientID == ""
    assert plain.StudyInstanceUID.is_valid
    assert "no StudyInstanceUID" in caplog.text
    write_series(tmp_path / "nowhere", np.zeros(SHAPE), FrameOfReferenceUID=None)
    with pytest.raises(ImageError, match="no FrameOfReferenceUID"):
        _write(tmp_path / "nowhere", _labels())
    with pytest.raises(MismatchError, match=r"shape \(5, 7, 5\) .* does not lie on the slices of .*, \(6, 7, 5\)"):
        _write(tmp_path / "anonymous", _labels()[:5])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["anonymous", "nowhere", "seg.dcm"]


def test_real_ct(shared: Path, tmp_path: Path) -> None:
    """A label map that others made of the series, as DICOM SEG: same voxels at the same places in the patient."""
    volumes = shared / "data" / "volumes"
    if not (volumes / "ct_abdomen_dicom.zip").is_file():
        pytest.skip(f"real data not found: {volumes}")
    with zipfile.ZipFile(volumes / "ct_abdomen_dicom.zip") as z:
        z.extractall(tmp_path / "ct")
    theirs = sitk.DICOMOrient(sitk.ReadImage(str(volumes / "ct_abdomen_dicom_seg.nii.gz")), "LPS")
    labels_ZYX = sitk.GetArrayFromImage(theirs)
    values = [int(v) for v in np.unique(labels_ZYX) if v]
    names = {"background": 0, **{f"structure {value}": value for value in values}}
    segmentation = hd.seg.segread(_write(tmp_path / "ct", labels_ZYX, names))
    assert [d.SegmentLabel for d in segmentation.SegmentSequence] == list(names)[1:]
    first = pydicom.dcmread(slice_files(DicomSeries(folder=tmp_path / "ct"))[0], stop_before_pixels=True)
    assert segmentation.FrameOfReferenceUID == first.FrameOfReferenceUID
    volume = segmentation.get_volume(combine_segments=True)
    # highdicom's affine maps (slice, row, column) to x, y, z; sent through it, every label is where theirs is
    where = np.argwhere(volume.array)
    points = where @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    index = np.rint((points - theirs.GetOrigin()) / theirs.GetSpacing()).astype(int)
    np.testing.assert_array_equal(theirs.GetDirection(), np.eye(3).ravel())
    np.testing.assert_allclose(points, index * theirs.GetSpacing() + theirs.GetOrigin(), atol=1e-3)
    got = np.zeros_like(labels_ZYX)
    got[tuple(index[:, ::-1].T)] = np.array([0, *values])[volume.array[tuple(where.T)]]
    np.testing.assert_array_equal(got, labels_ZYX)
