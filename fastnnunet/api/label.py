"""`label`: the soft labels of a teacher ensemble, computed once and stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.errors import CorruptError, ImageError
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec

if TYPE_CHECKING:
    from fastnnunet.cache.job import CacheJob
    from fastnnunet.cache.store.folder import CacheFolder
    from fastnnunet.cache.store.storage import Place
    from fastnnunet.nnunet.files.model import ModelFolder
    from fastnnunet.teachers.images import UnlabelledJob


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledCache:
    """A complete cache; of images without labels also the name of their set, for a training."""

    cache: "CacheFolder"
    unlabelled: str | None


def label(
    teacher: TeacherSpec,
    recipe: CacheSpec = CacheSpec(),
    *,
    recipe_file: Path | None = None,
    root: "Place | None" = None,
    images: Path | None = None,
    name: str | None = None,
    cases: Sequence[str] | None = None,
    workers: int = 0,
    threads: int | None = None,
    scheduler: str | None = None,
    memory_limit_bytes: int | None = None,
    verify: bool = False,
    progress: Listener = ignore,
) -> LabelledCache:
    """Label every case of the teacher's data set that is not in the cache yet; interrupted, the same call goes on.

    `images` labels that folder of images without labels instead, as the set `name` (default: the folder's). `cases`:
    only these, and damaged ones among them again. `root`: folder of the caches, default beside the cases. `workers`
    processes (0: this one alone) of `threads` threads (default: all cores), or those of the dask cluster `scheduler`.
    `recipe_file` is quoted in messages. `verify` reads the whole cache again.

    Of images, scans on which the folds disagree or the teacher sees nothing, and labels in too few of them, are named
    as warnings; a folder wholly of another modality is refused (ImageError).

    Raises NotFoundError, SpecError, MismatchError, CorruptError, DiskSpaceError, StorageError, and CasesFailedError (a
    BuildError) at the end when cases failed; the others are stored.
    """
    from fastnnunet.nnunet.files.model import model_folder_of
    from fastnnunet.teachers.images import list_foreground, open_images
    from fastnnunet.teachers.jobs import cache_job

    # one process labels, and need not read the weights again that the digests took
    files = model_folder_of(teacher, keep=teacher.folds if workers == 0 and scheduler is None else ())
    unlabelled: UnlabelledJob | None = None
    if images is None:
        job = cache_job(teacher, recipe, root=root, spec_file=recipe_file, progress=progress, files=files)
    else:
        unlabelled = open_images(teacher, recipe, images, name, root, recipe_file, files)
        _refuse_others(unlabelled, files, workers, progress)
        job = unlabelled.cache_job(unlabelled.preprocess(workers, progress), progress)
        unlabelled.refuse_labelled(job)
    cache = build(
        job,
        cases=cases,
        workers=workers,
        threads=threads,
        scheduler=scheduler,
        memory_limit_bytes=memory_limit_bytes,
        progress=progress,
    )
    if unlabelled is not None:
        list_foreground(unlabelled, cache, workers, progress)
        if cases is None:
            _warn_of_bad(cache, files, progress)
    if verify:
        _verify(cache, progress)
    return LabelledCache(cache=cache, unlabelled=None if unlabelled is None else unlabelled.target.name)


def build(
    job: "CacheJob",
    *,
    cases: Sequence[str] | None = None,
    workers: int = 0,
    threads: int | None = None,
    scheduler: str | None = None,
    memory_limit_bytes: int | None = None,
    compares: bool = True,
    progress: Listener = ignore,
) -> "CacheFolder":
    """Label what is not stored yet, and tell how much that is. Arguments and errors as of `label`.

    `compares`: whether the teacher is one that can be compared with nnU-Net, and it is told that it will be.
    """
    from fastnnunet.cache.build import build_cache
    from fastnnunet.cache.plan import MEMORY_LIMIT_BYTES
    from fastnnunet.engines.registry import available_cores

    todo = job.todo(cases)
    missing = job.todo() if cases and todo else todo  # a second look at all manifests only where it can tell more
    stored = len(job.cases) - len(missing)
    progress(Message(text=f"cache: {job.path}"))
    progress(Message(text=f"{stored} of {len(job.cases)} cases stored, {len(todo)} to do"))
    if compares and todo and job.open() is None:
        progress(Message(text="first, the teacher is compared with nnU-Net's own predictor on a few patches"))
    return build_cache(
        job,
        workers=workers,
        threads=threads or available_cores(),
        scheduler=scheduler,
        only=cases,
        memory_limit_bytes=memory_limit_bytes or MEMORY_LIMIT_BYTES,
        progress=progress,
    )


def _refuse_others(unlabelled: "UnlabelledJob", files: "ModelFolder", workers: int, progress: Listener) -> None:
    """Before images are preprocessed for the first time, those that have names of labelled ones or another modality.

    Raises MismatchError, ImageError.
    """
    from fastnnunet.nnunet.unlabelled.sets import require_other_names
    from fastnnunet.teachers.intensities import require_modality, sample_of
    from fastnnunet.teachers.measured import measure_scans

    if unlabelled.target.record_file.is_file():
        return
    found = unlabelled.target.find_images(unlabelled.images, tell=False)
    require_other_names(found, unlabelled.labelled)
    try:
        measured = measure_scans(sample_of(found), files.model, processes=workers, progress=progress)
    except ImageError:
        return  # preprocessing names all images that cannot be read, not those of the sample alone
    require_modality(measured, files.model)


def _warn_of_bad(cache: "CacheFolder", files: "ModelFolder", progress: Listener) -> None:
    """Name scans that would do harm in a training, and labels in too few; nothing is left out here."""
    from fastnnunet.cache.seen import seen_of
    from fastnnunet.teachers.screen import rare_labels, rare_text, screen

    if any(seen_of(cache, case) is None for case in cache.cases):
        progress(
            Message(text="whether the folds agree is not known of all images: some were labelled before it was counted")
        )
        return
    screening = screen(cache, files.model)
    if screening.bad:
        told = [f"{len(screening.bad)} of {len(cache.cases)} images may do harm in a training; look at them:"]
        told += [f"  {verdict.line}" for verdict in screening.bad]
        progress(Message(text="\n".join(told), level="warning"))
    if rare := rare_labels(screening.verdicts, tuple(cache.cases)):
        progress(Message(text=rare_text(rare, len(cache.cases)), level="warning"))


def _verify(cache: "CacheFolder", progress: Listener) -> None:
    from fastnnunet.cache.verify import verify_cache

    damaged = [f"{report.case_id}: {report.problem}" for report in verify_cache(cache, progress) if report.problem]
    if damaged:
        raise CorruptError("\n".join(["cases that did not verify, run the same command again:", *damaged]))
    progress(Message(text=f"verified: all {len(cache.cases)} cases intact"))
