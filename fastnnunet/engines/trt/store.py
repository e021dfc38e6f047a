"""Where engines lie, and which of them fits.

An engine runs only with the library, version and architecture it was built for, so all of these are part of its key:

    BUNDLE/engines/  or  $FASTNNUNET_CACHE_HOME/engines/
      fp16_sm86_b4_tensorrt_rtx-1.7.1.116_0123456789ab/    the last part from the digest of the key
        engine.plan    the engine as the library serialises it
        engine.json    EngineInfo

A folder is written beside its place and renamed, so it is whole or absent. Load only engines you trust as you would a
program: they hold machine code.
"""

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnnunet.errors import CorruptError, SpecError
from fastnnunet.specs.bundle import int8_file
from fastnnunet.specs.canonical import sha256_of, sha256_of_file, to_plain
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.home import local_home
from fastnnunet.specs.load import build_spec
from fastnnunet.system.files import replace_folder

log = logging.getLogger(__name__)

PLAN_FILE, INFO_FILE, FOLDER = "engine.plan", "engine.json", "engines"
RECIPE = 1  # counts up with every change of what is built of the same model


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKey:
    """Everything that changes an engine."""

    recipe: int = RECIPE
    model_sha256: str  # of the bundle's ONNX file it was built from
    precision: str
    library: str
    library_version: str
    architecture: str
    max_batch: int  # batches of `min_batch` to this many patches
    min_batch: int = 1
    input_shape: tuple[int, ...]  # (C, *patch)
    output_shape: tuple[int, ...]  # (heads, *patch)
    smallest_tile: tuple[int, ...] | None = None  # for one pass: of any tile from this to the patch; None: of the patch

    @property
    def folder_name(self) -> str:
        known = {name: value for name, value in to_plain(self).items() if value is not None}
        return (
            f"{self.precision}_{self.architecture}_b{self.max_batch}_{self.library}-{self.library_version}"
            f"_{sha256_of(known)[:12]}"
        )

    @property
    def space(self) -> tuple[int, ...]:
        """The patch, -1 for every axis that may be shorter."""
        patch = self.input_shape[1:]
        return patch if self.smallest_tile is None else (-1,) * len(patch)

    def __str__(self) -> str:
        batch = f"{self.min_batch}-{self.max_batch}" if self.min_batch < self.max_batch else f"{self.max_batch}"
        tile = "" if self.smallest_tile is None else f" tiles up to {' x '.join(map(str, self.input_shape[1:]))}"
        return f"{self.precision} {self.architecture} {self.library} {self.library_version} batch {batch}{tile}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What lies beside an engine."""

    key: dict[str, Any]
    plan_sha256: str
    parity: dict[str, Any]  # of the graph it was built from, against the bundle's expected logits, on a CPU


@dataclass(frozen=True, slots=True)
class StoredEngine:
    """An engine on disk; its plan has not been read."""

    path: Path  # of its folder
    key: EngineKey
    info: EngineInfo

    def read_plan(self) -> bytes:
        """The serialised engine. Raises CorruptError when it was changed after it was built."""
        file = self.path / PLAN_FILE
        if not file.is_file() or (got := sha256_of_file(file)) != self.info.plan_sha256:
            found = f"sha256 {got}" if file.is_file() else "no file"
            raise CorruptError(
                f"{file} was changed after it was built\n"
                f"  got      {found}\n  expected sha256 {self.info.plan_sha256}\nremove {self.path} and export again"
            )
        return file.read_bytes()


def source_file(model_file: str, precision: str) -> str:
    """The ONNX file of a bundle that an engine of that precision is built from."""
    return int8_file(model_file) if precision == "int8" else model_file


def machine_folder() -> Path:
    """Where engines of this machine lie that belong to no bundle or cannot lie beside theirs."""
    return local_home() / FOLDER


def engine_folders(bundle_dir: Path) -> tuple[Path, Path]:
    """Where engines of a bundle are looked for, in this order."""
    return bundle_dir / FOLDER, machine_folder()


def write_engine(folder: Path, key: EngineKey, plan: bytes, parity: dict[str, Any]) -> StoredEngine:
    """Write an engine below `folder` (one of `engine_folders`), whole or not at all; replaces one of the same key.

    Raises OSError when that is impossible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / key.folder_name
    temporary = Path(tempfile.mkdtemp(prefix=f".{key.folder_name}.", dir=folder))
    try:
        (temporary / PLAN_FILE).write_bytes(plan)
        info = EngineInfo(key=to_plain(key), plan_sha256=sha256_of_file(temporary / PLAN_FILE), parity=parity)
        (temporary / INFO_FILE).write_text(json.dumps(to_plain(info), indent=1))
        temporary.chmod(0o755)
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return StoredEngine(target, key, info)


def find_engine(folder: Path, key: EngineKey) -> StoredEngine | None:
    """The engine of exactly that key below `folder`, if it is there."""
    path = folder / key.folder_name
    return _read(path) if path.is_dir() else None


def list_engines(bundle_dir: Path, model_file: Path) -> list[StoredEngine]:
    """Every engine of a model of the bundle, beside it and in this machine's folder; unreadable ones are logged."""
    found = []
    for path in (path for folder in engine_folders(bundle_dir) for path in sorted(folder.glob("[!.]*/"))):
        try:
            found.append(_read(path))
        except CorruptError as e:
            log.warning("%s", e)
    digest = sha256_of_file(model_file)
    return [engine for engine in found if (engine.key.recipe, engine.key.model_sha256) == (RECIPE, digest)]


def _read(path: Path) -> StoredEngine:
    file = path / INFO_FILE
    try:
        info = build_spec(EngineInfo, read_json_object(file), where=str(file))
        return StoredEngine(path, build_spec(EngineKey, info.key, where=str(file)), info)
    except (OSError, ValueError, SpecError) as e:
        raise CorruptError(f"{file} cannot be read: {e}\nremove {path} and export again") from e
