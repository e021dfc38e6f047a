"""What every request passes before anything is done for it, and the headers that every answer gets.

Pages of other sites can make a browser on this machine send requests to it. They are told by where they say they come
from (Origin, Sec-Fetch-Site) and by the name they ask for (Host), which a name that was rebound to this machine is not.
"""

import hmac
import ipaddress
import json
import logging
import time
import traceback
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastnnunet.service.refusals import RefusedError
from fastnnunet.service.spec import ServiceSpec

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self'; connect-src 'self' blob: data:; worker-src 'self' blob:; "
        "manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
NEEDS_NO_TOKEN = ("/health", "/")  # and the files of the page, which hold nothing but the page
PAGE = "/page/"
_LOCAL_NAMES = ("localhost",)

log = logging.getLogger(__name__)


class Guard:
    """The outermost of the application."""

    def __init__(self, app: ASGIApp, *, spec: ServiceSpec, token: str | None) -> None:
        self._app, self._spec = app, spec
        self._token = None if token is None else token.encode()
        self._names = {*_LOCAL_NAMES, spec.host.lower(), *(name.lower() for name in spec.host_names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websockets: the server refuses them
        begin, status = time.perf_counter(), 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._counted(receive), send_guarded)
        except RefusedError as e:
            if status:  # the answer is under way
                raise
            await _send(e, send_guarded)
        except Exception as e:  # it was answered; logged without its message, which may be made of what a client sent
            log.error("a request failed: %s\n%s", type(e).__name__, "".join(traceback.format_tb(e.__traceback__)))
        # the route's pattern, never the address itself: no ids, no values of a query
        route = getattr(scope.get("route"), "path", "-")
        log.info("%s %s %d %.0f ms", scope["method"], route, status, 1e3 * (time.perf_counter() - begin))

    def _check(self, scope: Scope) -> None:
        """Raises RefusedError."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"origin", b"authorization") and name in headers:
                raise RefusedError(400, f"two headers {name.decode()}, expected one")
            headers[name] = value
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._is_ours(host):
            raise RefusedError(
                421, "the request asks for another host; use the address that the service was started with"
            )
        if b"origin" in headers and headers[b"origin"].decode("latin-1").lower() not in (
            f"http://{host}",
            f"https://{host}",
        ):
            raise RefusedError(403, "the request comes from a page of another site, which is not let in")
        site, mode = headers.get(b"sec-fetch-site", b"none"), headers.get(b"sec-fetch-mode", b"")
        if site not in (b"none", b"same-origin") and not (scope["method"] == "GET" and mode == b"navigate"):
            raise RefusedError(403, "the request comes from a page of another site, which is not let in")
        path = scope["path"]
        if self._token is not None and path not in NEEDS_NO_TOKEN and not path.startswith(PAGE):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                raise RefusedError(401, "a token is needed: send it as Authorization: Bearer TOKEN")

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this service. An address cannot be rebound, so any will do beside the names."""
        if host.startswith("["):
            name, _, port = host[1:].partition("]")
        else:
            name, colon, port = host.partition(":")
            port = colon + port
        if port and not (port[0] == ":" and port[1:].isascii() and port[1:].isdigit()):
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return address.is_loopback or not self._spec.is_loopback

    def _counted(self, receive: Receive) -> Receive:
        """Raises RefusedError when a body becomes longer than an upload may be, whatever its length was said to be."""
        left = self._spec.upload_bytes

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise RefusedError(
                        413, f"the upload has more than {self._spec.upload_bytes} bytes, which is the limit"
                    )
            return message

        return counted


async def _send(refusal: RefusedError, send: Send) -> None:
    body = json.dumps({"error": refusal.sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
