"""What OpenVINO made of a model before, kept for the next process: it takes a third of the time to load.

    $FASTNNUNET_CACHE_HOME/compiled/KEY.blob    SHA-256 of the rest, then the rest: what OpenVINO exports

The key is of everything that changes it. A file is whole or absent; where it is damaged, does not load or cannot be
written, the model is compiled as if there were no such folder. What was not used for longest goes first.
"""

import contextlib
import hashlib
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastnnunet.errors import FastnnUNetError
from fastnnunet.specs.canonical import sha256_of
from fastnnunet.specs.home import local_home
from fastnnunet.system.files import atomic_output, make_folder

log = logging.getLogger(__name__)

RECIPE = 1  # counts up with every change of how a model is prepared for compiling
MOST_BYTES = 2**30  # of all files
_LARGEST_BYTES = 2**28  # of one, which is in memory twice while it is written
_DIGEST_BYTES = 32


def compile_kept(
    core: Any, model: Callable[[], Any], hints: dict[str, Any], key: dict[str, Any] | None, version: str
) -> Any:
    """The compiled model of `model()`, on the CPU. `key`: of what `model` makes; None: not kept.

    Raises RuntimeError as OpenVINO does.
    """
    if key is None:
        return core.compile_model(model(), "CPU", hints)
    everything = {"recipe": RECIPE, "openvino": version, "cpu": _cpu(core), "hints": hints, "model": key}
    path = local_home() / "compiled" / f"{sha256_of(everything)[:32]}.blob"
    if (blob := _read(path)) is not None:
        try:
            return core.import_model(blob, "CPU", hints)
        except RuntimeError as e:
            log.debug("%s does not load, the model is compiled again: %s", path, e)
    compiled = core.compile_model(model(), "CPU", hints)
    _keep(compiled, path)
    return compiled


def _cpu(core: Any) -> list[str]:
    """What this CPU is and can do, as far as OpenVINO and the system tell."""
    flags = ""
    with contextlib.suppress(OSError):  # of Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    told = [str(core.get_property("CPU", name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    return [platform.system(), platform.machine(), *told, flags]


def _read(path: Path) -> bytes | None:
    """None where there is no whole file."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, blob = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(blob).digest() != digest:
        log.debug("%s is damaged, the model is compiled again", path)
        return None
    with contextlib.suppress(OSError):
        path.touch()  # used today
    return blob


def _keep(compiled: Any, path: Path) -> None:
    try:
        blob = compiled.export_model().getvalue()
        if len(blob) > _LARGEST_BYTES:
            return
        make_folder(path.parent)
        with atomic_output(path) as partial:
            partial.write_bytes(hashlib.sha256(blob).digest() + blob)
        _make_room(path.parent)
    except (FastnnUNetError, OSError, RuntimeError) as e:
        log.debug("%s cannot be kept: %s", path, e)


def _make_room(folder: Path) -> None:
    """Remove what was used longest ago beyond `MOST_BYTES`. Another process may do the same."""
    total = 0
    found = [(file, file.stat()) for file in folder.glob("*.blob")]
    for file, stat in sorted(found, key=lambda entry: entry[1].st_mtime, reverse=True):
        total += stat.st_size
        if total > MOST_BYTES:
            file.unlink(missing_ok=True)
