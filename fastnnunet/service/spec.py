"""Where the service listens, and how much it takes on."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastnnunet.errors import SpecError
from fastnnunet.specs.home import local_home
from fastnnunet.specs.one_pass import parse_memory
from fastnnunet.specs.option import Option
from fastnnunet.specs.run.precision import Precision

_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f:.]+\]?")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """All limits of the service. Sizes are texts such as `800M` or `2G`, times are seconds."""

    host: Annotated[str, Option("--host", "Address to listen on; any but this machine's own needs a token.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Option("--port", "Port to listen on; 0: one that is free.")] = 8000
    host_names: Annotated[
        tuple[str, ...], Option("--host-name", "Further name by which clients may ask for this machine.")
    ] = ()
    devices: Annotated[
        tuple[str, ...],
        Option("--device", "cpu, cuda, cuda:1, ...: one model at work on each (default: one, as `predict` chooses)."),
    ] = ()
    backend: Annotated[str, Option("--backend", "As of `predict`.")] = "auto"
    precision: Annotated[Precision, Option("--precision", "As of `predict`: fp32, bf16, fp16 or int8.")] = "fp32"
    threads: Annotated[int | None, Option("--threads", "CPU threads (default: all).")] = None
    idle_s: Annotated[float, Option("--idle", "Seconds after which a model that nobody asks for is unloaded.")] = 600.0
    queue: Annotated[int, Option("--queue", "Requests that may wait; more are refused for a while.")] = 16
    time_limit_s: Annotated[
        float, Option("--time-limit", "Seconds that an upload, and then a prediction, may take.")
    ] = 600.0
    upload: Annotated[str, Option("--upload", "Largest upload.")] = "1G"
    unpacked: Annotated[str, Option("--unpacked", "Largest zip, unpacked.")] = "4G"
    files: Annotated[int, Option("--files", "Most files in a zip.")] = 5000
    voxels: Annotated[int, Option("--voxels", "Most voxels of a channel, as stored and at the model's spacing.")] = (
        512 * 512 * 2048
    )
    work: Annotated[Path | None, Option("--work", "Folder for uploads and results (default: in ~/.cache).")] = None
    room: Annotated[str, Option("--room", "Most bytes in that folder.")] = "10G"
    keep_s: Annotated[float, Option("--keep", "Seconds for which results of jobs are kept.")] = 3600.0

    def __post_init__(self) -> None:
        """Raises SpecError with all problems."""
        problems = []
        for name, least in (("port", 0), ("queue", 1), ("files", 1), ("voxels", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"--{name}: got {value}, expected at least {least}")
        if self.port > 65535:
            problems.append(f"--port: got {self.port}, expected at most 65535")
        for name, option in (("idle_s", "--idle"), ("time_limit_s", "--time-limit"), ("keep_s", "--keep")):
            if not getattr(self, name) > 0:
                problems.append(f"{option}: got {getattr(self, name)}, expected seconds above 0")
        for name in self.host_names:
            if not _HOST_NAME.fullmatch(name):
                problems.append(
                    f"--host-name: got {name!r}, expected a name such as scanner.example, no address of a page"
                )
        for name in ("upload", "unpacked", "room"):
            try:
                parse_memory(getattr(self, name))
            except SpecError:
                problems.append(f"--{name}: got {getattr(self, name)!r}, expected a size such as 800M or 2G")
        if len(set(self.devices)) < len(self.devices):
            problems.append(f"--device: got {', '.join(self.devices)}, expected each once")
        if problems:
            raise SpecError("; ".join(problems))

    @property
    def upload_bytes(self) -> int:
        """Largest body of a request."""
        return parse_memory(self.upload)

    @property
    def unpacked_bytes(self) -> int:
        """Most bytes of the files of a zip."""
        return parse_memory(self.unpacked)

    @property
    def room_bytes(self) -> int:
        """Most bytes in the work folder."""
        return parse_memory(self.room)

    @property
    def folder(self) -> Path:
        """The work folder."""
        return self.work if self.work is not None else local_home() / "service"

    @property
    def is_loopback(self) -> bool:
        """Whether this machine alone can reach the service."""
        return self.host in LOOPBACK or self.host.startswith("127.")
