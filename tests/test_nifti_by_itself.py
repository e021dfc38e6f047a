"""NIfTI files read and written without ITK or with its header alone: the same voxels and geometry as ITK has."""

import gzip
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.errors import ImageError
from fastnnunet.images.io import image_io
from fastnnunet.images.nifti import read_nifti
from fastnnunet.images.plain import plain_geometry
from fastnnunet.images.sitk import read_itk
from fastnnunet.images.stored import _CHUNK_BYTES, open_stored
from tests.test_runtime_image_io import _same
from tests.test_runtime_readers import _same_read

TURNS = {(0, 0, 0): (1, 1, 1), (1, 0, 0): (1, -1, -1), (0, 1, 0): (-1, 1, -1), (0, 0, 1): (-1, -1, 1)}
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


def nifti(
    size: tuple[int, ...] = (3, 4, 5),
    pixdim: tuple[float, ...] = (1.0, 2.0, 3.0),
    *,
    qfac: float = 1,
    quaternion: tuple[float, ...] = (0, 0, 0),
    offsets: tuple[float, ...] = (10, -20, 30),
    matrix: np.ndarray | None = None,
    codes: tuple[int, int] = (1, 1),
    datatype: int = 4,
    order: str = "<",
    units: int = 2,
    intent: int = 0,
    slope: tuple[float, float] = (1.0, 0.0),
) -> bytes:
    """A file with random voxels; `matrix`: what the sform has besides the offsets."""
    dtype = np.dtype(order + TYPES[datatype])
    header = bytearray(352)
    for form, at, values in (
        ("i", 0, [348]),
        ("8h", 40, (len(size), *size, *(1,) * (7 - len(size)))),
        ("3h", 68, (intent, datatype, 8 * dtype.itemsize)),
        (f"{1 + len(pixdim)}f", 76, (qfac, *pixdim)),
        ("3f", 108, (352, *slope)),
        ("B", 123, [units]),
        ("2h", 252, codes),
        ("6f", 256, (*quaternion, *offsets)),
        ("12f", 280, np.column_stack([np.diag(pixdim[:3]) if matrix is None else matrix, offsets]).ravel()),
        ("4s", 344, [b"n+1"]),
    ):
        struct.pack_into(order + form, header, at, *values)
    voxels = np.random.default_rng(0).integers(0, 100, int(np.prod(size))).astype(dtype)
    return bytes(header) + voxels.tobytes()


def plain_files() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(1)
    for number in range(200):
        pixdim = tuple(np.float32(rng.choice([1, 0.8, 0.7421875, rng.uniform(0.01, 9)], 3)).tolist())
        quaternion = list(TURNS)[number % 4]
        qfac = (1, -1, 0)[number // 4 % 3]
        signs = np.array(TURNS[quaternion]) * (1, 1, -1 if qfac < 0 else 1)
        offsets = rng.choice([0.0, -0.0, 1.5, *np.float32(rng.uniform(-500, 500, 3)).tolist()], 3)
        yield (
            f"plain{number}",
            nifti(
                tuple(rng.integers(1, 5, 3)),
                pixdim,
                qfac=qfac,
                quaternion=tuple(np.array(quaternion) * rng.choice([1, -1])),
                offsets=tuple(offsets),
                matrix=np.diag(signs * pixdim) + rng.choice([0.0, -0.0]) * (1 - np.eye(3)),
                codes=((1, 1), (2, 4), (1, 0), (0, 2))[number % 7 % 4],
                datatype=list(TYPES)[number % len(TYPES)],
                order="<>"[number // 2 % 2],
                units=(0, 2, 10)[number % 3],
            ),
        )


def turned(degrees: float) -> tuple[tuple[float, ...], np.ndarray]:
    """Quaternion and matrix of a turn about an oblique axis, with the usual spacing."""
    half, axis = np.radians(degrees) / 2, np.array([1, 2, 3]) / np.sqrt(14)
    b, c, d = np.sin(half) * axis
    a = np.cos(half)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    return (b, c, d), rotation * (1, 2, 3)


def other_files() -> Iterator[tuple[str, bytes]]:
    """What is not plain."""
    quaternion, matrix = turned(40)
    for codes in ((1, 1), (1, 0), (0, 1)):
        yield f"oblique {codes}", nifti(quaternion=quaternion, matrix=matrix, codes=codes)
    yield "exchanged axes", nifti(quaternion=(0.5, 0.5, 0.5), matrix=np.array([[0, 0, 3], [1, 0, 0], [0, 2, 0]]))
    yield "neither form", nifti(codes=(0, 0))
    yield "forms that differ", nifti(matrix=np.diag([-1.0, -2.0, 3.0]))
    yield "slightly oblique", nifti(quaternion=(0, 0, 1e-4), codes=(1, 0))
    yield "sform of another spacing", nifti(matrix=np.diag([1.1, 2.0, 3.0]))
    yield "metres", nifti(units=1)
    yield "micrometres", nifti(units=3)
    yield "intent", nifti(intent=1002)
    yield "negative pixdim", nifti(pixdim=(1, -2, 3), codes=(1, 0))
    yield "two axes", nifti((3, 4), (1, 2, 1))
    yield "four axes", nifti((3, 4, 5, 2), (1, 2, 3, 1))
    yield "four axes, the last of one", nifti((3, 4, 5, 1), (1, 2, 3, 1))


def rescaled_files() -> Iterator[tuple[str, bytes]]:
    for datatype in TYPES:
        for slope in ((1.0, -1024.0), (0.3, 0.1), (-2.5, 7.0), (1e-9, 3.0), (0.0, 5.0), (2.0, 1e-30)):
            for order in "<>":
                yield f"{TYPES[datatype]} {order} {slope}", nifti(datatype=datatype, slope=slope, order=order)
    yield "four axes", nifti((3, 4, 5, 2), (1, 2, 3, 1), slope=(2.0, 1.0))


def put(name: str, content: bytes, folder: Path) -> Path:
    file = folder / f"{name.replace(' ', '_')}.nii.gz"
    file.write_bytes(gzip.compress(content, 1))
    return file


def same_as_itk(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    voxels, geometry = read_itk(file)
    expected = sitk.GetArrayFromImage(image)
    np.testing.assert_array_equal(voxels.astype(np.float32), expected.astype(np.float32), err_msg=file.name)
    assert voxels.shape == expected.shape
    assert geometry["spacing"] == image.GetSpacing(), file.name
    assert geometry["origin"] == image.GetOrigin(), file.name
    assert geometry["direction"] == image.GetDirection(), file.name


class TestReading:
    def test_plain_headers_without_itk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = [put(name, content, tmp_path) for name, content in plain_files()]
        for file in files:
            same_as_itk(file)
        monkeypatch.setattr(sitk, "ImageFileReader", None)
        for file in files:
            read_itk(file)

    def test_all_others_with_its_header(self, tmp_path: Path) -> None:
        for name, content in other_files():
            file = put(name, content, tmp_path)
            header, voxels = read_nifti(file)
            assert plain_geometry(header) is None, name
            assert voxels is not None
            same_as_itk(file)
            _same("SimpleITKIO", [file])

    def test_rescaled_voxels(self, tmp_path: Path) -> None:
        for name, content in rescaled_files():
            file = put(name, content, tmp_path)
            same_as_itk(file)
            if read_nifti(file)[0].dim[0] == 3:
                _same_read("NibabelIO", [file])
        voxels = read_nifti(put("ct", nifti(slope=(1.0, -1024.0)), tmp_path))[1]
        assert voxels is not None
        assert voxels.dtype == np.float32

    @pytest.mark.parametrize("name", ["packed.nii", "plain.nii.gz", "packed.NII.GZ", "packed.Nii.gz"])
    def test_names_that_say_something_else(self, name: str, tmp_path: Path) -> None:
        """What ITK does not read is refused, and what it does is read."""
        file = tmp_path / name
        file.write_bytes(gzip.compress(nifti()) if name.startswith("packed") else nifti())
        try:
            sitk.ReadImage(str(file), imageIO="NiftiImageIO")
        except RuntimeError:
            with pytest.raises(ImageError):
                read_itk(file)
        else:
            same_as_itk(file)


class TestGzip:
    """Of any writer: fields of the header, members that end anywhere, damage."""

    @staticmethod
    def member(content: bytes, flags: int, name: bytes = b"case.nii") -> bytes:
        head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\xff"
        head += struct.pack("<H", 5) + b"extra" if flags & 4 else b""
        head += name + b"\0" if flags & 8 else b""
        head += b"a comment\0" if flags & 16 else b""
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF) if flags & 2 else b""
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = packer.compress(content) + packer.flush()
        return head + body + struct.pack("<II", zlib.crc32(content), len(content))

    @staticmethod
    def read(file: Path) -> bytes:
        with open_stored(file, detect=True) as stored:
            return stored.read(1 << 30)

    @pytest.mark.parametrize("flags", range(0, 32, 2))
    def test_fields_of_members_that_begin_anywhere(self, flags: int, tmp_path: Path) -> None:
        first, second = np.random.default_rng(0).bytes(1000), b"the second" * 9
        file = tmp_path / "a.gz"
        shortest = len(self.member(first, 8, b""))
        for offset in range(-40, 3, 1 if flags in (0, 30) else 6):
            begin = self.member(first, 8, b"n" * (_CHUNK_BYTES + offset - shortest))
            assert len(begin) == _CHUNK_BYTES + offset
            file.write_bytes(begin + self.member(second, flags) + bytes(7))
            assert self.read(file) == first + second

    def test_damage(self, tmp_path: Path) -> None:
        content = np.random.default_rng(0).bytes(1000)
        whole, file = gzip.compress(content), tmp_path / "a.gz"
        for damaged, reason in {
            whole[:-8] + bytes(8): "is damaged",  # checksum
            whole[:-4] + bytes(4): "is damaged",  # size
            whole[:-1]: "is truncated",
            whole[:300]: "is truncated",
            whole[:5]: "is truncated",
            whole + b"more": "something else follows",
            whole + whole[:4]: "is truncated",
            b"\x1f\x8b\x09" + whole[3:]: "is damaged",
        }.items():
            file.write_bytes(damaged)
            with pytest.raises(ImageError, match=reason):
                self.read(file)


def header_of(file: Path) -> dict[str, Any]:
    """Every field of a header; of numbers the sign of zero is left out."""
    content = gzip.decompress(file.read_bytes()) if file.name.endswith(".gz") else file.read_bytes()
    header = nibabel.Nifti1Header(content[:348])
    return {name: np.asarray(header[name]).tolist() for name in header} | {"extension": content[348:352]}


class TestWriting:
    @staticmethod
    def geometries() -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
        rng = np.random.default_rng(2)
        for number in range(120):
            signs = [1.0 if number & bit else -1.0 for bit in (1, 2, 4)]
            spacing = rng.choice([1.0, 0.8, rng.uniform(0.01, 9)], 3).tolist()
            origin = rng.choice([0.0, 1.0, rng.uniform(-500, 500)], 3).tolist()
            yield tuple(rng.integers(1, 5, 3)), {"spacing": spacing, "origin": origin, "direction": np.diag(signs)}
        usual = {"spacing": (1.0, 2.0, 3.0), "origin": (5.0, 6.0, -7.0)}
        yield (3, 4, 5), usual | {"direction": turned(40)[1] / (1, 2, 3)}
        yield (3, 4, 5), usual | {"direction": np.eye(3)[[1, 2, 0]]}
        yield (1, 4, 5), {"spacing": (0.5, 0.75), "origin": (5.0, 6.0), "direction": np.diag([-1.0, 1.0])}
        yield (3, 4, 5), {"spacing": (1e-4, 2e4, 3.0), "origin": (5.0, 6.0, -7.0), "direction": np.eye(3)}

    @pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("highest", [3, 300])
    def test_headers_and_voxels_as_itk(self, ending: str, highest: int, tmp_path: Path) -> None:
        for shape, geometry in self.geometries():
            properties = geometry | {"direction": tuple(np.ravel(geometry["direction"]).tolist())}
            labels = np.random.default_rng(0).integers(0, highest + 1, shape)
            labels[0, 0, 0] = highest
            image = sitk.GetImageFromArray(
                (labels[0] if len(geometry["spacing"]) == 2 else labels).astype(
                    np.uint8 if highest < 255 else np.uint16
                )
            )
            image.SetSpacing(properties["spacing"])
            image.SetOrigin(properties["origin"])
            image.SetDirection(properties["direction"])
            ours, theirs = tmp_path / f"ours{ending}", tmp_path / f"theirs{ending}"
            sitk.WriteImage(image, str(theirs), True)
            image_io("SimpleITKIO").write(labels, ours, {"sitk_stuff": properties})
            assert header_of(ours) == header_of(theirs), geometry
            for read in (
                lambda file: sitk.GetArrayFromImage(sitk.ReadImage(str(file))),
                lambda file: np.asarray(nibabel.load(file).dataobj),
            ):
                np.testing.assert_array_equal(read(ours), read(theirs))

    @pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
    def test_gzip_that_every_reader_takes(self, reader: str, tmp_path: Path) -> None:
        labels = np.zeros((30, 200, 210), np.uint8)
        labels[5:20, 30:100, 40:150] = 2
        labels[::3, ::7, ::5] = 1
        file = tmp_path / "a.nii.gz"
        geometry = {"spacing": (1.0, 2.0, 3.0), "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}
        image_io(reader).write(labels, file, {"sitk_stuff": geometry, "nibabel_stuff": {"original_affine": np.eye(4)}})
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), labels)
        np.testing.assert_array_equal(np.asarray(nibabel.load(file).dataobj).T, labels)
        assert gzip.decompress(file.read_bytes())[352:] == labels.tobytes()
        assert file.stat().st_size < labels.size // 20
        if (zcat := shutil.which("zcat")) is not None:
            assert subprocess.run([zcat, file], capture_output=True, check=True).stdout[352:] == labels.tobytes()

    def test_plain_ones_without_itk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sitk, "WriteImage", None)
        geometry = {"spacing": (1.0, 2.0, 3.0), "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}
        image_io("SimpleITKIO").write(np.ones((3, 4, 5)), tmp_path / "a.nii.gz", {"sitk_stuff": geometry})
        assert sitk.ReadImage(str(tmp_path / "a.nii.gz")).GetSize() == (5, 4, 3)
