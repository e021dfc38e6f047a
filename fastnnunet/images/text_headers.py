"""NRRD and MetaImage files: where their voxels are and how many, read from the text that they begin with.

ITK reads on from what it could not parse (an offset of `nan` becomes 0), allocates what a header claims before it looks
for it, and MetaIO crashes on some counts of dimensions. So a header is refused here before ITK sees it unless all that
matters is well formed, and the voxels are there.
Formats: https://teem.sourceforge.net/nrrd/format.html, https://itk.org/Wiki/ITK/MetaIO/Documentation
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.images.stored import DEFLATE_RATIO, check_claim, open_stored

_HEAD_BYTES = 1 << 20
_META_BYTES = 8000  # ITK looks for NDims in as many
_META_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
_META_VECTORS = ("ElementSpacing", "ElementSize", "Offset", "Position", "Origin", "CenterOfRotation")
_META_MATRICES = ("TransformMatrix", "Rotation", "Orientation")
_NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char,int8,int8_t",
        "u1": "uchar,unsigned char,uint8,uint8_t",
        "i2": "short,short int,signed short,signed short int,int16,int16_t",
        "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
        "i4": "int,signed int,int32,int32_t",
        "u4": "uint,unsigned int,uint32,uint32_t",
        "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
        "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(",")
}
_NRRD_PACKINGS = {"raw": None, "gzip": "gzip", "gz": "gzip"}
_NRRD_TEXTS = {"txt": 2, "text": 2, "ascii": 2, "hex": 2}  # at least so many characters a voxel, or a byte


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the voxels of a file are. `packing` as `Stored` takes it; `start` counts bytes in `data_file`."""

    image_io: str  # ITK's name of the format
    sizes_xyz: tuple[int, ...]
    dtype: np.dtype[Any]
    data_file: Path
    start: int
    packing: str | None

    def describes(self, sizes_xyz: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
        """Whether ITK understood the header in the same way."""
        return self.sizes_xyz == sizes_xyz and self.dtype.newbyteorder("=") == dtype

    def read(self) -> npt.NDArray[Any]:
        """Voxels in the order of axes of NumPy. Raises ImageError when they are not as many as the header says."""
        count = math.prod(self.sizes_xyz)
        with open_stored(self.data_file, start=self.start, packing=self.packing) as stored:
            ratio = DEFLATE_RATIO if self.packing else 1
            check_claim(self.data_file, count * self.dtype.itemsize, stored.stored_bytes, ratio=ratio)
            return stored.voxels(count, self.dtype).reshape(self.sizes_xyz[::-1])


def read_layout(path: Path) -> Layout | str | None:
    """Layout of a NRRD or MetaImage file; ITK's name of the format where only ITK should read the voxels.

    Then their number was compared with the size of the files. None for other formats.
    Raises ImageError when the header is damaged.
    """
    with open_stored(path) as stored:
        head = stored.read(_HEAD_BYTES)
    ending = path.suffix.lower()
    if ending in (".nrrd", ".nhdr") and head.startswith(b"NRRD"):
        return _read_nrrd(path, head)
    if ending in (".mha", ".mhd") and b"NDims" in head[:_META_BYTES]:
        return _read_metaimage(path, head)
    return None


def _read_metaimage(path: Path, head: bytes) -> Layout | str:
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        line, newline, _ = head[start:].partition(b"\n") if start < len(head) else (b"", b"", b"")
        start += len(line) + len(newline)
        match = re.fullmatch(r"\s*(\S+?)\s*[=:]\s*(.*?)\s*", line.decode("latin-1"))
        is_last = match is not None and match[1] == "ElementDataFile" and len(head) < _HEAD_BYTES
        if (not newline and not is_last) or (match is None and line.strip()):
            raise _damaged(path, "it has no line 'ElementDataFile = ...'" if not newline else f"line {line[:60]!r}")
        if match is None:
            continue
        if "NDims" not in fields and match[1] in _META_COUNTED:
            raise _damaged(path, f"{match[1]} before NDims")
        if fields.get(match[1], match[2]) != match[2] and match[1] in _META_KNOWN:
            raise _damaged(path, f"a second {match[1]}")
        fields[match[1]] = match[2]
    _check_text(path, head[:start])
    axes = _whole(path, "NDims", fields.get("NDims", ""))
    if not 1 <= axes <= 10:
        raise _damaged(path, f"NDims = {axes}")
    for name in (*_META_VECTORS, *_META_MATRICES):
        if name in fields:
            _finite(path, name, fields[name].split(), axes if name in _META_VECTORS else axes * axes)
    sizes = _sizes(path, "DimSize", fields.get("DimSize", ""), axes)
    kind = fields.get("ElementType", "")
    if kind not in _META_TYPES:
        raise _damaged(path, f"ElementType = {kind}")
    if (channels := _whole(path, "ElementNumberOfChannels", fields.get("ElementNumberOfChannels", "1"))) != 1:
        raise ImageError(f"{path} has {channels} values per voxel, expected one; make a file of each")
    big = any(_is_true(fields.get(name, "False")) for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    layout = Layout(
        image_io="MetaImageIO",
        sizes_xyz=sizes,
        dtype=np.dtype(_META_TYPES[kind]).newbyteorder(">" if big else "<"),
        data_file=path,
        start=start,
        packing="zlib" if _is_true(fields.get("CompressedData", "False")) else None,
    )
    skip = _whole(path, "HeaderSize", fields.get("HeaderSize", "0"))
    packed_bytes = None
    if layout.packing:  # ITK decodes something else when the size is not stated
        packed_bytes = _whole(path, "CompressedDataSize", fields.get("CompressedDataSize", ""))
    is_text = not _is_true(fields.get("BinaryData", "False"))
    return _placed(
        layout,
        _data_files(path, fields["ElementDataFile"], head[start:], local="local"),
        skip=skip,
        text_bytes=2 if is_text else 0,
        packed_bytes=packed_bytes,
    )


_META_COUNTED = frozenset((*_META_VECTORS, *_META_MATRICES, "DimSize"))  # as many numbers as NDims says
_META_KNOWN = _META_COUNTED | {  # what decides where voxels are and how many; others may say what they like, and twice
    *("ObjectType", "NDims", "ElementType", "ElementNumberOfChannels", "HeaderSize", "BinaryData"),
    *("BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData", "CompressedDataSize"),
}


def _read_nrrd(path: Path, head: bytes) -> Layout | str:
    fields: dict[str, str] = {}
    start = 0
    is_first = True
    while True:
        line, newline, _ = head[start:].partition(b"\n")
        start += len(line) + len(newline)
        text = line.decode("latin-1").rstrip("\r")
        if is_first or text.startswith("#"):
            is_first = False
        elif not text:
            break
        elif re.match(r"[^:]*:=", text):  # a key of the user's own
            continue
        elif (match := re.fullmatch(r"([^:=]+): *(.*?)\s*", text)) is not None:
            name = match[1].strip().lower().replace(" ", "")
            if name in fields:
                raise _damaged(path, f"a second {match[1]!r}")
            fields[name] = match[2]
            if name == "datafile" and match[2].split()[:1] == ["LIST"]:
                break
        else:
            raise _damaged(path, f"line {text[:60]!r}")
    if start >= _HEAD_BYTES:
        raise _damaged(path, f"it is longer than {_HEAD_BYTES} bytes")
    _check_text(path, head[:start])
    axes = _whole(path, "dimension", fields.get("dimension", ""))
    if not 1 <= axes <= 16:
        raise _damaged(path, f"dimension: {axes}")
    sizes = _sizes(path, "sizes", fields.get("sizes", ""), axes)
    _check_nrrd_geometry(path, fields, axes)
    kind, encoding = fields.get("type", "").lower(), fields.get("encoding", "").lower()
    if kind not in _NRRD_TYPES:
        raise _damaged(path, f"type: {kind}")
    if encoding not in _NRRD_PACKINGS and encoding not in _NRRD_TEXTS:
        raise ImageError(f"{path} has the encoding {encoding!r}, expected raw or gzip; convert it first")
    dtype = np.dtype(_NRRD_TYPES[kind])
    endian = fields.get("endian", "").lower()
    if dtype.itemsize > 1 and encoding in _NRRD_PACKINGS and endian not in ("little", "big"):
        raise _damaged(path, f"endian: {endian}")
    layout = Layout(
        image_io="NrrdImageIO",
        sizes_xyz=sizes,
        dtype=dtype.newbyteorder(">" if endian == "big" else "<"),
        data_file=path,
        start=start,
        packing=_NRRD_PACKINGS.get(encoding),
    )
    skips = [_whole(path, name, fields.get(name, "0")) for name in ("lineskip", "byteskip")]
    return _placed(
        layout,
        _data_files(path, fields.get("datafile", "LOCAL"), head[start:], local="LOCAL"),
        skip=skips[1] if skips[0] == 0 else None,
        text_bytes=_NRRD_TEXTS.get(encoding, 0),
    )


def _check_nrrd_geometry(path: Path, fields: dict[str, str], axes: int) -> None:
    """An axis that is none of space (a list of channels) has no spacing and says `nan` or `none`."""
    kinds = fields.get("kinds", "").lower().split()
    spatial = [kind in ("domain", "space", "time", "???") for kind in kinds] if len(kinds) == axes else [True] * axes
    if (spacings := fields.get("spacings", "").split()) and len(spacings) == axes:
        numbers = [value for value, is_space in zip(spacings, spatial, strict=True) if is_space]
        _finite(path, "spacings", numbers, len(numbers))
    vectors = re.findall(r"\(([^)]*)\)|none", fields.get("spacedirections", ""), re.IGNORECASE)
    for vector in (*vectors, fields.get("spaceorigin", "").strip("() ")):
        if vector:
            _finite(path, "space directions and origin", vector.split(","), None)


def _data_files(path: Path, named: str, following: bytes, *, local: str) -> list[Path]:
    """The files that hold the voxels, in order: this one, one beside it, or many. Raises ImageError."""
    if named == "LOCAL" or (local == "local" and named.lower() == local):
        return [path]
    words = named.split()
    if words and words[0] == "LIST":
        names = [line.strip() for line in following.decode("latin-1").splitlines() if line.strip()]
    elif "%" in named and len(words) >= 3:
        numbers = [_whole(path, "the numbers of the data files", word) for word in (*words[1:4], "1")[:3]]
        if numbers[2] == 0 or len(range(numbers[0], numbers[1] + 1, numbers[2])) > 100_000:
            raise _damaged(path, f"data files {named!r}")
        if re.fullmatch(r"[^%]*%0?\d{0,2}d[^%]*", words[0]) is None:
            raise _damaged(path, f"data files {named!r}")
        names = [words[0] % number for number in range(numbers[0], numbers[1] + 1, numbers[2])]
    else:
        names = [named]
    files = [path.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise ImageError(f"{path}: its voxels are in {file}, which is missing; copy it beside the header")
    if not files:
        raise _damaged(path, f"data files {named!r}")
    return files


def _placed(
    layout: Layout, files: list[Path], *, skip: int | None, text_bytes: int, packed_bytes: int | None = None
) -> Layout | str:
    """A layout with the place of its voxels, or ITK's name of the format where that is not a plain one.

    `skip`: bytes before the voxels, -1 for voxels at the end of the file, None for lines to be skipped.
    """
    detached = files[0] != layout.data_file
    start = 0 if detached else layout.start
    stored = sum(file.stat().st_size for file in files) - start
    need = math.prod(layout.sizes_xyz) * (text_bytes or layout.dtype.itemsize)
    ratio = DEFLATE_RATIO if layout.packing and not text_bytes else 1
    check_claim(layout.data_file, need - (1 if text_bytes else 0), stored, ratio=ratio)
    if packed_bytes is not None and packed_bytes != stored:
        raise _damaged(layout.data_file, f"CompressedDataSize = {packed_bytes}, of which {stored} bytes are there")
    if len(files) > 1 or text_bytes or skip is None or (skip != 0 and (layout.packing or not detached)):
        return layout.image_io
    if skip < 0:
        start = stored - need
    return Layout(
        image_io=layout.image_io,
        sizes_xyz=layout.sizes_xyz,
        dtype=layout.dtype,
        data_file=files[0],
        start=start + max(0, skip),
        packing=layout.packing,
    )


def _check_text(path: Path, header: bytes) -> None:
    if (at := header.find(b"\0")) >= 0:
        raise _damaged(path, f"byte {at} of its text is zero")


def _sizes(path: Path, name: str, text: str, axes: int) -> tuple[int, ...]:
    sizes = tuple(_whole(path, name, word) for word in text.split())
    if len(sizes) != axes or min(sizes, default=0) < 1:
        raise _damaged(path, f"{name} = {text[:60]} of {axes} dimension(s)")
    return sizes


def _whole(path: Path, name: str, text: str) -> int:
    if re.fullmatch(r"[+-]?\d{1,18}", text.strip()) is None:
        raise _damaged(path, f"{name} = {text[:60] or 'nothing'}")
    return int(text)


def _finite(path: Path, name: str, words: Sequence[str], count: int | None) -> None:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)) or (count is not None and len(values) != count):
        raise _damaged(path, f"{name} = {' '.join(words)[:60]}")


def _is_true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")


def _damaged(path: Path, what: str) -> ImageError:
    return ImageError(f"{path} has a damaged header: {what}; export it again")
