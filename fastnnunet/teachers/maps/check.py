"""Whether soft maps fit the preprocessed cases: every file is read and looked at before anything is made of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.interfaces import Float32Array
from fastnnunet.errors import FastnnUNetError, MismatchError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.nnunet.files.cases import PreprocessedCases
from fastnnunet.nnunet.files.model import Model
from fastnnunet.teachers.maps.read import Geometry, SoftMap, geometry_of, read_map

SUM_TOLERANCE = 5e-3  # how far the classes of a voxel may be from a sum of 1; half precision needs a tenth of it
RANGE_TOLERANCE = 1e-4  # how far rounding may take a probability out of [0, 1]
SPACING_TOLERANCE = 1e-3  # relative; headers hold float32
ORIGIN_TOLERANCE = 1e-2  # of a voxel
DIRECTION_TOLERANCE = 1e-3
NAMED_AT_MOST = 20


def check_maps(
    folders: Mapping[Path, Mapping[str, Path]],
    wanted: Sequence[str],
    cases: PreprocessedCases,
    model: Model,
    progress: Listener = ignore,
) -> tuple[dict[str, str], ...]:
    """Digests of the maps, case id -> digest for every folder. `folders`: folder -> case id -> file.

    Raises MismatchError that names everything that is wrong in any of them.
    """
    problems: list[str] = []
    for folder, files in folders.items():
        problems += [f"{folder} has no map of case {case}" for case in wanted if case not in files]
        problems += [f"{files[case]} belongs to no preprocessed case" for case in files if case not in cases.case_ids]
    total = sum(case in files for files in folders.values() for case in wanted)
    done, found = 0, []
    for files in folders.values():
        digests: dict[str, str] = {}
        for case in (case for case in wanted if case in files):
            try:
                soft = read_map(files[case])
                problems += [f"{files[case]}: {problem}" for problem in map_problems(soft, case, cases, model)]
                digests[case] = soft.digest()
            except FastnnUNetError as e:
                problems.append(str(e))
            done += 1
            progress(Progress(what="checking maps", done=done, total=total, unit="maps"))
        found.append(digests)
    if problems:
        shown = [f"  - {problem}" for problem in problems[:NAMED_AT_MOST]]
        more = [f"  and {len(problems) - NAMED_AT_MOST} more"] if len(problems) > NAMED_AT_MOST else []
        raise MismatchError(
            "\n".join([f"the soft maps do not fit the preprocessed cases, {len(problems)} problem(s):", *shown, *more])
            + "\nmend them; nothing was written. Maps of some cases only are taken with --cases"
        )
    return tuple(found)


def map_problems(soft: SoftMap, case_id: str, cases: PreprocessedCases, model: Model) -> list[str]:
    """What is wrong with one map: shape, place, number of classes, values."""
    properties = cases.load(case_id)[3]
    problems = []
    before = [int(n) for n in properties["shape_before_cropping"]]
    expected = tuple(before[axis] for axis in model.manager.transpose_backward)
    got = soft.values_CZYX.shape
    if got[1:] != expected:
        problems.append(f"got {_by(got[1:])} voxels (z, y, x), expected {_by(expected)} as its image has")
    if got[0] != model.num_heads:
        kind = "regions" if model.has_regions else "classes with background"
        problems.append(f"got {got[0]} channels, expected {model.num_heads}, the {kind} of dataset.json")
    problems += geometry_problems(soft.geometry, properties)
    sums_to_one = got[0] == model.num_heads and not model.has_regions
    return problems + value_problems(soft.values_CZYX, sums_to_one=sums_to_one)


def geometry_problems(got: Geometry, properties: Mapping[str, Any]) -> list[str]:
    """Where a map lies elsewhere than its image. What the image's reader does not know is not compared."""
    expected = geometry_of(properties)
    spacing = np.asarray(expected.spacing_zyx)
    limits = {
        "spacing_zyx": SPACING_TOLERANCE * spacing,
        "origin_xyz": ORIGIN_TOLERANCE * spacing.min(),
        "direction": DIRECTION_TOLERANCE,
    }
    problems = []
    for name, limit in limits.items():
        theirs, ours = getattr(got, name), getattr(expected, name)
        if theirs is None or ours is None:
            continue
        if len(theirs) != len(ours) or not (np.abs(np.subtract(theirs, ours)) <= limit).all():
            problems.append(f"{name}: got {_rounded(theirs)}, expected {_rounded(ours)} as its image has")
    return problems


def value_problems(values_CZYX: Float32Array, *, sums_to_one: bool) -> list[str]:
    """What keeps values from being probabilities."""
    if not np.isfinite(values_CZYX).all():
        count = np.count_nonzero(~np.isfinite(values_CZYX))
        return [f"{count} values are not finite (NaN or infinite)"]
    low, high = float(values_CZYX.min(initial=1)), float(values_CZYX.max(initial=0))
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        whole = " (whole numbers, as of a label map)" if (values_CZYX == np.rint(values_CZYX)).all() else ""
        return [f"values from {low:g} to {high:g}{whole}, expected probabilities from 0 to 1"]
    if not sums_to_one:
        return []
    sums_ZYX = values_CZYX.sum(axis=0, dtype=np.float32)
    furthest = float(sums_ZYX.flat[int(np.abs(sums_ZYX - 1).argmax())]) if sums_ZYX.size else 1.0
    if abs(furthest - 1) > SUM_TOLERANCE:
        return [f"the classes of a voxel sum to {furthest:.4f}, expected 1, or off by {SUM_TOLERANCE:g} at most"]
    return []


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _rounded(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.5g}" for value in values) + ")"
