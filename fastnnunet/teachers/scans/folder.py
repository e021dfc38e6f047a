"""The work folder: where it keeps what, and which model and scans it is of.

WORK/work.json                             the model and the scans it was begun with
WORK/chosen.json                           how the scans to learn from were chosen
WORK/images/                               DICOM series as files, where the scans are DICOM
WORK/nnUNet_results/Dataset001_Images/     the model, under nnU-Net's names, and the students
WORK/nnUNet_preprocessed/Dataset001_Images/
    unlabelled/scans/                      the scans, preprocessed as any set of images without labels
    <data identifier>/                     the same with the teacher's labels: an ordinary preprocessed data set
    fastnnunet_<plans>_<configuration>/    the caches
    gt_segmentations/                      the teacher's label maps on the grids of the scans
    splits_final.json                      who learns, and who is held out
"""

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastnnunet.cache.job import CacheJob
from fastnnunet.errors import BuildError, CorruptError, MismatchError, SpecError
from fastnnunet.events import Listener, ignore
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.nnunet.files.named import check_reproducible
from fastnnunet.nnunet.files.plans import intensity_properties, without_previous_stage
from fastnnunet.nnunet.unlabelled.sets import ImageSet
from fastnnunet.nnunet.unlabelled.teacher_labels import write_split
from fastnnunet.nnunet.world import world_in
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import differences, sha256_of, to_plain
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.provenance import write_json
from fastnnunet.specs.teacher import Fold, PublishedSpec, TeacherSpec
from fastnnunet.system.files import atomic_output, check_output_folder, make_folder
from fastnnunet.system.locks import locked
from fastnnunet.teachers.data_set import cache_root
from fastnnunet.teachers.images import UnlabelledJob
from fastnnunet.teachers.jobs import recipe_words
from fastnnunet.teachers.nnunet import NnUNetTeacher, make_teacher
from fastnnunet.teachers.scans.found import OPTION, Scans, as_files, find_scans, hold_out, require_known_intensities
from fastnnunet.teachers.stages import first_stage_folder, first_stage_seconds, open_stages

DATASET, FINGERPRINT = "Dataset001_Images", "dataset_fingerprint.json"
SET = "scans"
IMAGES, CHOSEN = "images", "chosen.json"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A work folder and what it is of; make one with `open_work`. All but its fields is asked within `world`."""

    folder: Path
    asked: PublishedSpec
    source: ModelFolder  # where the user has the model
    teacher: TeacherSpec  # the model by its names in this world
    scans: Scans
    recipe: CacheSpec
    recipe_file: Path | None = None  # to quote it in commands
    first: NnUNetTeacher | None = None  # of a cascade: the teacher of its first stage
    held_out: int | None = None  # None: a part of the scans, see `hold_out`
    keep_all: bool = False  # also scans that would do harm

    @property
    def base(self) -> Path:
        """The data set in nnUNet_preprocessed."""
        return self.folder / "nnUNet_preprocessed" / DATASET

    @property
    def cases_folder(self) -> Path:
        """The preprocessed cases with the teacher's labels."""
        return self.base / str(self.source.model.config.data_identifier)

    @property
    def labels_folder(self) -> Path:
        """The teacher's label maps on the grids of the scans."""
        return self.base / "gt_segmentations"

    @property
    def file_ending(self) -> str:
        return str(self.source.dataset_json["file_ending"])

    def options(self, *, of_training: bool = False) -> str:
        """How the command line of `cache build`, or `train`, names this folder and what it is of."""
        words = ["-m", str(self.asked.path), "-i", str(self.scans.folder), "--work", str(self.folder)]
        for flag, name in (("-c", "configuration"), ("-p", "plans"), ("-tr", "trainer"), ("-chk", "checkpoint")):
            if getattr(self.asked, name) is not None:
                words += [flag, getattr(self.asked, name)]
        if self.asked.folds is not None:
            words += ["-tf" if of_training else "-f", *map(str, self.asked.folds)]
        words += recipe_words(self.recipe, self.recipe_file, engine=not of_training)
        if not self.recipe.mirroring:
            words.append("--no-mirroring")
        if not of_training:
            words += [] if self.held_out is None else ["--hold-out", str(self.held_out)]
            words += ["--keep-all"] * self.keep_all
        return shlex.join(words)

    def choose(self, learnt_from: Sequence[str], out: Sequence[str]) -> None:
        """Write who learns and who is held out, and remember what was asked for."""
        write_json(self.folder / CHOSEN, {"held_out": self.held_out, "keep_all": self.keep_all})
        write_split(self.base, learnt_from, out)

    @contextlib.contextmanager
    def world(self) -> Iterator[ModelFolder]:
        """Make this folder nnU-Net's world, with the model in it, for one process at a time.

        Gives the model folder there. Raises BuildError where another process works in it.
        """
        make_folder(self.folder)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder))
            except BlockingIOError as e:
                raise BuildError(f"another process works in {self.folder}\nwait for it, or name another --work") from e
            stack.enter_context(world_in(self.folder))
            yield self._link_model()

    def images(self, progress: Listener = ignore) -> tuple[Path, dict[str, tuple[Path, ...]]]:
        """The scans as files, and their folder; see `as_files`."""
        return as_files(self.scans, self.folder / IMAGES, self.file_ending, progress)

    def unlabelled(self, files: ModelFolder, images: Path) -> UnlabelledJob:
        """The scans as a set of images without labels. `files`: as `world` gives it."""
        target = ImageSet(
            name=SET,
            plans=files.plans,
            configuration=files.configuration,
            dataset_json=files.dataset_json,
            option=OPTION,
            tell=False,  # `find_scans` has
        )
        return UnlabelledJob(
            target=target,
            images=images,
            data_set=None,
            factory=make_teacher(files, self.teacher.folds, self.recipe, unseen={}),
            spec=self.recipe,
            root=cache_root(DATASET, self.teacher.plans, self.teacher.configuration),
            command=f"fastnnunet cache build {self.options()}",
            first=self.first,
        )

    def taught_by(self, files: ModelFolder) -> TeacherSpec:
        """The teacher of a training, of a cascade with what its first stage saw. `files`: as of `unlabelled`."""
        if self.first is None:
            return self.teacher
        target = self.unlabelled(files, self.folder).target
        return replace(self.teacher, previous=str(first_stage_folder(target, self.first)))

    def first_stage_s(self, files: ModelFolder) -> dict[str, float]:
        """Case -> seconds of a cascade's first stage; empty for other models. `files`: as of `unlabelled`."""
        if self.first is None:
            return {}
        return first_stage_seconds(self.unlabelled(files, self.folder).target, self.first)

    def prepared(self, files: ModelFolder) -> CacheJob:
        """The cache of the scans as the teacher sees them. Raises NotFoundError when they are not preprocessed yet, or
        not labelled by a cascade's first stage.
        """
        job = self.unlabelled(files, self.folder)
        return job.cache_job(job.finished())

    def _link_model(self) -> ModelFolder:
        """The model under its names in this world; its checkpoints stay where they are."""
        folder = (
            self.folder
            / "nnUNet_results"
            / DATASET
            / f"{self.teacher.trainer}__{self.teacher.plans}__{self.teacher.configuration}"
        )
        make_folder(folder)
        make_folder(self.base)
        _write(folder / "plans.json", {**self.source.plans, "dataset_name": DATASET})
        _write(folder / "dataset.json", self.source.dataset_json)
        fingerprint = self.source.folder / FINGERPRINT
        if fingerprint.is_file():
            described = read_json_object(fingerprint)
        else:  # nothing of a training reads it, but nnU-Net copies it
            described = {"foreground_intensity_properties_per_channel": intensity_properties(self.source.model.manager)}
        for place in (folder, self.base):
            _write(place / FINGERPRINT, described)
        for fold in self.teacher.folds:
            _link(self.source.path(fold).resolve(), folder / f"fold_{fold}" / self.teacher.checkpoint)
        return ModelFolder(folder, self.teacher.configuration, self.teacher.checkpoint, keep=self.teacher.folds)


def open_work(
    model: PublishedSpec,
    scans: Path,
    folder: Path,
    recipe: CacheSpec = CacheSpec(),
    held_out: int | None = None,
    progress: Listener = ignore,
    *,
    keep_all: bool | None = None,
    recipe_file: Path | None = None,
) -> Work:
    """Join a model and scans with a work folder, which need not exist; all that can be refused is.

    What is None of `held_out` and `keep_all` is as it was chosen before in this folder.
    Writes nothing but work.json, and that last. Files converted from series are removed where scans have changed.
    Raises NotFoundError, CorruptError, SpecError (also for too few scans to hold `held_out` of them out), ImageError
    (also for scans of another modality) and MismatchError (a work folder of another model or other scans).
    """
    recipe = replace(recipe, policy="ensemble")
    check_output_folder(folder)
    stages = open_stages(model, recipe, progress)
    published, files = stages.teacher, stages.teacher.files
    plans = without_previous_stage(files.plans, files.configuration)  # students see the scan alone
    check_reproducible(plans, files.configuration)  # or there could be no bundle
    found = find_scans(scans, files.model)
    before = _chosen(folder)
    held_out = before["held_out"] if held_out is None else held_out
    hold_out(list(found.cases), held_out)
    work = Work(
        folder=folder,
        asked=model,
        source=files,
        teacher=TeacherSpec(
            dataset=DATASET,
            configuration=files.configuration,
            plans=str(files.plans["plans_name"]),
            trainer=files.facts(published.folds[0]).trainer,
            folds=published.folds,
            checkpoint=files.checkpoint,
        ),
        scans=found,
        recipe=recipe,
        recipe_file=recipe_file,
        first=stages.first,
        held_out=held_out,
        keep_all=before["keep_all"] if keep_all is None else keep_all,
    )
    if not _is_known(work, record := _record(work)):
        require_known_intensities(found, files.model)
        if (converted := folder / IMAGES).is_dir():  # of series that have changed
            shutil.rmtree(converted)
        write_json(folder / "work.json", record)
    return work


def _chosen(folder: Path) -> dict[str, Any]:
    """What `Work.choose` remembers. Raises CorruptError."""
    file, chosen = folder / CHOSEN, {"held_out": None, "keep_all": False}
    if not file.is_file():
        return chosen
    try:
        chosen |= read_json_object(file)
        count = chosen["held_out"]
        if not (count is None or type(count) is int) or not isinstance(chosen["keep_all"], bool):
            raise ValueError(f"got {chosen}, expected a number or null, and true or false")
    except ValueError as e:
        raise CorruptError(f"{file} is damaged: {e}\nremove it, and give --hold-out and --keep-all again") from e
    return chosen


def _record(work: Work) -> dict[str, Any]:
    first = {} if work.first is None else {"first": _recognised(work.first.files, work.first.folds)}
    return {
        "format_version": VERSION,
        "model": {
            **_recognised(work.source, work.teacher.folds),
            **first,
            "mirroring": work.recipe.mirroring,
            "step_size": work.recipe.step_size,
        },
        "scans": work.scans.sizes(),
    }


def _recognised(files: ModelFolder, folds: tuple[Fold, ...]) -> dict[str, Any]:
    return {
        "configuration": files.configuration,
        "plans": sha256_of(files.plans),
        "labels": sha256_of(files.dataset_json),
        "checkpoints": {str(fold): files.digest(fold) for fold in folds},
    }


def _is_known(work: Work, record: dict[str, Any]) -> bool:
    """Whether a work folder is of this model and these scans; not yet where it is new.

    Until the first cache is begun, scans may change, as those that cannot be used are to be mended or removed. So may
    how they are labelled (folds, mirroring, step size), but not what they are preprocessed for.
    Raises MismatchError saying in what it is of something else, SpecError for a folder of others.
    """
    file = work.folder / "work.json"
    if not file.is_file():
        if work.folder.is_dir() and any(p for p in work.folder.iterdir() if not p.name.startswith(".")):
            raise SpecError(f"--work {work.folder} holds other things and no work.json\nname an empty or a new folder")
        return False
    try:
        stored = read_json_object(file)
        model, scans = dict(stored["model"]), dict(stored["scans"])
        if stored["format_version"] != VERSION:
            raise ValueError(f"format version {stored['format_version']}, expected {VERSION}")
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptError(f"{file} is damaged: {e}\nname another --work, or remove this one") from e
    problems = [f"model {change}" for change in differences(model, record["model"])]
    same_model = _preprocessed_for(model) == _preprocessed_for(record["model"])
    now = to_plain(record["scans"])
    begun = any(work.base.glob("fastnnunet_*"))
    if same_model and not begun:
        return not problems and scans == now
    if problems and same_model and scans == now:
        raise MismatchError(
            f"the work folder {work.folder} was labelled otherwise (there -> now):\n"
            + "\n".join(f"  - {line}" for line in _labelled_otherwise(model, record["model"]))
            + "\ngive what is there, or name another --work, where everything is labelled anew"
        )
    kinds = {
        "new": [case for case in now if case not in scans],
        "changed": [case for case in now if case in scans and now[case] != scans[case]],
        "no longer there": [case for case in scans if case not in now],
    }
    problems += [f"scans {kind}: {', '.join(cases)}" for kind, cases in kinds.items() if cases]
    if problems:
        raise MismatchError(
            f"--work {work.folder} is of another model or of other scans (there -> now):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nname another --work for these"
        )
    return True


def _labelled_otherwise(there: dict[str, Any], now: dict[str, Any], stage: str = "") -> Iterator[str]:
    """The options in which two records of one model differ."""
    weights, ours = there["checkpoints"], now["checkpoints"]
    if weights.keys() != ours.keys():
        yield f"{stage}folds: {' '.join(sorted(weights))} -> {' '.join(sorted(ours))}"
    if other := sorted(fold for fold in weights.keys() & ours.keys() if weights[fold] != ours[fold]):
        yield f"{stage}weights of fold {', '.join(other)}: others than there"
    if (was := there.get("mirroring")) != now.get("mirroring"):
        yield "mirrored -> --no-mirroring" if was else "--no-mirroring -> mirrored"
    if there.get("step_size") != now.get("step_size"):
        yield f"step_size: {there.get('step_size')} -> {now.get('step_size')}"
    if "first" in there:
        yield from _labelled_otherwise(there["first"], now["first"], "first stage, ")


def _preprocessed_for(model: dict[str, Any]) -> list[Any]:
    stages = [model, *([model["first"]] if "first" in model else [])]
    return [[stage.get(name) for name in ("configuration", "plans", "labels")] for stage in stages]


def _write(file: Path, described: dict[str, Any]) -> None:
    """As nnU-Net does, which knows statistics that are no numbers."""
    with atomic_output(file) as partial:
        partial.write_text(json.dumps(described, indent=4))


def _link(file: Path, link: Path) -> None:
    """A link to a file, or a copy where the system makes none."""
    if link.is_symlink() and Path(os.readlink(link)) == file:
        return
    make_folder(link.parent)
    with atomic_output(link) as partial:
        try:
            partial.symlink_to(file)
        except OSError:
            shutil.copyfile(file, partial)
