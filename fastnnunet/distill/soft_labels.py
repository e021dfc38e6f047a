"""The cache as a trainer sees it."""

import shlex
from pathlib import Path

import numpy as np

from fastnnunet.cache.find import find_cache
from fastnnunet.cache.identity import build_identity, cache_name, digest_cases
from fastnnunet.cache.reader import SoftLabelReader
from fastnnunet.nnunet.dataset import open_teacher
from fastnnunet.nnunet.teacher import Precision
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec


class CachedSoftLabels:
    """Random access to the float32 soft labels of a cache. Fork and spawn safe: the reader opens files on first use."""

    def __init__(self, cache: Path) -> None:
        self._reader = SoftLabelReader(cache)
        self.num_channels = self._reader.codec.num_stored
        self.key = self._reader.key

    def read(self, case_id: str, lower_zyx: tuple[int, ...], upper_zyx: tuple[int, ...]) -> np.ndarray:
        """Probabilities of the stored channels: float32 (S, z, y, x); background, channel 0 of classes, is left out."""
        probabilities = self._reader.to_probabilities(self._reader.read_patch(case_id, lower_zyx, upper_zyx))
        return probabilities[probabilities.shape[0] - self.num_channels :]


def build_command(teacher: TeacherSpec, spec: CacheSpec, spec_file: Path | None = None) -> str:
    """The `fastnnunet cache build` command that makes this cache."""
    words = ["fastnnunet", "cache", "build", "-d", teacher.dataset, "-c", teacher.configuration]
    default = TeacherSpec(dataset=teacher.dataset)
    for flag, name in (("-p", "plans"), ("-tr", "trainer"), ("-chk", "checkpoint")):
        if getattr(teacher, name) != getattr(default, name):
            words += [flag, getattr(teacher, name)]
    if teacher.folds != default.folds:
        words += ["-f", *map(str, teacher.folds)]
    if spec_file is not None:
        words += ["--spec", str(spec_file)]
    if spec.temperature != CacheSpec().temperature:
        words += ["--temp", f"{spec.temperature:g}"]
    return shlex.join(words)


def cache_for_training(
    teacher: TeacherSpec, spec: CacheSpec, root: Path | None = None, spec_file: Path | None = None
) -> Path:
    """The complete cache that fits data, plans, folds, checkpoints and recipe.

    With `precision: auto` a cache built in either precision fits, since it may come from another machine.
    Raises NotFoundError, MismatchError (the fields that differ and the command that builds the right one).
    """
    import dataclasses

    cases, factory, default_root = open_teacher(teacher, spec)
    root = root or default_root
    digests = digest_cases(cases)
    identity = build_identity(digests, factory, spec)
    if spec.precision == "auto" and not (root / cache_name(identity)).is_dir():
        other: Precision = "fp32" if factory.precision == "bf16" else "bf16"
        alternative = build_identity(digests, dataclasses.replace(factory, precision=other), spec)
        if (root / cache_name(alternative)).is_dir():
            identity = alternative
    return find_cache(root, identity, build_command=build_command(teacher, spec, spec_file), case_digests=digests)
