"""Requests and messages of several parts: against a server in this process, and the standard library's own parser."""

import email
import errno
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.policy import HTTP
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.connect.http import LostAnswerError, WebServer, authorization_from
from fastnnunet.connect.multipart import SentPart, multipart_body, read_parts
from fastnnunet.errors import ServerError, SpecError
from tests.web import Said, serving

SECRET = "sesame-0123456789"


def server_at(url: str, **more: object) -> WebServer:
    return WebServer(url=url, wait_s=0.001, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_passing_failure_is_asked_again(status: int) -> None:
    answers = iter([Said(status, headers={"Retry-After": "0"}), Said(status), Said(body=b"[1]")])
    with serving(lambda _: next(answers)) as web:
        assert server_at(web.url).ask("/x", lambda a: a.json()) == [1]
    assert len(web.asked) == 3


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "does not understand"),
        (401, "wants credentials, or others than were given; set TOKEN"),
        (403, "no permission"),
        (404, "nothing at this address"),
        (500, "expected an answer"),
        (302, "not followed"),
    ],
)
def test_other_failures_are_told_at_once_without_what_was_said(status: int, words: str) -> None:
    said = Said(status, b"Doe^Jane", headers={"Location": "http://elsewhere.invalid/"})
    with serving(lambda _: said) as web:
        server = server_at(web.url, authorization=f"Bearer {SECRET}", credentials="set TOKEN")
        with pytest.raises(ServerError, match=words) as caught:
            server.ask("/x", lambda a: a.json(), query=[("PatientName", "Doe")])
    assert caught.value.status == status
    assert len(web.asked) == 1
    assert web.asked[0].headers["authorization"] == f"Bearer {SECRET}"
    assert web.asked[0].query == {"PatientName": ["Doe"]}
    shown = f"{caught.value} {server!r}"
    assert "Doe" not in shown
    assert SECRET not in shown


def test_what_cannot_be_repeated_is_asked_once() -> None:
    with serving(lambda _: Said(503)) as web, pytest.raises(ServerError, match="503"):
        server_at(web.url).ask("/x", lambda a: a.json(), is_repeatable=False)
    assert len(web.asked) == 1


@pytest.mark.parametrize("said", [Said(body=b"x" * 50, cut=20), Said(body=[b"x" * 20, b"y"], cut=1)])
def test_an_answer_that_is_cut_off_is_asked_for_again_and_then_refused(said: Said) -> None:
    with serving(lambda _: said) as web, pytest.raises(ServerError, match="broke its answer off"):
        server_at(web.url, tries=3).ask("/x", lambda a: a.content())
    assert len(web.asked) == 3


def test_a_full_disk_here_is_no_fault_of_the_connection() -> None:
    def read(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with serving(lambda _: Said()) as web, pytest.raises(OSError, match="No space left") as caught:
        server_at(web.url).ask("/x", read)
    assert caught.value.errno == errno.ENOSPC
    assert len(web.asked) == 1


@pytest.mark.parametrize("body", [b"x" * 21, [b"x" * 20, b"x"]])
def test_no_more_is_read_than_the_limit(body: bytes | list[bytes]) -> None:
    with serving(lambda _: Said(body=body)) as web:
        with pytest.raises(ServerError, match="more than 20 bytes"):
            server_at(web.url).ask("/x", lambda a: a.content(), most_bytes=20)
        assert len(server_at(web.url).ask("/x", lambda a: a.content(), most_bytes=21)) == 21
    assert len(web.asked) == 2  # a limit is no reason to ask again


def test_who_is_not_there_and_who_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"said nothing for 0\.05 s"):
            server_at(url, timeout_s=0.05, tries=2).ask("/x", lambda a: a.json())
    with pytest.raises(ServerError, match="nothing listens there"):
        server_at(url, tries=2).ask("/x", lambda a: a.json())


def certified(folder: Path) -> ssl.SSLContext:
    """A server's context whose certificate, for localhost, is signed by itself and lies in `folder`."""
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography makes certificates, and is not installed")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "ca.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(encoding))
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    return context


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    context = certified(tmp_path)

    def serve_once(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.recv(4096)
                    secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[2]")
            except ssl.SSLError:
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_once, args=(listener,), daemon=True)
        thread.start()
        url = f"https://localhost:{listener.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"not trusted.*\n.*--ca-file"):
            server_at(url).ask("/x", lambda a: a.json())
        assert server_at(url, ca_file=tmp_path / "ca.pem").ask("/x", lambda a: a.json()) == [2]
        thread.join()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "expected one such as"),
        ("host:8042", "expected one such as"),
        ("http://host:99999", "expected one such as"),
        ("http://host/?a=b", "without"),
        ("http://host/\n", "without"),
        (f"http://me:{SECRET}@host/", "holds credentials"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        WebServer(url=url)
    assert SECRET not in str(caught.value)


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("T", "U", "P")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert authorization_from(*names)[0] is None
    monkeypatch.setenv("T", SECRET)
    assert authorization_from(*names)[0] == f"Bearer {SECRET}"
    monkeypatch.setenv("U", "ada")
    with pytest.raises(SpecError, match="both set"):
        authorization_from(*names)
    monkeypatch.delenv("T")
    with pytest.raises(SpecError, match="not set"):
        authorization_from(*names)
    monkeypatch.setenv("P", "open:sesame")
    assert authorization_from(*names)[0] == "Basic YWRhOm9wZW46c2VzYW1l"  # by `base64` on "ada:open:sesame"
    monkeypatch.delenv("U")
    monkeypatch.delenv("P")
    monkeypatch.setenv("T", f"{SECRET}\n")
    with pytest.raises(SpecError, match="line break") as caught:
        authorization_from(*names)
    assert SECRET not in str(caught.value)


def all_of(parts: Iterator[tuple[Message, Iterator[bytes]]]) -> list[tuple[Message, bytes]]:
    return [(headers, b"".join(content)) for headers, content in parts]


CONTENT = st.binary(max_size=200) | st.sampled_from([b"\r\n", b"--", b"\r\n--", b"\r\n--b", b"a\r\n\r\n--bo"])


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(CONTENT, min_size=1, max_size=5), size=st.integers(1, 70))
def test_parts_are_read_as_they_were_written_however_they_come(contents: list[bytes], size: int) -> None:
    parts = [SentPart(headers=(("Content-Type", f"x/y{n}"),), content=content) for n, content in enumerate(contents)]
    body = multipart_body("multipart/related", parts)
    message = b"".join(body.pieces())
    assert len(message) == body.length
    # the standard library reads what we write
    whole = email.message_from_bytes(f"Content-Type: {body.media_type}\r\n\r\n".encode() + message, policy=HTTP)
    assert [part.get_content_type() for part in whole.iter_parts()] == [f"x/y{n}" for n in range(len(parts))]
    boundary = whole.get_boundary() or ""
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    read = all_of(read_parts(iter(pieces), boundary))
    assert [(headers.get_content_type(), content) for headers, content in read] == [
        (f"x/y{n}", content) for n, content in enumerate(contents)
    ]
    # what ends before its last boundary is lost, wherever it ends
    for end in range(0, len(message) - 4, max(1, len(message) // 5)):
        with pytest.raises(LostAnswerError):
            all_of(read_parts(iter([message[:end]]), boundary))


def test_files_are_sent_and_preambles_passed_over(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    body = multipart_body("multipart/form-data", [SentPart(headers=(), content=tmp_path / "f")])
    for _ in range(2):  # each try sends it again
        assert sum(map(len, body.pieces())) == body.length
    message = b"preamble\r\n--b \r\n\r\none\r\n--b\r\nA: c\r\n\r\n\r\n--b--\r\nepilogue"
    assert [(dict(headers), content) for headers, content in all_of(read_parts(iter([message]), "b"))] == [
        ({}, b"one"),
        ({"A": "c"}, b""),
    ]
    with pytest.raises(ServerError, match="headers"):
        list(read_parts(iter([b"--b\r\n" + b"x" * 20000]), "b"))
