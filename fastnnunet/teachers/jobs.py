"""Caches as commands ask for them: a teacher and a recipe by name become a cache to build or to find."""

import shlex
from pathlib import Path

from fastnnunet.cache.codecs import LogitGapU8, codec_for_spec
from fastnnunet.cache.find import find_cache
from fastnnunet.cache.identity import build_identity, cache_name
from fastnnunet.cache.job import CacheJob, prepare_job
from fastnnunet.cache.store.storage import Place
from fastnnunet.events import Listener, ignore
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.load import load_yaml_spec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher


def build_command(
    teacher: TeacherSpec, spec: CacheSpec, spec_file: Path | None = None, root: Place | None = None
) -> str:
    """The `fastnnunet cache build` command that makes this cache."""
    words = ["fastnnunet", "cache", "build", "-d", teacher.dataset, "-c", teacher.configuration]
    default = TeacherSpec(dataset=teacher.dataset)
    for flag, name in (("-p", "plans"), ("-tr", "trainer"), ("-chk", "checkpoint"), ("--previous", "previous")):
        if getattr(teacher, name) != getattr(default, name):
            words += [flag, getattr(teacher, name)]
    if teacher.folds != default.folds:
        words += ["-f", *map(str, teacher.folds)]
    words += recipe_words(spec, spec_file)
    if root is not None:
        words += ["--root", str(root)]
    return shlex.join(words)


def recipe_words(spec: CacheSpec, spec_file: Path | None, *, engine: bool = True) -> list[str]:
    """The options that say this recipe. `engine`: whether the command has --engine."""
    words = [] if spec_file is None else ["--spec", str(spec_file)]
    recipe = CacheSpec() if spec_file is None else load_yaml_spec(CacheSpec, spec_file)
    if spec.temperature_range is None and spec.temperature != recipe.temperature:
        words += ["--temp", f"{spec.temperature:g}"]
    if engine and spec.engine != recipe.engine:
        words += ["--engine", spec.engine]
    return words


def cache_job(
    teacher: TeacherSpec,
    spec: CacheSpec,
    *,
    root: Place | None = None,
    spec_file: Path | None = None,
    progress: Listener = ignore,
    files: ModelFolder | None = None,
) -> CacheJob:
    """Join nnU-Net's cases and teacher with a cache recipe; nothing is written. `root` None = beside the cases.

    `files`: the model folder where it is open already, or where it is to keep the weights for the build.
    Raises NotFoundError, SpecError, MismatchError, CorruptError.
    """
    source, factory, default_root = open_teacher(teacher, spec, files)
    command = build_command(teacher, spec, spec_file, root)
    return prepare_job(source, factory, spec, root or default_root, command=command, progress=progress)


def cache_for_training(
    teacher: TeacherSpec,
    spec: CacheSpec,
    root: Place | None = None,
    spec_file: Path | None = None,
    files: ModelFolder | None = None,
) -> Place:
    """The complete cache that fits data, plans, folds, checkpoints and recipe.

    Where precision or engine are `auto` a cache built with any fits, since it may come from another machine. A recipe
    with a range of temperatures names the same cache at any of them.
    Raises NotFoundError, MismatchError (the fields that differ and the command that builds the right one), SpecError
    when the recipe does not serve its own temperature.
    """
    return find_for_training(cache_job(teacher, spec, root=root, spec_file=spec_file, files=files))


def find_for_training(job: CacheJob) -> Place:
    """As `cache_for_training`, for cases, teacher and recipe joined already."""
    spec = job.spec
    codec = codec_for_spec(spec, job.factory.num_heads, has_regions=job.factory.has_regions)
    if isinstance(codec, LogitGapU8):
        codec.at(spec.temperature)  # before anybody builds a cache that this training could not use
    identity = job.identity
    if not job.path.is_dir():
        for other in job.factory.alternatives(spec):
            alternative = build_identity(job.cases, other, spec)
            if (job.root / cache_name(alternative)).is_dir():
                identity = alternative
    return find_cache(job.root, identity, build_command=job.command, case_digests=job.cases)
