"""`serve`: everything is checked, then the port is taken, then requests are answered until the service is stopped."""

import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastnnunet.errors import SpecError
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.service.spec import ServiceSpec
from fastnnunet.system.children import in_main_thread

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from uvicorn import Server

_SHORTEST_TOKEN = 16
_BACKLOG = 128
TOKEN_VARIABLE = "FASTNNUNET_TOKEN"


def check_token(spec: ServiceSpec, token: str | None) -> None:
    """Raises SpecError where other machines could use the service without a secret."""
    if token is None and not spec.is_loopback:
        raise SpecError(
            f"--host {spec.host} is reached from other machines, and there is no token: anyone there could use the "
            f"service\nset one of at least {_SHORTEST_TOKEN} characters in {TOKEN_VARIABLE} (or --token), or leave out "
            "--host"
        )
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise SpecError(
            f"the token has {len(token)} characters, expected at least {_SHORTEST_TOKEN}, ASCII without control "
            "characters\nmake one: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )


def listening(spec: ServiceSpec) -> socket.socket:
    """A socket that listens. Raises SpecError saying why it cannot."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(spec.host, spec.port, type=socket.SOCK_STREAM)
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        # connections have it from here: else the body of an answer waits 40 ms for its head to be acknowledged
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (socket.gaierror, UnicodeError) as e:
        raise SpecError(f"--host: got {spec.host!r}, expected an address or a name of this machine: {e}") from e
    except OSError as e:
        raise SpecError(
            f"cannot listen on {spec.host}, port {spec.port}: {e}\nchoose another port with --port, or 0 for a free one"
        ) from e


def new_server(app: "ASGIApp") -> "Server":
    """uvicorn's, which tells nobody what it is and logs no address: `guard` logs routes, without values."""
    import uvicorn

    logging.getLogger("uvicorn.access").disabled = True
    for parser in ("python_multipart", "multipart"):  # by either name; it tells bytes of damaged uploads
        logging.getLogger(parser).setLevel(logging.CRITICAL + 1)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=5,
        )
    )


def serve(bundles: Sequence[Path], spec: ServiceSpec, *, token: str | None = None, progress: Listener = ignore) -> None:
    """Serve bundles until a signal ends the process. `progress` is told the address once requests are answered.

    Raises SpecError for a missing token, a port in use or two bundles of one name, what `load_bundle_spec` raises,
    BackendError for a backend, device or precision that cannot be, and FastnnUNetError where the work folder cannot be
    used: all of it before anything is served.
    """
    from fastnnunet.api.resident import check_model
    from fastnnunet.service.answers import available
    from fastnnunet.service.app import create_app
    from fastnnunet.service.models import load_models
    from fastnnunet.service.service import Service

    check_token(spec, token)
    served = load_models(bundles, available())
    for name, bundle in served.bundles.items():
        for device in spec.devices or (None,):
            check_model(served.specs[name], bundle, spec.backend, spec.precision, device)
    with listening(spec) as listener, Service(served, spec) as service:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        progress(Message(text=f"serving {', '.join(served.models)} at http://{shown}:{port} (Ctrl-C ends it)"))
        if in_main_thread():  # uvicorn ends with the signal that ended it, which would end this process at once
            signal.signal(signal.SIGTERM, _leave)
        new_server(create_app(service, token)).run(sockets=[listener])


def _leave(_signal: int, _frame: object) -> NoReturn:
    sys.exit(0)


def log_to_stderr() -> None:
    """Lines of the service on standard error: times, routes and statuses, never names or contents of files."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("fastnnunet.service")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
