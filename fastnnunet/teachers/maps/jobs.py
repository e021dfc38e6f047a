"""Soft maps and a recipe by name become a cache to build; a cache by name is found fit for a training, or refused."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastnnunet.cache.codecs import codec_for_spec, identity_of_codec
from fastnnunet.cache.find import case_differences
from fastnnunet.cache.identity import build_identity, digest_cases
from fastnnunet.cache.job import CacheJob
from fastnnunet.cache.store.folder import CacheFolder, cache_folders, open_cache
from fastnnunet.cache.store.storage import Place, place_at
from fastnnunet.errors import MismatchError, NotFoundError, SpecError
from fastnnunet.events import Listener, ignore
from fastnnunet.nnunet.files.cases import open_cases
from fastnnunet.nnunet.files.model import Model, model_of
from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset
from fastnnunet.nnunet.files.plans import read_json
from fastnnunet.nnunet.files.splits import split_of
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import differences
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import cache_root
from fastnnunet.teachers.maps.check import check_maps
from fastnnunet.teachers.maps.read import files_of
from fastnnunet.teachers.maps.teacher import ChosenCases, SoftMaps


def preprocessed_model(spec: TeacherSpec) -> Model:
    """What the plans and dataset.json beside the preprocessed cases say; no trained model need exist.

    Raises NotFoundError, CorruptError, MismatchError.
    """
    base = nnunet_folder("nnUNet_preprocessed") / resolve_dataset(spec.dataset)
    return model_of(read_json(base / f"{spec.plans}.json"), spec.configuration, read_json(base / "dataset.json"))


def maps_job(
    spec: TeacherSpec,
    recipe: CacheSpec,
    folders: Sequence[Path],
    *,
    root: Place | None = None,
    spec_file: Path | None = None,
    only: Sequence[str] | None = None,
    progress: Listener = ignore,
) -> CacheJob:
    """Read and check every map; nothing is written. Of `spec` data set, configuration and plans count.

    Raises NotFoundError, SpecError, ImageError, MismatchError with all that is wrong with the maps.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SpecError("SOFT_DIR: got a folder twice, expected each rater once")
    if recipe.policy != "ensemble":
        raise SpecError(f"policy: got {recipe.policy}, expected ensemble: soft maps have no folds")
    model = preprocessed_model(spec)
    if (stage := model.config.previous_stage_name) is not None:
        raise SpecError(f"{spec.configuration} is a cascade stage after {stage}; import maps for {stage} or 3d_fullres")
    cases = open_cases(model.plans, spec.configuration)
    if unknown := sorted({*(only or ())} - {*cases.case_ids}):
        raise SpecError(f"--cases: got {', '.join(unknown)}, expected cases such as {', '.join(cases.case_ids[:5])}")
    wanted = tuple(case for case in cases.case_ids if only is None or case in only)
    found = {folder: files_of(folder) for folder in folders}
    digests = check_maps(found, wanted, cases, model, progress)
    raters = [{case: files[case] for case in wanted} for files in found.values()]
    source = ChosenCases(cases, wanted)
    images = digest_cases(source, progress)
    _refuse_twins(images)
    order = sorted(range(len(digests)), key=lambda rater: sorted(digests[rater].items()))  # their mean has no order
    factory = SoftMaps(
        plans=model.plans,
        dataset_json=model.dataset_json,
        configuration=spec.configuration,
        num_heads=model.num_heads,
        has_regions=model.has_regions,
        patch_size=model.patch_size,
        cases=cases,
        images={digest: case for case, digest in images.items()},
        most_voxels=max(math.prod(map(int, cases.load(case)[3]["shape_before_cropping"])) for case in wanted),
        folders=tuple(raters[rater] for rater in order),
        digests=tuple(digests[rater] for rater in order),
    )
    used = replace(recipe, mirroring=False, step_size=0.5, engine="auto", precision="fp32")  # what runs no network
    return CacheJob(
        source=source,
        factory=factory,
        spec=used,
        root=root or cache_root(resolve_dataset(spec.dataset), spec.plans, spec.configuration),
        cases=images,
        identity=build_identity(images, factory, used),
        command=_command(spec, recipe, folders, root, spec_file, only),
    )


def _refuse_twins(images: dict[str, str]) -> None:
    """A map is found by the image it belongs to."""
    first: dict[str, str] = {}
    for case, digest in images.items():
        if (other := first.setdefault(digest, case)) != case:
            raise MismatchError(f"cases {other} and {case} have the same image\nleave one of them out with --cases")


def _command(
    spec: TeacherSpec,
    recipe: CacheSpec,
    folders: Sequence[Path],
    root: Place | None,
    spec_file: Path | None,
    only: Sequence[str] | None,
) -> str:
    words = ["fastnnunet", "cache", "import", *(str(folder.absolute()) for folder in folders)]
    words += ["-d", spec.dataset, "-c", spec.configuration, "-p", spec.plans]
    if spec_file is not None:
        words += ["--spec", str(spec_file)]
    if recipe.temperature_range is None:
        words += ["--temp", f"{recipe.temperature:g}"]
    if root is not None:
        words += ["--root", str(root)]
    if only is not None:
        words += ["--cases", *only]
    return shlex.join(words)


def named_cache(
    which: str,
    spec: TeacherSpec,
    recipe: CacheSpec,
    model: Model,
    fold: int | str,
    *,
    root: Place | None = None,
    spec_file: Path | None = None,
) -> Place:
    """The complete cache `which`, a folder, a URL or the first digits of a key, when it fits a training of `fold`.

    Its labels must be the model's, its temperature the recipe's, its encoding that of `spec_file` where one is given,
    and its images those of the fold's cases. Raises NotFoundError, CorruptError, MismatchError, SpecError.
    """
    cache = _opened(which, root or cache_root(resolve_dataset(spec.dataset), spec.plans, spec.configuration))
    labels = (cache.identity["teacher"].get("labels"), model.dataset_json["labels"])
    if labels[0] != labels[1] or cache.identity["soft_labels"]["heads"] != model.num_heads:
        raise MismatchError(f"cache {cache.path} has other labels\n  got      {labels[0]}\n  expected {labels[1]}")
    if cache.temperature is not None and cache.temperature != recipe.temperature:
        another = _instead(cache.build_command, "--temp", f"{recipe.temperature:g}")
        raise MismatchError(
            f"cache {cache.path} holds soft labels at another temperature\n"
            f"  got      {cache.temperature:g}\n  expected {recipe.temperature:g}\n"
            f"train at its own with --temp {cache.temperature:g}, or make another with: {another}"
        )
    cache.codec_at(recipe.temperature)
    if spec_file is not None:
        codec = codec_for_spec(recipe, model.num_heads, has_regions=model.has_regions)
        wanted = identity_of_codec(codec, recipe.temperature)
        if changed := differences(cache.identity["soft_labels"], wanted):
            raise MismatchError(
                f"cache {cache.path} was made by another recipe than {spec_file} (cached -> needed)\n"
                + "\n".join(f"  {line}" for line in changed)
            )
    cases = open_cases(model.plans, spec.configuration)
    split = split_of(nnunet_folder("nnUNet_preprocessed") / model.manager.dataset_name, cases.case_ids, fold)
    needed = cases.case_ids if split is None else sorted({*split["train"], *split["val"]})
    digests = {case: cases.digest(case) for case in needed}
    kept = {case: digest for case, digest in cache.cases.items() if case in digests}
    if lines := case_differences(kept, digests):
        raise MismatchError(
            f"cache {cache.path} does not fit the cases of fold {fold}\n"
            + "\n".join(lines)
            + f"\nmake one that does with: {_instead(cache.build_command, '--cases')}"
        )
    if missing := [case for case, problem in cache.problems(needed).items() if problem is not None]:
        raise NotFoundError(
            f"soft-label cache {cache.path} is incomplete: {len(missing)} case(s), first {missing[0]}\n"
            f"finish it with: {cache.build_command}"
        )
    return cache.path


def _instead(command: str, option: str, *values: str) -> str:
    """A command with other values of an option, or without it."""
    words = shlex.split(command)
    if option in words:
        begin = words.index(option)
        end = next((n for n in range(begin + 1, len(words)) if words[n].startswith("-")), len(words))
        del words[begin:end]
    return shlex.join([*words, *([option, *values] if values else [])])


def _opened(which: str, root: Place) -> CacheFolder:
    if "://" in which or Path(which).is_dir():
        return open_cache(place_at(which) if "://" in which else Path(which).resolve())
    found = [folder for folder in cache_folders(root) if folder.name.startswith(which)]
    if len(found) != 1:
        there = ", ".join(folder.name for folder in cache_folders(root)) or "none"
        problem = "several caches begin so" if found else "no such cache"
        raise NotFoundError(
            f"--soft-labels {which}: {problem} under {root}\nthere are: {there}\n"
            "expected a cache folder or the first digits of one key; see: fastnnunet cache list"
        )
    return open_cache(found[0])
