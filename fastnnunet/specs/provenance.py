"""Records: what machine and versions a number came from, and JSON files that are whole or absent."""

import json
import math
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fastnnunet.specs.canonical import to_plain
from fastnnunet.system.files import atomic_output, make_folder

PACKAGES = (
    *("fastnnunet", "numpy", "scipy", "torch", "nnunetv2", "onnxruntime", "openvino", "zarr"),
    *("tensorrt", "tensorrt-rtx", "cuda-python", "nncf"),
)


def now_utc() -> str:
    """Date and time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Python and the installed ones of the packages that decide speed and numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor name, cores this process may use, memory in bytes, operating system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, record: Any) -> None:
    """Write `record` (dataclasses allowed; NaN and infinities become null) through a temporary sibling and a rename."""
    make_folder(path.parent)
    with atomic_output(path) as partial:
        partial.write_text(json.dumps(_without_nan(to_plain(record)), indent=1, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
