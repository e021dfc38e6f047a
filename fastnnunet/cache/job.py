"""One cache to be built: cases + teacher + recipe + place. What `plan`, `build` and a training's `find` start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastnnunet.cache.identity import Identity, build_identity, cache_name, digest_cases
from fastnnunet.cache.interfaces import CaseSource, TeacherFactory
from fastnnunet.cache.store.folder import CacheFolder, create_cache, open_cache
from fastnnunet.cache.store.storage import Place
from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.events import Listener, ignore
from fastnnunet.specs.cache import CacheSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheJob:
    """Everything a build needs; make one with `prepare_job`."""

    source: CaseSource
    factory: TeacherFactory
    spec: CacheSpec
    root: Place
    cases: dict[str, str]  # case id -> digest of the preprocessed image
    identity: Identity
    command: str  # what a person types to run this build

    @property
    def path(self) -> Place:
        """Where the cache is or will be."""
        return self.root / cache_name(self.identity)

    def open(self) -> CacheFolder | None:
        """The cache when it exists already."""
        try:
            return open_cache(self.path)
        except NotFoundError:
            return None

    def create(self, provenance: dict[str, Any]) -> CacheFolder:
        """The cache, created when it is not there; `provenance` is what to record beside command and versions."""
        return create_cache(self.root, self.identity, self.spec, self.cases, {"command": self.command, **provenance})

    def todo(self, only: Sequence[str] | None = None) -> list[str]:
        """Cases still to be labelled, largest first.

        `only` restricts them to these cases, checked in depth, so that naming a damaged case rebuilds it.
        Raises SpecError for a case that is not in the data set.
        """
        if unknown := [case for case in only or () if case not in self.cases]:
            known = ", ".join(list(self.cases)[:5])
            raise SpecError(f"--case: got {', '.join(unknown)}, expected cases of this data set such as {known}")
        names = list(dict.fromkeys(only)) if only is not None else list(self.cases)
        cache = self.open()
        if cache is not None:
            if only is None:
                problems = cache.problems(names)
            else:
                problems = {case: cache.problem(case, deep=True) for case in names}
            names = [case for case in names if problems[case] is not None]
        return sorted(names, key=lambda case: (-self.voxels(case), case))

    def voxels(self, case_id: str) -> int:
        z, y, x = self.source.shape_zyx(case_id)
        return z * y * x


def prepare_job(
    source: CaseSource,
    factory: TeacherFactory,
    spec: CacheSpec,
    root: Place,
    *,
    command: str,
    progress: Listener = ignore,
) -> CacheJob:
    """Digest the cases and work out the identity; nothing is written.

    Raises SpecError when recipe and teacher contradict each other.
    """
    cases = digest_cases(source, progress)
    identity = build_identity(cases, factory, spec)
    return CacheJob(
        source=source, factory=factory, spec=spec, root=root, cases=cases, identity=identity, command=command
    )
