"""Finding the cache a training needs, or saying exactly why there is none."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from fastnnunet.cache.identity import Identity, cache_name
from fastnnunet.cache.store.folder import CacheFolder, cache_folders, open_cache
from fastnnunet.cache.store.storage import Place
from fastnnunet.errors import CorruptError, MismatchError, NewerFormatError, NotFoundError
from fastnnunet.specs.canonical import differences

NAMED_AT_MOST = 10


def find_cache(
    root: Place, identity: Identity, *, build_command: str, case_digests: Mapping[str, str] | None = None
) -> Place:
    """The folder of the complete cache with exactly this identity under `root`.

    `build_command` is what would build it, quoted in the errors; `case_digests`, when given, lets them name the cases
    whose image changed. Raises NotFoundError when there is no cache at all or the right one is incomplete,
    MismatchError when only other caches exist (with the fields in which the nearest one differs), CorruptError when the
    right one is damaged.
    """
    path = root / cache_name(identity)
    if path.is_dir():
        try:
            cache = open_cache(path)
        except NewerFormatError:
            raise
        except NotFoundError as e:
            raise NotFoundError(f"{e}\nbuild it with: {build_command}") from e
        except CorruptError as e:
            reason = str(e).splitlines()[0]
            where = f"remove it with: rm -r {shlex.quote(str(path))}" if isinstance(path, Path) else "remove it"
            raise CorruptError(f"{reason}\n{where}\nand build it again with: {build_command}") from e
        if missing := cache.missing_cases():
            raise NotFoundError(
                f"soft-label cache {path} is incomplete: {len(missing)} of {len(cache.cases)} cases are missing "
                f"({_some(missing, ' ')})\nfinish it with: {build_command}"
            )
        return path
    others = [other for folder in cache_folders(root) if (other := _readable(folder))]
    if case_digests is not None:  # caches of other images live here too; none of them is nearly this one
        others = [other for other in others if other.cases.keys() & case_digests.keys()]
    if not others:
        raise NotFoundError(f"no soft-label cache of these cases under {root}\nbuild it with: {build_command}")
    nearest = min(others, key=lambda other: len(differences(other.identity, identity)))
    fields = differences(nearest.identity, identity)
    if any(field.startswith("teacher.folds:") for field in fields):  # then it goes without saying whose weights differ
        fields = [f for f in fields if not (f.startswith("teacher.checkpoints.") and "absent" in f)]
    lines = [f"  {field}" for field in fields[:NAMED_AT_MOST]]
    if len(fields) > NAMED_AT_MOST:
        lines.append(f"  and {len(fields) - NAMED_AT_MOST} more")
    if case_digests is not None:
        lines += case_differences(nearest.cases, case_digests)
    lines.append(f"build the right one with: {build_command}")
    if len(lines) == 2 and fields[0].startswith("soft_labels.temperature:") and nearest.temperature is not None:
        lines.append(f"or train at the temperature of this one, with --temp {nearest.temperature:g}")
    raise MismatchError(
        f"no soft-label cache under {root} fits; the nearest, {nearest.path.name}, differs in (cached -> needed)\n"
        + "\n".join(lines)
    )


def _readable(folder: Place) -> CacheFolder | None:
    try:
        return open_cache(folder)
    except (CorruptError, NotFoundError):
        return None  # something else, or damaged: not a candidate


def case_differences(cached: Mapping[str, str], needed: Mapping[str, str]) -> list[str]:
    """Indented lines that name the cases in which two lists of case -> image digest differ, left to right."""
    kinds = {
        "cases whose preprocessed image changed": [c for c in cached if c in needed and cached[c] != needed[c]],
        "cases no longer there": [c for c in cached if c not in needed],
        "new cases": [c for c in needed if c not in cached],
    }
    return [f"  {kind}: {_some(cases, ' ')}" for kind, cases in kinds.items() if cases]


def _some(names: list[str], separator: str) -> str:
    shown = separator.join(names[:NAMED_AT_MOST])
    return shown if len(names) <= NAMED_AT_MOST else f"{shown} and {len(names) - NAMED_AT_MOST} more"
