"""An environment with the base install alone, made without a network from what is installed here.

What belongs to the distributions that the base install needs, and to no others, is linked into a new virtual
environment.
"""

import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import _fastnnunet_core
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastnnunet

NAME = "fastnnunet"


@dataclass(frozen=True)
class Installed:
    """A distribution of the base install: its installed files, from the folder of packages, and their sizes."""

    name: str
    files: dict[Path, Path]  # place below site-packages -> file here

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())


@cache
def base_install(*extras: str) -> list[Installed]:
    """This package and, through their requirements, all it needs without any extra, or with those that are named."""
    waiting, found = [(NAME, frozenset(extras))], {}
    while waiting:
        name, wanted = waiting.pop()
        key = canonicalize_name(name), wanted
        if key in found:
            continue
        distribution = metadata.distribution(name)
        found[key] = distribution
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (wanted or {""})
            ):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    by_name = {name: distribution for (name, _), distribution in found.items()}
    return [Installed(name, dict(_files(distribution))) for name, distribution in sorted(by_name.items())]


def _files(distribution: metadata.Distribution) -> Iterator[tuple[Path, Path]]:
    """Where a file belongs below site-packages, and where it is. Scripts are left out."""
    for file in distribution.files or ():
        place = Path(file)
        is_own_redirect = canonicalize_name(distribution.name) == NAME and not place.parts[0].endswith(".dist-info")
        if ".." not in place.parts and not is_own_redirect and (path := Path(file.locate())).is_file():
            yield place, path
    if canonicalize_name(distribution.name) == NAME:  # may be an editable install: then these are elsewhere
        package, core = Path(fastnnunet.__file__).parent, Path(_fastnnunet_core.__file__)
        yield from ((Path(NAME, p.relative_to(package)), p) for p in package.rglob("*.py"))
        yield Path(core.name), core


def make_environment(folder: Path, installed: list[Installed]) -> Path:
    """A virtual environment that has these distributions and nothing else; its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for distribution in installed:
        # a package, its metadata and its libraries are linked as one; folders that several distributions share are not
        whole = {place.parts[0] for place in distribution.files if _is_its_own(place)}
        for name in whole:
            inside = next((place, path) for place, path in distribution.files.items() if place.parts[0] == name)
            (site_packages / name).symlink_to(inside[1].parents[len(inside[0].parts) - 2])
        for place, path in distribution.files.items():
            if place.parts[0] not in whole:
                (site_packages / place).parent.mkdir(parents=True, exist_ok=True)
                (site_packages / place).symlink_to(path)
    return folder / "bin" / "python"


def _is_its_own(place: Path) -> bool:
    """Whether a file shows that its top folder belongs to one distribution alone."""
    is_package = len(place.parts) == 2 and place.name == "__init__.py"
    return is_package or (len(place.parts) > 1 and place.parts[0].endswith((".dist-info", ".libs")))


def importable(python: Path, module: str) -> bool:
    """Whether an interpreter finds a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-I", "-c", code]).returncode == 0
