"""The bytes of one case: a Zarr v3 array (S, Z, Y, X), uint8 or float16, whose single chunk is one shard file.

Layout of the shard (Zarr v3 `sharding_indexed`): compressed inner chunks one after another, then the index: for each
inner chunk in C order its offset and length as little-endian uint64, then a CRC-32C of the index. Each inner chunk ends
in a CRC-32C of its compressed bytes. A chunk that is all zero is absent: offset and length are 2^64 - 1.

The inner chunks hold all channels and are about `chunk_zyx` in space: an axis is cut into round(n / edge) equal parts,
so with edges of 32 a 51-voxel axis becomes 2 x 26 and not 32 + 19 padded to 64. Small volumes then carry almost no
padding, which made the hippocampus cache 6 % smaller than fixed chunks at the same level, and quicker to decode.

Writing is done here and not by zarr-python so that equal voxels give equal bytes whatever its version and threads do;
zarr-python reads every case back before it is committed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc, zstd

from fastnnunet.cache.interfaces import StoredArray
from fastnnunet.errors import CorruptError
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.checks.problems import is_integer

SHARD_NAME = "c/0/0/0/0"  # Zarr's default chunk key of the one shard
ABSENT = 2**64 - 1
CRC_BYTES = 4
CRC_RESIDUE = 0x48674BC7  # CRC-32C of any message followed by its own CRC-32C, little-endian
ENTRY_BYTES = 16
# `compressor: auto` takes zstd up to this volume (about 100^3): whatever the patch, zstd then costs at most about a
# millisecond per stored channel, less than nnU-Net needs to augment the patch by far
AUTO_ZSTD_VOXELS = 1 << 20
MAX_CHUNK_VALUES = 1 << 30  # a reader decodes whole chunks; they are about 32^3 voxels
ZSTD_MAGIC = bytes.fromhex("28b52ffd")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """Shapes and codec of one case; `shape` and `chunk` are (S, Z, Y, X)."""

    shape: Shape
    chunk: Shape
    compressor: str
    level: int
    dtype: str = "uint8"  # Zarr's name, which is NumPy's

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The type in the file: little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def grid(self) -> Shape:
        """Number of inner chunks per axis."""
        return tuple(math.ceil(n / c) for n, c in zip(self.shape, self.chunk, strict=True))

    @property
    def num_chunks(self) -> int:
        return math.prod(self.grid)

    @property
    def index_bytes(self) -> int:
        return self.num_chunks * ENTRY_BYTES + CRC_BYTES

    @property
    def chunk_values(self) -> int:
        return math.prod(self.chunk)


def chunk_for(spec: CacheSpec, shape_zyx: Sequence[int]) -> tuple[int, int, int]:
    """Chunks of a case of this size under `spec`: each axis in equal parts of about the size asked for."""
    z, y, x = (
        math.ceil(n / max(1, round(n / edge))) if n else 1 for n, edge in zip(shape_zyx, spec.chunk_zyx, strict=True)
    )
    return z, y, x


def layout_for(
    spec: CacheSpec, num_stored: int, shape_zyx: Sequence[int], dtype: str = "uint8", chunk_channels: int | None = None
) -> ShardLayout:
    """The layout of a case of this size under `spec`; `chunk_channels` None = all channels in one chunk."""
    small = math.prod(shape_zyx) <= AUTO_ZSTD_VOXELS
    return ShardLayout(
        shape=(num_stored, *shape_zyx),
        chunk=(num_stored if chunk_channels is None else chunk_channels, *chunk_for(spec, shape_zyx)),
        compressor=("zstd" if small else "lz4") if spec.compressor == "auto" else spec.compressor,
        level=spec.level,
        dtype=dtype,
    )


class ShardWriter:
    """Packs the chunks of a case as they come and ends with the index.

    Chunks may come in any order, every one once; a chunk of zeros is not stored.
    """

    def __init__(self, write: Callable[[bytes], object], layout: ShardLayout) -> None:
        """`write` takes the file's parts, one after another."""
        self._write = write
        self._layout = layout
        self._offset = 0
        self._index: npt.NDArray[np.uint64] = np.full((*layout.grid, 2), ABSENT, np.uint64)

    def add(self, number_zyx: Sequence[int], stored_SZYX: StoredArray) -> None:
        """Pack the stored values of one chunk; at the upper border of the volume they may be fewer than a chunk's."""
        layout = self._layout
        channels = layout.chunk[0]
        for group in range(-(-len(stored_SZYX) // channels)):
            part = stored_SZYX[group * channels : (group + 1) * channels]
            if not part.any():
                continue
            chunk = np.zeros(layout.chunk, layout.stored_dtype)
            chunk[tuple(slice(n) for n in part.shape)] = part
            packed = _compress(chunk, layout)
            packed += _crc(packed)
            self._index[(group, *number_zyx)] = self._offset, len(packed)
            self._offset += len(packed)
            self._write(packed)

    def finish(self) -> bytes:
        """Write the index and return it."""
        tail = self._index.astype("<u8").tobytes()
        tail += _crc(tail)
        self._write(tail)
        return tail


def parse_index(tail: bytes, layout: ShardLayout, payload_bytes: int) -> npt.NDArray[np.uint64]:
    """The checked index as (chunks, 2) uint64 offset and length; `tail` is the last `index_bytes` of the shard.

    Raises CorruptError when the checksum is wrong or an entry points outside the `payload_bytes` before the index.
    """
    entries, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if len(tail) != layout.index_bytes or _crc(entries) != crc:
        raise CorruptError("the shard index is damaged (checksum mismatch)")
    index = np.frombuffer(entries, "<u8").reshape(-1, 2).astype(np.uint64)
    offset, length = index[index[:, 0] != ABSENT].T
    limit = np.uint64(payload_bytes)
    # compared one by one first, so that the sum cannot wrap around
    inside = (offset <= limit) & (length <= limit) & (length > CRC_BYTES)
    if not (inside.all() and (offset + length <= limit).all()):
        raise CorruptError("the shard index points outside the shard")
    return index


def decode_chunk(packed: npt.NDArray[np.uint8], layout: ShardLayout, out: StoredArray | None = None) -> StoredArray:
    """One inner chunk (channels, z, y, x) from its bytes in the shard.

    Decoded into `out` when given, which is C-contiguous and of the layout's chunk and type. Raises CorruptError when
    checksum or size are wrong; `out` then holds anything.
    """
    # a message followed by its own CRC has a constant CRC, so the payload need not be cut out to be checked
    if google_crc32c.value(packed) != CRC_RESIDUE:
        raise CorruptError("a chunk is damaged (checksum mismatch)")
    payload = packed[:-CRC_BYTES]
    if out is None:
        out = np.empty(layout.chunk, layout.stored_dtype)
    if (held := _content_bytes(payload, layout.compressor)) != out.nbytes:
        raise CorruptError(f"a chunk holds {held} bytes, expected {out.nbytes}")
    try:
        if layout.compressor == "zstd":
            zstd.decompress(payload, out)
        else:
            _blosc().decompress(payload, out)
    except (RuntimeError, ValueError) as e:
        raise CorruptError(f"a chunk cannot be decompressed ({e})") from e
    return out


def array_document(layout: ShardLayout, attributes: dict[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of the array."""
    itemsize = layout.stored_dtype.itemsize
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:
        to_bytes["configuration"] = {"endian": "little"}
    if layout.compressor == "zstd":
        codec = {"name": "zstd", "configuration": {"level": layout.level, "checksum": False}}
    else:  # lz4 inside Blosc: unlike a bare lz4 codec every Zarr v3 reader knows it
        codec = {
            "name": "blosc",
            "configuration": {
                "cname": "lz4hc",
                "clevel": min(layout.level, 9),
                "shuffle": "noshuffle",
                "typesize": itemsize,
                "blocksize": 0,
            },
        }
    shard_shape = [g * c for g, c in zip(layout.grid, layout.chunk, strict=True)]
    sharding = {
        "chunk_shape": list(layout.chunk),
        "codecs": [to_bytes, codec, {"name": "crc32c"}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(layout.shape),
        "data_type": layout.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0 if layout.dtype == "uint8" else 0.0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["channel", "z", "y", "x"],
        "attributes": attributes,
    }


def layout_of_document(document: dict[str, Any]) -> ShardLayout:
    """The layout an array document describes. Raises CorruptError when this reader does not know it."""
    try:
        sharding = document["codecs"][0]["configuration"]
        codec = sharding["codecs"][1]
        settings = codec["configuration"]
        layout = ShardLayout(
            shape=tuple(document["shape"]),
            chunk=tuple(sharding["chunk_shape"]),
            compressor={"zstd": "zstd", "blosc": "lz4"}[codec["name"]],
            level=settings["level"] if codec["name"] == "zstd" else settings["clevel"],
            dtype={"uint8": "uint8", "float16": "float16"}[document["data_type"]],
        )
        known = array_document(layout, document["attributes"]) == document
        sizes = (*layout.shape, *layout.chunk)
        known = known and all(is_integer(n, 0, 2**40) for n in sizes) and 0 < layout.chunk_values <= MAX_CHUNK_VALUES
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as e:
        raise CorruptError(f"zarr.json does not describe a soft-label array ({type(e).__name__}: {e})") from e
    if not known:
        raise CorruptError("zarr.json describes an array this version does not write")
    return layout


def index_crc32c(tail: bytes) -> str:
    """The checksum stored at the end of the index, as hex; the manifest repeats it to bind the two together."""
    return tail[-CRC_BYTES:].hex()


def _compress(chunk: StoredArray, layout: ShardLayout) -> bytes:
    if layout.compressor == "zstd":
        return bytes(zstd.compress(chunk, layout.level))
    return bytes(_blosc().compress(chunk, b"lz4hc", min(layout.level, 9), blosc.NOSHUFFLE, 0))


def _content_bytes(payload: npt.NDArray[np.uint8], compressor: str) -> int:
    """Decompressed size that the frame's header states (RFC 8878 3.1.1.1; Blosc 1 header), -1 when it states none.

    Checked before decoding, because the decompressors accept a result shorter than the buffer they write to.
    """
    header = payload[:18].tobytes()
    if compressor != "zstd":
        return int.from_bytes(header[4:8], "little") if len(header) >= 16 else -1
    if len(header) < 6 or header[:4] != ZSTD_MAGIC:
        return -1
    flags = header[4]
    single_segment = flags >> 5 & 1
    width = (single_segment, 2, 4, 8)[flags >> 6]
    start = 5 + (not single_segment) + (0, 1, 2, 4)[flags & 3]  # past window descriptor and dictionary id
    if not width:
        return -1
    return int.from_bytes(header[start : start + width], "little") + (256 if width == 2 else 0)


def _blosc() -> Any:
    blosc.use_threads = False  # its thread pool would not survive the fork of a loader worker
    return blosc


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")
