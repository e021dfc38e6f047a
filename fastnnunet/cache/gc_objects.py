"""Removing what interrupted builds left behind in an object store.

There are no locks there, so age alone tells a dead builder's objects from a living one's: no case is touched of which
any object was written within `STALE_OBJECTS_S`. The manifest goes first, and with it the case, whatever happens next.
Parts of uploads that never ended are no objects; a lifecycle rule of the bucket removes those.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from fastnnunet.cache.leftover import Leftover, looked_at
from fastnnunet.cache.store.folder import CACHE_NAME, CacheFolder, open_cache
from fastnnunet.cache.store.manifest import MANIFEST_NAME
from fastnnunet.cache.store.storage import PROBE_NAME, ObjectPath
from fastnnunet.errors import CorruptError, NotFoundError
from fastnnunet.events import Listener

STALE_OBJECTS_S = 24 * 3600


def collect_objects(root: ObjectPath, *, damaged: bool, dry_run: bool, progress: Listener) -> list[Leftover]:
    """See `gc.collect_garbage`."""
    found = [_probe(root / PROBE_NAME, dry_run)]
    for folder in (root / name for name in root.names() if CACHE_NAME.fullmatch(name)):
        try:
            cache = open_cache(folder)
        except (CorruptError, NotFoundError):
            continue  # nothing in it can be judged; `cache list` shows a damaged one
        for case_id in cache.cases:
            found.append(_case(cache, folder / case_id, damaged, dry_run))
            progress(looked_at(case_id))
    return [leftover for leftover in found if leftover is not None]


def _probe(place: ObjectPath, dry_run: bool) -> Leftover | None:
    if not place.exists() or not _are_stale([place]):
        return None
    leftover = Leftover(path=place, reason="probe of a dead builder", size_bytes=place.size_bytes())
    if not dry_run:
        place.delete()
    return leftover


def _case(cache: CacheFolder, place: ObjectPath, damaged: bool, dry_run: bool) -> Leftover | None:
    committed = MANIFEST_NAME in (names := place.names())
    if not names or (committed and not damaged):
        return None
    problem = cache.problem(place.name, deep=True)
    objects = place.objects()
    if problem is None or not objects or not _are_stale(objects):
        return None
    leftover = Leftover(
        path=place,
        reason=f"damaged: {problem}" if committed else f"half-written: it has no {MANIFEST_NAME}, for over a day",
        size_bytes=sum(o.size_bytes() for o in objects),
    )
    if dry_run:
        return leftover
    if not _are_stale(place.objects()):
        return None  # a builder began to replace it while it was judged
    for doomed in sorted(objects, key=lambda o: o.name != MANIFEST_NAME):
        doomed.delete()
    return leftover


def _are_stale(objects: Iterable[ObjectPath]) -> bool:
    """None of them was written lately."""
    now = datetime.now(UTC)
    return all((now - o.modified()).total_seconds() > STALE_OBJECTS_S for o in objects)
