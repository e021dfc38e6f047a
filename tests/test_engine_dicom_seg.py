"""DICOM SEG of the engine (by DCMTK) against that of the Python runtime (by highdicom), attribute by attribute."""

import ctypes
import functools
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from fastnnunet.cli.main import main
from fastnnunet.errors import FastnnUNetError
from fastnnunet.images.cases import single_case
from fastnnunet.images.dicom.series import DicomSeries, slice_heads
from fastnnunet.outputs.dicom.anatomy import ALIASES, FINDINGS
from fastnnunet.outputs.dicom.codes import codes_of_name
from fastnnunet.outputs.dicom.seg import check_dicom_seg, write_dicom_seg
from fastnnunet.outputs.labelled import structures_of
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.version import __version__
from tests import engine
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.concept_tables import FILE as CONCEPTS
from tests.concept_tables import tables
from tests.dicom_files import labelled_series, write_series
from tests.test_dicom_seg_headers import KINDS, _edited, _rewrite
from tests.test_engine_program import run

SHAPE = (4, 7, 5)
LABELS = {"background": 0, "kidney_left": 1, "liver_tumor_right": 2, "something": 4, "never there": 5, "ignore": 6}
REGIONS = {"background": 0, "whole": [1, 2, 4], "core": [2, 4], "enhancing": 4}
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0), "negated column": (1, 0, 0, 0, -1, 0), "negated row": (-1, 0, 0, 0, 1, 0),
    "oblique": (0.8, 0.6, 0, 0, 0, -1), "sagittal": (0, 1, 0, 0, 0, -1),
}  # fmt: skip
# what is made anew for every object
OWN = {"SOPInstanceUID", "TrackingUID", "DimensionOrganizationUID", "InstanceCreationDate", "InstanceCreationTime",
       "ContentDate", "ContentTime"}  # fmt: skip


@pytest.fixture(scope="module")
def plugins() -> Path:
    """The folder of the plugin."""
    if not Path("/usr/include/dcmtk").is_dir():
        pytest.skip("no DCMTK to build the engine's DICOM SEG with (Debian: libdcmtk-dev)")
    folder = engine.BUILD.with_name(f"{engine.BUILD.name}_dcmtk")
    return engine.build("fastnnunet_dicomseg", folder, "-DFASTNNUNET_DCMTK=ON") / "lib"


class Slice(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_char_p) for name in (
            "path", "storage_class", "sop_uid", "study_uid", "series_uid", "frame_uid", "modality")),
        ("position_mm", ctypes.c_double * 3),
    ]  # fmt: skip


class Structure(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("values", ctypes.POINTER(ctypes.c_uint16)),
        ("value_count", ctypes.c_int64),
    ]


class Seg(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("folder", ctypes.c_char_p), ("slices", ctypes.POINTER(Slice)),
        ("slice_count", ctypes.c_int64), ("orientation", ctypes.c_double * 6),
        ("pixel_spacing_mm", ctypes.c_double * 2), ("rows", ctypes.c_int32), ("columns", ctypes.c_int32),
        ("structures", ctypes.POINTER(Structure)), ("structure_count", ctypes.c_int64), ("model", ctypes.c_char_p),
        ("version", ctypes.c_char_p), ("is_label_map", ctypes.c_int32), ("labels", ctypes.c_void_p),
        ("bytes_per_voxel", ctypes.c_int32), ("file", ctypes.c_char_p),
    ]  # fmt: skip


class Said(ctypes.Structure):
    _fields_ = [("error", ctypes.c_char * 4096), ("mended", ctypes.c_char * 8192)]


class Code(ctypes.Structure):
    _fields_ = [("value", ctypes.c_char * 17), ("scheme", ctypes.c_char * 17), ("meaning", ctypes.c_char * 65)]


class WriterTable(ctypes.Structure):
    _fields_ = [
        ("interface_version", ctypes.c_int32),
        ("write", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(Seg), ctypes.POINTER(Said))),
        ("check_whole", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p, ctypes.POINTER(Said))),
        ("find_codes", ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(Code))),
    ]


class Writer:
    """The plugin itself."""

    def __init__(self, folder: Path) -> None:
        entry = ctypes.CDLL(str(folder / "libfastnnunet_dicomseg.so")).fastnnunet_dicom_seg_entry
        entry.restype = ctypes.POINTER(WriterTable)
        self.table = entry().contents

    def write(
        self, labels_ZYX: np.ndarray | None, folder: Path, labels: dict[str, Any], model: str, file: Path, kind: str
    ) -> str:
        """What was mended. Raises ValueError with the refusal. Without labels the headers are checked alone."""
        heads = slice_heads(DicomSeries(folder=folder))
        slices = (Slice * len(heads))(*(
            Slice(*(str(text).encode() for text in (
                path, head.storage_class, head.sop_uid, head.study_uid, head.series_uid, head.frame_uid, head.modality,
            )), (ctypes.c_double * 3)(*head.position))
            for path, head in heads.items()
        ))  # fmt: skip
        structures = structures_of(labels)
        made = (Structure * len(structures))(*(
            Structure(s.name.encode(), (ctypes.c_uint16 * len(s.values))(*s.values), len(s.values)) for s in structures
        ))  # fmt: skip
        first = next(iter(heads.values()))
        seg = Seg(
            ctypes.sizeof(Seg), str(folder).encode(), slices, len(slices), (ctypes.c_double * 6)(*first.orientation),
            (ctypes.c_double * 2)(*first.pixel_spacing), first.rows, first.columns, made, len(made), model.encode(),
            __version__.encode(), kind == "labelmap", None, 0, str(file).encode(),
        )  # fmt: skip
        if labels_ZYX is not None:
            labels_ZYX = np.ascontiguousarray(labels_ZYX)
            seg.labels, seg.bytes_per_voxel = labels_ZYX.ctypes.data, labels_ZYX.itemsize
        said = Said()
        if self.table.write(ctypes.byref(seg), ctypes.byref(said)):
            raise ValueError(said.error.decode())
        return said.mended.decode()

    def codes(self, name: str) -> list[tuple[str, str, str] | None]:
        found = (Code * 4)()
        self.table.find_codes(name.encode(), found)
        return [(c.value.decode(), c.scheme.decode(), c.meaning.decode()) if c.value else None for c in found]


@pytest.fixture(scope="module")
def writer(plugins: Path) -> Writer:
    return Writer(plugins)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING):
        yield


def flat(data_set: Dataset, where: str = "") -> dict[str, Any]:
    """Every attribute of an object but its own identities and the library that wrote it, by its path."""
    found = {}
    for element in data_set:
        name = f"{where}{element.keyword}"
        if element.keyword in OWN or element.keyword == "PixelData" or name == "SeriesInstanceUID":
            continue
        if element.VR == "SQ":
            for number, item in enumerate(element.value):
                if element.keyword != "ContributingEquipmentSequence" or number < len(element.value) - 1:
                    found |= flat(item, f"{name}[{number}].")
        elif element.VR == "DS":
            values = element.value if element.VM > 1 else [element.value] if element.VM else []
            found[name] = tuple(round(float(value), 9) for value in values)
        else:
            found[name] = (element.VR, str(element.value))
    return found


def assert_same_object(got: Path, expected: Path) -> None:
    left, right = pydicom.dcmread(got), pydicom.dcmread(expected)
    assert flat(left) == flat(right)
    np.testing.assert_array_equal(left.pixel_array, right.pixel_array, strict=True)
    assert left.file_meta.MediaStorageSOPClassUID == right.file_meta.MediaStorageSOPClassUID
    own = [str(e.value) for e in left.iterall() if e.keyword in OWN and e.VR == "UI"]
    assert all(pydicom.uid.UID(uid).is_valid for uid in own)
    assert not set(own) & {str(e.value) for e in right.iterall() if e.keyword in OWN}


def check(
    writer: Writer, labels_ZYX: np.ndarray, folder: Path, labels: dict[str, Any] = LABELS, kind: Any = "binary"
) -> str:
    """Both write the same object; what the engine says it mended."""
    expected, got = folder.parent / "expected.dcm", folder.parent / "got.dcm"
    write_dicom_seg(labelled_series(labels_ZYX, folder, labels), expected, segmentation_type=kind)
    mended = writer.write(labels_ZYX, folder, labels, "toy", got, kind)
    assert_same_object(got, expected)
    return mended


def labels_of(values: tuple[int, ...] = (0, 1, 2, 4)) -> np.ndarray:
    labels = np.random.default_rng(0).choice(np.array(values, np.uint8), SHAPE)
    labels[1] = 0  # a slice without any segment is left out of the file
    return labels


def in_patient(file: Path) -> dict[tuple[float, ...], int]:
    """Place in mm (x, y, z) -> segment of every voxel that has one, as highdicom reads the file."""
    volume = hd.seg.segread(file).get_volume(combine_segments=True)
    index = np.argwhere(volume.array)
    points = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return dict(zip(map(tuple, points.round(3).tolist()), volume.array[tuple(index.T)].tolist(), strict=True))


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_same_object(orientation: str, kind: str, writer: Writer, tmp_path: Path) -> None:
    extra = {"Manufacturer": "Maker", "PatientAge": "065Y", "PatientSex": "F", "StudyDate": "20200131"}
    write_series(tmp_path / "ct", np.zeros(SHAPE), orientation=ORIENTATIONS[orientation], **extra)
    assert check(writer, labels_of(), tmp_path / "ct", kind=kind) == ""
    got, expected = in_patient(tmp_path / "got.dcm"), in_patient(tmp_path / "expected.dcm")
    assert got == expected
    assert set(got.values()) == {1, 2, 3}


@pytest.mark.parametrize("values", [(0, 1, 2, 4), (0, 4)])
def test_regions_overlap(values: Any, writer: Writer, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros(SHAPE))
    check(writer, labels_of(values), tmp_path / "ct", REGIONS)


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("how", ["empty", "one voxel", "all", "16 bits", "one slice", "one label", "every other slice"])
def test_little_and_much(how: str, kind: str, writer: Writer, tmp_path: Path) -> None:
    shape = (1, 7, 5) if how == "one slice" else (6, 7, 5)
    write_series(tmp_path / "ct", np.zeros(shape))
    labels_ZYX = np.full(shape, how in ("all", "one label", "one slice"), np.uint16 if how == "16 bits" else np.uint8)
    labels_ZYX[-1, 6, 4] |= how in ("one voxel", "16 bits")
    labels_ZYX[::2] |= how == "every other slice"
    labels = {"background": 0, "liver": 1} if how in ("one label", "every other slice") else LABELS
    if how == "16 bits" and kind == "labelmap":  # as many segments as need them
        labels = {"background": 0, **{f"l{n}": n for n in range(1, 258)}}
        labels_ZYX[0, 0] = (257, 256, 255, 254, 1)
    check(writer, labels_ZYX, tmp_path / "ct", labels, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_headers(kind: str, writer: Writer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mended as the Python runtime mends them, and said in its words."""
    _rewrite(tmp_path / "in", KINDS[kind][0])
    caplog.clear()
    got, expected = tmp_path / "got.dcm", tmp_path / "expected.dcm"
    labels_ZYX = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    write_dicom_seg(labelled_series(labels_ZYX, tmp_path / "in", LABELS), expected)
    mended = writer.write(labels_ZYX, tmp_path / "in", LABELS, "toy", got, "binary")
    left, right = (flat(pydicom.dcmread(file)) for file in (got, expected))
    # highdicom copies nothing that is not ASCII without saying so; here what is taken over alone counts
    for side in (left, right):
        side.pop("SpecificCharacterSet", None)
    assert left == right
    told = [said.split(between)[1] for said in caplog.messages if (between := "mended for the DICOM SEG: ") in said]
    assert ([mended] if mended else []) == told


@pytest.mark.parametrize("name", ["FrameOfReferenceUID", "SOPInstanceUID"])
def test_refusals(name: str, writer: Writer, tmp_path: Path) -> None:
    def change(header: Dataset, index: int) -> None:
        delattr(header, name)
        if name == "SOPInstanceUID":
            header.file_meta.MediaStorageSOPInstanceUID = ""

    _rewrite(tmp_path / "in", _edited(change))
    with pytest.raises(FastnnUNetError) as expected:
        check_dicom_seg(DicomSeries(folder=tmp_path / "in"), structures=structures_of(LABELS), model="toy")
    with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
        writer.write(None, tmp_path / "in", LABELS, "toy", tmp_path / "got.dcm", "binary")


def test_lost_identities_are_the_same_for_every_object(writer: Writer, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros(SHAPE), StudyInstanceUID=None)
    for name in ("a.dcm", "b.dcm"):
        mended = writer.write(labels_of(), tmp_path / "ct", LABELS, "toy", tmp_path / name, "binary")
        assert mended == "StudyInstanceUID (made up, the series has no StudyInstanceUID (anonymised?))"
    one, other = (pydicom.dcmread(tmp_path / name) for name in ("a.dcm", "b.dcm"))
    assert one.StudyInstanceUID == other.StudyInstanceUID
    assert one.StudyInstanceUID.is_valid
    assert one.SOPInstanceUID != other.SOPInstanceUID


def test_names_of_labels_are_any_text(writer: Writer, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros(SHAPE))
    labels = {"background": 0, "Läsion\\links": 1, "肝" * 70: 2, "": 3, "x" * 100: 4}
    check(writer, labels_of((0, 1, 2, 3, 4)), tmp_path / "ct", labels)


def test_codes_of_every_name(writer: Writer) -> None:
    names = {name for group in (7191, 7192, 7193, 7194, 7197) for name in getattr(codes, f"cid{group}").concepts}
    names |= {*ALIASES, *FINDINGS, "", "left", "l r", "kidneyLeft", "Kidney_r", "heart atrium left", "liver cysts"}
    names |= {f"{name} {side}" for name in sorted(names)[::7] for side in ("left", "R", "tumour", "s")}
    for name in names:
        found = codes_of_name(name)
        expected = [
            None if code is None else (code.value, code.scheme, code.meaning)
            for code in (found.category, found.type, found.laterality, found.region)
        ]
        assert writer.codes(name) == expected, name


def test_the_tables_are_those_of_pydicom() -> None:
    assert CONCEPTS.read_text() == tables(), "run python -m tests.concept_tables"


@pytest.fixture(scope="module")
def program() -> Path:
    return engine.build() / "bin" / "fastnnunet-engine"


@functools.cache
def toy(reader: str, where: Path) -> Path:
    return make_toy_model(Toy(reader_writer=reader), where / reader).bundle


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def ct(folder: Path, orientation: Any = ORIENTATIONS["axial"]) -> Path:
    stored = (1000 * smooth_noise((12, 25, 20), 0, border=2)).astype(int)
    write_series(folder, stored, spacing_zyx=(1.1, 1.0, 0.9), orientation=orientation)
    return folder


@pytest.mark.parametrize(
    ("reader", "orientation"),
    [("SimpleITKIO", "negated column"), ("SimpleITKIOWithReorient", "oblique"), ("NibabelIO", "sagittal"),
     ("NibabelIOWithReorient", "negated row")],
)  # fmt: skip
def test_a_predicted_series(
    reader: str, orientation: str, plugins: Path, program: Path, models: Path, tmp_path: Path
) -> None:
    bundle = toy(reader, models)
    folder = ct(tmp_path / "ct", ORIENTATIONS[orientation])
    words = ("predict", "-i", folder, "-o", tmp_path / "got", "-m", bundle, "--backend", "onnxruntime", "--threads", 1)
    done = run(program, *words, "--output-format", "dicom-seg", "image", FASTNNUNET_PLUGINS=str(plugins))
    assert done.returncode == 0, done.stderr
    predictor = Predictor.load(bundle, "onnxruntime", threads=1)
    predictor.predict_files(
        folder, tmp_path / "expected", writer=predictor.writer(OutputSpec(formats=("dicom-seg", "image")))
    )
    assert_same_object(tmp_path / "got" / "ct.dcm", tmp_path / "expected" / "ct.dcm")
    assert in_patient(tmp_path / "got" / "ct.dcm") == in_patient(tmp_path / "expected" / "ct.dcm")
    assert {p.name for p in (tmp_path / "got").iterdir()} >= {"ct.dcm", "ct.nii.gz"}


def test_the_c_interface(plugins: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNNUNET_PLUGINS", str(plugins))
    bundle, folder = toy("SimpleITKIO", models), ct(tmp_path / "ct")
    engine.Engine(bundle).predict_files([folder], tmp_path / "got.dcm")
    case = single_case(folder, load_bundle_spec(bundle))
    Predictor.load(bundle, "onnxruntime", threads=1).predict_case(case, tmp_path / "expected.dcm")
    assert_same_object(tmp_path / "got.dcm", tmp_path / "expected.dcm")


def test_what_is_done_is_left(plugins: Path, program: Path, models: Path, tmp_path: Path) -> None:
    bundle = toy("SimpleITKIO", models)
    for name in ("a", "b"):
        ct(tmp_path / "in" / name)

    def predict() -> subprocess.CompletedProcess[str]:
        words = ("predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "-m", bundle, "--backend", "onnxruntime")
        return run(program, *words, "--output-format", "dicom-seg", "--segmentation-type", "labelmap",
                   "--continue_prediction", FASTNNUNET_PLUGINS=str(plugins))  # fmt: skip

    assert "2 case(s) predicted" in predict().stdout
    assert pydicom.dcmread(tmp_path / "out" / "a.dcm").SegmentationType == "LABELMAP"
    damaged = tmp_path / "out" / "b.dcm"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    whole = (tmp_path / "out" / "a.dcm").stat().st_mtime_ns
    done = predict()
    assert "1 case(s) predicted" in done.stdout
    assert "b.dcm is damaged or not complete: its case is predicted again" in done.stderr
    assert (tmp_path / "out" / "a.dcm").stat().st_mtime_ns == whole


def said_by_python(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (Toy().labels, ("--output-format", "dicom-seg")),  # of a NIfTI image
        (Toy().labels, ("--segmentation-type", "labelmap")),
        (
            {"background": 0, "whole": [1, 2], "core": 2},
            ("--output-format", "dicom-seg", "--segmentation-type", "labelmap"),
        ),
    ],
)
def test_the_words_of_refusals(
    labels: Any, words: Any, plugins: Path, program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    regions = [1, 2] if len(labels) == 3 and isinstance(labels.get("whole"), list) else None
    bundle = make_toy_model(Toy(labels=labels, regions_class_order=regions), tmp_path / "toy").bundle
    image = tmp_path / "a_0000.nii.gz"
    shutil.copy(_nifti(tmp_path), image)
    common = ("-i", image, "-o", tmp_path / "out", "-m", bundle, "--backend", "onnxruntime", *words)
    done = run(program, "predict", *common, FASTNNUNET_PLUGINS=str(plugins))
    assert done.returncode == 2
    expected = said_by_python(capsys, "predict", *common)
    assert done.stderr.removeprefix("error: ").strip() in expected
    assert not (tmp_path / "out").exists()


def _nifti(folder: Path) -> Path:

    write_image(smooth_noise((12, 25, 20), 0, border=2), folder / "nifti.nii.gz", (1.1, 1.0, 0.9))
    return folder / "nifti.nii.gz"


def test_a_build_without_dcmtk_says_so(program: Path, models: Path, tmp_path: Path) -> None:
    words = ("-i", ct(tmp_path / "ct"), "-o", tmp_path / "out", "-m", toy("SimpleITKIO", models))
    done = run(program, "predict", *words, "--output-format", "dicom-seg")
    if (engine.BUILD / "lib" / "libfastnnunet_dicomseg.so").is_file():
        pytest.skip("this build has DCMTK")
    assert done.returncode == 2
    assert "-DFASTNNUNET_DCMTK=ON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_codes_of_the_bundle_are_not_passed_over(plugins: Path, program: Path, tmp_path: Path) -> None:
    bundle = make_toy_model(Toy(), tmp_path / "toy").bundle
    (bundle / "label_codes.yaml").write_text("a: Liver\n")
    words = ("-i", ct(tmp_path / "ct"), "-o", tmp_path / "out", "-m", bundle, "--output-format", "dicom-seg")
    done = run(program, "predict", *words, FASTNNUNET_PLUGINS=str(plugins))
    assert done.returncode == 2
    assert "label_codes.yaml" in done.stderr
