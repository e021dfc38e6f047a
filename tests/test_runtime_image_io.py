"""Readers and writers against nnU-Net's own; damaged input is refused with one clear message."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.errors import FastnnUNetError, ImageError, SpecError
from fastnnunet.images.io import image_io
from fastnnunet.images.nifti import read_nifti
from tests.bundles import write_image

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64]
GEOMETRY: dict[str, Any] = {
    "spacing_xyz": (0.7, 1.1, 2.5),
    "origin_xyz": (-12.5, 3.0, 40.0),
    "direction": (-1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0),
}


def _volume(dtype: Any = np.float32, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def _nnunet(reader: str) -> Any:
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    return recursive_find_reader_writer_by_name(reader)()


def _same(reader: str, files: list[Path]) -> None:
    expected, expected_properties = _nnunet(reader).read_images([str(f) for f in files])
    got, properties = image_io(reader).read(files)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    assert properties == expected_properties


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl"])
def test_reads_as_nnunet(dtype: Any, ending: str, tmp_path: Path) -> None:
    if ending == ".gipl" and dtype in (np.int32, np.uint32):
        pytest.skip("ITK writes no such GIPL")
    _same("SimpleITKIO", [write_image(_volume(dtype), tmp_path / f"a_0000{ending}", **GEOMETRY)])


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_reads_reoriented_as_nnunet(ending: str, tmp_path: Path) -> None:
    _same("SimpleITKIOWithReorient", [write_image(_volume(), tmp_path / f"a_0000{ending}", **GEOMETRY)])


def test_reads_several_channels_2d_and_4d_as_nnunet(tmp_path: Path) -> None:
    _same("SimpleITKIO", [write_image(_volume() + c, tmp_path / f"a_000{c}.nii.gz", **GEOMETRY) for c in range(3)])
    flat = sitk.GetImageFromArray(_volume(shape=(6, 7)))
    flat.SetSpacing((0.5, 0.75))
    sitk.WriteImage(flat, str(tmp_path / "b.nii.gz"))
    _same("SimpleITKIO", [tmp_path / "b.nii.gz"])
    series = sitk.JoinSeries([sitk.GetImageFromArray(_volume() + c) for c in range(2)])
    sitk.WriteImage(series, str(tmp_path / "c.nii.gz"))
    _same("SimpleITKIO", [tmp_path / "c.nii.gz"])


def test_rescaled_and_big_endian_nifti_as_nnunet(tmp_path: Path) -> None:
    import nibabel

    for name, slope in (("scaled", (0.5, -10.0)), ("plain", (1.0, 0.0))):
        for endianness in "<>":
            header = nibabel.Nifti1Header(endianness=endianness)
            header.set_data_dtype(np.dtype(np.int16).newbyteorder(endianness))
            image = nibabel.Nifti1Image(_volume(np.int16), np.diag([1.0, 2.0, 3.0, 1.0]), header)
            image.header.set_slope_inter(*slope)
            file = tmp_path / f"{name}{'le' if endianness == '<' else 'be'}.nii.gz"
            nibabel.save(image, file)
            for reader in ("SimpleITKIO", "SimpleITKIOWithReorient"):
                _same(reader, [file])
            assert read_nifti(file)[1] is not None


def test_several_gzip_members(tmp_path: Path) -> None:
    file = write_image(_volume(), tmp_path / "a.nii", **GEOMETRY)
    content = file.read_bytes()
    joined = tmp_path / "joined.nii.gz"
    joined.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    _same("SimpleITKIO", [joined])


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif"])
@pytest.mark.parametrize("keep", [0.0, 0.002, 0.5, 0.95])
def test_truncated_images_are_refused(ending: str, keep: float, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (1, 64, 96)).astype(np.uint8)
    is_picture = ending in (".png", ".bmp", ".tif")
    array = array[0] if is_picture else array
    whole = write_image(array, tmp_path / f"whole{ending}", (1.0,) * array.ndim)
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(whole.read_bytes()[: int(keep * whole.stat().st_size)])
    reader = "NaturalImage2DIO" if is_picture else "SimpleITKIO"
    with pytest.raises(ImageError, match=f"cut{ending}"):
        image_io(reader).read([cut])


def test_truncated_rescaled_nifti_is_refused(tmp_path: Path) -> None:
    import nibabel

    image = nibabel.Nifti1Image(_volume(np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, 1.0)
    nibabel.save(image, tmp_path / "a.nii")
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.nii").read_bytes()[:-10])
    with pytest.raises(ImageError, match="truncated"):
        image_io("SimpleITKIO").read([tmp_path / "b.nii"])


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = write_image(_volume(), tmp_path / "a.nii.gz")
    content = bytearray(file.read_bytes())
    content[-6] ^= 1  # in the checksum
    file.write_bytes(content)
    with pytest.raises(ImageError, match="damaged"):
        image_io("SimpleITKIO").read([file])


@pytest.mark.parametrize(
    "content",
    [b"hello", b"\x1f\x8bhello", b"x" * 1000, gzip.compress(b"x" * 1000)],
    ids=["text", "gzip's magic", "letters", "letters in gzip"],  # the last has the time in it
)
def test_junk_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "junk.nii.gz").write_bytes(content)
    with pytest.raises(ImageError, match=r"junk\.nii\.gz"):
        image_io("SimpleITKIO").read([tmp_path / "junk.nii.gz"])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not found"):
        image_io("SimpleITKIO").read([tmp_path / "none.nii.gz"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 210])
def test_not_finite_is_refused(bad: float, count: int, tmp_path: Path) -> None:
    array = _volume()
    array.ravel()[:count] = bad
    with pytest.raises(ImageError, match=f"{count} of 210 voxels are NaN or infinite"):
        image_io("SimpleITKIO").read([write_image(array, tmp_path / "a_0000.nii.gz")])


def test_channels_that_do_not_fit_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write_image(_volume(), tmp_path / "a_0000.nii.gz", (1.0, 1.0, 2.0))
    other_shape = write_image(_volume(shape=(5, 6, 8)), tmp_path / "a_0001.nii.gz", (1.0, 1.0, 2.0))
    other_spacing = write_image(_volume(), tmp_path / "b_0001.nii.gz", (1.0, 1.0, 2.1))
    other_origin = write_image(_volume(), tmp_path / "c_0001.nii.gz", (1.0, 1.0, 2.0), (5.0, 0.0, 0.0))
    io = image_io("SimpleITKIO")
    with pytest.raises(ImageError, match=r"shape is \(5, 6, 7\) in a_0000.nii.gz and \(5, 6, 8\) in a_0001.nii.gz"):
        io.read([first, other_shape])
    with pytest.raises(ImageError, match="spacing"):
        io.read([first, other_spacing])
    # as in nnU-Net: a warning
    assert io.read([first, other_origin])[0].shape == (2, 5, 6, 7)
    assert "origin" in caplog.text


@pytest.mark.parametrize("labels", [3, 254, 255, 1000])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient"])
def test_writes_as_nnunet(reader: str, labels: int, tmp_path: Path) -> None:
    if labels >= 255 and reader == "SimpleITKIOWithReorient":
        pytest.skip("nnU-Net's reorienting writer cuts labels to 8 bits; ours does not")
    file = write_image(_volume(), tmp_path / "a_0000.nii.gz", **GEOMETRY)
    segmentation = np.random.default_rng(0).integers(0, labels + 1, (5, 6, 7)).astype(np.uint16)
    segmentation[0, 0, 0] = labels
    image, properties = image_io(reader).read([file])
    if reader == "SimpleITKIOWithReorient":
        segmentation = segmentation.reshape(image.shape[1:])
    image_io(reader).write(segmentation, tmp_path / "ours.nii.gz", properties)
    _nnunet(reader).write_seg(segmentation, str(tmp_path / "theirs.nii.gz"), properties)
    ours, theirs = (gzip.decompress((tmp_path / f"{n}.nii.gz").read_bytes()) for n in ("ours", "theirs"))
    assert ours == theirs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_0000.nii.gz", "ours.nii.gz", "theirs.nii.gz"]


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha", ".gipl"])
def test_writes_every_format_as_nnunet(ending: str, tmp_path: Path) -> None:
    file = write_image(_volume(), tmp_path / f"a_0000{ending}", **GEOMETRY)
    segmentation = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    _, properties = image_io("SimpleITKIO").read([file])
    image_io("SimpleITKIO").write(segmentation, tmp_path / f"ours{ending}", properties)
    _nnunet("SimpleITKIO").write_seg(segmentation, str(tmp_path / f"theirs{ending}"), properties)
    assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


@pytest.mark.parametrize("mode", ["gray8", "gray16", "rgb", "rgba"])
@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_pictures_as_nnunet(mode: str, ending: str, tmp_path: Path) -> None:
    from skimage import io

    if ending == ".bmp" and mode in ("gray16", "rgba"):
        pytest.skip("BMP has no such pixels")
    shape = (11, 13, {"rgb": 3, "rgba": 4}.get(mode, 1))
    pixels = np.random.default_rng(0).integers(0, 60000 if mode == "gray16" else 255, shape)
    file = tmp_path / f"a_0000{ending}"
    io.imsave(file, pixels.squeeze().astype(np.uint16 if mode == "gray16" else np.uint8), check_contrast=False)
    _same("NaturalImage2DIO", [file])
    segmentation = np.random.default_rng(1).integers(0, 3, (1, 11, 13)).astype(np.uint8)
    image_io("NaturalImage2DIO").write(segmentation, tmp_path / f"s{ending}", {})
    np.testing.assert_array_equal(io.imread(tmp_path / f"s{ending}"), segmentation[0])


def test_indexed_pictures_as_nnunet(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (11, 13)).astype(np.uint8))
    colour = picture.convert("P")
    colour.putpalette(np.random.default_rng(1).integers(0, 255, 768).astype(np.uint8).tobytes())
    for name, indexed in (("grey", picture.convert("P")), ("colour", colour)):
        for ending in (".png", ".bmp"):
            indexed.save(tmp_path / f"{name}{ending}")
            _same("NaturalImage2DIO", [tmp_path / f"{name}{ending}"])


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("ending", [".mhd", ".nhdr", ".hdr", ".img"])
def test_formats_of_two_files_are_whole(reader: str, ending: str, tmp_path: Path) -> None:
    if reader == "NibabelIO" and ending in (".mhd", ".nhdr"):
        pytest.skip("nibabel knows no such format")
    file = write_image(_volume(), tmp_path / "a_0000.nii.gz", **GEOMETRY)
    io, labels = image_io(reader), (_volume() > 50).astype(np.uint8)
    _, properties = io.read([file])
    (tmp_path / "out").mkdir()
    io.write(labels, tmp_path / f"out/b{ending}", properties)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(made) == 2
    assert all(name.startswith("b.") for name in made)
    got, _ = _nnunet(reader).read_seg(str(tmp_path / f"out/b{ending}"))
    np.testing.assert_array_equal(got[0], labels)


def test_a_vector_of_one_number_is_that_number(tmp_path: Path) -> None:
    vector = sitk.Compose([sitk.GetImageFromArray(_volume(np.int16))])
    assert vector.GetPixelID() == sitk.sitkVectorInt16
    for ending in (".nii.gz", ".nrrd", ".mha"):
        sitk.WriteImage(vector, str(tmp_path / f"v_0000{ending}"))
        _same("SimpleITKIO", [tmp_path / f"v_0000{ending}"])


def test_sizes_of_axes_that_are_not_there(tmp_path: Path) -> None:
    file = write_image(_volume(np.int16), tmp_path / "a_0000.nii", **GEOMETRY)
    content = bytearray(file.read_bytes())
    content[40:56] = np.array([5, 7, 6, 5, 0, 0, 0, 0], "<i2").tobytes()
    file.write_bytes(content)
    _same("SimpleITKIO", [file])


def test_a_field_of_the_writers_own_may_be_there_twice(tmp_path: Path) -> None:
    file = write_image(_volume(np.int16), tmp_path / "a_0000.mha", **GEOMETRY)
    file.write_bytes(file.read_bytes().replace(b"NDims = 3\n", b"NDims = 3\nPatient = a\nPatient = b\n"))
    _same("SimpleITKIO", [file])


def test_unknown_reader_is_named() -> None:
    with pytest.raises(SpecError, match="'MyIO'"):
        image_io("MyIO")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    file = write_image(_volume(), tmp_path / "a_0000.nii.gz")
    io = image_io("SimpleITKIO")
    _, properties = io.read([file])
    with pytest.raises(FastnnUNetError, match="cannot write"):
        io.write(_volume(np.uint8), tmp_path / "no_such_folder" / "s.nii.gz", properties)
    blocked = tmp_path / "blocked.nii.gz"
    blocked.mkdir()
    with pytest.raises(FastnnUNetError, match="cannot write"):
        io.write(_volume(np.uint8), blocked, properties)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_0000.nii.gz", "blocked.nii.gz"]
