"""The header of a DICOM file, as far as it says what the file is and where its slice lies, read without a library.

Works on files with and without preamble (old consoles wrote the bare data set), in explicit or implicit encoding, of
either byte order. Layout: DICOM PS3.5 7.1 (elements), 7.5 (sequences), PS3.10 7.1 (preamble).
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastnnunet.errors import ImageError

_PREAMBLE_BYTES = 128
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_FRAMES = 0x52009229  # what follows describes single frames, and is long
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_TEXT = {
    0x00020002: "media_class",
    0x00020003: "media_uid",
    0x00020010: "transfer_syntax",
    0x00080008: "image_type",
    0x00080010: "recognition",
    0x00080016: "storage_class",
    0x00080018: "sop_uid",
    0x00080060: "modality",
    0x0008103E: "description",
    0x0020000D: "study_uid",
    0x0020000E: "series_uid",
    0x00200032: "position",
    0x00200037: "orientation",
    0x00200052: "frame_uid",
    0x00280008: "frames",
    0x00280030: "pixel_spacing",
}
_NUMBERS = {0x00280002: "samples", 0x00280010: "rows", 0x00280011: "columns"}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LONGEST_VALUE = 4096  # bytes of any of these
_MOST_ELEMENTS = 100_000
_DEEPEST = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a file says of itself; empty or 0 where it says nothing. Positions and spacings in mm, as DICOM has them."""

    is_whole: bool  # read up to the pixels or the end; else damaged, or encoded in a way not known here
    has_preamble: bool = True
    is_deflated: bool = False  # then nothing but the file's own header is known
    storage_class: str = ""
    sop_uid: str = ""
    study_uid: str = ""
    series_uid: str = ""
    frame_uid: str = ""  # of the frame of reference
    image_type: tuple[str, ...] = ()
    modality: str = ""
    description: str = ""
    samples: int = 1
    frames: int = 1
    rows: int = 0
    columns: int = 0
    position: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    pixel_spacing: tuple[float, ...] = ()
    pixels_at: int | None = None  # offset in the file
    pixel_bytes: int | None = None  # None: compressed, or there are none

    @property
    def is_image(self) -> bool:
        return self.rows > 0 and self.columns > 0 and self.pixels_at is not None

    @property
    def is_localizer(self) -> bool:
        return "LOCALIZER" in self.image_type


class _OddFileError(Exception):
    """The bytes are not what is expected at this place."""


class _Encoding(NamedTuple):
    explicit: bool
    order: str  # of struct


class _Element(NamedTuple):
    tag: int
    length: int
    is_unknown: bool  # VR UN, whose undefined length means implicit little endian inside


def read_head(file: Path) -> Head | None:
    """The header of a DICOM file; None for any other. Raises ImageError when the file cannot be read at all.

    A file without preamble is DICOM when it begins with an element of group 2 or 8 and goes on in good order to an
    image.
    """
    try:
        with file.open("rb") as f:
            start = f.read(_PREAMBLE_BYTES + 4)
            has_preamble = start[_PREAMBLE_BYTES:] == b"DICM"
            if not has_preamble and not _may_begin(start):
                return None
            f.seek(_PREAMBLE_BYTES + 4 if has_preamble else 0)
            return _parse(f, file.stat().st_size, has_preamble)
    except OSError as e:
        raise ImageError(f"cannot read {file}: {e}") from e


def _may_begin(start: bytes) -> bool:
    """Whether bytes may be the first element of a data set without preamble."""
    if len(start) < 16:
        return False
    for order in "<>":
        group, number = struct.unpack(f"{order}HH", start[:4])
        if (group == 2 and number <= 0x0102) or (group == 8 and number <= 0x0070):
            short = start[4:6] in _SHORT or start[4:6] in _LONG
            length = struct.unpack(f"{order}{'xxH' if short else 'L'}", start[4:8])[0]
            return length <= _LONGEST_VALUE and (short or order == "<")
    return False


def _parse(f: BinaryIO, size: int, has_preamble: bool) -> Head | None:
    found: dict[str, str | int] = {}
    pixels_at = pixel_bytes = None
    is_whole = True
    try:
        encoding = _Encoding(True, "<") if has_preamble else _sniff(f)
        in_meta, last = True, -1
        for _ in range(_MOST_ELEMENTS):
            if in_meta and _next_group(f) != 2:
                encoding, in_meta = _sniff(f), False
            element = _next_element(f, encoding)
            if element is None:
                break
            if element.tag <= last and not has_preamble:  # some writers keep no order
                raise _OddFileError
            last = element.tag
            if element.tag == _FRAMES or element.tag in _PIXELS:
                pixels_at = f.tell()
                pixel_bytes = None if element.length == _UNDEFINED or element.tag == _FRAMES else element.length
                break
            _take(f, element, encoding, size, found)
        else:
            raise _OddFileError
    except (_OddFileError, struct.error, RecursionError):
        is_whole = False
    head = _head(found, is_whole, has_preamble, pixels_at, pixel_bytes)
    if has_preamble or (head.is_image and (head.storage_class or head.modality or "recognition" in found)):
        return head
    # begun like DICOM and cut off; anything else is another kind of file
    return head if not is_whole and head.storage_class.startswith("1.2.840.") else None


def _sniff(f: BinaryIO) -> _Encoding:
    """How the data set that begins here is encoded, whatever the file says."""
    at = f.tell()
    first = f.read(8)
    f.seek(at)
    if len(first) < 8:
        return _Encoding(True, "<")
    explicit = first[4:6] in _SHORT or first[4:6] in _LONG
    return _Encoding(explicit, ">" if explicit and first[0] == 0 and first[1] != 0 else "<")


def _next_group(f: BinaryIO) -> int:
    at = f.tell()
    first = f.read(2)
    f.seek(at)
    return int.from_bytes(first, "little")


def _next_element(f: BinaryIO, encoding: _Encoding) -> _Element | None:
    """Tag and length, the file then at the value; None at the end of the file."""
    start = f.read(8)
    if not start:
        return None
    if len(start) < 8:
        raise _OddFileError
    order = encoding.order
    group, number = struct.unpack(f"{order}HH", start[:4])
    tag = group << 16 | number
    if tag in (_ITEM, _ITEM_END, _SEQUENCE_END) or not encoding.explicit:
        return _Element(tag, struct.unpack(f"{order}L", start[4:])[0], False)
    vr = start[4:6]
    if vr in _SHORT:
        return _Element(tag, struct.unpack(f"{order}H", start[6:])[0], False)
    if vr not in _LONG:
        raise _OddFileError
    return _Element(tag, struct.unpack(f"{order}L", f.read(4))[0], vr == b"UN")


def _take(f: BinaryIO, element: _Element, encoding: _Encoding, size: int, found: dict[str, str | int]) -> None:
    """Keep the value of an element that is asked for; be behind it then."""
    if element.length == _UNDEFINED:
        _skip_sequence(f, _Encoding(False, "<") if element.is_unknown else encoding, 0)
        return
    if f.tell() + element.length > size:
        raise _OddFileError
    name = _TEXT.get(element.tag) or _NUMBERS.get(element.tag)
    if name is None or element.length > _LONGEST_VALUE:
        f.seek(element.length, 1)
        return
    value = f.read(element.length)
    if element.tag in _NUMBERS:
        found[name] = struct.unpack(f"{encoding.order}H", value[:2])[0] if len(value) >= 2 else 0
    else:
        found[name] = value.decode("latin-1").strip("\0 ")


def _skip_sequence(f: BinaryIO, encoding: _Encoding, depth: int) -> None:
    """To behind the end of a sequence of undefined length."""
    if depth > _DEEPEST:
        raise _OddFileError
    while True:
        item = _next_element(f, encoding)
        if item is None or item.tag not in (_ITEM, _SEQUENCE_END):
            raise _OddFileError
        if item.tag == _SEQUENCE_END:
            return
        if item.length != _UNDEFINED:
            f.seek(item.length, 1)
            continue
        while (element := _next_element(f, encoding)) is not None and element.tag != _ITEM_END:
            if element.length == _UNDEFINED:
                _skip_sequence(f, _Encoding(False, "<") if element.is_unknown else encoding, depth + 1)
            else:
                f.seek(element.length, 1)
        if element is None:
            raise _OddFileError


def numbers(text: str) -> tuple[float, ...]:
    """Values of a decimal string, some with a decimal comma; empty where one is no number."""
    try:
        values = tuple(float(part.replace(",", ".")) for part in text.split("\\")) if text else ()
    except ValueError:
        return ()
    return values if all(map(math.isfinite, values)) else ()


def _head(
    found: dict[str, str | int], is_whole: bool, has_preamble: bool, pixels_at: int | None, pixel_bytes: int | None
) -> Head:
    def text(name: str) -> str:
        return str(found.get(name, ""))

    return Head(
        is_whole=is_whole,
        has_preamble=has_preamble,
        is_deflated=text("transfer_syntax") == _DEFLATED,
        storage_class=text("storage_class") or text("media_class"),
        sop_uid=text("sop_uid") or text("media_uid"),  # the file's own header repeats the two
        study_uid=text("study_uid"),
        series_uid=text("series_uid"),
        frame_uid=text("frame_uid"),
        image_type=tuple(part.strip().upper() for part in text("image_type").split("\\") if part),
        modality=text("modality"),
        description=text("description"),
        samples=int(found.get("samples", 1)),
        frames=int(match[0]) if (match := re.match(r"\s*\d{1,9}", text("frames"))) else 1,
        rows=int(found.get("rows", 0)),
        columns=int(found.get("columns", 0)),
        position=numbers(text("position")),
        orientation=numbers(text("orientation")),
        pixel_spacing=numbers(text("pixel_spacing")),
        pixels_at=pixels_at,
        pixel_bytes=pixel_bytes,
    )
