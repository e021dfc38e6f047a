"""A service that listens on a free port of this machine, in a thread of the test or in a process of its own."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fastnnunet.service.answers import available
from fastnnunet.service.app import create_app
from fastnnunet.service.models import load_models
from fastnnunet.service.run import listening, new_server
from fastnnunet.service.service import Service
from fastnnunet.service.spec import ServiceSpec


@dataclass(frozen=True)
class Serving:
    """A service that answers, and a client that may be used from any thread."""

    url: str
    client: httpx.Client
    service: Service


@contextlib.contextmanager
def serving(bundles: Sequence[Path], token: str | None = None, **limits: Any) -> Iterator[Serving]:
    """In threads of this process; the models are in a child process as ever."""
    spec = ServiceSpec(**{"backend": "onnxruntime", "threads": 1, "port": 0, **limits})
    with (
        listening(spec) as listener,
        Service(load_models(bundles, available()), spec) as service,
    ):
        server = new_server(create_app(service, token))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Serving(url, client, service)
        finally:
            server.should_exit = True
            thread.join(10)


@contextlib.contextmanager
def serving_process(bundles: Sequence[Path], work: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fastnnunet serve` as a user starts it, and its address; killed at the end."""
    command = [sys.executable, "-m", "fastnnunet", "serve", *map(str, bundles), "--port", "0", "--work", str(work)]
    options = ["--backend", "onnxruntime", "--threads", "1", *words]
    log = work.with_suffix(".log").open("a")
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://[^ ]+", line)
        assert match is not None, (line, work.with_suffix(".log").read_text())
        yield process, match[0]
    finally:
        process.kill()
        process.wait(10)
        log.close()


def until(question: Any, timeout_s: float = 120) -> Any:
    """The first answer that is true, asked again and again."""
    deadline = time.monotonic() + timeout_s
    while not (answer := question()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return answer


def children(pid: int) -> list[int]:
    """Processes that a process started and that predict or did; Linux alone."""
    tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
    found = [int(word) for task in tasks for word in task.read_text().split()]
    return [one for one in found if "resource_tracker" not in Path(f"/proc/{one}/cmdline").read_text()]
