"""NibabelIO, NibabelIOWithReorient and Tiff3DIO against nnU-Net's own; headers that lie are refused by every reader."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from fastnnunet.errors import FastnnUNetError, ImageError
from fastnnunet.images.io import image_io
from tests.bundles import write_image

NIBABEL = ["NibabelIO", "NibabelIOWithReorient"]
# axes swapped and flipped, and a rotation by a few degrees that reorienting must not undo
TURNED = np.array([[0.0, 0.0, -2.5, 40.0], [-0.7, 0.05, 0.0, 3.0], [0.03, 1.1, 0.0, -12.5], [0.0, 0.0, 0.0, 1.0]])
SHEARED = np.array([[1.0, 0.3, 0.0, 5.0], [0.0, 1.2, 0.1, -4.0], [0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]])


def _volume(dtype: Any = np.float32, shape: tuple[int, ...] = (5, 6, 7), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def _nnunet(reader: str) -> Any:
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    return recursive_find_reader_writer_by_name(reader)()


def _nifti(file: Path, voxels_XYZ: np.ndarray, affine: np.ndarray, **header: Any) -> Path:
    image = nibabel.Nifti1Image(voxels_XYZ, affine)
    if "slope_inter" in header:
        image.header.set_slope_inter(*header["slope_inter"])
    if "qform" in header:
        image.set_sform(None, 0)
        image.set_qform(affine, header["qform"])
    nibabel.save(image, file)
    return file


def _assert_same(got: Any, expected: Any) -> None:
    """Properties, with NumPy arrays in them, equal to the last bit."""
    assert type(got) is type(expected) or not isinstance(expected, dict)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            _assert_same(got[key], expected[key])
    else:
        np.testing.assert_array_equal(got, expected)


def _same_read(reader: str, files: list[Path]) -> dict[str, Any]:
    expected, expected_properties = _nnunet(reader).read_images([str(f) for f in files])
    got, properties = image_io(reader).read(files)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    _assert_same(properties, expected_properties)
    return properties


@pytest.mark.parametrize("reader", NIBABEL)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize(
    "affine", [np.diag([1.0, 2.0, 3.0, 1.0]), TURNED, SHEARED], ids=["straight", "turned", "sheared"]
)
def test_nibabel_reads_as_nnunet(reader: str, dtype: Any, affine: np.ndarray, tmp_path: Path) -> None:
    _same_read(reader, [_nifti(tmp_path / "a_0000.nii.gz", _volume(dtype), affine)])


@pytest.mark.parametrize("reader", NIBABEL)
def test_nibabel_headers_as_nnunet(reader: str, tmp_path: Path) -> None:
    rotated = TURNED.copy()
    rotated[:3, :3] = np.array([[0, 0, -1], [-1, 0, 0], [0, 1, 0]]) * [0.7, 1.1, 2.5]
    _same_read(reader, [_nifti(tmp_path / "qform.nii", _volume(), rotated, qform=1)])
    _same_read(reader, [_nifti(tmp_path / "neither.nii.gz", _volume(), rotated, qform=0)])
    _same_read(reader, [_nifti(tmp_path / "scaled.nii.gz", _volume(np.int16), TURNED, slope_inter=(0.3, -10.7))])
    nibabel.save(nibabel.Nifti2Image(_volume(), TURNED), tmp_path / "two.nii.gz")
    _same_read(reader, [tmp_path / "two.nii.gz"])
    _same_read(reader, [_nifti(tmp_path / f"c_000{c}.nii.gz", _volume(seed=c), TURNED) for c in range(2)])


@pytest.mark.parametrize("reader", NIBABEL)
@pytest.mark.parametrize("labels", [3, 300])
@pytest.mark.parametrize("affine", [TURNED, SHEARED], ids=["turned", "sheared"])
def test_nibabel_writes_as_nnunet(reader: str, labels: int, affine: np.ndarray, tmp_path: Path) -> None:
    file = _nifti(tmp_path / "a_0000.nii.gz", _volume(), affine)
    image, properties = image_io(reader).read([file])
    segmentation = np.random.default_rng(0).integers(0, labels + 1, image.shape[1:]).astype(np.uint16)
    segmentation[0, 0, 0] = labels
    image_io(reader).write(segmentation, tmp_path / "ours.nii.gz", properties)
    _nnunet(reader).write_seg(segmentation, str(tmp_path / "theirs.nii.gz"), properties)
    ours, theirs = (gzip.decompress((tmp_path / f"{n}.nii.gz").read_bytes()) for n in ("ours", "theirs"))
    assert ours == theirs
    # where a voxel was, its label is
    again, _ = image_io(reader).read_segmentation(tmp_path / "ours.nii.gz")
    np.testing.assert_array_equal(again[0], segmentation)


@pytest.mark.parametrize("reader", NIBABEL)
def test_nibabel_refuses(reader: str, tmp_path: Path) -> None:
    io = image_io(reader)
    four = _nifti(tmp_path / "four.nii.gz", _volume(shape=(3, 4, 5, 2)), np.eye(4))
    with pytest.raises(ImageError, match="three dimensions"):
        io.read([four])
    with pytest.raises(ImageError, match="reads NIfTI files"):
        io.read([write_image(_volume(), tmp_path / "a.mha")])
    with pytest.raises(ImageError, match="not found"):
        io.read([tmp_path / "none.nii.gz"])
    first = _nifti(tmp_path / "b_0000.nii.gz", _volume(), np.eye(4))
    with pytest.raises(ImageError, match="shape is"):
        io.read([first, _nifti(tmp_path / "b_0001.nii.gz", _volume(shape=(5, 6, 8)), np.eye(4))])
    with pytest.raises(ImageError, match="spacing is"):
        io.read([first, _nifti(tmp_path / "c_0001.nii.gz", _volume(), np.diag([1.0, 1.0, 2.0, 1.0]))])
    nan = _volume()
    nan[1, 2, 3] = np.nan
    with pytest.raises(ImageError, match="1 of 210 voxels are NaN"):
        io.read([_nifti(tmp_path / "nan.nii.gz", nan, np.eye(4))])
    content = first.read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="truncated"):
        io.read([tmp_path / "cut.nii.gz"])


@pytest.mark.parametrize("reader", NIBABEL)
def test_other_places_of_channels_are_a_warning(reader: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    moved = TURNED.copy()
    moved[0, 3] += 5
    _same_read(reader, [_nifti(tmp_path / f"a_000{c}.nii.gz", _volume(), a) for c, a in enumerate((TURNED, moved))])
    assert "affine is" in caplog.text


def _tiff(folder: Path, spacing: Any = (2.5, 0.7, 1), channels: int = 1, **options: Any) -> list[Path]:
    files = [folder / f"a_000{c}.tif" for c in range(channels)]
    for seed, file in enumerate(files):
        tifffile.imwrite(file, _volume(np.uint16, seed=seed), **options)
    if spacing is not None:
        (folder / "a.json").write_text(json.dumps({"spacing": spacing}))
    return files


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"imagej": True}, {"bigtiff": True}], ids=str)
def test_tiff_reads_as_nnunet(options: dict[str, Any], tmp_path: Path) -> None:
    assert _same_read("Tiff3DIO", _tiff(tmp_path, channels=2, **options))["spacing"] == [2.5, 0.7, 1]


def test_tiff_without_spacing_as_nnunet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _same_read("Tiff3DIO", _tiff(tmp_path, spacing=None))["spacing"] == (1, 1, 1)
    assert "no spacing" in caplog.text


@pytest.mark.parametrize("labels", [3, 300])
def test_tiff_writes_as_nnunet(labels: int, tmp_path: Path) -> None:
    _, properties = image_io("Tiff3DIO").read(_tiff(tmp_path))
    segmentation = np.random.default_rng(0).integers(0, labels + 1, (5, 6, 7)).astype(np.uint16)
    segmentation[0, 0, 0] = labels
    for name, write in (
        ("ours", lambda file: image_io("Tiff3DIO").write(segmentation, file, properties)),
        ("theirs", lambda file: _nnunet("Tiff3DIO").write_seg(segmentation, str(file), properties)),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.tif")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["a.json", "a.tif"]
    ours, theirs = (tifffile.imread(tmp_path / name / "a.tif") for name in ("ours", "theirs"))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    texts = [json.loads((tmp_path / name / "a.json").read_text()) for name in ("ours", "theirs")]
    assert texts[0] == texts[1]
    expected, expected_properties = _nnunet("Tiff3DIO").read_seg(str(tmp_path / "theirs" / "a.tif"))
    got, got_properties = image_io("Tiff3DIO").read_segmentation(tmp_path / "ours" / "a.tif")
    np.testing.assert_array_equal(got, expected)
    assert got_properties == expected_properties


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("metadata", [None, {}])  # without tifffile's own note of the shape, lost pages go unnoticed
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.7, 0.97])
def test_truncated_tiff_is_refused(compression: Any, metadata: Any, keep: float, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (20, 32, 48)).astype(np.uint8)
    whole = tmp_path / "whole.tif"
    tifffile.imwrite(whole, array, compression=compression, metadata=metadata)
    content = whole.read_bytes()
    data_end = len(content) if compression or metadata is None else 1000 + array.size
    (tmp_path / "a_0000.tif").write_bytes(content[: int(keep * min(len(content), data_end))])
    with pytest.raises(ImageError, match=r"a_0000\.tif"):
        image_io("Tiff3DIO").read([tmp_path / "a_0000.tif"])


def test_tiff_refuses(tmp_path: Path) -> None:
    io = image_io("Tiff3DIO")
    tifffile.imwrite(tmp_path / "flat_0000.tif", _volume(np.uint8, (6, 7)))
    with pytest.raises(ImageError, match="three dimensions"):
        io.read([tmp_path / "flat_0000.tif"])
    (tmp_path / "text_0000.tif").write_text("hello")
    with pytest.raises(ImageError, match="not a TIFF file"):
        io.read([tmp_path / "text_0000.tif"])
    with pytest.raises(ImageError, match="reads TIFF files"):
        io.read([write_image(_volume(), tmp_path / "a_0000.nii.gz")])
    for content, words in (("hello", "damaged"), ("{}", "damaged"), ('{"spacing": [1, 2]}', "2 numbers")):
        files = _tiff(tmp_path, spacing=None)
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ImageError, match=words):
            io.read(files)
    with pytest.raises(ImageError, match="spacing is"):
        io.read(_tiff(tmp_path, spacing=(1, 0, 1)))
    tifffile.imwrite(tmp_path / "nan_0000.tif", np.full((2, 3, 4), np.nan, np.float32))
    with pytest.raises(ImageError, match="24 of 24 voxels are NaN"):
        io.read([tmp_path / "nan_0000.tif"])
    with pytest.raises(FastnnUNetError, match="cannot write"):
        io.write(_volume(np.uint8), tmp_path / "none" / "a.tif", {"spacing": (1, 1, 1)})


DAMAGE = {
    "size": (0, "i", [999], "magic"),
    "magic": (344, "4s", [b"xxxx"], "magic"),
    "no voxels": (42, "h", [0], "dimensions"),
    "negative dimension": (44, "h", [-5], "dimensions"),
    "nine dimensions": (40, "h", [9], "dimensions"),
    "offset": (108, "f", [1e9], "truncated"),
    "longer than the file": (46, "h", [3000], "truncated"),
    "data type": (70, "h", [9999], "a_0000.nii"),
    "affine of NaN": (280, "4f", [np.nan] * 4, "a_0000.nii"),
    "affine of zeros": (280, "4f", [0.0] * 4, "a_0000.nii"),
}


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", *NIBABEL])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_nifti_header_is_refused(reader: str, damage: str, tmp_path: Path) -> None:
    file = _nifti(tmp_path / "a_0000.nii", _volume(np.int16), TURNED)
    rotation = np.array([[0, 0, -1], [-1, 0, 0], [0, 1, 0]]) * [0.7, 1.1, 2.5]
    affine = np.eye(4)
    affine[:3, :3] = rotation
    file = _nifti(file, _volume(np.int16), affine)
    image_io(reader).read([file])
    offset, form, values, words = DAMAGE[damage]
    content = bytearray(file.read_bytes())
    struct.pack_into(f"<{form}", content, offset, *values)
    file.write_bytes(content)
    with pytest.raises(ImageError, match=words):
        image_io(reader).read([file])


def test_spacing_that_is_no_number_is_refused(tmp_path: Path) -> None:
    file = _nifti(tmp_path / "a_0000.nii", _volume(np.int16), np.eye(4))
    content = bytearray(file.read_bytes())
    struct.pack_into("<f", content, 80, np.nan)
    file.write_bytes(content)
    with pytest.raises(ImageError, match="spacing is"):
        image_io("NibabelIO").read([file])


def test_images_without_voxels_are_refused(tmp_path: Path) -> None:
    header = "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 1 1\nDimSize = 0 4 5\n"
    (tmp_path / "a.mha").write_text(f"{header}ElementType = MET_UCHAR\nElementDataFile = LOCAL\n")
    (tmp_path / "a.nrrd").write_text("NRRD0004\ntype: uchar\ndimension: 3\nsizes: 0 4 5\nencoding: raw\n\n")
    nibabel.save(nibabel.Nifti1Image(np.zeros((0, 3, 4), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    for ending, reader in ((".mha", "SimpleITKIO"), (".nrrd", "SimpleITKIO"), (".nii.gz", "NibabelIO")):
        with pytest.raises(ImageError, match=rf"a\{ending}"):
            image_io(reader).read([tmp_path / f"a{ending}"])


def test_mixed_geometries_of_formats(tmp_path: Path) -> None:
    """Channels of different spacing are refused whatever the format; SimpleITK reads each for itself."""
    for ending in (".nrrd", ".mha"):
        files = []
        for channel, spacing in enumerate((1.0, 1.5)):
            image = sitk.GetImageFromArray(_volume())
            image.SetSpacing((1.0, 1.0, spacing))
            files.append(tmp_path / f"a_000{channel}{ending}")
            sitk.WriteImage(image, str(files[-1]))
        with pytest.raises(ImageError, match=r"spacing is \(1.0, 1.0, 1.0\) in a_0000"):
            image_io("SimpleITKIO").read(files)
