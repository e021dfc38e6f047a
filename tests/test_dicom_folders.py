"""DICOM folders as they come: files without preamble, copies of slices, scouts, strangers among the slices."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from fastnnunet.errors import ImageError
from fastnnunet.images.dicom.head import read_head
from fastnnunet.images.dicom.series import DicomSeries, is_dicom_file, is_dicom_folder, read_series, slice_files
from tests.dicom_files import write_series

SHAPE = (6, 7, 5)
TURNED = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def _stored(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-50, 3000, shape)


def _voxels(folder: Path, uid: str | None = None) -> np.ndarray:
    return sitk.GetArrayFromImage(read_series(DicomSeries(folder=folder, uid=uid)))


def _without_preamble(file: Path, encoding: str) -> None:
    """As consoles wrote it before there was a file format."""
    header = pydicom.dcmread(file)
    if encoding == "meta":  # the group of the file format, but nothing before it
        file.write_bytes(file.read_bytes()[132:])
        return
    bare = Dataset()
    bare.update({e.tag: e for e in header})
    if encoding == "sequences":  # of undefined length, before what is looked for
        item = Dataset()
        item.CodeValue = "1"
        item.is_undefined_length_sequence_item = True
        bare.ProcedureCodeSequence = [item, item]
        bare["ProcedureCodeSequence"].is_undefined_length = True
    if encoding == "big":
        values = np.frombuffer(header.PixelData, "<i2").astype(">i2")
        bare.PixelData = values.tobytes()
    explicit = encoding in ("explicit", "big", "sequences")
    bare.save_as(file, implicit_vr=not explicit, little_endian=encoding != "big")


@pytest.mark.parametrize("encoding", ["implicit", "explicit", "big", "meta", "sequences"])
def test_files_without_preamble(encoding: str, tmp_path: Path) -> None:
    files = write_series(tmp_path, _stored(), prefix="IM")
    for index, file in enumerate(files):
        _without_preamble(file, encoding)
        files[index] = file.rename(file.with_suffix(".IMA"))
        assert files[index].read_bytes()[128:132] != b"DICM"
        assert is_dicom_file(files[index])
    assert is_dicom_folder(tmp_path)
    assert slice_files(DicomSeries(folder=tmp_path)) == tuple(files)
    np.testing.assert_array_equal(_voxels(tmp_path), _stored() - 1024)
    files[2].write_bytes(files[2].read_bytes()[:-20])
    with pytest.raises(ImageError, match=files[2].name):
        _voxels(tmp_path)


def test_headers_are_read_as_pydicom_reads_them() -> None:
    """On the files that pydicom tests itself with: every encoding, private sequences, damaged files."""
    base = Path(pydicom.__file__).parent / "data"
    compared = 0
    for file in sorted(p for p in base.rglob("*") if p.is_file()):
        head = read_head(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = pydicom.dcmread(file)
            except pydicom.errors.InvalidDicomError:
                continue
            wanted = {name: expected.get(name) for name in ("Rows", "Columns", "SOPInstanceUID", "SeriesInstanceUID")}
            wanted["SOPInstanceUID"] = wanted["SOPInstanceUID"] or expected.file_meta.get("MediaStorageSOPInstanceUID")
        assert head is not None, file
        if not head.is_whole:  # what cannot be read is left to the reader of images
            continue
        compared += 1
        got = (head.rows, head.columns, head.sop_uid, head.series_uid)
        assert got == tuple(wanted[name] or kind() for name, kind in zip(wanted, (int, int, str, str), strict=True)), (
            file
        )
        assert (head.pixels_at is not None) == any("PixelData" in e.keyword for e in expected), file
    assert compared > 100


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"\x08\x00", b"\x02\x00\x10\x00UI", b"\x08\x00\x16\x00UI\x1a\x00"]), st.binary(max_size=400)
)
def test_no_other_file_is_taken_for_dicom(tmp_path_factory: pytest.TempPathFactory, start: bytes, rest: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(start + rest)
    assert not is_dicom_file(file)


def test_other_formats_are_no_dicom(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((9, 9, 9), np.uint8))
    for name in ("a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.tif", "a.vtk"):
        sitk.WriteImage(image, str(tmp_path / name))
    (tmp_path / "a.txt").write_text("word " * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(bytes(1000))
    assert not is_dicom_folder(tmp_path)


def test_deflated_files_are_read(tmp_path: Path) -> None:
    """What this package's own look at the header does not know, the reader of images does."""
    for file in write_series(tmp_path, _stored()):
        header = pydicom.dcmread(file)
        header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        header.save_as(file, enforce_file_format=True)
        head = read_head(file)
        assert head is not None
        assert not head.is_whole
    np.testing.assert_array_equal(_voxels(tmp_path), _stored() - 1024)


def test_a_copy_of_a_slice_is_used_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = write_series(tmp_path, _stored())
    shutil.copy(files[3], tmp_path / "copy of one")
    again = pydicom.dcmread(files[0])
    again.PatientComments = "the same image with another header"
    again.save_as(tmp_path / "anonymised again")
    np.testing.assert_array_equal(_voxels(tmp_path), _stored() - 1024)
    assert slice_files(DicomSeries(folder=tmp_path)) == tuple(files)
    assert "left out 2 file(s) that hold a slice a second time (copy of one, anonymised again)" in caplog.text


def test_a_whole_series_twice_is_one(tmp_path: Path) -> None:
    for file in write_series(tmp_path, _stored()):
        shutil.copy(file, tmp_path / f"{file.name}.dcm")
    np.testing.assert_array_equal(_voxels(tmp_path), _stored() - 1024)


def test_two_slices_at_one_position_are_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path / "echoes", _stored(), series_uid="1.2.3")
    other = pydicom.dcmread(files[2])
    other.SOPInstanceUID = generate_uid()
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(tmp_path / "echoes" / "second echo")
    with pytest.raises(ImageError, match="different slices at the same position") as caught:
        _voxels(tmp_path / "echoes")
    assert files[2].name in str(caught.value)
    assert "second echo" in str(caught.value)
    files = write_series(tmp_path / "clash", _stored())
    other = pydicom.dcmread(files[2])
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(tmp_path / "clash" / "edited")
    with pytest.raises(ImageError, match="different slices with the same identity"):
        _voxels(tmp_path / "clash")


def test_slices_whose_identities_an_anonymiser_made_equal_are_slices(tmp_path: Path) -> None:
    write_series(tmp_path, _stored(), SOPInstanceUID="1.2.3")
    np.testing.assert_array_equal(_voxels(tmp_path), _stored() - 1024)


@pytest.mark.parametrize("uid", ["1.2.3", None])
def test_scouts_are_left_out(uid: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_series(tmp_path, _stored(), series_uid="1.2.3")
    scout = {"orientation": TURNED, "prefix": "scout", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    write_series(tmp_path, _stored((1, 9, 9)), series_uid=uid, **scout)
    np.testing.assert_array_equal(_voxels(tmp_path), _stored() - 1024)
    assert "left out 1" in caplog.text
    assert "scout_00" in caplog.text


def test_a_series_of_scouts_is_predicted_when_it_is_all_there_is(tmp_path: Path) -> None:
    write_series(tmp_path, _stored(), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    np.testing.assert_array_equal(_voxels(tmp_path), _stored() - 1024)


def test_one_slice_of_another_size_is_named(tmp_path: Path) -> None:
    write_series(tmp_path, _stored(), series_uid="1.2.3")
    write_series(tmp_path, _stored((1, 9, 8)), origin=(0, 0, 90), series_uid="1.2.3", prefix="odd")
    with pytest.raises(ImageError, match=r"1 of 7 slices have 9 x 8 pixels .* instead of 7 x 5: odd_00"):
        _voxels(tmp_path)


def test_strangers_are_named_and_never_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_series(tmp_path, _stored())
    (tmp_path / "README\x1b[31m.txt").write_text("hello")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 300)
    (tmp_path / "report.pdf").write_bytes(b"%PDF" * 100)
    (tmp_path / "raw").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    np.testing.assert_array_equal(_voxels(tmp_path), _stored() - 1024)
    for words in ("1 broken link(s): gone", "1 folder(s): raw", "1 pipe(s), socket(s) or device(s): pipe"):
        assert words in caplog.text
    assert r"2 other file(s): README\x1b[31m.txt, report.pdf" in caplog.text
    assert "DS_Store" not in caplog.text


def test_a_slice_that_is_not_there_yet_is_refused(tmp_path: Path) -> None:
    """As git-annex leaves links to data that have not been fetched."""
    files = [file.rename(file.with_suffix(".dcm")) for file in write_series(tmp_path, _stored())]
    files[-1].unlink()
    files[-1].symlink_to(tmp_path / ".annex" / "content")
    with pytest.raises(ImageError, match=f"1 file.* cannot be read as DICOM .*{files[-1].name}"):
        _voxels(tmp_path)


@pytest.mark.parametrize("wrong", ["spacing", "orientation", "nan"])
def test_geometry_that_is_not_said_is_refused(wrong: str, tmp_path: Path) -> None:
    attributes: dict[str, Any] = {
        "spacing": {"PixelSpacing": None},
        "orientation": {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
        "nan": {"ImagePositionPatient": ["1", "2", "nan"]},
    }[wrong]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_series(tmp_path, _stored(), **attributes)
    with pytest.raises(
        ImageError, match={"spacing": "spacing", "orientation": "orientation", "nan": "position"}[wrong]
    ):
        _voxels(tmp_path)


def test_decimal_commas(tmp_path: Path) -> None:
    """As some exporters write numbers in some countries."""
    files = write_series(tmp_path, _stored())
    for index, file in enumerate(files):
        header = pydicom.dcmread(file)
        for name, values in (
            ("PixelSpacing", "0,7\\1,1 "),
            ("ImagePositionPatient", f"-12,5\\3\\{40 + 25 * index // 10},{25 * index % 10}"),
        ):
            text = values.encode()
            tag = pydicom.tag.Tag(name)
            header._dict[tag] = RawDataElement(tag, "DS", len(text), text + b" " * (len(text) % 2), 0, False, True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header.save_as(file)
    image = read_series(DicomSeries(folder=tmp_path))
    np.testing.assert_allclose(image.GetSpacing(), (1.1, 0.7, 2.5))
    np.testing.assert_allclose(image.GetOrigin(), (-12.5, 3, 40))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), _stored() - 1024)


def test_secondary_captures_have_the_spacing_of_their_header(tmp_path: Path) -> None:
    """GDCM looks for it elsewhere in these."""
    write_series(tmp_path, _stored(), SOPClassUID=SecondaryCaptureImageStorage)
    image = read_series(DicomSeries(folder=tmp_path))
    np.testing.assert_allclose(image.GetSpacing(), (1.1, 0.7, 2.5))


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, -1, 0), TURNED])
def test_negated_cosines(orientation: Any, tmp_path: Path) -> None:
    """The place in the patient of every voxel, by the formula of the standard (C.7.6.2.1.1), is that of the image."""
    files = write_series(tmp_path, _stored(), orientation=orientation)
    image = read_series(DicomSeries(folder=tmp_path))
    for file in files:
        header = pydicom.dcmread(file)
        row, column = np.reshape(np.asarray(header.ImageOrientationPatient, float), (2, 3))
        for y, x in ((0, 0), (6, 4), (2, 3)):
            place = np.asarray(header.ImagePositionPatient, float)
            place = place + x * header.PixelSpacing[1] * row + y * header.PixelSpacing[0] * column
            index = image.TransformPhysicalPointToIndex(place.tolist())
            assert image[index] == header.pixel_array[y, x] - 1024
