"""The bytes of an image file, inflated where they are compressed, and never more of them than its header says.

What a header claims is compared with the size of the file and with this machine's memory before anything is allocated.
ISA-L inflates twice as fast as zlib, and deflates label maps ten times as fast.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from isal import igzip, igzip_lib, isal_zlib

from fastnnunet.errors import ImageError

DEFLATE_RATIO = 1032  # deflate cannot make more than this out of a byte
PICTURE_RATIO = 4096  # above what JPEG and the usual compressions of TIFF do
SMALL_BYTES = 1 << 26  # so large an image may be made of any number of bytes, where a library alone knows the format
_CHUNK_BYTES = 1 << 18  # more than the header of a gzip member has, which ISA-L wants to see in one
_PIECE_BYTES = 1 << 18  # so that what is copied is still in the processor's cache
_PADDING_BYTES = 4096  # some writers fill the last block of a file, of whatever size that is, with zeros
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP, _ZLIB = 31, 15  # window bits as zlib counts them: 16 and 15 for a gzip header and its checksum
_GZIP_LEVEL = 2  # of 0 to 3: as fast as 0 with half its size; 3 takes ten times as long for nothing
_DecoderError: Any = igzip_lib.IsalError  # whose stub makes it an exception that was raised


class Stored:
    """Content of a file from byte `start` on, read once from front to back.

    `packing`: None, "gzip" (any number of members, checksums compared) or "zlib".
    """

    def __init__(self, file: BinaryIO, path: Path, *, start: int = 0, packing: str | None = None) -> None:
        self.path, self.packed = path, packing is not None
        self.position = start  # in the inflated content, in the file where nothing is packed
        self._end = os.fstat(file.fileno()).st_size
        self.stored_bytes = max(0, self._end - start)
        self._file = file
        self._file.seek(start)
        self._bits = _GZIP if packing == "gzip" else _ZLIB
        self._decoder: Any = isal_zlib.decompressobj(self._bits) if self.packed else None

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer where the content ends. Raises ImageError when compressed data are damaged."""
        pieces = []
        while count > 0 and (piece := self._take(count)):
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def skip(self, count: int) -> int:
        """Pass over `count` bytes, or what there is; returns how many."""
        if not self.packed:
            count = max(0, min(count, self._end - self.position))
            self.position += count
            self._file.seek(self.position)
            return count
        left = count
        while left > 0 and (piece := self._take(left)):
            left -= len(piece)
        return count - left

    def voxels(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The next `count` numbers, after which nothing follows. Raises ImageError when there are fewer, or more."""
        try:
            flat = np.empty(count, dtype)
        except MemoryError as e:
            raise no_memory(self.path, count * np.dtype(dtype).itemsize) from e
        into = flat.view(np.uint8)
        got = 0
        while got < into.size and (piece := self._take(into.size - got)):
            into[got : got + len(piece)] = np.frombuffer(piece, np.uint8)
            got += len(piece)
        self._require(got, into.size)
        return flat

    def check(self, size: int) -> None:
        """As `voxels`, for `size` bytes that are not kept."""
        self._require(self.skip(size), size)

    def _require(self, got: int, need: int) -> None:
        if got < need:
            raise ImageError(
                f"{self.path} is truncated: got {got} bytes of voxels, expected {need}; copy or export it again"
            )
        rest = self.read(_PADDING_BYTES + 1)
        if rest.strip(b"\0") or len(rest) > _PADDING_BYTES:
            raise ImageError(
                f"{self.path} is damaged: more data follow than the {need} bytes of voxels of its header; "
                "copy or export it again"
            )

    def _take(self, limit: int) -> bytes:
        """Some of the next bytes, at most `limit`; none at the end."""
        limit = min(limit, _PIECE_BYTES)
        try:
            piece = self._inflated(limit) if self.packed else self._file.read(limit)
        except _DecoderError as e:
            raise ImageError(f"{self.path} is damaged ({e}); copy or export it again") from e
        except OSError as e:
            raise ImageError(f"cannot read {self.path}: {e}") from e
        self.position += len(piece)
        return piece

    def _inflated(self, limit: int) -> bytes:
        while True:
            if self._decoder.eof:
                if (following := self._next_member()) is None:
                    return b""
                self._decoder = isal_zlib.decompressobj(self._bits)
                data = following
            else:
                data = self._decoder.unconsumed_tail or self._file.read(_CHUNK_BYTES)
            piece: bytes = self._decoder.decompress(data, limit)
            if piece:
                return piece
            if not data and not self._decoder.eof:
                raise ImageError(f"{self.path} is truncated (its compressed data stop early); copy or export it again")

    def _next_member(self) -> bytes | None:
        """Begin of the gzip member behind one that ended; zeros between them are padding. None at the end."""
        data = self._decoder.unused_data.lstrip(b"\0")
        while not data and (more := self._file.read(_CHUNK_BYTES)):
            data = more.lstrip(b"\0")
        if not data:
            return None
        if len(data) < _CHUNK_BYTES:
            data += self._file.read(_CHUNK_BYTES)
        if self._bits != _GZIP or not data.startswith(_GZIP_MAGIC):
            raise ImageError(
                f"{self.path} is damaged: something else follows its compressed data; copy or export it again"
            )
        return data


@contextlib.contextmanager
def open_stored(path: Path, *, start: int = 0, packing: str | None = None, detect: bool = False) -> Iterator[Stored]:
    """`detect`: gzip where the file begins like it. Raises ImageError when there is no such file."""
    if not path.is_file():  # a pipe or a device would never end
        raise ImageError(f"image not found: {path}" if not path.exists() else f"{path} is not a regular file")
    try:
        file = path.open("rb")
    except OSError as e:
        raise ImageError(f"cannot read {path}: {e}") from e
    with file:
        if detect and file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC:
            packing = "gzip"
        yield Stored(file, path, start=start, packing=packing)


@contextlib.contextmanager
def new_gzip(path: Path) -> Iterator[BinaryIO]:
    """Yield a file whose content becomes a gzip file of one member at `path`. Raises OSError."""
    with (
        path.open("wb") as file,
        igzip.IGzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=file, mtime=0) as packed,
    ):
        yield packed


def check_claim(path: Path, claimed_bytes: int, stored_bytes: int, *, ratio: int = 1, slack: int = 0) -> None:
    """Raises ImageError when `stored_bytes`, compressed by `ratio` at best, cannot be what a header claims.

    Also when this machine's memory cannot hold it. `slack`: bytes that need not be stored.
    """
    if claimed_bytes > stored_bytes * ratio + slack:
        raise ImageError(
            f"{path} is truncated or its header is damaged: it claims {claimed_bytes} bytes of voxels, "
            f"expected at most {stored_bytes * ratio + slack} in {stored_bytes} stored bytes; copy or export it again"
        )
    if claimed_bytes > memory_bytes():
        raise no_memory(path, claimed_bytes)


def no_memory(what: object, needed_bytes: int) -> ImageError:
    """The error of an image that is too large for this machine, or for what it has left."""
    return ImageError(
        f"{what} does not fit into memory: {needed_bytes / 2**30:.1f} GiB of voxels, this machine has "
        f"{memory_bytes() / 2**30:.1f} GiB; crop or resample it first"
    )


def memory_bytes() -> int:
    """Physical memory of this machine, or of this container; no limit where the system does not tell."""
    limits = [1 << 62]
    with contextlib.suppress(ValueError, OSError):
        if hasattr(os, "sysconf"):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # "max" where there is none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)
