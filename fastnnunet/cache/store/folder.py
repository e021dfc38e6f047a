"""The folder of one cache: `<root>/<first 16 digits of the key>/`, a Zarr v3 group with one array per case.

The root is a folder of this machine or a prefix of an object store (`storage.py`).

zarr.json                  group; attributes: key, identity, spec, cases, provenance, a digest of all that
<case>/zarr.json           array (stored channels, Z, Y, X), uint8 or float16
<case>/c/0/0/0/0           its only shard
<case>/manifest.json       written last: proof that the case is whole
"""

import json
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from fastnnunet.cache.codecs import Codec, LogitGapU8, codec_of_identity
from fastnnunet.cache.identity import FORMAT_VERSION, KEY_CHARS_IN_NAME, Identity, cache_key, cache_name
from fastnnunet.cache.store.durable import write_atomically, write_error
from fastnnunet.cache.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from fastnnunet.cache.store.shard import SHARD_NAME
from fastnnunet.cache.store.storage import ObjectPath, Place, place_at, sha256_at, size_bytes
from fastnnunet.errors import CorruptError, MismatchError, NewerFormatError, NotFoundError, SpecError, StorageError
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import sha256_of, to_plain
from fastnnunet.specs.checks.json_text import parse_json
from fastnnunet.specs.checks.problems import is_integer, is_name, is_number
from fastnnunet.specs.load import build_spec

GROUP_NAME = "zarr.json"
ARRAY_NAME = "zarr.json"
CACHE_NAME = re.compile(f"[0-9a-f]{{{KEY_CHARS_IN_NAME}}}")
REQUESTS_AT_ONCE = 16
NNUNETS_FOLDER = "nnUNet_preprocessed"  # the environment variable

T = TypeVar("T")
RECORDED_PACKAGES = ("fastnnunet", "numpy", "torch", "nnunetv2", "zarr", "numcodecs", "openvino")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFolder:
    """An opened cache. Holds no file handle; safe to pickle and to share."""

    path: Place
    key: str
    identity: Identity
    spec: CacheSpec
    cases: dict[str, str]  # case id -> digest of the preprocessed image
    provenance: dict[str, Any]

    @property
    def codec(self) -> Codec:
        return codec_of_identity(self.identity["soft_labels"])

    @property
    def temperature(self) -> float | None:
        """None when the cache serves a range of temperatures."""
        own = self.identity["soft_labels"].get("temperature")
        return None if own is None else float(own)

    def codec_at(self, temperature: float | None) -> Codec:
        """The codec that decodes at `temperature`; None leaves a cache of one temperature at its own.

        Raises MismatchError when the cache cannot serve that temperature.
        """
        codec = self.codec
        if temperature is None:
            return codec
        if isinstance(codec, LogitGapU8):
            try:
                return codec.at(temperature)
            except SpecError as e:
                raise MismatchError(f"cache {self.path}: {e}") from e
        if temperature != self.temperature:
            raise MismatchError(
                f"cache {self.path} holds soft labels at another temperature\n"
                f"  got      {self.temperature:g}\n  expected {temperature:g}\n"
                "rounded probabilities cannot be brought to another temperature: build a cache at the one you need, or "
                "one with encoding: logit_gap_u8, which serves a range"
            )
        return codec

    def case_dir(self, case_id: str) -> Place:
        return self.path / case_id

    def manifest(self, case_id: str) -> Manifest | None:
        """The manifest of a stored case, None when the case is not stored.

        Raises CorruptError when it is damaged or belongs to another case, cache or image.
        """
        manifest = read_manifest(self.case_dir(case_id))
        if manifest is None:
            return None
        expected = (case_id, self.key, self.cases.get(case_id))
        if (got := (manifest.case_id, manifest.key, manifest.image_sha256)) != expected:
            raise CorruptError(
                f"{self.case_dir(case_id) / MANIFEST_NAME} belongs elsewhere\n"
                f"  got      (case, cache, image) {got}\n  expected (case, cache, image) {expected}"
            )
        return manifest

    @property
    def build_command(self) -> str:
        """The command that built this cache, and completes it where it is now."""
        return command_at(str(self.provenance["command"]), self.path.parent)

    def rebuild_command(self, *case_ids: str) -> str:
        """The command that replaces damaged cases; an import looks at every case in depth anyway."""
        if shlex.split(self.build_command)[:3] == ["fastnnunet", "cache", "import"]:
            return self.build_command
        return f"{self.build_command} --case {shlex.join(case_ids)}"

    def missing_cases(self) -> list[str]:
        """Cases that are not stored, or visibly damaged (a rebuild replaces those)."""
        return [case for case, problem in self.problems(self.cases).items() if problem is not None]

    def stored_manifests(self) -> list[Manifest]:
        """The manifests of all cases that count as stored."""
        stored = self._of_each(
            self.manifest, [c for c, problem in self.problems(self.cases).items() if problem is None]
        )
        return [manifest for manifest in stored if manifest is not None]

    def problems(self, case_ids: Iterable[str]) -> dict[str, str | None]:
        """`problem` of several cases."""
        cases = list(case_ids)
        return dict(zip(cases, self._of_each(self.problem, cases), strict=True))

    def _of_each(self, question: Callable[[str], T], case_ids: list[str]) -> list[T]:
        """The answers in order; an object store, which answers slowly, is asked about many cases at once."""
        if not isinstance(self.path, ObjectPath):
            return [question(case) for case in case_ids]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(question, case_ids))

    def problem(self, case_id: str, *, deep: bool = False) -> str | None:
        """Why a case does not count as stored, None when it does.

        The manifest, the array's metadata and the shard's size are always checked; `deep` also hashes the shard.
        """
        try:
            manifest = self.manifest(case_id)
        except CorruptError as e:
            return str(e)
        if manifest is None:
            return f"not built ({MANIFEST_NAME} is missing)"
        folder = self.case_dir(case_id)
        shard = folder / SHARD_NAME
        try:
            if sha256_at(folder / ARRAY_NAME) != manifest.array_sha256:
                return f"{folder / ARRAY_NAME} was changed (its digest does not match the manifest)"
            if (size := size_bytes(shard)) != manifest.stored_bytes:
                return f"{shard} was truncated or changed: got {size} bytes, expected {manifest.stored_bytes}"
            if deep and (got := sha256_at(shard)) != manifest.shard_sha256:
                return f"{shard} was changed: got sha256 {got}, expected {manifest.shard_sha256}"
        except OSError as e:
            return f"{e.filename or shard} cannot be read ({e.strerror or e})"
        return None


def create_cache(
    root: Place, identity: Identity, spec: CacheSpec, cases: Mapping[str, str], provenance: Mapping[str, Any]
) -> CacheFolder:
    """Open the cache with this identity under `root`, creating it when it is not there.

    `provenance` holds at least the `command` that builds it; versions and time are added here.
    A second builder of the same cache finds and uses the first one's folder. Raises SpecError when `root` lies inside
    another cache or a case id cannot be a folder name, CorruptError when the existing cache is damaged.
    """
    require_root(root)
    for case in cases:
        if not case or case.startswith(".") or "/" in case or "\\" in case or case == GROUP_NAME:
            raise SpecError(f"case id {case!r} cannot be used as a folder name")
    path = root / cache_name(identity)
    if not (path / GROUP_NAME).exists():
        body = {
            "format_version": FORMAT_VERSION,
            "key": cache_key(identity),
            "identity": identity,
            "spec": to_plain(spec),
            "cases": dict(cases),
            "provenance": {
                **provenance,
                **_versions(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }
        group = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"fastnnunet": {**body, "self_sha256": sha256_of(body)}},
        }
        document = json.dumps(group, indent=1, sort_keys=True).encode()
        try:
            if isinstance(path, ObjectPath):
                (path / GROUP_NAME).put(document)
            else:
                path.mkdir(parents=True, exist_ok=True)
                write_atomically(path / GROUP_NAME, document)
        except OSError as e:
            raise write_error(e, path) from e
    return open_cache(path)


def command_at(command: str, root: Place) -> str:
    """A `fastnnunet cache build` command for a cache that lies under `root` by now.

    Without `--root` it builds beside the preprocessed cases, `$nnUNet_preprocessed/<data set>/<root>`.
    """
    words = shlex.split(command)
    if words[:3] != ["fastnnunet", "cache", "build"]:
        return command
    if "--root" in words:
        where = words.index("--root") + 1
        if _is_same_place(place_at(words[where]), root):
            return command
        words[where] = str(root)
        return shlex.join(words)
    base = os.environ.get(NNUNETS_FOLDER)
    if base is not None and isinstance(root, Path) and _is_same_place(Path(base), root.parent.parent):
        return command
    return f"{command} --root {shlex.quote(str(root))}"


def _is_same_place(one: Place, other: Place) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return str(one) == str(other)


def require_root(root: Place) -> None:
    """Raise SpecError when `root` lies inside a cache or another Zarr store."""
    for folder in (root, *root.parents):
        try:
            inside = (folder / GROUP_NAME).exists()
        except StorageError:
            if folder == root:
                raise
            continue  # keys of an object store often reach no further up than one prefix
        if inside:
            raise SpecError(
                f"root {root} is inside a Zarr store\n  got      {folder / GROUP_NAME}\n"
                "  expected no such file in the root or above it\nchoose a folder outside any cache with --root"
            )


def open_cache(path: Place) -> CacheFolder:
    """Open a cache folder for reading.

    Raises NotFoundError when there is none, CorruptError when its metadata was changed or is of a newer format.
    """
    file = path / GROUP_NAME
    try:
        raw = parse_json(file.read_text(), file, finite=True)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise NotFoundError(f"no soft-label cache at {path}: {GROUP_NAME} is missing") from e
    except (OSError, ValueError) as e:
        raise CorruptError(_damaged(path, f"{GROUP_NAME} cannot be read: {e}")) from e
    try:
        body = raw["attributes"]["fastnnunet"]
        version = body["format_version"]
        if not isinstance(version, int):
            raise SpecError("format_version: expected a number")
        if version > FORMAT_VERSION:
            raise NewerFormatError(
                f"cache {path} was written by a newer fastnnunet\n"
                f"  got      format version {version}\n  expected at most {FORMAT_VERSION}\n"
                "update fastnnunet"
            )
        declared = body.pop("self_sha256")
        if (set(raw), raw["zarr_format"], raw["node_type"]) != ({"zarr_format", "node_type", "attributes"}, 3, "group"):
            raise CorruptError(_damaged(path, f"{GROUP_NAME} is not the group this project writes"))
        if sha256_of(body) != declared:
            raise CorruptError(_damaged(path, f"{GROUP_NAME} was changed (its digest does not match)"))
        folder = CacheFolder(
            path=path,
            key=body["key"],
            identity=body["identity"],
            spec=build_spec(CacheSpec, body["spec"], where=str(file)),
            cases=body["cases"],
            provenance=body["provenance"],
        )
        _check_parts(folder)
    except (KeyError, TypeError, AttributeError, SpecError) as e:
        raise CorruptError(_damaged(path, f"{GROUP_NAME} is not that of a soft-label cache: {e}")) from e
    if cache_key(folder.identity) != folder.key or path.name != folder.key[:KEY_CHARS_IN_NAME]:
        raise CorruptError(
            _damaged(path, f"folder name, key and identity disagree\n  got      {path.name}\n  expected {folder.key}")
        )
    if folder.identity["data"]["sha256"] != sha256_of(folder.cases):
        raise CorruptError(_damaged(path, "the list of cases does not match the identity"))
    return folder


def _check_parts(folder: CacheFolder) -> None:
    """What a digest does not say: that the parts are what they are taken for. Raises SpecError, TypeError, KeyError."""
    if not all(is_name(case) and isinstance(digest, str) for case, digest in folder.cases.items()):
        raise SpecError("a case id cannot be the name of a folder")
    if not isinstance(folder.identity["data"]["sha256"], str) or not folder.build_command.isprintable():
        raise SpecError("digest of the cases, command: expected text without control characters")
    temperature = folder.identity["soft_labels"].get("temperature")
    if temperature is not None and not is_number(temperature):
        raise SpecError("temperature: expected a number")
    if not is_integer(folder.identity["soft_labels"]["heads"], 1, 2**16):
        raise SpecError("heads: expected a whole number of at least 1")
    try:
        _ = folder.codec
    except (ValueError, IndexError, OverflowError) as e:
        raise SpecError(f"soft_labels: {e}") from e


def cache_folders(root: Place) -> Iterable[Place]:
    """Folders under `root` that look like caches, by name; empty when `root` does not exist."""
    if isinstance(root, ObjectPath):
        named = [root / name for name in root.names() if CACHE_NAME.fullmatch(name)]
        return [folder for folder in named if (folder / GROUP_NAME).exists()]
    return sorted(file.parent for file in root.glob(f"*/{GROUP_NAME}"))


def _damaged(path: Place, reason: str) -> str:
    return f"cache {path} is damaged: {reason}\nremove the folder and build the cache again (fastnnunet cache build)"


def _versions() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions}
