"""Image files that are damaged or lie: one message each, in bounded time and memory, and never other voxels.

The oracle of what is read in spite of damage is nnU-Net's own reader.
"""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from fastnnunet.cli.main import main
from fastnnunet.errors import ImageError
from fastnnunet.evaluate.segmentations import read_segmentation
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.images.io import image_io
from fastnnunet.runtime.predict import Predictor
from tests import hostile
from tests.bundles import Toy, ToyModel, make_toy_model, smooth_noise, write_image
from tests.dicom_files import write_series

MUTATIONS = {"nifti": 500, "nrrd mha png tiff": 280}
GIB = 2**30


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, hostile.Files]:
    return hostile.seeds(tmp_path_factory.mktemp("seeds"))


def _reader(kind: str) -> str:
    return next((reader for begin, reader in hostile.READERS.items() if kind.startswith(begin)), "SimpleITKIO")


def _read_all(items: list[tuple[str, Path]], folder: Path, timeout_s: float = 200) -> list[dict[str, Any]]:
    """What a process of its own says of each file, in order. A death or a hang fails and names the file."""
    (folder / "list.json").write_text(json.dumps([(reader, str(file)) for reader, file in items]))
    with (folder / "answers").open("w") as answers:
        command = [sys.executable, "-m", "tests.hostile", str(folder / "list.json")]
        try:
            done = subprocess.run(command, stdout=answers, stderr=subprocess.PIPE, timeout=timeout_s)
            ending = f"exit code {done.returncode}: {done.stderr.decode(errors='replace')[-1000:]}"
        except subprocess.TimeoutExpired:
            ending = f"nothing more after {timeout_s} s"
    lines = [json.loads(line) for line in (folder / "answers").read_text().splitlines() if line.startswith("{")]
    told = [line for line in lines if "file" not in line]
    assert len(told) == len(items), f"{lines[-1]}: {ending}"
    return told


@pytest.mark.parametrize("group", MUTATIONS)
def test_mutated_files(group: str, seeds: dict[str, hostile.Files], tmp_path: Path) -> None:
    """Each is read as nnU-Net reads it or refused with a message; no traceback, no crash, no hang, no GiB."""
    kinds = [kind for kind in seeds if kind.startswith(("nifti", "nib")) == (group == "nifti")]
    items, names = [], []
    for kind in kinds:
        items.append((_reader(kind), hostile.write(seeds[kind], tmp_path / f"{kind} whole", "a_0000")))
        names.append(f"{kind}, undamaged")
    for number in range(MUTATIONS[group]):
        kind = kinds[number % len(kinds)]
        files = hostile.damaged(kind, number, seeds[kind])
        items.append((_reader(kind), hostile.write(files, tmp_path / f"{kind} {number}", "a_0000")))
        names.append(f"hostile.damaged({kind!r}, {number}, seeds[{kind!r}])")
    told = _read_all(items, tmp_path)
    whole = max(one["peak_bytes"] for one in told[: len(kinds)])
    wrong = []
    for name, (_, file), one in zip(names, items, told, strict=True):
        if "traceback" in one or one["peak_bytes"] > whole + GIB:
            wrong.append(f"{name}: {one}")
        elif "refused" in one:
            if str(file.parent) not in one["refused"] or "undamaged" in name:
                wrong.append(f"{name}: {one}")
        elif one["ours"] != one.get("nnunet"):
            wrong.append(f"{name}: {one}")
    assert not wrong, "\n".join(wrong)
    refused = sum("refused" in one for one in told)
    assert 0.3 * len(told) < refused < 0.9 * len(told), "the mutations are too mild or too wild to tell anything"


def _edited(content: bytes, *changes: tuple[int, str, tuple[Any, ...]]) -> bytes:
    b = bytearray(content)
    for offset, form, values in changes:
        struct.pack_into(form, b, offset, *values)
    return bytes(b)


def _png(width: int, height: int, inflated: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(inflated)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _larger_tiff(side: int, **options: Any) -> bytes:
    into = io.BytesIO()
    tifffile.imwrite(into, np.zeros((24, 20), np.uint8), metadata=None, **options)
    content = bytearray(into.getvalue())
    (start,) = struct.unpack_from("<I", content, 4)
    for tag in range(struct.unpack_from("<H", content, start)[0]):
        place = start + 2 + 12 * tag
        if struct.unpack_from("<H", content, place)[0] in (256, 257):  # width and height
            struct.pack_into("<HII", content, place + 2, 4, 1, side)
    return bytes(content)


def _claims(seeds: dict[str, hostile.Files]) -> dict[str, tuple[str, hostile.Files]]:
    """What claims, or is packed to be, far more than there is: name -> reader and files."""
    nifti, scaled = seeds["nifti"][".nii"], seeds["nifti scaled"][".nii"]
    huge = (42, "<3h", (30000, 30000, 30000))
    large = (42, "<3h", (1000, 1500, 2000))
    bomb = bytes(GIB // 4)
    zlib_bomb, gzip_bomb = zlib.compress(bomb, 1), gzip.compress(bomb, 1)
    packed = gzip.compress(nifti) + gzip_bomb
    mha, nrrd = seeds["mha zlib"][".mha"], seeds["nrrd gz"][".nrrd"]
    mha_head = mha[: mha.index(b"LOCAL\n") + 6].replace(b"DataSize = 322", b"DataSize = %d" % len(zlib_bomb))
    nrrd_head = nrrd[: nrrd.index(b"\n\n") + 2]
    big = b"30000 30000 30000"
    gipl = seeds["gipl"][".gipl"]
    vtk = (
        b"# vtk DataFile Version 3.0\nx\nBINARY\nDATASET STRUCTURED_POINTS\nDIMENSIONS 2000 2000 2000\nSPACING 1 1 1\n"
    )
    vtk += b"ORIGIN 0 0 0\nPOINT_DATA 8000000000\nSCALARS s short 1\nLOOKUP_TABLE default\n" + bytes(100)
    jpeg = bytearray(seeds["picture jpeg"][".png"])
    struct.pack_into(">2H", jpeg, jpeg.index(b"\xff\xc0") + 5, 65000, 65000)
    itk = {
        "terabytes.nii": {".nii": _edited(nifti, huge)},
        "terabytes.nii.gz": {".nii.gz": gzip.compress(_edited(nifti, huge))},
        "scaled.nii": {".nii": _edited(scaled, large)},
        "scaled.nii.gz": {".nii.gz": gzip.compress(_edited(scaled, large))},
        "pair.hdr": {**seeds["nifti pair"], ".hdr": _edited(seeds["nifti pair"][".hdr"], large)},
        "bomb.nii.gz": {".nii.gz": packed},
        "bomb, scaled": {".nii.gz": gzip.compress(scaled) + gzip_bomb},
        "nrrd": {".nrrd": seeds["nrrd"][".nrrd"].replace(b"7 6 5", big)},
        "nrrd gz": {".nrrd": nrrd.replace(b"7 6 5", big)},
        "nrrd bomb": {".nrrd": nrrd_head + gzip_bomb},
        "nrrd detached": {n: c.replace(b"7 6 5", big) for n, c in seeds["nrrd detached"].items()},
        "mha": {".mha": seeds["mha"][".mha"].replace(b"7 6 5", big)},
        "mha zlib": {".mha": mha.replace(b"7 6 5", big)},
        "mha bomb": {".mha": mha_head + zlib_bomb},
        "mhd": {n: c.replace(b"7 6 5", big) for n, c in seeds["mhd"].items()},
        "gipl": {".gipl": _edited(gipl, (0, ">3h", (1000, 1500, 2000)))},
        "vtk": {".vtk": vtk},
    }
    pictures = {
        "png": {".png": _png(40000, 40000, b"x" * 1000)},
        "png of 2^62 pixels": {".png": _png(2**31 - 1, 2**31 - 1, b"x" * 1000)},
        "jpeg": {".png": bytes(jpeg)},
        "bmp": {".bmp": _edited(seeds["picture bmp"][".bmp"], (18, "<2i", (60000, 60000)))},
        **{f"tiff {c}": {".tif": _larger_tiff(100000, compression=c)} for c in (None, "zlib", "lzw", "jpeg")},
    }
    return {
        **{name: ("SimpleITKIO", files) for name, files in itk.items()},
        **{name: ("NaturalImage2DIO", files) for name, files in pictures.items()},
        "tiff3d": ("Tiff3DIO", {".tif": _larger_tiff(100000, compression="zlib")}),
        "nibabel": ("NibabelIO", {".nii.gz": gzip.compress(_edited(scaled, huge))}),
        "nibabel bomb": ("NibabelIO", {".nii.gz": packed}),
        "nifti-2": ("NibabelIO", {".nii": _edited(seeds["nib two"][".nii"], (24, "<3q", (1 << 40,) * 3))}),
    }


def test_headers_that_claim_more_than_there_is_take_no_memory(seeds: dict[str, hostile.Files], tmp_path: Path) -> None:
    claims = _claims(seeds)
    whole = [("SimpleITKIO", hostile.write(seeds["nifti gz"], tmp_path / "whole", "a_0000"))]
    items = [(reader, hostile.write(files, tmp_path / name, "a_0000")) for name, (reader, files) in claims.items()]
    told = _read_all(whole + items, tmp_path)
    for name, one in zip(claims, told[1:], strict=True):
        assert "refused" in one, (name, one)
        assert one["peak_bytes"] - told[0]["peak_bytes"] < GIB / 8, (name, one)


NIFTI_READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
LIES: dict[str, tuple[tuple[tuple[int, str, tuple[Any, ...]], ...], str]] = {
    "nifti-2 by its size alone": (((0, "<i", (540,)),), "damaged NIfTI header: size 540"),
    "no dimensions": (((40, "<h", (0,)),), "dimensions"),
    "complex numbers": (((70, "<h", (32,)), (42, "<3h", (7, 6, 1))), "holds complex numbers"),
    "colours": (((70, "<h", (128,)), (42, "<3h", (7, 5, 4))), r"holds colours \(RGB\)"),
    "bits": (((70, "<h", (1,)),), "holds bits"),
    "unknown numbers": (((70, "<h", (17,)),), "data type 17"),
    "intercept": (((112, "<2f", (2.0, np.nan)),), "rescaled by 2 and nan"),
    "infinite slope": (((112, "<2f", (np.inf, 0.0)),), "rescaled by inf"),
    "qform": (((252, "<2h", (1, 0)), (256, "<f", (np.nan,))), r"its qform is \(1, nan"),
    "qoffset": (((252, "<2h", (1, 0)), (268, "<f", (np.inf,))), "its qform is"),
    "sform": (((252, "<2h", (0, 1)), (292, "<f", (np.nan,))), "its sform is"),
    **{f"spacing {bad}": (((84, "<f", (bad,)),), "its spacing is") for bad in (np.nan, np.inf, -np.inf, 0.0)},
    "fewer voxels than there are": (((46, "<h", (4,)),), "more data follow"),
}


@pytest.mark.parametrize("reader", NIFTI_READERS)
@pytest.mark.parametrize("lie", LIES)
def test_what_a_nifti_header_must_not_say(
    reader: str, lie: str, seeds: dict[str, hostile.Files], tmp_path: Path
) -> None:
    changes, words = LIES[lie]
    content = _edited(seeds["nifti"][".nii"], *changes)
    for ending, stored in ((".nii", content), (".nii.gz", gzip.compress(content))):
        with pytest.raises(ImageError, match=words):
            image_io(reader).read([hostile.write({ending: stored}, tmp_path, "a_0000")])


@pytest.mark.parametrize("reader", NIFTI_READERS)
def test_one_slice_without_a_distance_as_nnunet(reader: str, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(hostile.voxels((7, 6, 1)), np.diag([2.0, 3.0, 4.0, 1.0]))
    file = hostile.write({".nii": _edited(image.to_bytes(), (88, "<f", (0.0,)))}, tmp_path, "a_0000")
    _same(reader, file)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("reader", NIFTI_READERS)
def test_completeness_does_not_trust_bitpix(
    reader: str, ending: str, seeds: dict[str, hostile.Files], tmp_path: Path
) -> None:
    content = _edited(seeds["nifti scaled"][".nii"], (72, "<h", (0,)))
    cut = content[:-100]
    for name, stored in (("whole", content), ("cut", cut)):
        stored = gzip.compress(stored) if ending.endswith("gz") else stored
        hostile.write({ending: stored}, tmp_path, name)
    with pytest.raises(ImageError, match="truncated"):
        image_io(reader).read([tmp_path / f"cut{ending}"])
    _same(reader, tmp_path / f"whole{ending}")


def _same(reader: str, file: Path) -> None:
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    expected, expected_properties = recursive_find_reader_writer_by_name(reader)().read_images([str(file)])
    got, properties = image_io(reader).read([file])
    np.testing.assert_array_equal(got, expected)
    assert hostile.digest(got, properties) == hostile.digest(expected, expected_properties)


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("reader", NIFTI_READERS)
def test_a_negative_pixdim_as_nnunet(
    reader: str, axis: int, codes: tuple[int, int], seeds: dict[str, hostile.Files], tmp_path: Path
) -> None:
    changes = ((80 + 4 * axis, "<f", (-1.5,)), (252, "<2h", codes))
    for kind in ("nifti", "nifti scaled"):
        file = hostile.write({".nii": _edited(seeds[kind][".nii"], *changes)}, tmp_path, kind)
        _same(reader, file)
        image, properties = image_io(reader).read([file])
        labels = (image[0] > 100).astype(np.uint8)
        image_io(reader).write(labels, tmp_path / "s.nii.gz", properties)
        again, _ = image_io(reader).read_segmentation(tmp_path / "s.nii.gz")
        np.testing.assert_array_equal(again[0], labels)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_what_follows_the_voxels(reader: str, seeds: dict[str, hostile.Files], tmp_path: Path) -> None:
    content = seeds["nifti"][".nii"]
    padding = bytes(-len(content) % 512)
    packed = gzip.compress(content)
    for name, files in {
        "one more": {".nii": content + b"x"},
        "more than a block of zeros": {".nii": content + bytes(5000)},
        "another gzip": {".nii.gz": packed + gzip.compress(b"more")},
        "another image": {".nii.gz": packed + packed},
        "no gzip": {".nii.gz": packed + b"more"},
        "scaled": {".nii.gz": gzip.compress(seeds["nifti scaled"][".nii"] + b"x")},
    }.items():
        with pytest.raises(ImageError, match=r"more data follow|something else follows"):
            image_io(reader).read([hostile.write(files, tmp_path, name)])
    pieces = b"".join(gzip.compress(content[i : i + 3]) for i in range(0, len(content), 3))  # as bgzip, many members
    for name, files in {
        "padded": {".nii": content + padding},
        "a zero": {".nii": content + b"\0"},
        "padded to a page": {".nii": content + bytes(-len(content) % 4096)},
        "padded gz": {".nii.gz": gzip.compress(content + padding)},
        "padding behind gzip": {".nii.gz": packed + bytes(1000)},
        "members": {".nii.gz": pieces + gzip.compress(b"")},
    }.items():
        _same_as_seed(reader, hostile.write(files, tmp_path, name), content, tmp_path)


def _same_as_seed(reader: str, file: Path, seed: bytes, folder: Path) -> None:
    whole, properties = image_io(reader).read([hostile.write({".nii": seed}, folder, "seed")])
    got, got_properties = image_io(reader).read([file])
    np.testing.assert_array_equal(got, whole)
    assert hostile.digest(got, got_properties) == hostile.digest(whole, properties)


@pytest.mark.parametrize("cut", [".hdr", ".img"])
def test_a_pair_that_is_not_whole(cut: str, seeds: dict[str, hostile.Files], tmp_path: Path) -> None:
    pair = seeds["nifti pair"]
    hostile.write(pair, tmp_path, "a")
    for name in ("a.hdr", "a.img"):
        _same("SimpleITKIO", tmp_path / name)
    hostile.write({**pair, cut: pair[cut][:-10]}, tmp_path, "b")
    hostile.write({cut: pair[cut]}, tmp_path, "c")
    for name in ("b.hdr", "b.img", f"c{cut}"):
        with pytest.raises(ImageError, match=r"truncated|not a NIfTI image|not found"):
            image_io("SimpleITKIO").read([tmp_path / name])
    analyze = nibabel.AnalyzeImage(hostile.voxels((7, 6, 5)).astype(np.int16), np.eye(4))
    nibabel.save(analyze, tmp_path / "d.img")
    _same("SimpleITKIO", tmp_path / "d.hdr")
    (tmp_path / "d.img").write_bytes((tmp_path / "d.img").read_bytes()[:-1])
    with pytest.raises(ImageError, match="truncated"):
        image_io("SimpleITKIO").read([tmp_path / "d.hdr"])


MHA = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 4 5 6
ElementSpacing = 1 2 3
DimSize = 7 6 5
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""
NRRD = """NRRD0004
# a comment
type: short
dimension: 3
space: left-posterior-superior
sizes: 7 6 5
space directions: (1,0,0) (0,2,0) (0,0,3)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (4,5,6)
key:=value

"""
DATA = hostile.voxels().astype("<i2")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("Offset = 4", f"Offset = {bad}") for bad in ("nan", "inf", "abc", "")),
        *(("ElementSpacing = 1", f"ElementSpacing = {bad}") for bad in ("nan", "inf", "0", "x", "1e999")),
        *(("TransformMatrix = 1", f"TransformMatrix = {bad}") for bad in ("nan", "inf", "0")),
        *(("NDims = 3", f"NDims = {bad}") for bad in ("-1", "0", "4", "18446744073709551615", "1e9", "3\nNDims = 9")),
        *(("DimSize = 7", f"DimSize = {bad}") for bad in ("-7", "0", "7.5", "8", "4294967303", "6")),
        ("DimSize = 7 6 5\n", ""),
        ("MET_SHORT", "MET_STRING"),
        ("MET_SHORT", "MET_INT"),
        ("MET_SHORT", "MET_CHAR"),
        ("DimSize", "ElementNumberOfChannels = 300000000\nDimSize"),
        ("LOCAL", "none.raw"),
        ("LOCAL", "LIST"),
        ("LOCAL", "%s%s%s.raw 1 3"),
        ("LOCAL", "/dev/zero"),
        ("CompressedData = False", "CompressedData = True"),
    ],
)
def test_metaimage_headers_are_refused(old: str, new: str, tmp_path: Path) -> None:
    file = hostile.write({".mha": MHA.encode() + DATA.tobytes()}, tmp_path, "a_0000")
    _same("SimpleITKIO", file)
    file.write_bytes(MHA.replace(old, new).encode() + DATA.tobytes())
    with pytest.raises(ImageError):
        image_io("SimpleITKIO").read([file])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("origin: (4", f"origin: ({bad}") for bad in ("nan", "inf", "abc")),
        *(("directions: (1", f"directions: ({bad}") for bad in ("nan", "inf", "0")),
        ("space directions: (1,0,0) (0,2,0) (0,0,3)", "spacings: nan 2 3"),
        ("space directions: (1,0,0) (0,2,0) (0,0,3)", "spacings: inf 2 3"),
        *(("dimension: 3", f"dimension: {bad}") for bad in ("-1", "0", "4", "17", "4294967299", "3\ndimension: 3")),
        *(("sizes: 7", f"sizes: {bad}") for bad in ("-7", "0", "8", "4294967303", "6", "7.5")),
        ("sizes: 7 6 5\n", ""),
        ("type: short", "type: block"),
        ("type: short", "type: int"),
        ("endian: little\n", ""),
        ("encoding: raw", "encoding: gzip"),
        ("encoding: raw", "encoding: bzip2"),
        ("key:=value", "data file: none.raw"),
        ("key:=value", "data file: /dev/zero"),
        ("key:=value", "byte skip: 2"),
        ("key:=value", "nonsense"),
        ("key:=value", "#" * (1 << 20)),
    ],
)
def test_nrrd_headers_are_refused(old: str, new: str, tmp_path: Path) -> None:
    file = hostile.write({".nrrd": NRRD.encode() + DATA.tobytes()}, tmp_path, "a_0000")
    _same("SimpleITKIO", file)
    file.write_bytes(NRRD.replace(old, new).encode() + DATA.tobytes())
    with pytest.raises(ImageError):
        image_io("SimpleITKIO").read([file])


def test_headers_of_every_legal_kind_as_nnunet(tmp_path: Path) -> None:
    raw, text = DATA.tobytes(), " ".join(map(str, DATA.ravel())).encode()
    (tmp_path / "v.raw").write_bytes(raw)
    (tmp_path / "w.raw").write_bytes(b"header" + raw)
    (tmp_path / "v.txt").write_bytes(text)
    (tmp_path / "v.raw.gz").write_bytes(gzip.compress(raw))
    for z in range(5):
        (tmp_path / f"z{z:02d}.raw").write_bytes(DATA[z].tobytes())
    slices = "\n".join(f"z{z:02d}.raw" for z in range(5))

    def mha(data: bytes = b"", **changes: str) -> bytes:
        lines = {**dict(line.split(" = ") for line in MHA.splitlines()), **changes}
        lines["ElementDataFile"] = lines.pop("ElementDataFile")
        return "".join(f"{key} = {value}\n" for key, value in lines.items()).encode() + data

    def nrrd(data: bytes = b"", old: str = "", new: str = "") -> bytes:
        return NRRD.replace(old, new, 1).encode() + data

    packed = gzip.compress(raw)
    for name, content in {
        "plain.mha": mha(raw),
        "crlf.mha": MHA.replace("\n", "\r\n").encode() + raw,
        "colons.mha": MHA.replace(" = ", ":").encode() + raw,
        "fields.mha": mha(raw, Comment="hello", Modality="MET_MOD_CT", ElementSize="1 2 3", Name="x"),
        "big.mha": mha(DATA.astype(">i2").tobytes(), BinaryDataByteOrderMSB="True"),
        "zlib.mha": mha(zlib.compress(raw), CompressedData="True", CompressedDataSize=str(len(zlib.compress(raw)))),
        "negative.mha": mha(raw, ElementSpacing="1 -2 3"),
        "skewed.mha": mha(raw, TransformMatrix="1 0.5 0 0 1 0 0 0 1"),
        "no_matrix.mha": MHA.replace("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "").encode() + raw,
        "float.mha": mha(DATA.astype("<f4").tobytes(), ElementType="MET_FLOAT"),
        "long.mha": mha(DATA.astype("<i4").tobytes(), ElementType="MET_LONG"),
        "flat.mha": b"NDims = 2\nDimSize = 7 6\nElementType = MET_SHORT\nBinaryData = True\nElementDataFile = LOCAL\n"
        + DATA[0].tobytes(),
        "detached.mhd": mha(ElementDataFile="v.raw"),
        "headed.mhd": mha(HeaderSize="6", ElementDataFile="w.raw"),
        "ended.mhd": mha(HeaderSize="-1", ElementDataFile="w.raw"),
        "no_line_break.mhd": mha(ElementDataFile="v.raw").rstrip(b"\n"),
        "listed.mhd": mha(ElementDataFile=f"LIST\n{slices}"),
        "pattern.mhd": mha(ElementDataFile="z%02d.raw 0 4 1"),
        "text.mha": mha(text + b"\n", BinaryData="False"),
        "plain.nrrd": nrrd(raw),
        "crlf.nrrd": NRRD.replace("\n", "\r\n").encode() + raw,
        "old.nrrd": nrrd(raw, "NRRD0004", "NRRD0005"),
        "big.nrrd": nrrd(DATA.astype(">i2").tobytes(), "endian: little", "endian: big"),
        "gzip.nrrd": nrrd(packed, "encoding: raw", "encoding: gz"),
        "members.nrrd": nrrd(gzip.compress(raw[:101]) + gzip.compress(raw[101:]), "encoding: raw", "encoding: gzip"),
        "text.nrrd": nrrd(text, "encoding: raw", "encoding: ascii"),
        "upper.nrrd": nrrd(raw, "type: short", "type: Signed Short Int"),
        "spacings.nrrd": nrrd(raw, "space directions: (1,0,0) (0,2,0) (0,0,3)", "spacings: 1 2 3")
        .replace(b"space: left-posterior-superior\n", b"")
        .replace(b"space origin: (4,5,6)\n", b""),
        "keys.nrrd": nrrd(raw, "key:=value", "key:=a: b\nkey:=a second time\nspace:=as a field is called\nempty:="),
        "ras.nrrd": nrrd(raw, "left-posterior-superior", "right-anterior-superior"),
        "detached.nhdr": nrrd(b"", "key:=value", "data file: v.raw"),
        "skipped.nhdr": nrrd(b"", "key:=value", "data file: w.raw\nbyte skip: 6"),
        "ended.nhdr": nrrd(b"", "key:=value", "data file: w.raw\nbyte skip: -1"),
        "gzipped.nhdr": nrrd(b"", "key:=value", "data file: v.raw.gz").replace(b"encoding: raw", b"encoding: gzip"),
        "listed.nhdr": nrrd(b"", "key:=value\n", f"data file: LIST\n{slices}"),
        "pattern.nhdr": nrrd(b"", "key:=value", "data file: z%02d.raw 0 4 1"),
    }.items():
        (tmp_path / name).write_bytes(content)
        _same("SimpleITKIO", tmp_path / name)
        if name != "flat.mha":
            _same("SimpleITKIOWithReorient", tmp_path / name)


def test_a_dicom_series_that_claims_more_than_there_is(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros((3, 8, 9), np.int16), Rows=60000, Columns=60000)
    with pytest.raises(ImageError, match="claims 10800000000 bytes"):
        image_io("SimpleITKIO").read([DicomSeries(folder=tmp_path / "ct")])


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.raw")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "a.mhd").write_text(MHA.replace("LOCAL", "pipe.raw"))
    (tmp_path / "a.nhdr").write_text(NRRD.replace("key:=value", "data file: pipe.raw"))
    for name in ("pipe.nii.gz", "a.mhd", "a.nhdr"):
        with pytest.raises(ImageError, match="pipe"):
            image_io("SimpleITKIO").read([tmp_path / name])


def test_label_maps_are_held_to_the_same(seeds: dict[str, hostile.Files], tmp_path: Path) -> None:
    gipl = seeds["gipl"][".gipl"]
    for files in (
        {".gipl": gipl[:-1]},
        {".gipl": gipl + b"x"},
        {".gipl.gz": gzip.compress(gipl[:-1])},
        {".nii": _edited(seeds["nifti scaled"][".nii"], (72, "<h", (0,)))[:-1]},
        {".nii.gz": gzip.compress(_edited(seeds["nifti"][".nii"], (80, "<f", (np.nan,))))},
        {".mha": MHA.replace("Offset = 4", "Offset = nan").encode() + DATA.tobytes()},
        {".nrrd": NRRD.encode() + DATA.tobytes()[:-1]},
        {".nii": _edited(seeds["nifti"][".nii"], (70, "<h", (32,)), (42, "<3h", (7, 6, 2)))},
    ):
        file = hostile.write(files, tmp_path, "a")
        for read in (read_segmentation, image_io("SimpleITKIO").read_segmentation):
            with pytest.raises(ImageError, match=str(file)):
                read(file)
    whole = read_segmentation(hostile.write({".gipl": gipl}, tmp_path, "b"))
    np.testing.assert_array_equal(whole.labels_zyx, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "b.gipl"))))


@pytest.mark.parametrize("spacing", [1e6, 1e12, 1e38])
def test_a_spacing_that_cannot_be_meant(spacing: float, model: ToyModel) -> None:
    image = smooth_noise((12, 18, 20), 0)[None].astype(np.float32)
    spec = Predictor.load(model.bundle, "onnxruntime", threads=1)
    with pytest.raises(ImageError, match="check that of the image"):
        spec.preprocess(image, {"spacing": [spacing, 1.0, 1.0]})
    assert spec.preprocess(image, {"spacing": [20.0, 1.0, 1.0]}).data_CZYX.shape == (1, 240, 18, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


def test_the_rest_of_a_folder_is_predicted(
    model: ToyModel, seeds: dict[str, hostile.Files], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole images between thirty damaged ones: every damaged one is told once, the others are as predicted alone."""
    for name in ("a", "m", "z"):
        write_image(smooth_noise((12, 18, 20), ord(name)), tmp_path / "alone" / f"{name}_0000.nii.gz", (1.0,) * 3)
    kinds = ("nifti gz", "nifti scaled gz", "nib gz")
    damaged = [hostile.damaged(kinds[n % 3], n, seeds[kinds[n % 3]]) for n in range(200)]
    refused = []
    for files in damaged:
        file = hostile.write(files, tmp_path / "try", "a_0000")
        try:
            image_io("SimpleITKIO").read([file])
        except ImageError:
            refused.append(files)
    for number, files in enumerate(refused[:30]):
        hostile.write(files, tmp_path / "all", f"{'bnx'[number % 3]}{number:02d}_0000")
    for file in (tmp_path / "alone").iterdir():
        (tmp_path / "all" / file.name).write_bytes(file.read_bytes())
    for source in ("alone", "all"):
        command = [
            "predict",
            "-i",
            str(tmp_path / source),
            "-o",
            str(tmp_path / f"{source} out"),
            "-m",
            str(model.bundle),
        ]
        with pytest.raises(SystemExit) as done:
            main([*command, "-m", str(model.bundle), "--backend", "onnxruntime", "--threads", "1"])
        assert done.value.code == (1 if source == "all" else 0)
    printed = "".join(capsys.readouterr())
    assert "30 case(s) failed" in printed
    assert "Traceback" not in printed
    for number in range(30):
        assert printed.count(f"failed: {'bnx'[number % 3]}{number:02d}: ") == 1
    written = sorted(p.name for p in (tmp_path / "all out").glob("*.nii.gz"))
    assert written == ["a.nii.gz", "m.nii.gz", "z.nii.gz"]
    for name in written:
        assert (tmp_path / "all out" / name).read_bytes() == (tmp_path / "alone out" / name).read_bytes()


@pytest.mark.parametrize("axis", range(3))
def test_one_plane_that_is_not_zero(axis: int, tmp_path: Path) -> None:
    """What is left of a crop may have no neighbours in memory. By NumPy, as nnU-Net normalises."""
    bundle = make_toy_model(Toy(spacing=(1.0, 1.0, 1.0)), tmp_path).bundle
    image = np.zeros((1, 18, 20, 22), np.float32)
    inside = [slice(0, 1), slice(4, 12), slice(5, 15), slice(6, 16)]
    inside[1 + axis] = slice(7, 8)
    inner = np.random.default_rng(axis).random(image[tuple(inside)].shape).astype(np.float32) + 1
    image[tuple(inside)] = inner
    case = Predictor.load(bundle, "onnxruntime", threads=1).preprocess_array(image, {"spacing": [1.0, 1.0, 1.0]})
    np.testing.assert_allclose(case.data_CZYX, (inner - inner.mean()) / inner.std(), atol=1e-5)
