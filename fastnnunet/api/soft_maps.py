"""`import_maps`: soft maps of a user's own become a cache, in a teacher's place."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.api.label import LabelledCache, build
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec

if TYPE_CHECKING:
    from fastnnunet.cache.store.storage import Place


def import_maps(
    folders: Sequence[Path],
    data: TeacherSpec,
    recipe: CacheSpec = CacheSpec(),
    *,
    recipe_file: Path | None = None,
    root: "Place | None" = None,
    cases: Sequence[str] | None = None,
    memory_limit_bytes: int | None = None,
    progress: Listener = ignore,
) -> LabelledCache:
    """Make a cache of the soft maps in `folders`, one of every rater, whose mean is taken.

    Of `data` data set, configuration and plans count: the preprocessed cases that the maps belong to, `cases` alone
    where they are given. Every map is read and checked before anything is written; of a cache that is there already,
    damaged cases are made again. Raises NotFoundError, SpecError, ImageError, MismatchError, DiskSpaceError.
    """
    from fastnnunet.teachers.maps.jobs import maps_job

    job = maps_job(data, recipe, folders, root=root, spec_file=recipe_file, only=cases, progress=progress)
    if len(folders) > 1:
        progress(Message(text=f"mean of {len(folders)} raters"))
    cache = build(
        job,
        cases=list(job.cases),
        threads=1,
        memory_limit_bytes=memory_limit_bytes,
        compares=False,
        progress=progress,
    )
    return LabelledCache(cache=cache, unlabelled=None)
