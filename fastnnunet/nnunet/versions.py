"""The oldest releases of other packages that training and export may run with; pyproject.toml repeats them.

nnU-Net is content with older ones of some, and a `pip install` that keeps them says nothing.
"""

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from fastnnunet.errors import BackendError

OLDEST = {
    "torch": "2.6",
    "nnunetv2": "2.8",
    "batchgeneratorsv2": "0.3.6",  # older ones draw other samples, and labels by another rule; nnunetv2 takes 0.3.2
    "zarr": "3.1",
    "onnxscript": "0.5",  # older ones cannot be told which nodes to leave alone when constants are folded
}
TRAINING = ("torch", "nnunetv2", "batchgeneratorsv2", "zarr")


def require_versions(packages: Sequence[str]) -> None:
    """Raise BackendError naming every one that is installed and too old, and the command that mends it."""
    old = []
    for package in packages:
        oldest = OLDEST[package]
        try:
            installed = version(package)
        except PackageNotFoundError:  # installed in another way, or absent, which its import tells
            continue
        if _numbers(installed) < _numbers(oldest):
            old.append((package, installed, oldest))
    if old:
        raise BackendError(
            f"{len(old)} package(s) are too old:\n"
            + "\n".join(
                f"  - {package}: got {installed}, expected {oldest} or later" for package, installed, oldest in old
            )
            + "\nupdate: pip install "
            + " ".join(f"'{package}>={oldest}'" for package, _, oldest in old)
        )


def _numbers(text: str) -> tuple[int, ...]:
    """Release numbers of a version; what follows them (`rc1`, `+cpu`, `.post1`) is left out."""
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, release[0].split("."))) if release else ()
