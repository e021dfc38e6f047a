"""`distil_images`: students of a published nnU-Net from scans without labels, in a work folder that is kept.

`label_images` and `train_on_images` are its single stages. All see nnU-Net's folders in the work folder, and nothing of
the user's own.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastnnunet.api.distil import Student, distil
from fastnnunet.api.export import export
from fastnnunet.api.judged import JudgedStudent, LabelledScans, judge, write_report
from fastnnunet.api.label import build
from fastnnunet.api.overall import Overall, Passes, median_passes, training_passes
from fastnnunet.errors import MismatchError, NotFoundError, SpecError
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import SCANS_TRAINING, DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import PublishedSpec

if TYPE_CHECKING:
    from fastnnunet.cache.store.folder import CacheFolder
    from fastnnunet.distill.job import TrainingJob
    from fastnnunet.nnunet.files.model import ModelFolder
    from fastnnunet.teachers.nnunet import NnUNetTeacher
    from fastnnunet.teachers.scans.folder import Work
    from fastnnunet.teachers.screen import Screening

CHECKPOINT = "checkpoint_final.pth"
_MARKS = {"bundle": "bundle.json", "nnunet_model": "plans.json"}  # in the folders of a student
_FIRST_STAGE, _REPORT = "labelling by the first stage", "writing the report"  # the first one of a cascade


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilledImages:
    """What came out of `distil_images`."""

    scans: LabelledScans
    students: tuple[JudgedStudent, ...]
    summary: Path
    report: Path  # HTML, with everything inside


def distil_images(
    model: PublishedSpec,
    scans: Path,
    output: Path,
    students: Sequence[StudentSpec],
    *,
    work: Path | None = None,
    recipe: CacheSpec = CacheSpec(),
    recipe_file: Path | None = None,
    training: Mapping[str, Any] = {},
    held_out: int | None = None,
    keep_all: bool | None = None,
    calibrate: bool = True,
    workers: int = 0,
    threads: int | None = None,
    device: str = "auto",
    augment_on: str = "auto",
    command: str = "",
    progress: Listener = ignore,
) -> DistilledImages:
    """Label scans with a published model, train students on them, export and judge each; see the guide of this command.

    Interrupted, the same call goes on; with the same `work` (default `output`/work) other students cost only their own
    training. `training`: fields of `DistillSpec` in the place of those of `SCANS_TRAINING`. `held_out`: how many scans
    students are judged on. `keep_all`: scans that would do harm are learnt from too. Both are as before in this work
    folder where they are None. `calibrate`: the temperature that brings a student's probabilities closest to its
    teacher's is folded into its last layer, which changes no label.
    `command` is quoted in the report, and `recipe_file`, where `recipe` was read from, in commands that are named.
    Into `output` come summary.json, report.html and a folder for every student: its bundle, an nnU-Net model folder and
    its predictions of the scans held out.

    Raises before anything long: what `open_work` raises, SpecError for too few scans, a student twice and a training
    that cannot be, MismatchError. Then what `label`, `distil` and `export` raise.
    """
    from fastnnunet.specs.provenance import hardware, now_utc, versions, write_json

    _refuse_twice(students)
    _refuse_others(output, students)
    distill = _training(recipe, training)
    work = output / "work" if work is None else work
    opened = _open(model, scans, work, recipe, recipe_file, progress, held_out, keep_all)
    with opened.world() as files:
        jobs = [_job(opened, files, student, distill, device, augment_on, threads) for student in students]
        overall = Overall(progress, "distill images", _expected(opened, files, jobs))
        labelled, screening = _label(opened, files, workers, threads, overall)
        images, judged = opened.images()[1], []
        for group in _sharing(jobs):
            overall.begin(f"training {_tags(group)}")
            for trained in _train(labelled, group, overall):
                tag, folder = trained.tag, output / trained.tag
                overall.begin(f"exporting {tag}")
                temperature = _temperature(opened, files, labelled, trained, threads, overall) if calibrate else 1.0
                _export(trained, folder, temperature, overall)
                overall.begin(f"judging {tag}")
                one = judge(opened, files, labelled, images, tag, folder, threads, overall)
                judged.append(replace(one, temperature=temperature))
        record = {
            "created": now_utc(),
            "versions": versions(),
            "hardware": hardware(),
            "threads": threads,
            "model": model,
            "folds": [str(fold) for fold in opened.teacher.folds],
            "first_stage": None if opened.first is None else _first_stage(opened.first),
            "mirroring": recipe.mirroring,
            "scans": scans,
            "work": opened.folder,
            "training": distill,
            "learnt_from": labelled.learnt_from,
            "held_out": labelled.held_out,
            "would_do_harm": [verdict.line for verdict in screening.bad],
            "left_out": labelled.left_out,
            "keep_all": opened.keep_all,
            "rare_labels": labelled.rare,
            "teacher": {"seconds_per_case": labelled.teacher_s, "labels": labelled.labels},
            "students": judged,
        }
        overall.begin(_REPORT)
        summary, report = output / "summary.json", output / "report.html"
        write_json(summary, record)
        write_report(report, opened, files, labelled, screening, images, judged, record, command)
        overall.end()
    return DistilledImages(scans=labelled, students=tuple(judged), summary=summary, report=report)


def label_images(
    model: PublishedSpec,
    scans: Path,
    work: Path,
    *,
    recipe: CacheSpec = CacheSpec(),
    recipe_file: Path | None = None,
    held_out: int | None = None,
    keep_all: bool | None = None,
    workers: int = 0,
    threads: int | None = None,
    progress: Listener = ignore,
) -> LabelledScans:
    """The first stages of `distil_images`: everything up to the training. Raises as it does."""
    opened = _open(model, scans, work, recipe, recipe_file, progress, held_out, keep_all)
    with opened.world() as files:
        overall = Overall(progress, "labelling scans", _expected(opened, files, ()))
        labelled, _ = _label(opened, files, workers, threads, overall)
        overall.end()
    return labelled


def train_on_images(
    model: PublishedSpec,
    scans: Path,
    work: Path,
    students: Sequence[StudentSpec],
    *,
    recipe: CacheSpec = CacheSpec(),
    recipe_file: Path | None = None,
    training: Mapping[str, Any] = {},
    threads: int | None = None,
    device: str = "auto",
    augment_on: str = "auto",
    progress: Listener = ignore,
) -> list[Student]:
    """The training of `distil_images` alone, in a work folder that is ready for it.

    It runs a teacher for `online_teacher` alone. The students stay in the work folder's nnUNet_results. Raises as
    `distil_images` does, and NotFoundError with the command that makes the work folder ready.
    """
    _refuse_twice(students)
    distill = _training(recipe, training)
    opened = _open(model, scans, work, recipe, recipe_file, progress)
    with opened.world() as files:
        jobs = [_job(opened, files, student, distill, device, augment_on, threads) for student in students]
        labelled = _found(opened, files)
        return [student for group in _sharing(jobs) for student in _train(labelled, group, progress)]


def _open(
    model: PublishedSpec,
    scans: Path,
    work: Path,
    recipe: CacheSpec,
    recipe_file: Path | None,
    progress: Listener,
    held_out: int | None = None,
    keep_all: bool | None = None,
) -> "Work":
    from fastnnunet.nnunet.versions import TRAINING, require_versions
    from fastnnunet.teachers.scans.folder import open_work

    require_versions(TRAINING)
    return open_work(model, scans, work, recipe, held_out, progress, keep_all=keep_all, recipe_file=recipe_file)


def _refuse_twice(students: Sequence[StudentSpec]) -> None:
    tags = [student.tag for student in students]
    if twice := sorted({tag for tag in tags if tags.count(tag) > 1}):
        raise SpecError(f"student {', '.join(twice)}: asked for twice, expected each once")


def _refuse_others(output: Path, students: Sequence[StudentSpec]) -> None:
    """Raises SpecError where folders that will be replaced hold what no earlier call has written, FastnnUNetError."""
    from fastnnunet.system.files import check_output_folder

    for student in students:
        check_output_folder(output / student.tag)
    places = [(output / student.tag / name, mark) for student in students for name, mark in _MARKS.items()]
    taken = [(place, mark) for place, mark in places if place.is_file() or (place.is_dir() and any(place.iterdir()))]
    others = [place for place, mark in taken if not (place / mark).is_file()]
    if others:
        raise SpecError(f"-o {output}: {', '.join(map(str, others))} holds something else\ngive another -o")


def _training(recipe: CacheSpec, training: Mapping[str, Any]) -> DistillSpec:
    """`SCANS_TRAINING`, with what is asked for in its place. Raises SpecError."""
    from fastnnunet.specs.load import build_spec

    besides = {"steps": {"epochs", "iterations_per_epoch"}, "hours": {"epochs"}}
    replaced = {name for asked, names in besides.items() if training.get(asked) is not None for name in names}
    schedule = {name: value for name, value in SCANS_TRAINING.items() if name not in replaced}
    given = {**schedule, "temperature": recipe.temperature, **training}
    return build_spec(DistillSpec, given, where="options")


def _sharing(jobs: "Sequence[TrainingJob]") -> "list[list[TrainingJob]]":
    """Those that are trained on the same batches: students that differ in size alone, unless each has some hours."""
    from fastnnunet.specs.canonical import canonical_json, to_plain

    groups: dict[str, list[TrainingJob]] = {}
    for job in jobs:
        kind = canonical_json({**to_plain(job.student), "r": None})
        groups.setdefault(kind if job.distill.hours is None else job.student.tag, []).append(job)
    return list(groups.values())


def _tags(jobs: "Sequence[TrainingJob]") -> str:
    return " ".join(job.student.tag for job in jobs)


def _expected(opened: "Work", files: "ModelFolder", jobs: "Sequence[TrainingJob]") -> dict[str, float | Passes]:
    """Stages and about how long each takes; labels and trainings that are there take none."""
    from fastnnunet.distill.job import run_folder

    scans = sum(not (opened.labels_folder / f"{case}{opened.file_ending}").is_file() for case in opened.scans.cases)
    stages: dict[str, float | Passes] = {"preprocessing": 0.5 * scans}
    if opened.first is not None:
        stages[_FIRST_STAGE] = median_passes(opened.first, scans)
    teacher = opened.unlabelled(files, opened.folder).factory
    stages |= {"labelling": median_passes(teacher, scans), "writing labels": 0.2 * scans}
    for group in _sharing(jobs):
        distill = group[0].distill
        new = sum(not (run_folder(job) / CHECKPOINT).is_file() for job in group)
        one = 3600 * distill.hours if distill.hours else training_passes(files, distill)
        stages[f"training {_tags(group)}"] = new * one
        for tag in (job.student.tag for job in group):
            stages |= {f"exporting {tag}": 20.0, f"judging {tag}": 0.2 * len(opened.scans.cases)}
    return stages | ({_REPORT: 5.0} if jobs else {})


def _label(
    opened: "Work", files: "ModelFolder", workers: int, threads: int | None, overall: Overall
) -> tuple[LabelledScans, "Screening"]:
    """Preprocess, label, screen, hold scans out, and write the teacher's labels where nnU-Net looks for labels."""
    from fastnnunet.cache.plan import plan_cache
    from fastnnunet.nnunet.files.cases import open_cases
    from fastnnunet.teachers.intensities import require_modality
    from fastnnunet.teachers.measured import measure_scans
    from fastnnunet.teachers.scans.found import hold_out
    from fastnnunet.teachers.scans.labels import write_labels
    from fastnnunet.teachers.screen import rare_labels, rare_text, screen

    overall.begin("preprocessing")
    folder, scans = opened.images(overall)
    measured = measure_scans(
        scans, files.model, record=opened.folder / "intensities.json", processes=workers, progress=overall
    )
    require_modality(measured, files.model)
    job = opened.unlabelled(files, folder)
    preprocessed = job.preprocess_alone(workers, overall)
    if opened.first is not None:
        overall.begin(_FIRST_STAGE)
    images = job.label_first(preprocessed, threads, overall)
    cache_job = job.cache_job(images, overall)
    work = Passes(plan_cache(cache_job).tiles_todo * job.factory.voxels_per_tile)
    overall.expect("labelling", work)
    overall.begin("labelling")
    cache = build(cache_job, workers=workers, threads=threads, progress=overall)
    overall.took(work)
    overall.begin("writing labels")
    write_labels(cache.path, images, files, opened.cases_folder, opened.labels_folder, workers, overall)
    labelled = open_cases(files.plans, files.configuration)
    screening = screen(
        cache,
        files.model,
        cases=images,
        measured=measured,
        label_ZYX=labelled.label_ZYX,
        keep_all=opened.keep_all,
        progress=overall,
    )
    for line in screening.lines():
        overall(Message(text=line, level="warning"))
    if screening.left_out and len(screening.kept) < 2:
        raise MismatchError(
            f"{len(screening.kept)} of {len(cache.cases)} scans are fit to learn from, expected at least 2\n"
            f"{screening.rule}\ngive other scans, or keep all of them with --keep-all"
        )
    out = hold_out(screening.kept, opened.held_out)
    learnt_from = tuple(case for case in screening.kept if case not in out)
    rare = rare_labels(screening.verdicts, learnt_from)
    if rare:
        overall(Message(text=rare_text(rare, len(learnt_from)), level="warning"))
    opened.choose(learnt_from, out)
    return _labelled(opened, files, cache, screening.left_out, rare), screening


def _first_stage(first: "NnUNetTeacher") -> dict[str, Any]:
    return {"configuration": first.files.configuration, "folds": [str(fold) for fold in first.folds]}


def _found(opened: "Work", files: "ModelFolder") -> LabelledScans:
    """Scans that were labelled before. Raises NotFoundError, or MismatchError, with the command that labels them."""
    from fastnnunet.cache.store.folder import open_cache
    from fastnnunet.teachers.jobs import find_for_training

    def not_ready(problem: str) -> NotFoundError:
        return NotFoundError(
            f"--work {opened.folder} is not ready for a training: {problem}\n"
            f"make it ready with: fastnnunet cache build {opened.options()}"
        )

    try:
        job = opened.prepared(files)
    except NotFoundError as e:
        raise not_ready("the scans are not preprocessed yet, or not all of them") from e
    cache = open_cache(find_for_training(job))
    if not (opened.base / "splits_final.json").is_file():
        raise not_ready("the teacher's labels are not written yet")
    return _labelled(opened, files, cache)


def _labelled(
    opened: "Work",
    files: "ModelFolder",
    cache: "CacheFolder",
    left_out: tuple[str, ...] = (),
    rare: Mapping[str, int] = {},
) -> LabelledScans:
    from fastnnunet.nnunet.files.splits import load_splits

    (split,) = load_splits(opened.base, tuple(cache.cases))
    before_s = opened.first_stage_s(files)
    manifests = {case: manifest for case in cache.cases if (manifest := cache.manifest(case)) is not None}
    seconds = [manifest.seconds + before_s.get(case, 0.0) for case, manifest in manifests.items()]
    return LabelledScans(
        cache=cache,
        labels=opened.labels_folder,
        learnt_from=tuple(split["train"]),
        held_out=tuple(split["val"]),
        left_out=left_out,
        rare=rare,
        teacher_s=median(seconds),
        train_options=opened.options(of_training=True),
    )


def _job(
    opened: "Work",
    files: "ModelFolder",
    student: StudentSpec,
    distill: DistillSpec,
    device: str,
    augment_on: str,
    threads: int | None,
) -> "TrainingJob":
    """A training in the work folder's world. Raises what is wrong with the student, its training or the device."""
    from fastnnunet.distill.check import check_student, resolve_device
    from fastnnunet.distill.job import TrainingJob

    job = TrainingJob(
        teacher=opened.taught_by(files),
        student=student,
        distill=distill,
        cache=opened.recipe,
        fold=0,
        device=device,
        augment_on=augment_on,
        threads=threads,
        alone=opened.first is not None,
    )
    resolve_device(device)
    check_student(job, files)
    return job


def _train(labelled: LabelledScans, jobs: "Sequence[TrainingJob]", progress: Listener) -> list[Student]:
    """Train what is not trained yet, on the same batches; a student that learnt from other scans is trained anew.

    Those that have begun already go on without those that have not.
    """
    from fastnnunet.distill.job import run_folder
    from fastnnunet.specs.canonical import sha256_of
    from fastnnunet.specs.checks.json_text import read_json_object
    from fastnnunet.specs.provenance import write_json

    going_on: list[TrainingJob] = []
    new: list[TrainingJob] = []
    for job in jobs:
        folder = run_folder(job)
        mark, now = folder / "learnt_from.json", {"cases": sha256_of(list(labelled.learnt_from))}
        begun = any(folder.glob("checkpoint_*.pth"))
        if begun and not (mark.is_file() and read_json_object(mark) == now):
            progress(Message(text=f"student {job.student.tag} learnt from other scans and is trained anew"))
            shutil.rmtree(folder)
            begun = False
        if not begun:
            write_json(mark, now)
        (going_on if begun else new).append(job)
    trained: dict[str, Student] = {}
    for some in (going_on, new):
        if some:
            done = distil(some, resume=some is going_on, validate=False, progress=progress)
            trained |= {student.tag: student for student in done}
    return [trained[job.student.tag] for job in jobs]


def _temperature(
    opened: "Work",
    files: "ModelFolder",
    labelled: LabelledScans,
    trained: Student,
    threads: int | None,
    progress: Listener,
) -> float:
    """What the student's logits are divided by; found once for its weights."""
    from fastnnunet.api.calibrated import student_temperature
    from fastnnunet.engines.registry import available_cores
    from fastnnunet.nnunet.files.cases import open_cases
    from fastnnunet.nnunet.files.checkpoint import load_checkpoint, weights_digest
    from fastnnunet.specs.checks.json_text import read_note
    from fastnnunet.specs.provenance import write_json

    mark = trained.folder / "temperature.json"
    weights = weights_digest(load_checkpoint(trained.folder / CHECKPOINT)["network_weights"])
    known = read_note(mark)
    if known.get("weights_sha256") == weights and isinstance(known.get("temperature"), float):
        return float(known["temperature"])
    temperature = student_temperature(
        trained.folder.parent,
        files.configuration,
        open_cases(files.plans, files.configuration),
        labelled.learnt_from,
        labelled.cache.path,
        opened.recipe.temperature,
        threads or available_cores(),
        progress,
    )
    write_json(mark, {"weights_sha256": weights, "temperature": temperature})
    return temperature


def _export(trained: Student, folder: Path, temperature: float, progress: Listener) -> None:
    """Write bundle and nnU-Net model folder of a student into `folder`, unless that of the same weights and mirrors is.

    Both have `temperature` in their last layer.
    """
    from fastnnunet.nnunet.files.checkpoint import load_checkpoint, strip_prefix, weights_digest
    from fastnnunet.nnunet.student.tempered import copy_tempered, tempered
    from fastnnunet.specs.bundle import is_bundle
    from fastnnunet.specs.checks.json_text import read_json_object

    bundle, model, fold = folder / "bundle", folder / "nnunet_model", trained.folder
    stored = load_checkpoint(fold / CHECKPOINT)
    weights = weights_digest(tempered(strip_prefix(stored["network_weights"]), temperature))
    if is_bundle(bundle):
        there = read_json_object(bundle / "bundle.json")
        known = there.get("provenance", {}).get("weights_sha256"), there.get("mirror_axes") or []
        now = {fold.name.removeprefix("fold_"): weights}, [*(stored["inference_allowed_mirroring_axes"] or ())]
        if known == now and (model / fold.name / CHECKPOINT).is_file():
            return
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        made = Path(partial, "model")
        (made / fold.name).mkdir(parents=True)
        for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
            if (fold.parent / name).is_file():
                shutil.copyfile(fold.parent / name, made / name)
        copy_tempered(fold / CHECKPOINT, made / fold.name / CHECKPOINT, temperature)
        if model.exists():
            model.rename(Path(partial, "before"))
        made.rename(model)
    export(model, 0, bundle, overwrite=is_bundle(bundle), measure=False, progress=progress)
