"""Shards of a remote cache on this machine: fetched once, shared by all processes, memory-mapped like local ones.

A shard is kept under its digest in `$FASTNNUNET_CACHE_HOME/shards` (default: `~/.cache/fastnnunet/shards`), so it
serves every cache that holds the same bytes. The folder may be deleted at any time.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastnnunet.cache.store.durable import write_error
from fastnnunet.cache.store.folder import CacheFolder
from fastnnunet.cache.store.manifest import Manifest
from fastnnunet.cache.store.shard import SHARD_NAME
from fastnnunet.cache.store.storage import ObjectPath, Place
from fastnnunet.errors import CorruptError, FastnnUNetError
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.home import HOME_VARIABLE, local_home
from fastnnunet.system.locks import locked


def shard_file(case_dir: Place, manifest: Manifest, folder: Path | None = None) -> Path:
    """The shard of a case as a local file, fetched into `folder` when it is remote and not there yet.

    Raises CorruptError when what was fetched is not what the manifest promises, FileNotFoundError when the store has no
    such shard, StorageError, DiskSpaceError, BuildError when the folder cannot be written.
    """
    if isinstance(case_dir, Path):
        return case_dir / SHARD_NAME
    target = (folder or shards_folder()) / manifest.shard_sha256
    try:
        if _is_whole(target, manifest):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent, manifest):
            if not _is_whole(target, manifest):
                _fetch(case_dir / SHARD_NAME, manifest, target)
    except (FastnnUNetError, FileNotFoundError):
        raise
    except OSError as e:
        error = write_error(e, target)
        raise type(error)(f"{error}\n{HOME_VARIABLE} says where fetched shards are kept: {target.parent}") from e
    return target


def shards_folder() -> Path:
    return local_home() / "shards"


def drop_damaged_copy(cache: CacheFolder, case_id: str, folder: Path | None = None) -> str | None:
    """Why a remote shard could not be read, when only the copy of this machine is bad: that is removed.

    None when the copy is what the manifest promises, the manifest is the damaged one, or the cache is local.
    """
    if isinstance(cache.path, Path):
        return None
    try:
        manifest = cache.manifest(case_id)
    except CorruptError:
        return None
    copy = (folder or shards_folder()) / (manifest.shard_sha256 if manifest else "")
    if not copy.is_file() or sha256_of_file(copy) == copy.name:
        return None
    copy.unlink(missing_ok=True)
    return f"the local copy {copy} was damaged; it was removed, and the same command fetches it again"


def _is_whole(file: Path, manifest: Manifest) -> bool:
    """It was checked before it got its name, so the size tells."""
    try:
        return file.stat().st_size == manifest.stored_bytes
    except (FileNotFoundError, NotADirectoryError):
        return False


def _fetch(shard: ObjectPath, manifest: Manifest, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        shard.download(temporary)
        if (got := sha256_of_file(temporary)) != manifest.shard_sha256:
            raise CorruptError(f"{shard} was changed: got sha256 {got}, expected {manifest.shard_sha256}")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path, manifest: Manifest) -> Iterator[None]:
    """Only one process fetches a shard; the others wait and find it there. The lock ends with its process.

    Without locks each fetches it, under a name of its own until it is whole.
    """
    file = folder / f".lock-{manifest.shard_sha256[:2]}"  # 256 locks: they stay, since removing one could split it
    file.touch()
    with locked(file, wait=True):
        yield
