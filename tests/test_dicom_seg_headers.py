"""DICOM SEG of series whose headers are as PACS and anonymisers leave them: mended, said, and legal afterwards."""

import datetime
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pydicom.valuerep import STR_VR_REGEXES, validate_value

from fastnnunet.errors import ImageError
from fastnnunet.images.dicom.series import DicomSeries, slice_files
from fastnnunet.outputs.dicom.seg import check_dicom_seg, write_dicom_seg
from fastnnunet.outputs.dicom.values import mended, mended_sex
from fastnnunet.outputs.labelled import structures_of
from tests.dicom_files import labelled_series, write_series

SHAPE = (4, 7, 5)
LABELS = {"background": 0, "liver": 1, "spleen": 2}
Change = Callable[[Path, int], None]


def _rewrite(folder: Path, change: Change) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = write_series(folder, np.zeros(SHAPE), Manufacturer="Maker")
        for index, file in enumerate(files):
            change(file, index)
    return files


def _raw(**values: str | bytes) -> Change:
    """Put the very bytes into the file, which pydicom would not write."""

    def change(file: Path, index: int) -> None:
        content = file.read_bytes()
        at = 132 + 12 + int.from_bytes(content[140:144], "little")  # behind the group of the file format
        elements, start = {}, content[:at]
        while at < len(content):
            group, number = struct.unpack("<HH", content[at : at + 4])
            is_long = content[at + 4 : at + 6] in (b"OW", b"OB", b"SQ", b"UN")
            size = struct.unpack(
                "<L" if is_long else "<H", content[at + (8 if is_long else 6) : at + (12 if is_long else 8)]
            )[0]
            end = at + (12 if is_long else 8) + size
            elements[group << 16 | number], at = content[at:end], end
        for name, value in values.items():
            value = value if isinstance(value, bytes) else value.encode("latin-1")
            value += b" " * (len(value) % 2)
            tag = int(tag_for_keyword(name) or 0)
            head = struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, dictionary_VR(tag).encode(), len(value))
            elements[tag] = head + value
        file.write_bytes(start + b"".join(elements[tag] for tag in sorted(elements)))

    return change


def _edited(edit: Callable[[Dataset, int], None]) -> Change:
    def change(file: Path, index: int) -> None:
        header = pydicom.dcmread(file)
        edit(header, index)
        header.save_as(file)

    return change


def _without(*names: str) -> Change:
    def edit(header: Dataset, index: int) -> None:
        for name in names:
            if name in header:
                delattr(header, name)

    return _edited(edit)


def _segment(folder: Path) -> tuple[Path, np.ndarray]:
    """Checked as before a prediction, then written."""
    labels_ZYX = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    file = folder.parent / "seg.dcm"
    series = DicomSeries(folder=folder)
    check_dicom_seg(series, structures=structures_of(LABELS), model="toy")
    write_dicom_seg(labelled_series(labels_ZYX, folder, LABELS), file, checked=True)
    return file, labels_ZYX


def _check(file: Path, labels_ZYX: np.ndarray, folder: Path) -> Dataset:
    """Every value is legal by pydicom's strictest reading, but UIDs copied from the images; the voxels are right."""
    segmentation = pydicom.dcmread(file)
    _check_values(segmentation)
    uids = [
        str(pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID) for f in slice_files(DicomSeries(folder=folder))
    ]
    got = hd.seg.segread(file).get_pixels_by_source_instance(uids, combine_segments=True)
    np.testing.assert_array_equal(got, labels_ZYX)
    return segmentation


def _check_values(data_set: Dataset) -> None:
    for element in data_set:
        if element.VR == "SQ":
            for item in element.value:
                _check_values(item)
        elif element.VR in STR_VR_REGEXES or element.VR in ("LO", "SH", "PN", "CS", "DA", "TM", "IS", "DS", "AS"):
            values = element.value if element.VM > 1 else [element.value]
            for value in values if element.VM else ():
                text = getattr(value, "original_string", None) or str(value)
                if element.VR != "UI":
                    validate_value(element.VR, text, pydicom.config.RAISE)


GOOD = {"PatientID": "P1", "PatientName": "Test^Case"}
KINDS: dict[str, tuple[Change, dict[str, Any], tuple[str, ...]]] = {
    # kind -> (what is wrong, what the segmentation says, what is told)
    "dotted dates": (
        _raw(PatientBirthDate="1950.12.11", StudyDate="2020/01/31", StudyTime="10:11:12"),
        {"PatientBirthDate": "19501211", "StudyDate": "20200131", "StudyTime": "101112"},
        ("PatientBirthDate (rewritten)", "StudyTime"),
    ),
    "no dates": (
        _raw(PatientBirthDate="00000000", StudyDate="ANONYMIZ", StudyTime="99:99"),
        {"PatientBirthDate": "", "StudyDate": "", "StudyTime": ""},
        ("PatientBirthDate (left empty, it is no date)", "StudyDate", "StudyTime"),
    ),
    "impossible date": (_raw(StudyDate="20230230"), {"StudyDate": ""}, ("StudyDate",)),
    "leap second": (_raw(StudyTime="235960"), {"StudyTime": "235959"}, ("StudyTime",)),
    "sex as a word": (_raw(PatientSex="Male"), {"PatientSex": "M"}, ("PatientSex (written as M)",)),
    "sex N": (_raw(PatientSex="N"), {"PatientSex": ""}, ("PatientSex (left empty",)),
    "sex with a null": (_raw(PatientSex=b"F\0"), {"PatientSex": "F"}, ()),
    "series number text": (_raw(SeriesNumber="3.5"), {"SeriesNumber": 1000}, ("SeriesNumber (1000",)),
    "series number huge": (_raw(SeriesNumber="2147483600"), {"SeriesNumber": 1000}, ("SeriesNumber",)),
    "series number negative": (_raw(SeriesNumber="-2000"), {"SeriesNumber": 1000}, ("SeriesNumber",)),
    "series number float": (_raw(SeriesNumber="7.0"), {"SeriesNumber": 1007}, ()),
    "series number several": (_raw(SeriesNumber="7\\8"), {"SeriesNumber": 1007}, ()),
    "series number empty": (_raw(SeriesNumber=""), {"SeriesNumber": 1000}, ()),
    "too long": (
        _raw(PatientName="X" * 80, PatientID="Y" * 70, StudyID="Z" * 40, AccessionNumber="A" * 17),
        {"PatientName": "X" * 64, "PatientID": "Y" * 64, "StudyID": "Z" * 16, "AccessionNumber": "A" * 16},
        ("PatientName", "PatientID (shortened to 64 characters)", "StudyID", "AccessionNumber"),
    ),
    "several where there is one": (
        _raw(PatientID="A\\B", StudyID="1\\2", PatientBirthDate="19500101\\19500102", PatientSex="M\\F"),
        {"PatientID": "A", "StudyID": "1", "PatientBirthDate": "19500101"},
        ("PatientID (only the first value kept)",),
    ),
    "control characters": (_raw(PatientID="a\tb\x1bc", StudyDescription="x\ny"), {"PatientID": "abc"}, ("PatientID",)),
    "Latin-1 without a character set": (
        _raw(PatientName="M\xfcller^J\xf6rg"),
        {"PatientName": "Müller^Jörg", "SpecificCharacterSet": "ISO_IR 192"},
        (),
    ),
    "unknown character set": (
        _raw(SpecificCharacterSet="latin9", PatientName="M\xfcller"),
        {"PatientName": "Müller"},
        (),
    ),
    "Japanese": (
        _raw(
            SpecificCharacterSet="\\ISO 2022 IR 87",
            PatientName=b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
        ),
        {"PatientName": "Yamada^Tarou=山田^太郎"},
        (),
    ),
    "Japanese in Shift-JIS": (
        _raw(SpecificCharacterSet="ISO_IR 13", PatientName="ﾔﾏﾀﾞ^ﾀﾛｳ".encode("shift_jis")),
        {"PatientName": "ﾔﾏﾀﾞ^ﾀﾛｳ"},
        (),
    ),
    "Korean": (
        _raw(
            SpecificCharacterSet="\\ISO 2022 IR 149",
            PatientName=b"Hong^Gildong=\x1b$)C" + "洪^".encode("euc_kr") + b"\x1b$)C" + "吉洞".encode("euc_kr"),
        ),
        {"PatientName": "Hong^Gildong=洪^吉洞"},
        (),
    ),
    # the second byte of this letter is a backslash
    "Chinese": (
        _raw(SpecificCharacterSet="GB18030", PatientName="Wang^王小".encode("gb18030"), StudyDescription=b"\x81\x5c"),
        {"PatientName": "Wang^王小", "StudyDescription": b"\x81\x5c".decode("gb18030")},
        (),
    ),
    "GBK": (_raw(SpecificCharacterSet="GBK", PatientName="王^小".encode("gbk")), {"PatientName": "王^小"}, ()),
    "Chinese by escapes": (
        _raw(
            SpecificCharacterSet="\\ISO 2022 IR 58",
            PatientName=b"Zhang^XiaoDong=\x1b$)A" + "张^".encode("gb2312") + b"\x1b$)A" + "小东".encode("gb2312"),
        ),
        {"PatientName": "Zhang^XiaoDong=张^小东"},
        (),
    ),
    "Latin-1 called UTF-8": (
        _raw(SpecificCharacterSet="ISO_IR 192", PatientName="M\xfcller"),
        {"PatientName": "Müller"},
        (),
    ),
    "UTF-8 without a character set": (_raw(PatientName="Ωmega".encode()), {"PatientName": "Ωmega"}, ()),
    "character set spelled otherwise": (
        _raw(SpecificCharacterSet="iso-ir 101", PatientName="Wałęsa".encode("iso8859_2")),
        {"PatientName": "Wałęsa"},
        (),
    ),
    "what the segmentation has of its own": (
        _raw(Modality="ct scan", ContentDate="x", InstanceCreationTime="y"),
        {"Modality": "SEG"},
        (),
    ),
    "Cyrillic": (
        _raw(SpecificCharacterSet="ISO_IR 144", PatientName="Люкceмбypг".encode("iso8859_5")),
        {"PatientName": "Люкceмбypг"},
        (),
    ),
    "UTF-8": (_raw(SpecificCharacterSet="ISO_IR 192", PatientName="Ωmega".encode()), {"PatientName": "Ωmega"}, ()),
    "thickness text": (_raw(SliceThickness="thin"), {}, ("SliceThickness",)),
    "thickness zero": (_raw(SliceThickness="0"), {}, ("SliceThickness",)),
    "thickness negative": (_raw(SliceThickness="-1"), {}, ("SliceThickness",)),
    "thickness empty": (_raw(SliceThickness=""), {}, ()),
    "thickness with a comma": (_raw(SliceThickness="5,0"), {}, ()),
    "thickness several": (_raw(SliceThickness="5\\6"), {}, ()),
    "age and size": (
        _raw(PatientAge="65Y", PatientWeight="70,5", PatientSize="tall", Occupation="x" * 30),
        {"PatientAge": "065Y", "PatientWeight": 70.5, "PatientSize": None, "Occupation": "x" * 16},
        ("PatientAge (rewritten)", "PatientWeight (rewritten)", "PatientSize (left empty, it is no number)"),
    ),
    "missing": (
        _without("Manufacturer", "StudyID", "AccessionNumber", "PatientID", "PatientName", "Modality", "SeriesNumber"),
        {"StudyID": "", "AccessionNumber": "", "PatientID": ""},
        (),
    ),
    "study UID with letters": (_raw(StudyInstanceUID="1.2.ANON.3"), {"StudyInstanceUID": "1.2.ANON.3"}, ()),
    "UIDs with nulls and spaces": (
        _raw(StudyInstanceUID=b"1.2.3\0", FrameOfReferenceUID=b"1.2.4 ", SeriesInstanceUID=b"1.2.5\0\0\0"),
        {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"},
        (),
    ),
    "UIDs that differ": (
        _edited(lambda header, index: setattr(header, "StudyInstanceUID", generate_uid())),
        {},
        ("StudyInstanceUID (that of the",),
    ),
    "a maker's class": (_raw(SOPClassUID="1.3.46.670589.11.0.0.12.2"), {}, ()),
    "no class": (_without("SOPClassUID"), {}, ()),
    "equipment": (
        _raw(Manufacturer="M" * 80, SoftwareVersions="a\\b", DeviceSerialNumber="S" * 70, InstitutionName="\xe9" * 65),
        {},
        ("Manufacturer (shortened", "InstitutionName"),
    ),
    "long decimals": (
        _raw(
            ImageOrientationPatient="1.00000000000000000\\0\\0\\0\\1.0000000000000000000\\0",
            PixelSpacing="0.7000000000000000001\\1.1000000000000000001",
        ),
        {},
        (),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_headers(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, expected, told = KINDS[kind]
    _rewrite(tmp_path / "in", change)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydicom's and highdicom's are none that a user can do something about
        file, labels_ZYX = _segment(tmp_path / "in")
    assert len(caplog.records) == bool(told), caplog.text
    segmentation = _check(file, labels_ZYX, tmp_path / "in")
    for name, value in expected.items():
        assert segmentation[name].value == value, name
    for words in told:
        assert words in caplog.text
    thickness = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness
    assert thickness == (
        2.5 if kind in ("thickness text", "thickness zero", "thickness negative", "thickness empty") else 5
    )


def test_a_makers_class_is_named_in_every_reference(tmp_path: Path) -> None:
    storage_class = "1.3.46.670589.11.0.0.12.2"
    _rewrite(tmp_path / "in", _raw(SOPClassUID=storage_class))
    segmentation = pydicom.dcmread(_segment(tmp_path / "in")[0])
    named = [e.value for e in segmentation.iterall() if e.keyword == "ReferencedSOPClassUID"]
    assert len(named) > SHAPE[0]
    assert set(named) == {storage_class}


def test_sequences_are_in_the_character_set_around_them(tmp_path: Path) -> None:
    def change(header: Dataset, index: int) -> None:
        header.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        header.PatientName = "Yamada^Tarou=山田^太郎"
        item = Dataset()
        item.PatientID = "山田"
        header.OtherPatientIDsSequence = [item]

    _rewrite(tmp_path / "in", _edited(change))
    segmentation = pydicom.dcmread(_segment(tmp_path / "in")[0])
    assert segmentation.PatientName == "Yamada^Tarou=山田^太郎"
    assert segmentation.OtherPatientIDsSequence[0].PatientID == "山田"


def test_copies_and_scouts_are_not_referred_to(tmp_path: Path) -> None:
    files = _rewrite(tmp_path / "in", _raw(SeriesInstanceUID="1.2.3"))
    shutil.copy(files[1], tmp_path / "in" / "copy")
    scout = {"orientation": (0, 1, 0, 0, 0, -1), "prefix": "scout", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    write_series(tmp_path / "in", np.zeros((1, 9, 9)), series_uid="1.2.3", **scout)
    file, labels_ZYX = _segment(tmp_path / "in")
    segmentation = _check(file, labels_ZYX, tmp_path / "in")
    named = [
        item.ReferencedSOPInstanceUID for item in segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    ]
    assert named == [pydicom.dcmread(f).SOPInstanceUID for f in files]


def test_sequences_are_mended_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(header: Dataset, index: int) -> None:
        item = Dataset()
        item.PatientID = "I" * 70
        header.OtherPatientIDsSequence = [item]
        header.add_new(0x00091010, "LO", "private")
        header.add_new(0x00090010, "LO", "MAKER")

    _rewrite(tmp_path / "in", _edited(change))
    file, labels_ZYX = _segment(tmp_path / "in")
    segmentation = _check(file, labels_ZYX, tmp_path / "in")
    assert segmentation.OtherPatientIDsSequence[0].PatientID == "I" * 64
    assert "PatientID (shortened" in caplog.text


@pytest.mark.parametrize("name", ["FrameOfReferenceUID", "SOPInstanceUID", "PixelSpacing", "ImagePositionPatient"])
def test_what_nothing_can_stand_for_is_refused_before(name: str, tmp_path: Path) -> None:
    def change(header: Dataset, index: int) -> None:
        delattr(header, name)
        if name == "SOPInstanceUID":
            header.file_meta.MediaStorageSOPInstanceUID = ""

    _rewrite(tmp_path / "in", _edited(change))
    with pytest.raises(ImageError, match=f"no {name}"):
        check_dicom_seg(DicomSeries(folder=tmp_path / "in"), structures=structures_of(LABELS), model="toy")


def test_equal_identities_are_refused_before(tmp_path: Path) -> None:
    _rewrite(tmp_path / "in", _raw(SOPInstanceUID="1.2.3"))
    with pytest.raises(ImageError, match="the same SOPInstanceUID"):
        check_dicom_seg(DicomSeries(folder=tmp_path / "in"), structures=structures_of(LABELS), model="toy")


def test_names_of_labels_are_any_text(tmp_path: Path) -> None:
    _rewrite(tmp_path / "in", _without())
    labels = {"background": 0, "Läsion\\links": 1, "肝": 2, "": 3, "x" * 100: 4}
    labels_ZYX = np.random.default_rng(0).integers(0, 5, SHAPE).astype(np.uint8)
    series, file = DicomSeries(folder=tmp_path / "in"), tmp_path / "seg.dcm"
    check_dicom_seg(series, structures=structures_of(labels), model="Modell\\für\nalle")
    write_dicom_seg(labelled_series(labels_ZYX, series.folder, labels, "Modell\\für\nalle"), file)
    segmentation = _check(file, labels_ZYX, tmp_path / "in")
    assert [s.SegmentLabel for s in segmentation.SegmentSequence] == ["Läsion/links", "肝", "3", "x" * 64]


def test_files_without_preamble(tmp_path: Path) -> None:
    for file in _rewrite(tmp_path / "in", _without()):
        header = pydicom.dcmread(file)
        bare = Dataset()
        bare.update({e.tag: e for e in header})
        bare.save_as(file, implicit_vr=True, little_endian=True)
    file, labels_ZYX = _segment(tmp_path / "in")
    segmentation = pydicom.dcmread(file)
    _check_values(segmentation)
    np.testing.assert_array_equal(hd.seg.segread(file).get_volume(combine_segments=True).array.sum(), labels_ZYX.sum())


@pytest.mark.parametrize(
    "orientation",
    [(1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, -1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, 1)],
)
def test_negated_cosines_are_not_flipped(orientation: Any, tmp_path: Path) -> None:
    """Read as an array with an affine, as other tools do, each labelled voxel lies where its pixel does."""
    files = write_series(tmp_path / "in", np.zeros(SHAPE), orientation=orientation)
    labels_ZYX = np.zeros(SHAPE, np.uint8)
    labels_ZYX[1, 0, 0], labels_ZYX[2, 6, 4], labels_ZYX[3, 2, 1] = 1, 2, 1
    write_dicom_seg(labelled_series(labels_ZYX, tmp_path / "in", LABELS), tmp_path / "seg.dcm")
    expected = set()
    for z, y, x in np.argwhere(labels_ZYX):
        header = pydicom.dcmread(files[z])
        row, column = np.reshape(np.asarray(header.ImageOrientationPatient, float), (2, 3))
        place = np.asarray(header.ImagePositionPatient, float)
        place = place + x * header.PixelSpacing[1] * row + y * header.PixelSpacing[0] * column
        expected.add((*place.round(3).tolist(), int(labels_ZYX[z, y, x])))
    volume = hd.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    got = set()
    for index in np.argwhere(volume.array):
        place = volume.affine[:3, :3] @ index + volume.affine[:3, 3]
        got.add((*place.round(3).tolist(), int(volume.array[tuple(index)])))
    assert got == expected


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(["DA", "TM", "DT", "AS", "CS", "DS", "IS", "LO", "SH", "PN", "UI"]), st.text(max_size=90))
def test_whatever_was_there_is_legal_afterwards(vr: str, text: str) -> None:
    values, _ = mended(vr, text, single=False)
    for value in values:
        validate_value(vr, value, pydicom.config.RAISE)


@settings(max_examples=300, deadline=None)
@given(st.dates(min_value=datetime.date(1000, 1, 1)), st.times(), st.sampled_from([".", "-", "/", ""]))
def test_dates_and_times_keep_their_meaning(date: Any, time: Any, between: str) -> None:
    written = between.join((f"{date.year:04d}", f"{date.month:02d}", f"{date.day:02d}"))
    assert mended("DA", written, single=True)[0] == [date.strftime("%Y%m%d")]
    colons = ":" if between else ""
    written = colons.join((f"{time.hour:02d}", f"{time.minute:02d}", f"{time.second:02d}"))
    assert mended("TM", written, single=True)[0] == [time.strftime("%H%M%S")]


def test_sexes() -> None:
    assert [mended_sex(s)[0] for s in ("M", "f", "Female", " O", "N", "D", "unknown", "")] == [*"MFFO", "", "", "", ""]
