"""Requests to a server, by the standard library: time-outs, retries, limits of size, and nothing secret in any message.

Redirections are refused, since credentials would follow them. Certificates are always verified. Messages have the path
of an address without its query, and nothing of what a server answers: both may tell of patients.
"""

import base64
import contextlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from fastnnunet.errors import CorruptError, ServerError, SpecError, printable
from fastnnunet.specs.checks.json_text import MAX_BYTES, parse_json

T = TypeVar("T")
PIECE_BYTES = 1 << 18
_PASSING = frozenset({408, 429, 502, 503, 504})  # worth asking again
_LONGEST_WAIT_S = 30.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LINE_BYTES = 1 << 20


class LostAnswerError(Exception):
    """An answer that did not come, or ended before it should have: the words, or the error, that say why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What is sent: its length, and its pieces as often as they are asked for."""

    media_type: str
    length: int
    pieces: Callable[[], Iterator[bytes]]


@dataclass(slots=True)
class HttpAnswer:
    """An answer that is read piece by piece, no further than `most_bytes`."""

    stream: http.client.HTTPResponse
    most_bytes: int
    what: str  # was asked for, for messages
    got_bytes: int = 0

    @property
    def status(self) -> int:
        return self.stream.status

    @property
    def media_type(self) -> str:
        """In lower case, without parameters."""
        return self.stream.headers.get_content_type() if "Content-Type" in self.stream.headers else ""

    def parameter(self, name: str) -> str | None:
        """A parameter of the media type."""
        found = self.stream.headers.get_param(name)
        return found if isinstance(found, str) else None

    def header(self, name: str) -> str | None:
        """A header of the answer."""
        return self.stream.headers.get(name)

    def pieces(self) -> Iterator[bytes]:
        """The content. Raises LostAnswerError where it ends too early, ServerError where it is too large."""
        claimed = self.stream.length  # None where it is sent in chunks or until the end of the connection
        self._limit(claimed or 0)
        while piece := _heard(self.stream.read, PIECE_BYTES):
            self.got_bytes += len(piece)
            self._limit(self.got_bytes)
            yield piece
        if claimed is not None and self.got_bytes < claimed:
            raise LostAnswerError(f"it ended after {self.got_bytes} of {claimed} bytes")

    def lines(self) -> Iterator[str]:
        """The content line by line, each as soon as it is there, without its end. Raises LostAnswerError."""
        while line := _heard(self.stream.readline, _LINE_BYTES):
            yield line.decode("utf-8", "replace").rstrip("\r\n")

    def content(self) -> bytes:
        """All of it. Raises as `pieces`."""
        return b"".join(self.pieces())

    def json(self) -> Any:
        """The content as JSON; None where there is none. Raises ServerError."""
        content = self.content()
        if self.status == 204 or not content.strip():
            return None
        try:
            return parse_json(content, "the answer")
        except CorruptError as e:
            got = self.media_type or "something without a type"
            raise ServerError(
                f"{self.what} answered {got} that is no JSON, expected JSON; is the address right?"
            ) from e

    def _limit(self, size_bytes: int) -> None:
        if size_bytes > self.most_bytes:
            raise ServerError(f"{self.what} sends more than {self.most_bytes} bytes, the limit of this request")


def _heard(read: Callable[[int], bytes], size: int) -> bytes:
    try:
        return read(size)
    except (OSError, http.client.HTTPException) as e:
        raise LostAnswerError(e) from e


@dataclass(frozen=True, slots=True, kw_only=True)
class WebServer:
    """A server, and how it is spoken to. Making one raises SpecError for an address that cannot be."""

    url: str
    authorization: str | None = field(default=None, repr=False)  # the header
    credentials: str = ""  # how they are given: what is said where they are wanted
    timeout_s: float = 60.0  # of silence
    tries: int = 4
    wait_s: float = 0.5  # before the second, doubled for each that follows
    ca_file: Path | None = None  # certificates that are trusted instead of the system's

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        problem = None
        try:
            port_is_bad = parts.port == 0
        except ValueError:
            port_is_bad = True
        if parts.username is not None or parts.password is not None:
            shown = f"{parts.scheme}://...@{parts.hostname}"
            raise SpecError(f"the address {shown} holds credentials, which others can see; {self.credentials}")
        if parts.scheme not in ("http", "https") or not parts.hostname or port_is_bad:
            problem = "expected one such as https://server:8443/path"
        elif parts.query or parts.fragment or not self.url.isprintable() or not self.url.isascii() or " " in self.url:
            problem = "expected one without ?, # and spaces"
        if problem is not None:
            raise SpecError(f"the address {printable(self.url)!r} is none, {problem}")
        if self.ca_file is not None and not self.ca_file.is_file():
            raise SpecError(f"no file of certificates at {self.ca_file}")

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine."""
        return urlsplit(self.url).hostname in _LOOPBACK

    @property
    def is_open_to_others(self) -> bool:
        """Whether others can read along."""
        return urlsplit(self.url).scheme == "http" and not self.is_local

    def ask(
        self,
        path: str,
        read: Callable[[HttpAnswer], T],
        *,
        query: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        method: str = "GET",
        body: Body | None = None,
        most_bytes: int = MAX_BYTES,
        is_repeatable: bool = True,
        refused: Callable[[int, bytes], str | None] | None = None,
    ) -> T:
        """What `read` makes of the answer to a request; made again where that may help, and `is_repeatable`.

        `refused`: what a status means, and the beginning of what came with it, in words; None for those of this module.
        Raises ServerError, and what `read` raises.
        """
        where = f"{self.url.rstrip('/')}{path}"
        address = f"{where}?{urlencode(query)}" if query else where
        opener = self._opener()
        tries = self.tries if is_repeatable else 1
        for number in range(1, tries + 1):
            request = urllib.request.Request(address, method=method, headers=dict(headers or {}))
            pause_s = self.wait_s * 2 ** (number - 1)
            try:
                with self._opened(opener, request, body) as stream:
                    return read(HttpAnswer(stream, most_bytes, where))
            except urllib.error.HTTPError as e:
                with e:
                    if number == tries or e.code not in _PASSING:
                        raise self._status_error(where, e, refused) from None
                    pause_s = _retry_after_s(e.headers.get("Retry-After"), pause_s)
            except LostAnswerError as e:
                (reason,) = e.args
                if isinstance(reason, ssl.SSLCertVerificationError):
                    raise ServerError(
                        f"the certificate of {where} is not trusted: {reason.verify_message}\n"
                        "name the certificates of your authority with --ca-file"
                    ) from None
                # to a server on this machine nothing is lost on the way
                if number == tries or (self.is_local and isinstance(reason, ConnectionRefusedError)):
                    raise ServerError(f"{where} {_words(reason, self.timeout_s)}") from None
            time.sleep(min(pause_s, _LONGEST_WAIT_S))
        raise AssertionError("the last try returns or raises")

    def _opened(
        self, opener: urllib.request.OpenerDirector, request: urllib.request.Request, body: Body | None
    ) -> http.client.HTTPResponse:
        """The answer, of which nothing but its headers is read. Raises HTTPError, LostAnswerError."""
        request.add_header("User-Agent", "fastnnunet")
        if self.authorization is not None:
            request.add_unredirected_header("Authorization", self.authorization)
        if body is not None:
            request.data = body.pieces()
            request.add_header("Content-Type", body.media_type)
            request.add_header("Content-Length", str(body.length))
        try:
            stream: http.client.HTTPResponse = opener.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as e:
            raise LostAnswerError(e.reason if isinstance(e, urllib.error.URLError) else e) from e
        return stream

    def _opener(self) -> urllib.request.OpenerDirector:
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.ProxyHandler({} if self.is_local else None),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ]
        if self.url.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=_trusted(self.ca_file)))
        opener = urllib.request.OpenerDirector()
        for handler in handlers:
            opener.add_handler(handler)
        return opener

    def _status_error(
        self, where: str, error: urllib.error.HTTPError, refused: Callable[[int, bytes], str | None] | None
    ) -> ServerError:
        said = b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            said = error.read(PIECE_BYTES)
        words = refused(error.code, said) if refused is not None else None
        if words is None:
            words = _STATUS_WORDS.get(error.code, "expected an answer; its log may say why")
            if error.code == 401:
                words += f"; {self.credentials}" if self.credentials else ""
            elif 300 <= error.code < 400:
                words = "wants to send this request elsewhere, which is not followed; give the address it should go to"
            words = f"{where} answered {error.code}: {words}"
        found = ServerError(words)
        found.status = error.code
        return found


_STATUS_WORDS = {
    400: "it does not understand the request",
    401: "it wants credentials, or others than were given",
    403: "these credentials have no permission for it",
    404: "there is nothing at this address",
    413: "this is more than it takes",
}


def _trusted(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except ssl.SSLError as e:
        raise SpecError(f"{ca_file} holds no certificates that can be read, expected PEM") from e


def _retry_after_s(header: str | None, otherwise_s: float) -> float:
    return float(header) if header is not None and header.isascii() and header.isdigit() else otherwise_s


def _words(reason: object, timeout_s: float) -> str:
    """Why there was no answer."""
    if isinstance(reason, TimeoutError):
        return f"said nothing for {timeout_s:g} s, the limit; is it there, and not too busy?"
    if isinstance(reason, ConnectionRefusedError):
        return "cannot be reached: nothing listens there; is the server started, and the address right?"
    if isinstance(reason, http.client.IncompleteRead):
        return "broke its answer off in the middle"
    if isinstance(reason, str):
        return f"broke its answer off: {reason}"
    return f"cannot be used: {printable(reason) or type(reason).__name__}"


def authorization_from(token: str, user: str | None = None, password: str | None = None) -> tuple[str | None, str]:
    """The `Authorization` header that environment variables of these names ask for, and how to set them, in words.

    Raises SpecError where they contradict each other or hold what no header can.
    """
    pair = f", or {user} and {password}" if user and password else ""
    how = f"set {token}{pair} in the environment"
    bearer = os.environ.get(token)
    name, secret = (os.environ.get(variable) if variable else None for variable in (user, password))
    if bearer and (name or secret):
        raise SpecError(f"{token} and {user} are both set, expected one of them; unset the other")
    if (name is None) != (secret is None):
        raise SpecError(f"one of {user} and {password} is not set, expected both")
    if bearer:
        if not (bearer.isascii() and bearer.isprintable()) or " " in bearer:
            raise SpecError(f"{token} holds a character that no token has (a line break at its end?)")
        return f"Bearer {bearer}", how
    if name is not None and secret is not None:
        if ":" in name:
            raise SpecError(f"{user} holds a colon, which no name of a user can")
        return f"Basic {base64.b64encode(f'{name}:{secret}'.encode()).decode()}", how
    return None, how
