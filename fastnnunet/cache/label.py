"""Labelling one case: teacher, encoding and writing side by side."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastnnunet.cache.interfaces import CaseSource, Float32Array, Teacher, TeacherFactory
from fastnnunet.cache.seen import Counts, FoldTally, TallyingTeacher, count_heads, seen_by
from fastnnunet.cache.store.folder import CacheFolder
from fastnnunet.cache.store.manifest import Manifest
from fastnnunet.cache.store.shard import chunk_for
from fastnnunet.cache.store.writer import CaseWriter, case_writer
from fastnnunet.errors import BuildError, FastnnUNetError, MismatchError
from fastnnunet.specs.canonical import to_plain

log = logging.getLogger(__name__)

MAX_PENDING_BLOCKS = 4  # finished by the teacher and not yet encoded: bounds memory where encoding is the slower


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseTask:
    """One case's work, small enough to be sent to a worker."""

    case_id: str
    cache: CacheFolder  # knows this one case only
    source: CaseSource
    factory: TeacherFactory
    folds: tuple[Any, ...]
    threads: int


def label_case(task: CaseTask, teacher: Teacher, encoder: Executor) -> Callable[[], Manifest]:
    """Run the teacher over one case while `encoder` encodes what is ready; the returned call commits and waits.

    The teacher is free for the next case once this returns. Both this and the returned call raise MismatchError when
    the image is not the one the cache is for, DiskSpaceError when the disk is full, BuildError for anything else.
    """
    start = time.perf_counter()
    case = task.case_id
    stack = ExitStack()
    with _named(case), stack:
        if (got := task.source.digest(case)) != task.cache.cases[case]:
            raise MismatchError(
                f"the preprocessed image of case {case} changed during the build\n"
                f"  got      {got}\n  expected {task.cache.cases[case]}\nrun the same command again"
            )
        image_CZYX = task.source.image_CZYX(case)
        shape_zyx = task.source.shape_zyx(case)
        chunk_zyx = chunk_for(task.cache.spec, shape_zyx)
        writer = stack.enter_context(case_writer(task.cache, case, shape_zyx))
        pooled = task.cache.spec.pooling == "probabilities"
        per_fold = partial(task.cache.codec.target, temperature=task.cache.temperature) if pooled else None
        pending: deque[Future[Counts]] = deque()
        stack.callback(wait, pending)  # before the folder goes, whatever went wrong
        count = partial(count_heads, has_regions=task.factory.has_regions, probabilities=pooled)
        voxels = np.zeros(task.factory.num_heads, np.int64)
        if isinstance(teacher, TallyingTeacher):
            tally = FoldTally(task.folds, task.factory.num_heads, has_regions=task.factory.has_regions)
            blocks = teacher.tallied_blocks(image_CZYX, task.folds, chunk_zyx, per_fold, tally)
        else:
            tally, blocks = None, teacher.blocks(image_CZYX, task.folds, chunk_zyx, per_fold)
        for number, values_CZYX in blocks:
            pending.append(encoder.submit(_encode, writer, count, number, values_CZYX, pooled))
            if len(pending) > MAX_PENDING_BLOCKS:
                voxels += pending.popleft().result()
        seconds = time.perf_counter() - start
        unfinished = stack.pop_all()  # the folder stays until it is committed

    def commit() -> Manifest:
        with _named(case), unfinished:
            total = sum((future.result() for future in pending), start=voxels)
            return writer.commit(seconds, to_plain(seen_by(total, tally)))

    return commit


def _encode(
    writer: CaseWriter,
    count: Callable[[Float32Array], Counts],
    number: tuple[int, int, int],
    values_CZYX: Float32Array,
    pooled: bool,
) -> Counts:
    writer.add(number, values_CZYX, probabilities=pooled)
    return count(values_CZYX)


@contextmanager
def _named(case_id: str) -> Iterator[None]:
    """Errors of this project pass; those of the frameworks underneath, such as running out of memory, become one."""
    try:
        yield
    except FastnnUNetError:
        raise
    except Exception as e:
        log.exception("case %s failed", case_id)
        raise BuildError(f"{type(e).__name__}: {e}") from e
