"""What an ONNX file says of itself, read without any package: its inputs and outputs, and that it stands alone.

Engines follow an ONNX file to other files (tensors as "external data"), wherever it says they are. A bundle's models
have their weights inside, so a file that refers to another one is refused before an engine sees it.
The file is protobuf: a message is a row of fields, each a number, a wire type and a value (onnx.proto names them).
"""

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastnnunet.errors import CorruptError

FLOAT32 = 1  # TensorProto.DataType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1  # TensorProto.DataLocation
_SMALL = 2**20  # bytes of a node that are searched as a whole, which is faster than field by field
_SUSPICIOUS = re.compile(b"location|EPContext")  # a reference to another file has one of these words
_MAX_DEPTH = 16  # of graphs within nodes
# message -> number of a field -> the message it holds; other fields are of no interest
_HOLDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input or output. `shape`: None for an axis of any length."""

    name: str
    element_type: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class OnnxFile:
    inputs: list[OnnxValue] = field(default_factory=list)
    outputs: list[OnnxValue] = field(default_factory=list)


def read_onnx_file(path: Path) -> OnnxFile:
    """Inputs (without those that have a stored value) and outputs of an ONNX file.

    Raises CorruptError when it is damaged, or takes weights or code from another file.
    """
    found = OnnxFile()
    stored: set[str] = set()
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _walk(content, "model", 0, len(content), 0)
            for number, _, start, end in _fields(content, 0, len(content)):
                if number == 7:
                    _read_graph(content, start, end, found, stored)
    except (ValueError, IndexError, OverflowError) as e:  # of an empty file too
        raise CorruptError(f"{path} is no usable ONNX file: {e}\nexport the bundle again") from e
    found.inputs[:] = [value for value in found.inputs if value.name not in stored]
    return found


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and place of each field; of a number its value stands in place of the start."""
    while start < end:
        key, start = _varint(content, start, end)
        wire = key & 7
        if wire == _VARINT:
            value, start = _varint(content, start, end)
            yield key >> 3, wire, value, start
            continue
        if wire == _BYTES:
            length, start = _varint(content, start, end)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if start + length > end:
            raise ValueError("it is truncated")
        yield key >> 3, wire, start, start + length
        start += length


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while start < end and shift < 70:
        byte = content[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
        shift += 7
    raise ValueError("it is truncated")


def _walk(content: mmap.mmap, kind: str, start: int, end: int, depth: int) -> None:
    """Refuse anything in a message that lies in another file. Raises ValueError."""
    if depth > _MAX_DEPTH * 3:
        raise ValueError("its graphs are nested too deep")
    holds = _HOLDS.get(kind, {})
    for number, wire, first, last in _fields(content, start, end):
        if kind == "tensor" and (number == 13 or (number == 14 and first == _EXTERNAL)):
            raise ValueError("weights lie in another file, expected all of them inside")
        if kind == "node" and number == 4 and wire == _BYTES and content[first:last] == b"EPContext":
            raise ValueError("a node EPContext takes a compiled network from another file")
        if number not in holds or wire != _BYTES:
            continue
        if holds[number] != "node" or last - first > _SMALL or _SUSPICIOUS.search(content[first:last]):
            _walk(content, holds[number], first, last, depth + 1)


def _read_graph(content: mmap.mmap, start: int, end: int, found: OnnxFile, stored: set[str]) -> None:
    for number, wire, first, last in _fields(content, start, end):
        if wire != _BYTES:
            continue
        if number == 5:
            stored.add(_text(content, first, last, 8))
        elif number in (11, 12):
            (found.inputs if number == 11 else found.outputs).append(_read_value(content, first, last))


def _read_value(content: mmap.mmap, start: int, end: int) -> OnnxValue:
    """ValueInfoProto: 1 name, 2 type; its 1 tensor_type: 1 elem_type, 2 shape; its 1 dim: 1 dim_value."""
    element_type, shape = 0, []
    for _, _, first, last in _inside(content, start, end, 2, 1):
        for number, wire, value, stop in _fields(content, first, last):
            if number == 1 and wire == _VARINT:
                element_type = value
            elif number == 2 and wire == _BYTES:
                for _, _, below, above in _inside(content, value, stop, 1):
                    sizes = [v for n, w, v, _ in _fields(content, below, above) if n == 1 and w == _VARINT]
                    shape.append(sizes[-1] if sizes else None)
    return OnnxValue(_text(content, start, end, 1), element_type, tuple(shape))


def _inside(content: mmap.mmap, start: int, end: int, *numbers: int) -> Iterator[tuple[int, int, int, int]]:
    """The messages that lie at a path of field numbers."""
    for found in _fields(content, start, end):
        if found[0] == numbers[0] and found[1] == _BYTES:
            if len(numbers) == 1:
                yield found
            else:
                yield from _inside(content, found[2], found[3], *numbers[1:])


def _text(content: mmap.mmap, start: int, end: int, number: int) -> str:
    texts = [content[a:b] for n, wire, a, b in _fields(content, start, end) if n == number and wire == _BYTES]
    return texts[-1].decode() if texts else ""
