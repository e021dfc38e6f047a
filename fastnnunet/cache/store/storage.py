"""Where caches are kept: a folder of this machine, or a prefix of an object store (s3://, gs://, memory:// ...).

A folder is a plain `pathlib.Path`, so that nothing about local caches goes through another layer: they keep rename,
fsync, locks and memory maps. An object store is an `ObjectPath`, which has the few operations of `Path` that reading a
cache takes, over fsspec, and `put`. What only one of the two can do (locks, renames) is
asked for by type, in `store.py` and `gc.py`.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastnnunet.errors import NO_ROOM, FastnnUNetError, SpecError, StorageError
from fastnnunet.specs.canonical import sha256_of_file

READ_BYTES = 8 << 20
PROBE_NAME = ".partial/probe"  # written and deleted to find out whether that is possible


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """A place in an object store. Holds no connection: safe to pickle, to fork and to share between threads.

    Every operation raises FileNotFoundError when nothing is there, where `Path` would, and StorageError when the store
    cannot be used (no connection, no permission, no package, no bucket to write to).
    """

    url: str  # no slash at the end

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self._parts[1].rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        """The place above; a bucket is its own parent."""
        protocol, path = self._parts
        return ObjectPath(f"{protocol}://{path.rpartition('/')[0] or path}")

    @property
    def parents(self) -> tuple["ObjectPath", ...]:
        above = []
        place = self
        while (up := place.parent) != place:
            above.append(up)
            place = up
        return tuple(above)

    @property
    def _parts(self) -> tuple[str, str]:
        protocol, _, path = self.url.partition("://")
        return protocol, path

    def read_bytes(self) -> bytes:
        with self._store("read") as (store, path):
            return bytes(store.cat_file(path))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def size_bytes(self) -> int:
        with self._store("read") as (store, path):
            return int(store.info(path)["size"])

    def sha256(self) -> str:
        """Hex digest of the object, read in blocks."""
        digest = hashlib.sha256()
        with self._store("read") as (store, path), store.open(path, "rb", block_size=READ_BYTES) as f:
            while block := f.read(READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def modified(self) -> datetime:
        """When the object was last written."""
        with self._store("read") as (store, path):
            when: datetime = store.modified(path)
            return when if when.tzinfo else when.replace(tzinfo=UTC)

    def exists(self) -> bool:
        """An object is there, or something below it."""
        try:
            with self._store("read") as (store, path):
                store.info(path)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """There are objects below this place."""
        return bool(self.names())

    def names(self) -> list[str]:
        """Names of what is directly below, sorted; empty when there is nothing."""
        try:
            with self._store("list") as (store, path):
                entries = [entry.rstrip("/") for entry in store.ls(path, detail=False)]
                inside = path.strip("/") + "/"  # a store may list an object under its own name
                return sorted(e.rpartition("/")[2] for e in entries if e.strip("/").startswith(inside))
        except FileNotFoundError:
            return []

    def objects(self) -> list["ObjectPath"]:
        """All objects below this place, at any depth."""
        with self._store("list") as (store, path):
            inside = path.strip("/") + "/"
            found = [entry.strip("/") for entry in store.find(path)]
            return [self / entry[len(inside) :] for entry in sorted(found) if entry.startswith(inside)]

    def put(self, data: bytes) -> None:
        """Write an object; on an object store it is there whole or not at all."""
        with self._store("write") as (store, path):
            store.pipe_file(path, data)

    def upload(self, file: Path) -> None:
        """Write an object from a file; on an object store it is there whole or not at all."""
        with self._store("write") as (store, path):
            if self._parts[0] == "memory":  # its put_file shows others an empty object first
                store.pipe_file(path, file.read_bytes())
            else:
                store.put_file(str(file), path)

    def download(self, file: Path) -> None:
        with self._store("read") as (store, path):
            store.get_file(path, str(file))

    def delete(self) -> None:
        """Remove an object; nothing happens when there is none."""
        with contextlib.suppress(FileNotFoundError), self._store("delete") as (store, path):
            store.rm_file(path)

    @contextlib.contextmanager
    def _store(self, what: str) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it; whatever goes wrong inside becomes one StorageError."""
        protocol, _ = self._parts
        try:
            store = _file_system(protocol, os.getpid())
            yield store, store._strip_protocol(self.url)
        except FileNotFoundError as e:
            if what == "write":  # unlike a folder, a bucket is not made on the way
                raise StorageError(_failed(self.url, what, e)) from e
            raise
        except FastnnUNetError:
            raise
        except Exception as e:  # each store has exceptions of its own
            if isinstance(e, OSError) and e.errno in NO_ROOM:
                raise  # the disk of this machine
            raise StorageError(_failed(self.url, what, e)) from e


Place = Path | ObjectPath


@lru_cache(maxsize=16)
def _file_system(protocol: str, _process: int) -> Any:
    """One client per process: connections do not survive a fork. Listings are never remembered: others write too."""
    import fsspec

    try:
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as e:
        package = {"s3": "s3fs", "s3a": "s3fs"}.get(protocol)
        how = (
            "install it: pip install 'fastnnunet[s3]'"
            if package
            else f"install the package that fsspec needs for {protocol}://"
        )
        raise StorageError(f"{protocol}:// needs the package {package or 'named here: ' + str(e)}\n{how}") from e


def place_at(text: "str | Path | ObjectPath") -> Place:
    """A path or URL as given on the command line. Raises SpecError for a URL of unknown kind or without a bucket."""
    if not isinstance(text, str) or "://" not in text:
        return text if isinstance(text, ObjectPath) else Path(text)
    protocol, _, path = text.partition("://")
    if protocol in ("file", "local"):
        return Path(path)
    from fsspec.registry import known_implementations, registry

    if protocol not in known_implementations and protocol not in registry:
        raise SpecError(
            f"unknown kind of place {protocol}:// in {text}\n"
            "expected a folder, or a URL that fsspec knows such as s3://bucket/folder"
        )
    if urlsplit(text).password is not None:
        raise SpecError(
            f"a password does not belong in {protocol}:// places, which are stored and printed\n"
            "leave it to the environment or the configuration of the store (AWS_SECRET_ACCESS_KEY, ~/.aws ...)"
        )
    if not path.strip("/"):
        raise SpecError(f"{text} names no bucket or folder\nexpected for example {protocol}://bucket/folder")
    return ObjectPath(f"{protocol}://{path.strip('/')}")


def size_bytes(place: Place) -> int:
    """Bytes of a file or object. Raises FileNotFoundError."""
    return place.size_bytes() if isinstance(place, ObjectPath) else place.stat().st_size


def sha256_at(place: Place) -> str:
    """Hex SHA-256 of a file or object. Raises FileNotFoundError."""
    return place.sha256() if isinstance(place, ObjectPath) else sha256_of_file(place)


def require_shared(root: Place) -> None:
    """Raise SpecError for a place that other processes do not see."""
    if isinstance(root, ObjectPath) and root.url.startswith("memory://"):
        raise SpecError(
            f"{root} is memory of this process, which workers would not see\n"
            "use --workers 0 without --scheduler, or a folder or object store as --root"
        )


def require_writable(root: Place) -> None:
    """Find out before any work that nothing can be written under `root`, which need not exist.

    On an object store a small object is written and deleted. Raises StorageError, PermissionError or another OSError.
    """
    if isinstance(root, ObjectPath):
        probe = root / PROBE_NAME
        probe.put(b"")
        probe.delete()
        return
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(20, "Not a directory", str(existing))
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(13, "Permission denied", str(existing))


def _failed(url: str, what: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (
        f"cannot {what} {url} ({reason})\n"
        "expected a bucket that exists, a connection to it and permission to list, read, write and delete there; "
        "mend that and run the same command again, finished cases are kept"
    )
