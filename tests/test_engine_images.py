"""The engine's image files against the Python runtime (ITK, nibabel): the same images and label maps, or a refusal."""

import gzip
import logging
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from scipy.spatial.transform import Rotation

from fastnnunet.errors import ImageError
from fastnnunet.images.io import image_io
from tests import hostile
from tests.engine_probe import Probe, images_probe
from tests.test_nifti_by_itself import TYPES, nifti

VOLUME_READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
ITK_READERS = VOLUME_READERS[:2]
TEXT_ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr")
QUATERNION = slice(256, 268)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    probe = Probe(images_probe(), tmp_path_factory.mktemp("probe"))
    yield probe
    probe.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """ITK warns of whatever a damaged header has."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    sitk.ProcessObject.SetGlobalWarningDisplay(before)


def read_by_python(reader: str, *files: Path) -> tuple[np.ndarray, dict[str, Any]] | str:
    try:
        return image_io(reader).read(files)
    except ImageError as e:
        return str(e)


def check_read(probe: Probe, reader: str, *files: Path) -> dict[str, Any] | None:
    """The engine and the Python runtime have the same image; its properties, or None where both refuse."""
    expected, got = read_by_python(reader, *files), probe.read(reader, *files)
    if isinstance(expected, str) or isinstance(got, str):
        assert isinstance(expected, str), f"only the engine refuses: {got}"
        assert isinstance(got, str), f"only the Python runtime refuses: {expected}"
        return None
    np.testing.assert_array_equal(got[0], expected[0], strict=True)
    assert got[1]["spacing"] == [float(s) for s in expected[1]["spacing"]]
    return expected[1]


def content(file: Path) -> bytes:
    """What is in a file however it is compressed, without the size that it was compressed to."""
    whole = file.read_bytes()
    if file.name.endswith(".gz"):
        return gzip.decompress(whole)
    if file.suffix == ".zraw":
        return zlib.decompress(whole)
    without_size = re.sub(rb"CompressedDataSize = \d+\n", b"", whole)
    if file.suffix == ".mha":
        header, local, voxels = without_size.partition(b"LOCAL\n")
        return header + local + zlib.decompress(voxels)
    if file.suffix == ".nrrd":
        header, blank, voxels = whole.partition(b"\n\n")
        return header + blank + gzip.decompress(voxels)
    return without_size


def without_signs_of_zeros(header: bytes) -> bytes:
    return header.replace(struct.pack("<f", -0.0), bytes(4)) if len(header) % 4 == 0 else header


def quaternion(header: bytes) -> np.ndarray:
    bcd = np.frombuffer(header[QUATERNION], "<f4").astype(np.float64)
    return np.array([np.sqrt(max(0, 1 - bcd @ bcd)), *bcd])


def check_written(expected: bytes, got: bytes, *, nibabels: bool) -> None:
    """The bytes of two NIfTI files are the same; nibabel's quaternion, of which LAPACK has the last bit, nearly so."""
    assert got[352:] == expected[352:]
    headers = [without_signs_of_zeros(whole[:352]) for whole in (expected, got)]
    if nibabels:
        # turned by half, a quaternion may have either sign
        assert abs(quaternion(headers[1]) @ quaternion(headers[0])) == pytest.approx(1, abs=1e-6)
        headers = [header[: QUATERNION.start] + header[QUATERNION.stop :] for header in headers]
    assert headers[1] == headers[0]


def check_labels(
    probe: Probe, reader: str, ending: str, folder: Path, properties: dict[str, Any], *files: Path
) -> None:
    """A label map is written as the Python runtime writes it, in 8 bits or 16."""
    shape = probe.read(reader, *files)[0].shape[1:]
    rng = np.random.default_rng(sum(shape))
    for most in (3, 300):
        labels = rng.integers(0, most, shape).astype(np.uint16 if most > 3 or sum(shape) % 2 else np.uint8)
        labels.flat[0] = most - 1
        folders = [folder / "python", folder / "engine"]
        for place in folders:
            place.mkdir(exist_ok=True)
            for old in place.iterdir():
                old.unlink()
        name = f"labels{ending}"
        image_io(reader).write(labels, folders[0] / name, properties)
        assert probe.write(reader, labels, folders[1] / name, *files) is None
        names = sorted(p.name for p in folders[0].iterdir())
        assert sorted(p.name for p in folders[1].iterdir()) == names
        for name in names:
            expected, got = (content(place / name) for place in folders)
            if ".nii" in name:
                check_written(expected, got, nibabels=reader.startswith("Nibabel"))
            else:
                assert got == expected


def random_nifti(rng: np.random.Generator, codes: tuple[int, int]) -> bytes:
    """Any type, order of bytes, turn, mirroring and scaling; qform and sform may differ a little or a lot."""
    turns = 90.0 * rng.integers(0, 4, 3) + rng.choice([0, 3, 30]) * rng.normal(0, 1, 3)
    turn = Rotation.from_euler("xyz", turns, degrees=True)
    bcd = turn.as_quat(canonical=True)[:3]
    qfac = float(rng.choice([1, -1]))
    pixdim = tuple(float(s) for s in np.float32(rng.choice([1, 0.8, *rng.uniform(0.3, 6, 3)], 3)))
    matrix = turn.as_matrix() * (1, 1, qfac) * pixdim + rng.choice([0, 1e-6, 0.2]) * rng.normal(0, 1, (3, 3))
    return nifti(
        tuple(int(n) for n in rng.integers(1, 7, 3)),
        pixdim,
        qfac=qfac,
        quaternion=tuple(bcd),
        offsets=tuple(np.float32(rng.uniform(-300, 300, 3)).tolist()),
        matrix=matrix,
        codes=codes,
        datatype=int(rng.choice(list(TYPES))),
        order=str(rng.choice(["<", ">"])),
        units=int(rng.choice([0, 2, 10, 1, 3])),
        slope=(float(rng.choice([0, 1, 0.5, -3])), float(rng.choice([0, 7.25]))),
    )


class TestNifti:
    @pytest.mark.parametrize("reader", VOLUME_READERS)
    def test_random_geometries(self, probe: Probe, reader: str, tmp_path: Path) -> None:
        rng = np.random.default_rng(VOLUME_READERS.index(reader))
        read = 0
        for number in range(60):
            codes = [(0, 0), (1, 0), (0, 2), (1, 1), (2, 1), (1, 2), (2, 3), (4, 4)][number % 8]
            file = tmp_path / (f"{number}.nii.gz" if number % 2 else f"{number}.nii")
            whole = random_nifti(rng, codes)
            file.write_bytes(gzip.compress(whole, 1) if number % 2 else whole)
            properties = check_read(probe, reader, file)
            if properties is not None:
                read += 1
                check_labels(probe, reader, ".nii.gz" if number % 3 else ".nii", tmp_path, properties, file)
        assert read > 45

    def test_planes_series_and_single_voxels(self, probe: Probe, tmp_path: Path) -> None:
        for number, (size, pixdim) in enumerate(
            (
                ((7, 6), (1.0, 2.0)),
                ((7, 6, 5, 2), (1.0, 2.0, 3.0, 0.0)),
                ((7, 6, 5, 1), (1.0, 2.0, 3.0, 4.0)),
                ((4, 1, 1), (1.0, 0.0, 0.0)),
                ((7, 6, 1), (2.0, 2.0, 5.0)),
                ((4, 5, 6, 1, 1), (1.0, 1, 1, 1, 1)),
                ((3, 4, 5, 2, 2), (1.0, 1, 1, 1, 1)),
                ((7,), (1.0,)),
            )
        ):
            file = tmp_path / f"{number}.nii"
            matrix = np.diag([*pixdim[:3], *[1.0] * (3 - len(pixdim[:3]))])
            file.write_bytes(nifti(size, pixdim, matrix=matrix, codes=(1, 0)))
            for reader in VOLUME_READERS:
                properties = check_read(probe, reader, file)
                if properties is not None:
                    check_labels(probe, reader, ".nii.gz", tmp_path, properties, file)

    @pytest.mark.parametrize("reader", VOLUME_READERS)
    def test_names_versions_and_packings(self, probe: Probe, reader: str, tmp_path: Path) -> None:
        plain = nifti()
        packed = gzip.compress(plain)
        files = {
            "a.nii": plain, "a.NII": plain, "b.Nii": plain, "c.nii.gz": packed, "d.NII.GZ": packed, "e.nii": packed,
            "f.nii.gz": plain, "padded.nii": plain + bytes(100), "padded.nii.gz": gzip.compress(plain + bytes(4096)),
            "much.nii.gz": gzip.compress(plain + bytes(4097)), "tail.nii": plain + b"x",
            "members.nii.gz": gzip.compress(plain[:300]) + gzip.compress(plain[300:]) + bytes(7),
            "stored.nii.gz": gzip.compress(plain, 0), "after.nii.gz": packed + b"more",
            "two.nii": hostile._nifti(two=True), "two.nii.gz": gzip.compress(hostile._nifti(two=True)),
        }  # fmt: skip
        for name, whole in files.items():
            (tmp_path / name).write_bytes(whole)
            if name != "b.Nii" or reader in ITK_READERS:  # nibabel looks for b.nii
                check_read(probe, reader, tmp_path / name)

    def test_pairs_of_files(self, probe: Probe, tmp_path: Path) -> None:
        seed = hostile.seeds(tmp_path)["nifti pair"]
        header = hostile.write(seed, tmp_path, "pair")
        assert check_read(probe, "SimpleITKIO", header) is not None
        assert check_read(probe, "SimpleITKIO", header.with_suffix(".img")) is not None
        analyze = bytearray(seed[".hdr"])
        analyze[344:348] = bytes(4)
        hostile.write({".hdr": bytes(analyze), ".img": seed[".img"]}, tmp_path, "analyze")
        assert check_read(probe, "SimpleITKIO", tmp_path / "analyze.hdr") is not None


class TestTextHeaders:
    @pytest.mark.parametrize("ending", TEXT_ENDINGS)
    def test_random_geometries(self, probe: Probe, ending: str, tmp_path: Path) -> None:
        rng = np.random.default_rng(TEXT_ENDINGS.index(ending))
        for number in range(24):
            axes = (2, 3, 3, 4)[number % 4]
            dtype = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")[number % 10]
            image = sitk.GetImageFromArray(rng.integers(0, 100, rng.integers(1, 6, axes)).astype(dtype), isVector=False)
            image.SetSpacing(rng.uniform(0.1, 5, axes))
            image.SetOrigin(rng.uniform(-100, 100, axes))
            turn = np.eye(axes)
            angles = 90.0 * rng.integers(0, 4, 3) + rng.choice([0, 20]) * rng.normal(0, 1, 3)
            if axes == 2:
                turn = Rotation.from_euler("z", angles[0], degrees=True).as_matrix()[:2, :2]
            else:
                turn[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * rng.choice([-1, 1], 3)
            image.SetDirection(turn.ravel().tolist())
            file = tmp_path / f"image{ending}"
            sitk.WriteImage(image, str(file), bool(rng.random() < 0.5))
            for reader in ITK_READERS:
                properties = check_read(probe, reader, file)
                if properties is not None:
                    check_labels(probe, reader, ending, tmp_path, properties, file)

    def test_spaces_of_nrrd(self, probe: Probe, tmp_path: Path) -> None:
        directions = "(0,1.5,0) (-2,0,0) (0,0,3)"
        for number, lines in enumerate((
            "space: right-anterior-superior", "space: RAS", "space: left-anterior-superior", "space: LPS",
            "space: scanner-xyz", "space dimension: 3",
        )):  # fmt: skip
            head = f"NRRD0004\n{lines}\ntype: short\ndimension: 3\nsizes: 2 3 4\nendian: big\nencoding: raw\n"
            head += f"space directions: {directions}\nspace origin: (1,2,3)\nmine:=my own\n\n"
            file = tmp_path / f"{number}.nrrd"
            file.write_bytes(head.encode() + np.arange(24, dtype=">i2").tobytes())
            properties = check_read(probe, "SimpleITKIO", file)
            assert properties is not None
            check_labels(probe, "SimpleITKIO", ".nrrd", tmp_path, properties, file)

    def test_metaimage_that_others_write(self, probe: Probe, tmp_path: Path) -> None:
        (tmp_path / "voxels.raw").write_bytes(bytes(10) + np.arange(24, dtype=">u2").tobytes())
        for number, lines in enumerate((
            "ElementSize = 1 2 3", "Position = 1 2 3\nOffset = 4 5 6", "Origin: 1 2 3\nRotation = 0 1 0 1 0 0 0 0 1",
            "ElementSpacing = -1 2 3\nOrientation = 1 0 0 0 1 0 0 0 -1", "AnatomicalOrientation = LPS",
        )):  # fmt: skip
            head = f"NDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = True\n{lines}\nDimSize = 2 3 4\n"
            for skip in (10, -1):
                file = tmp_path / f"{number}.mhd"
                file.write_text(f"{head}HeaderSize = {skip}\nElementType = MET_USHORT\nElementDataFile = voxels.raw\n")
                assert check_read(probe, "SimpleITKIO", file) is not None


# byte in a NIfTI-1 header, its format there, and a value that no image has
FAULTS = (
    (0, "i", 347), (40, "h", 0), (40, "h", 8), (40, "h", -1), (42, "h", 0), (44, "h", -5), (46, "h", 32767),
    (42, "h", 8), (70, "h", 0), (70, "h", 3), (70, "h", 32), (70, "h", 128), (70, "h", 1536), (80, "f", np.nan),
    (84, "f", 0.0), (88, "f", np.inf), (108, "f", 0.0), (108, "f", 347.0), (108, "f", 1e9), (108, "f", np.nan),
    (112, "f", np.inf), (116, "f", np.nan), (256, "f", np.nan), (268, "f", np.inf), (292, "f", np.nan),
    (344, "4s", b"n+3\0"),
)  # fmt: skip


class TestDamage:
    @pytest.mark.parametrize("fault", FAULTS, ids=str)
    def test_faults_of_headers(self, probe: Probe, fault: tuple[int, str, Any], tmp_path: Path) -> None:
        """Refused as the Python runtime does, in its words where it speaks for itself."""
        at, form, value = fault
        for name in ("a.nii", "a.nii.gz"):
            whole = bytearray(nifti())
            struct.pack_into(f"<{form}", whole, at, value)
            file = tmp_path / name
            file.write_bytes(gzip.compress(whole) if name.endswith(".gz") else whole)
            for reader in VOLUME_READERS:
                expected, got = read_by_python(reader, file), probe.read(reader, file)
                assert isinstance(expected, str)
                assert isinstance(got, str)
                if not expected.startswith("cannot read") and fault[:3] != (70, "h", 1536):
                    assert got == expected

    def test_truncated_anywhere(self, probe: Probe, tmp_path: Path) -> None:
        whole = nifti()
        packed = gzip.compress(whole)
        for name, some in (("a.nii", whole), ("a.nii.gz", packed)):
            file = tmp_path / name
            for size in {*range(0, len(some), 7), *range(340, min(360, len(some))), len(some) - 1}:
                file.write_bytes(some[:size])
                assert isinstance(probe.read("SimpleITKIO", file), str)
                assert isinstance(probe.read("NibabelIO", file), str)
        file.write_bytes(packed[:-6] + b"\0" + packed[-5:])
        assert "checksum" in probe.read("SimpleITKIO", file)

    def test_a_bomb_does_not_go_off(self, probe: Probe, tmp_path: Path) -> None:
        file = tmp_path / "bomb.nii.gz"
        file.write_bytes(gzip.compress(nifti() + bytes(1 << 26)))
        assert "more data follow" in probe.read("SimpleITKIO", file)
        header = bytearray(nifti())
        struct.pack_into("<3h", header, 42, 32767, 32767, 32767)
        for name, some in (("claim.nii.gz", gzip.compress(header)), ("claim.nii", header)):
            (tmp_path / name).write_bytes(some)
            assert probe.read("SimpleITKIO", tmp_path / name) == read_by_python("SimpleITKIO", tmp_path / name)

    @pytest.mark.parametrize("kind", [
        "nifti", "nifti gz", "nifti scaled", "nifti scaled gz", "nifti float", "nifti 2d", "nifti 4d", "nifti pair",
        "nib", "nib gz", "nib scaled", "nib two", "nrrd", "nrrd gz", "nrrd detached", "mha", "mha zlib", "mhd",
    ])  # fmt: skip
    def test_damaged_by_number(self, probe: Probe, kind: str, tmp_path: Path) -> None:
        """What the engine takes of a damaged file is what the Python runtime does; it takes nothing more."""
        seed = hostile.seeds(tmp_path)[kind]
        reader = "NibabelIO" if kind.startswith("nib") else "SimpleITKIO"
        refused = stricter = 0
        for number in range(25):
            folder = tmp_path / str(number)
            file = hostile.write(hostile.damaged(kind, number, seed), folder, "seed")
            expected, got = read_by_python(reader, file), probe.read(reader, file)
            if isinstance(got, str):
                refused += 1
                stricter += not isinstance(expected, str)
                continue
            assert not isinstance(expected, str), f"{number}: only the Python runtime refuses: {expected}"
            np.testing.assert_array_equal(got[0], expected[0], strict=True)
            assert got[1]["spacing"] == [float(s) for s in expected[1]["spacing"]]
        assert refused > 3
        assert stricter <= 2  # what only ITK reads


class TestPictures:
    """PNG alone."""

    @pytest.mark.parametrize("mode", ["L", "1", "I;16", "RGB", "RGBA", "P", "LA"])
    @pytest.mark.parametrize("size", [(20, 24), (1, 1), (13, 7), (5, 2)])
    def test_pixels(self, probe: Probe, mode: str, size: tuple[int, int], tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        grey, file = rng.integers(0, 256, size).astype(np.uint8), tmp_path / "a_0000.png"
        grey[size[0] // 2 :] = np.arange(size[1])
        if mode == "I;16":
            picture = Image.fromarray(grey.astype(np.uint16) * 200)
        elif mode == "P":
            picture = Image.fromarray(np.dstack([grey] * 3)).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
        else:
            picture = Image.fromarray(np.dstack([grey, grey.T.reshape(size), grey[::-1]])).convert(mode)
        picture.save(file)
        properties = check_read(probe, "NaturalImage2DIO", file)
        assert (properties is None) == (mode == "LA")
        for depth in (2, 4) if mode == "P" else ():
            picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=2**depth).save(file, bits=depth)
            assert check_read(probe, "NaturalImage2DIO", file) is not None
        for most in (200, 300) if properties is not None else ():
            labels = rng.integers(0, most, (1, *size)).astype(np.uint16)
            labels.flat[0] = most
            out = tmp_path / "out.png"
            assert probe.write("NaturalImage2DIO", labels, out, file) is None
            np.testing.assert_array_equal(image_io("NaturalImage2DIO").read([out])[0][0], labels)
            assert np.asarray(Image.open(out)).dtype == (np.uint8 if most < 255 else np.uint16)

    def test_interlaced_and_of_few_bits(self, probe: Probe, tmp_path: Path) -> None:
        """Of every depth and kind, written pixel by pixel in seven passes as the format says."""
        rng = np.random.default_rng(0)
        for number, (colour, depth, samples) in enumerate(
            [(0, 1, 1), (0, 2, 1), (0, 4, 1), (0, 8, 1), (0, 16, 1), (2, 8, 3), (2, 16, 3), (6, 8, 4), (6, 16, 4)]
        ):
            for width, height in ((9, 11), (1, 1), (3, 5)):
                pixels = rng.integers(0, 2**depth, (height, width, samples))
                for interlaced in (0, 1):
                    file = tmp_path / f"{number}_{interlaced}.png"
                    file.write_bytes(png(pixels, colour, depth, interlaced, rng))
                    assert check_read(probe, "NaturalImage2DIO", file) is not None

    @pytest.mark.parametrize("kind", ["picture png", "picture png rgb", "picture png palette"])
    def test_damaged_by_number(self, probe: Probe, kind: str, tmp_path: Path) -> None:
        seed = hostile.seeds(tmp_path)[kind]
        for number in range(40):
            file = hostile.write(hostile.damaged(kind, number, seed), tmp_path / str(number), "seed")
            expected, got = read_by_python("NaturalImage2DIO", file), probe.read("NaturalImage2DIO", file)
            if not isinstance(got, str):
                assert not isinstance(expected, str), f"{number}: only the Python runtime refuses: {expected}"
                np.testing.assert_array_equal(got[0], expected[0], strict=True)


def png(pixels_YXC: np.ndarray, colour: int, depth: int, interlaced: int, rng: np.random.Generator) -> bytes:
    """A PNG file, its rows filtered by any of the five filters."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    step = max(1, pixels_YXC.shape[2] * depth // 8)
    data = b""
    for x, y, step_x, step_y in passes:
        part = pixels_YXC[y::step_y, x::step_x]
        if not part.size:
            continue
        bits = (part.reshape(len(part), -1)[:, :, None] >> np.arange(depth)[::-1]) & 1
        rows = np.packbits(bits.reshape(len(part), -1).astype(np.uint8), axis=1).astype(int)
        for above, row in zip([np.zeros_like(rows[0]), *rows[:-1]], rows, strict=True):
            a, c = (np.concatenate([np.zeros(step, int), line])[: len(line)] for line in (row, above))
            p = a + above - c
            near = np.stack([abs(p - a), abs(p - above), abs(p - c)]).argmin(0)
            paeth = np.choose(near, [a, above, c])
            kind = int(rng.integers(0, 5))
            predicted = [0 * row, a, above, (a + above) // 2, paeth][kind]
            data += bytes([kind]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
    header = struct.pack(">2I5B", pixels_YXC.shape[1], pixels_YXC.shape[0], depth, colour, 0, 0, interlaced)
    whole = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")):
        whole += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return whole


class TestChannels:
    def test_files_of_one_image(self, probe: Probe, tmp_path: Path) -> None:
        files = [tmp_path / f"a_{channel:04d}.nii.gz" for channel in range(4)]
        for file, datatype in zip(files, (4, 16, 512, 64), strict=True):
            file.write_bytes(gzip.compress(nifti(datatype=datatype)))
        for reader in VOLUME_READERS:
            assert check_read(probe, reader, *files) is not None

    @pytest.mark.parametrize("change", [{"size": (3, 4, 6)}, {"pixdim": (1.0, 2.0, 3.5)}, {"offsets": (1, 2, 3)}])
    def test_that_do_not_fit(self, probe: Probe, change: dict[str, Any], tmp_path: Path) -> None:
        files = [tmp_path / "a_0000.nii", tmp_path / "a_0001.nii"]
        files[0].write_bytes(nifti())
        files[1].write_bytes(nifti(**change))
        for reader in VOLUME_READERS:
            expected, got = read_by_python(reader, *files), probe.read(reader, *files)
            if isinstance(expected, str):
                assert got == expected
            else:
                assert "do not fit together" in got[1]["warnings"][0]

    def test_missing_and_unfinite(self, probe: Probe, tmp_path: Path) -> None:
        whole = bytearray(nifti(datatype=16))
        struct.pack_into("<2f", whole, 352, np.nan, np.inf)
        bad, good = tmp_path / "bad.nii", tmp_path / "good.nii"
        bad.write_bytes(whole)
        good.write_bytes(nifti(datatype=16))
        for files in ((bad,), (good, bad), (tmp_path / "none.nii",), (good, tmp_path / "none.nii")):
            for reader in VOLUME_READERS:
                assert probe.read(reader, *files) == read_by_python(reader, *files)


class TestWriting:
    def test_what_cannot_be_written_leaves_nothing(self, probe: Probe, tmp_path: Path) -> None:
        file = tmp_path / "a.nii"
        file.write_bytes(nifti())
        labels = np.zeros((5, 4, 3), np.uint8)
        assert "cannot write" in probe.write("SimpleITKIO", labels, tmp_path / "missing" / "a.nii.gz", file)
        assert "expected NIfTI" in probe.write("SimpleITKIO", labels, tmp_path / "a.jpg", file)
        (tmp_path / "folder.nii.gz").mkdir()
        assert "cannot write" in probe.write("SimpleITKIO", labels, tmp_path / "folder.nii.gz", file)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "folder.nii.gz"]

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_any_labels_can_be_unpacked(self, probe: Probe, dtype: type, tmp_path: Path) -> None:
        """Noise, runs of every length, rows like the rows before them, and more than a block of the code takes."""
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 255 if dtype == np.uint8 else 60000, 90 * 100 * 33)
        runs = np.repeat(rng.integers(0, 3, 3000), rng.integers(1, 600, 3000))[: noise.size]
        rows = np.broadcast_to(rng.integers(0, 200, 33), (90, 100, 33)).ravel()
        mixed = np.where(rng.random(noise.size) < 0.01, noise, rows)
        skewed = rng.geometric(0.5, noise.size) % 255
        file, out = tmp_path / "a.nii", tmp_path / "out.nii.gz"
        header = bytearray(nifti()[:352])
        struct.pack_into("<4h", header, 40, 3, 33, 100, 90)
        file.write_bytes(header + bytes(2 * noise.size))
        for labels in (noise, runs, rows, mixed, skewed, np.zeros(noise.size)):
            assert probe.write("SimpleITKIO", labels.astype(dtype), out, file) is None
            whole = gzip.decompress(out.read_bytes())
            kind = np.uint8 if labels.max() < 255 else np.uint16
            np.testing.assert_array_equal(np.frombuffer(whole[352:], kind), labels)
            assert check_read(probe, "SimpleITKIO", out) is not None  # by ISA-L and libdeflate

    def test_replaces_what_was_there(self, probe: Probe, tmp_path: Path) -> None:
        file = tmp_path / "a.nii"
        file.write_bytes(nifti())
        assert probe.write("SimpleITKIO", np.ones((5, 4, 3), np.uint8), file, file) is None
        assert (probe.read("SimpleITKIO", file)[0] == 1).all()

    def test_an_unknown_reader(self, probe: Probe, tmp_path: Path) -> None:
        assert "known: SimpleITKIO" in probe.read("MyOwnIO", tmp_path)
