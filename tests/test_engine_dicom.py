"""DICOM series in the engine against the Python runtime (ITK and GDCM): the same images, or the same refusals."""

import gzip
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ImplicitVRLittleEndian, MRImageStorage, generate_uid

from fastnnunet.errors import ImageError
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.images.io import image_io
from tests.dicom_files import write_series
from tests.engine import BUILD
from tests.engine_probe import Probe, images_probe, with_gdcm

READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)
SHAPE = (6, 7, 5)
UP = np.arange(6.0)
LOCALIZER = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    probe = Probe(images_probe(), tmp_path_factory.mktemp("probe"))
    yield probe
    probe.close()


@pytest.fixture(scope="module")
def gdcm_probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    probe = Probe(with_gdcm(BUILD.with_name(f"{BUILD.name}_gdcm")), tmp_path_factory.mktemp("probe"))
    yield probe
    probe.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def stored(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-50, 3000, SHAPE)


def read_by_python(reader: str, folder: Path, uid: str | None) -> tuple[np.ndarray, dict[str, Any]] | str:
    try:
        return image_io(reader).read([DicomSeries(folder=folder, uid=uid)])
    except ImageError as e:
        return str(e)


def check(probe: Probe, folder: Path, reader: str = "SimpleITKIO", uid: str | None = None) -> dict[str, Any] | str:
    """The same image with the same spacing, or a refusal in the same words; what the Python runtime says."""
    got, expected = probe.series(reader, folder, uid or ""), read_by_python(reader, folder, uid)
    if isinstance(expected, str):
        assert isinstance(got, str), f"only the Python runtime refuses: {expected}"
        if not expected.startswith("cannot read"):
            assert got == expected
        return expected
    assert not isinstance(got, str), got
    image, properties = expected
    np.testing.assert_array_equal(got[0], image, strict=True)
    np.testing.assert_allclose(got[1]["spacing"], [float(s) for s in properties["spacing"]], rtol=1e-12)
    return properties


def label_map(probe: Probe, folder: Path, reader: str, properties: dict[str, Any], scratch: Path) -> None:
    """A label map of the series is the same file."""
    labels = (np.arange(np.prod(SHAPE)) % 3).astype(np.uint8)
    labels = labels.reshape(probe.series(reader, folder)[0].shape[1:])
    files = [scratch / "expected.nii.gz", scratch / "got.nii.gz"]
    image_io(reader).write(labels, files[0], properties)
    assert probe.write(reader, labels, files[1], folder) is None
    expected, got = (gzip.decompress(file.read_bytes()) for file in files)
    assert got[352:] == expected[352:]
    fields = [np.frombuffer(whole[76:344], "<f4") for whole in (expected, got)]
    np.testing.assert_allclose(fields[1], fields[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("orientation", [(1.0, 0, 0, 0, 1, 0), OBLIQUE, (-1.0, 0, 0, 0, 1, 0), (0.0, 1, 0, 0, 0, -1)])
def test_voxels_and_geometry(probe: Probe, reader: str, orientation: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dicom"
    write_series(folder, stored(), orientation=orientation)
    properties = check(probe, folder, reader)
    assert not isinstance(properties, str)
    label_map(probe, folder, reader, properties, tmp_path)


def test_rescaling_of_each_slice(probe: Probe, tmp_path: Path) -> None:
    write_series(tmp_path, stored(), rescale=[(1.0, 0.0), *((0.1 * i, 3.7) for i in range(1, 6))])
    assert not isinstance(check(probe, tmp_path), str)


@pytest.mark.parametrize(("bits", "signed"), [(12, 0), (12, 1), (16, 0), (16, 1), (10, 1)])
def test_bits_that_are_not_used(probe: Probe, bits: int, signed: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-(2**15), 2**15, SHAPE)
    write_series(tmp_path, values, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=signed)
    assert not isinstance(check(probe, tmp_path), str)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_encodings(probe: Probe, syntax: str, tmp_path: Path) -> None:
    for file in write_series(tmp_path, stored()):
        header = pydicom.dcmread(file)
        if syntax == ExplicitVRBigEndian:
            header.PixelData = header.pixel_array.astype(">i2").tobytes()
        header.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(file, header, implicit_vr=syntax == ImplicitVRLittleEndian,
                         little_endian=syntax == ImplicitVRLittleEndian, enforce_file_format=True)  # fmt: skip
    assert not isinstance(check(probe, tmp_path), str)


def test_without_preamble(probe: Probe, tmp_path: Path) -> None:
    for file in write_series(tmp_path, stored()):
        file.write_bytes(file.read_bytes()[132:])
    assert not isinstance(check(probe, tmp_path), str)


@pytest.mark.parametrize("storage_class", [CTImageStorage, MRImageStorage])
def test_compressed_slices_and_those_of_a_kind_of_their_own(
    gdcm_probe: Probe, probe: Probe, storage_class: str, tmp_path: Path
) -> None:
    write_series(tmp_path, stored(), compressed=True, SOPClassUID=storage_class, rescale=[(2.0, 5.0)])
    assert not isinstance(check(gdcm_probe, tmp_path), str)
    assert "FASTNNUNET_GDCM" in probe.series("SimpleITKIO", tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    write_series(tmp_path, stored(), SOPClassUID=storage_class, rescale=[(2.0, 5.0)])
    assert not isinstance(check(gdcm_probe, tmp_path), str)
    write_series(tmp_path / "one", stored()[:1])
    check(gdcm_probe, tmp_path / "one")


def test_several_series(probe: Probe, tmp_path: Path) -> None:
    write_series(tmp_path, stored(), series_uid="1.2.3", SeriesDescription="Body 3.0")
    write_series(tmp_path, stored(1)[:2], series_uid="1.2.4", prefix="other", Modality="PT")
    for uid in (None, "1.2.3", "1.2.4", "1.2.5"):
        check(probe, tmp_path, uid=uid)


def scouts(folder: Path) -> None:
    write_series(folder, stored(), series_uid="1.2.3")
    write_series(folder, stored()[:1], series_uid="1.2.4", prefix="scout", ImageType=LOCALIZER)


def scout_of_the_series(folder: Path) -> None:
    write_series(folder, stored(), series_uid="1.2.3")
    write_series(folder, stored()[:1], series_uid="1.2.3", prefix="scout", ImageType=LOCALIZER, orientation=OBLIQUE)


def with_a_copy(folder: Path) -> None:
    file = write_series(folder, stored())[2]
    shutil.copy(file, folder / f"copy of {file.name}")


def same_identity(folder: Path) -> None:
    uid = generate_uid()
    write_series(folder, stored()[:2], positions=[(0, 0, 0)] * 2, SOPInstanceUID=uid)


def with_a_segmentation(folder: Path) -> None:
    write_series(folder, stored())
    write_series(folder, stored()[:1], prefix="seg", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4", Modality="SEG")


def with_others(folder: Path) -> None:
    write_series(folder, stored())
    (folder / "notes.txt").write_text("not DICOM" * 40)
    (folder / ".hidden").write_bytes(b"x" * 300)
    (folder / "below").mkdir()


def missing(folder: Path) -> None:
    write_series(folder, stored())[3].unlink()


def empty(folder: Path) -> None:
    write_series(folder, stored())[3].write_bytes(b"")


def cut(folder: Path) -> None:
    file = write_series(folder, stored())[3]
    file.write_bytes(file.read_bytes()[:-20])


def headless(folder: Path) -> None:
    file = write_series(folder, stored())[3]
    file.write_bytes(file.read_bytes()[:500])


def other_size(folder: Path) -> None:
    write_series(folder, stored(), series_uid="1.2.3")
    write_series(folder, stored()[:1, :5], series_uid="1.2.3", prefix="odd")


def of_positions(*positions: tuple[float, float, float]) -> Callable[[Path], None]:
    return lambda folder: write_series(folder, stored()[: len(positions)], positions=list(positions)) and None


def of_attributes(**attributes: Any) -> Callable[[Path], None]:
    return lambda folder: write_series(folder, stored(), **attributes) and None


FOLDERS: dict[str, Callable[[Path], None]] = {
    **{f.__name__: f for f in (
        scouts, scout_of_the_series, with_a_copy, same_identity, with_a_segmentation, with_others, missing, empty, cut,
        headless, other_size,
    )},
    "uneven": of_positions(*((0, 0, z) for z in (0, 2, 4, 6.7, 8.7, 10.7))),
    "two missing": of_positions(*((0, 0, z) for z in (0, 1, 2, 3, 5, 7))),
    "twice at a place": of_positions(*((0, 0, z) for z in (0, 2, 4, 4, 6, 8))),
    "a little uneven": of_positions(*((0, 0, z + 0.01 * (z == 2)) for z in UP)),
    "tilted": of_positions(*((0, 0.3 * z, z) for z in UP)),
    "a little tilted": of_positions(*((0, 0.01 * z, z) for z in UP)),
    "downwards": of_positions(*((0, 0, -z) for z in UP)),
    "no position": of_attributes(ImagePositionPatient=None),
    "no orientation": of_attributes(ImageOrientationPatient=None),
    "no spacing": of_attributes(PixelSpacing=None),
    "skewed": of_attributes(orientation=(1, 0, 0, 0.5, 0.5, 0)),
    "frames": of_attributes(NumberOfFrames=2),
    "no rescaling": of_attributes(RescaleSlope=None, RescaleIntercept=None),
    "MR without rescaling": of_attributes(RescaleSlope=None, RescaleIntercept=None, SOPClassUID=MRImageStorage),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_as_they_come(probe: Probe, name: str, tmp_path: Path) -> None:
    FOLDERS[name](tmp_path)
    check(probe, tmp_path)


def test_no_series(probe: Probe, tmp_path: Path) -> None:
    check(probe, tmp_path)
    (tmp_path / "a").write_bytes(bytes(500))
    check(probe, tmp_path)


def test_damaged_anywhere(probe: Probe, tmp_path: Path) -> None:
    """Whatever a byte of a header is, the engine takes what the Python runtime does, or refuses."""
    files = write_series(tmp_path, stored()[:3])
    whole = files[1].read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(128, len(whole) - 220, rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 255, 1, 0x31, damaged[at] ^ 1])
        files[1].write_bytes(damaged)
        got = probe.series("SimpleITKIO", tmp_path)
        if isinstance(got, str):
            continue
        image, properties = image_io("SimpleITKIO").read([DicomSeries(folder=tmp_path)])
        np.testing.assert_array_equal(got[0], image)
        np.testing.assert_allclose(got[1]["spacing"], [float(s) for s in properties["spacing"]], rtol=1e-12)
