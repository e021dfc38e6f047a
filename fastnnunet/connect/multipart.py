"""Messages of several parts (RFC 2046), read and written piece by piece: a series need not fit into memory."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message as Headers
from email.parser import BytesHeaderParser
from pathlib import Path

from fastnnunet.connect.http import PIECE_BYTES, Body, LostAnswerError
from fastnnunet.errors import ServerError

_HEADER_BYTES = 1 << 14  # of one part


@dataclass(frozen=True, slots=True, kw_only=True)
class SentPart:
    """One part to be sent: a file, or bytes."""

    headers: tuple[tuple[str, str], ...]
    content: Path | bytes


def multipart_body(kind: str, parts: Sequence[SentPart]) -> Body:
    """A message whose media type is `kind` (with parameters) and a boundary that no part can know."""
    boundary = secrets.token_hex(16)
    heads = [
        "\r\n".join([f"--{boundary}", *(f"{name}: {value}" for name, value in part.headers), "", ""]).encode()
        for part in parts
    ]
    sizes = [p.content.stat().st_size if isinstance(p.content, Path) else len(p.content) for p in parts]
    end = f"--{boundary}--\r\n".encode()

    def pieces() -> Iterator[bytes]:
        for head, part in zip(heads, parts, strict=True):
            yield head
            if isinstance(part.content, bytes):
                yield part.content
            else:
                with part.content.open("rb") as f:
                    while piece := f.read(PIECE_BYTES):
                        yield piece
            yield b"\r\n"
        yield end

    length = sum(map(len, heads)) + sum(sizes) + 2 * len(parts) + len(end)
    return Body(media_type=f"{kind}; boundary={boundary}", length=length, pieces=pieces)


def read_parts(pieces: Iterator[bytes], boundary: str) -> Iterator[tuple[Headers, Iterator[bytes]]]:
    """Headers and content of each part. The content of one must be read to its end before the next is asked for.

    Raises LostAnswerError where the message ends before its last boundary, ServerError where it is none.
    """
    reader = _PartReader(pieces, b"\r\n--" + boundary.encode("ascii", "replace"))
    for _ in reader.until_boundary():  # what stands before the first part means nothing
        pass
    while not reader.at_end():
        yield reader.headers(), reader.until_boundary()


class _PartReader:
    """A message behind a window that is a little longer than a piece."""

    def __init__(self, pieces: Iterator[bytes], delimiter: bytes) -> None:
        self._pieces, self._delimiter = pieces, delimiter
        self._window = bytearray(b"\r\n")  # a message may begin with its first boundary

    def _more(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise LostAnswerError("its last part is not complete")
        self._window += piece

    def until_boundary(self) -> Iterator[bytes]:
        """What comes before the next boundary, which is taken away."""
        window, kept = self._window, len(self._delimiter) - 1
        searched = 0
        while (found := window.find(self._delimiter, searched)) < 0:
            if len(window) > kept:
                yield bytes(window[: len(window) - kept])
                del window[: len(window) - kept]
            self._more()
        if found:
            yield bytes(window[:found])
        del window[: found + len(self._delimiter)]

    def at_end(self) -> bool:
        """Whether the boundary that was just read is the last."""
        while len(self._window) < 2:
            self._more()
        return self._window.startswith(b"--")

    def headers(self) -> Headers:
        """Those of the part that begins here."""
        while (end := self._window.find(b"\r\n\r\n")) < 0:
            if len(self._window) > _HEADER_BYTES:
                raise ServerError("a part of the answer has no headers that end, expected a multipart message")
            self._more()
        found = BytesHeaderParser().parsebytes(bytes(self._window[:end]).partition(b"\r\n")[2] + b"\r\n\r\n")
        del self._window[: end + 4]
        return found
