"""Removing what interrupted builds and copies left behind, and nothing else.

A builder holds a lock on the folder it writes, so what can be locked in `.partial/` belongs to nobody; on file systems
without locks, what has not changed for a day. Other places have no lock: there a thing counts as left behind when it
has not changed for `STALE_S`.
"""

import secrets
import shutil
import time
from pathlib import Path

from fastnnunet.cache.gc_objects import collect_objects
from fastnnunet.cache.leftover import Leftover, looked_at
from fastnnunet.cache.store.folder import CACHE_NAME, GROUP_NAME, CacheFolder, cache_folders, open_cache
from fastnnunet.cache.store.manifest import MANIFEST_NAME
from fastnnunet.cache.store.storage import ObjectPath, Place
from fastnnunet.cache.store.writer import is_abandoned, partial_folder
from fastnnunet.errors import BuildError, CorruptError
from fastnnunet.events import Listener, ignore
from fastnnunet.system.locks import locked

STALE_S = 3600


def collect_garbage(
    root: Place, *, damaged: bool = False, dry_run: bool = False, progress: Listener = ignore
) -> list[Leftover]:
    """Remove the leftovers under `root`, the folder that holds caches, and return them.

    Leftovers are unfinished cases of dead builders, case folders without a manifest, and temporary metadata files.
    With `damaged` every shard is read, and committed cases that no longer match their manifest go too; `cache build`
    makes them again. Valid cases, caches whose own metadata is damaged, and files this project does not write are never
    touched. `dry_run` removes nothing. `progress` hears of each case looked at.
    In an object store, where nothing can be locked, only what is older than a day goes
    (`gc_objects.py`). Raises BuildError when something cannot be removed, StorageError when a store does not answer.
    """
    try:
        found = [_partial(folder, dry_run) for folder in sorted(partial_folder(root).glob("*"))]
        if isinstance(root, ObjectPath):
            found += collect_objects(root, damaged=damaged, dry_run=dry_run, progress=progress)
            return [leftover for leftover in found if leftover is not None]
        for folder in sorted(root.glob("*")):
            if CACHE_NAME.fullmatch(folder.name) and folder.is_dir():
                found += _unfinished_metadata(folder, dry_run)
        for place in cache_folders(root):
            try:
                cache = open_cache(place)
            except CorruptError:
                continue  # nothing in it can be judged; `cache list` shows it as damaged
            for case_id in cache.cases:
                found.append(_case(cache, root / place.name / case_id, damaged, dry_run))
                progress(looked_at(case_id))
    except OSError as e:
        raise BuildError(
            f"cannot remove leftovers under {root}: {e}\nmake the folder writable and run the same command again"
        ) from e
    return [leftover for leftover in found if leftover is not None]


def _partial(folder: Path, dry_run: bool) -> Leftover | None:
    if not CACHE_NAME.match(folder.name) or not folder.is_dir():
        return None  # not ours
    try:
        with locked(folder) as held:
            if not held and not is_abandoned(folder):
                return None
            leftover = Leftover(path=folder, reason="unfinished case of a dead builder", size_bytes=_size_bytes(folder))
            if not dry_run:
                shutil.rmtree(folder)
    except (BlockingIOError, FileNotFoundError):
        return None  # a builder is writing it, or has just finished
    return leftover


def _unfinished_metadata(folder: Path, dry_run: bool) -> list[Leftover]:
    """Temporary siblings of the group's metadata, and the folder itself when it never got any."""
    found = []
    for file in sorted(folder.glob(f".{GROUP_NAME}.*")):
        if _is_stale(file):
            found.append(Leftover(path=file, reason="unfinished metadata", size_bytes=file.stat().st_size))
            if not dry_run:
                file.unlink(missing_ok=True)
    if not found and not any(folder.iterdir()) and _is_stale(folder):
        found.append(Leftover(path=folder, reason="empty", size_bytes=0))
        if not dry_run:
            folder.rmdir()
    return found


def _case(cache: CacheFolder, folder: Path, damaged: bool, dry_run: bool) -> Leftover | None:
    case_id = folder.name
    if not folder.is_dir() or folder.is_symlink():
        return None
    committed = (folder / MANIFEST_NAME).exists()
    if committed and not damaged:
        return None
    problem = cache.problem(case_id, deep=True)
    if problem is None or not (committed or _is_stale(folder)):
        return None
    leftover = Leftover(
        path=folder,
        reason=f"damaged: {problem}" if committed else f"half-written: it has no {MANIFEST_NAME}",
        size_bytes=_size_bytes(folder),
    )
    if dry_run:
        return leftover
    return leftover if _remove_case(cache, folder) else None


def _remove_case(cache: CacheFolder, folder: Path) -> bool:
    """Remove a bad case at one stroke; False when a builder works on it or has just replaced it."""
    case_id = folder.name
    partial = partial_folder(folder.parent.parent)
    partial.mkdir(exist_ok=True)
    doomed = partial / f"{cache.path.name}.{case_id}.gc.{secrets.token_hex(6)}"
    try:
        with locked(folder):
            judged = folder.stat().st_ino
            if cache.problem(case_id, deep=True) is None:
                return False
            folder.rename(doomed)
            if doomed.stat().st_ino != judged:  # a builder put a good one there in between: back with it
                doomed.rename(folder)
                return False
            shutil.rmtree(doomed)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def _is_stale(path: Path) -> bool:
    """Nothing in it has changed for a while."""
    newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
    return time.time() - newest > STALE_S


def _size_bytes(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
