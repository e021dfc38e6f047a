"""Published cascades: both stages found in one folder or zip, and images labelled by the first for the second."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastnnunet.engines.registry import available_cores
from fastnnunet.errors import BuildError, CorruptError, FastnnUNetError, NotFoundError, SpecError
from fastnnunet.events import Listener, Message, Progress, ignore
from fastnnunet.nnunet.files.cases import dataset_class
from fastnnunet.nnunet.files.model import Model, ModelFolder, model_of
from fastnnunet.nnunet.unlabelled.image_case import PARTIAL, ImageTask
from fastnnunet.nnunet.unlabelled.previous import (
    UnlabelledCascadeCases,
    check_stages,
    first_stage_image,
    second_stage_labels,
)
from fastnnunet.nnunet.unlabelled.sets import ImageSet
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import canonical_json, sha256_of
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.teacher import PublishedSpec
from fastnnunet.system.files import atomic_output, make_folder
from fastnnunet.teachers.nnunet import LoadedTeacher, NnUNetTeacher
from fastnnunet.teachers.published import candidates, open_model, open_published

_ENDING = ".b2nd"  # of the cases of a set


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """A published teacher, and of a cascade the teacher that labels images before it."""

    teacher: NnUNetTeacher
    first: NnUNetTeacher | None


def open_stages(spec: PublishedSpec, recipe: CacheSpec, progress: Listener = ignore) -> Stages:
    """As `open_published`, for cascades too: the first stage is looked for beside the second, and all its folds used.

    Of several with the right configuration and plans that of the same trainer is taken. Raises what `open_published`
    raises, and NotFoundError where there is no first stage.
    """
    teacher = open_model(spec, recipe, progress)
    stage = teacher.files.model.config.previous_stage_name
    if stage is None:
        return Stages(teacher=teacher, first=None)
    first = open_published(_first_stage(spec, teacher.files, stage, progress), recipe, progress, takes_folds=False)
    check_stages(first.files.model, teacher.files.model)
    return Stages(teacher=teacher, first=first)


def _first_stage(spec: PublishedSpec, files: ModelFolder, stage: str, progress: Listener) -> PublishedSpec:
    folder = files.folder.resolve()
    trainer, _, rest = folder.name.partition("__")
    plans, _, _ = rest.partition("__")
    beside = candidates(p.parent for p in sorted(folder.parent.glob("*/plans.json")))
    found = [c for c in beside if (c.plans, c.configuration) == (plans, stage)]
    same = [c for c in found if c.trainer == trainer] or found
    if not same:
        raise NotFoundError(
            f"{spec.path}: {files.configuration} is a cascade stage and needs the predictions of {stage}, which is not "
            f"beside it\n  expected {trainer}__{plans}__{stage}\ngive a zip or a folder that holds both, or use a "
            "configuration without a previous stage"
        )
    if len(same) > 1:
        there = ", ".join(c.folder.name for c in same)
        raise SpecError(f"{spec.path}: several models are the first stage of {files.configuration}: {there}\nkeep one")
    progress(Message(text=f"{files.configuration} is a cascade's second stage: {same[0].folder.name} labels first"))
    return PublishedSpec(path=same[0].folder)


def label_first(
    target: ImageSet, images: Path, first: NnUNetTeacher, threads: int | None = None, progress: Listener = ignore
) -> UnlabelledCascadeCases:
    """The cases of a preprocessed set with the label maps of a cascade's first stage; what is there already is kept.

    They lie in a folder of their own in the set, as nnU-Net's `predicted_next_stage` does, one for every first stage.
    `images`: the folder that the set was made from. Raises NotFoundError, BuildError naming the case, DiskSpaceError.
    """
    record, found = target.record(), target.find_images(images, tell=False)
    folder = first_stage_folder(target, first)
    make_folder(folder)
    known = _read_known(folder)
    wanted = {case: {name: sha for name, (_, _, sha) in stamps.items()} for case, stamps in record.cases.items()}
    todo = [c for c in wanted if _images_of(known, c) != wanted[c] or not (folder / f"{c}{_ENDING}").is_file()]
    if todo:
        loaded = first.load(threads or available_cores())
        second = model_of(target.plans, target.configuration, target.dataset_json)
        for done, case in enumerate(todo, start=1):
            task = ImageTask(
                case_id=case,
                files=found[case],
                folder=folder,
                plans=first.files.plans,
                configuration=first.files.configuration,
                dataset_json=first.files.dataset_json,
            )
            begin = time.perf_counter()
            _label(task, loaded, second, target)
            known[case] = {"images": wanted[case], "seconds": time.perf_counter() - begin}
            with atomic_output(_known_file(folder)) as partial:
                partial.write_text(canonical_json(known))
            what = f"labelling by {first.files.configuration}"
            progress(Progress(what=what, done=done, total=len(todo), unit="cases"))
    return first_stage_cases(target, first)


def _label(task: ImageTask, loaded: LoadedTeacher, second: Model, target: ImageSet) -> None:
    first = loaded.recipe.files.model
    try:
        image = first_stage_image(task, first)
        ((_, logits_HZYX),) = loaded.blocks(image.image_CZYX, loaded.recipe.folds, image.image_CZYX.shape[1:])
        labels_ZYX = second_stage_labels(image, logits_HZYX, first, second)
        with TemporaryDirectory(prefix=PARTIAL, dir=target.folder) as made:
            dataset_class(target.cases_folder).save_seg(labels_ZYX, str(Path(made, task.case_id)))
            name = f"{task.case_id}{_ENDING}"
            Path(made, name).replace(task.folder / name)
    except FastnnUNetError:
        raise
    except Exception as e:  # from readers and frameworks underneath
        raise BuildError(
            f"{task.case_id} cannot be labelled by {first.configuration}: {type(e).__name__}: {e}\n"
            "mend that and run the same command again; images that are labelled are kept"
        ) from e


def first_stage_cases(target: ImageSet, first: NnUNetTeacher) -> UnlabelledCascadeCases:
    """The cases as `label_first` left them. Raises NotFoundError naming those without a label map."""
    folder, finished = first_stage_folder(target, first), tuple(target.record().cases)
    if missing := [case for case in finished if not (folder / f"{case}{_ENDING}").is_file()]:
        raise NotFoundError(
            f"{len(missing)} of {len(finished)} images were not labelled by {first.files.configuration} yet, first "
            f"{missing[0]}: {folder}\nrun the command that labels them again"
        )
    labels = tuple(first.files.model.labels.foreground_labels)
    return UnlabelledCascadeCases(target.cases_folder, folder, labels, finished)


def first_stage_folder(target: ImageSet, first: NnUNetTeacher) -> Path:
    """Where the label maps of this first stage lie, on the grid of the set's cases: a `--previous` of a training."""
    files = first.files
    own = replace(target, plans=files.plans, configuration=files.configuration)
    key = sha256_of({"teacher": first.identity(), "preprocessing": [own.preprocessing, target.preprocessing]})
    return target.folder / f"{target.data_identifier}.{files.configuration}.{key[:16]}"


def first_stage_seconds(target: ImageSet, first: NnUNetTeacher) -> dict[str, float]:
    """Case -> how long the first stage took, from reading the image to writing its label map. Raises CorruptError."""
    known = _read_known(first_stage_folder(target, first))
    return {case: float(entry["seconds"]) for case, entry in known.items()}


def _known_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.images")


def _images_of(known: dict[str, Any], case: str) -> Any:
    return known[case]["images"] if case in known else None


def _read_known(folder: Path) -> dict[str, Any]:
    """Case -> `images`, names and digests of the files that its label map was made of, and `seconds` that it took."""
    file = _known_file(folder)
    try:
        known = read_json_object(file)
        if not all(isinstance(entry, dict) and entry.keys() >= {"images", "seconds"} for entry in known.values()):
            raise CorruptError(f"{file}: expected images and seconds of every case")
        return known
    except FileNotFoundError:
        return {}
    except CorruptError as e:
        raise CorruptError(f"{e}\nremove {file}, and the images are labelled again") from e
