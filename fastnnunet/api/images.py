"""`distil_images`: students of a published nnU-Net from scans without labels, in a work folder that is kept.

`label_images` and `train_on_images` are its single stages. All see nnU-Net's folders in the work folder, and nothing of
the user's own.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastnnunet.api.distil import Student, distil
from fastnnunet.api.export import export
from fastnnunet.api.label import build
from fastnnunet.api.overall import Overall
from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import PublishedSpec

if TYPE_CHECKING:
    from fastnnunet.cache.store.folder import CacheFolder
    from fastnnunet.distill.job import TrainingJob
    from fastnnunet.nnunet.files.model import ModelFolder
    from fastnnunet.teachers.scans.folder import Work

RECIPE = CacheSpec(temperature=1.0)
STEPS, STEPS_PER_EPOCH = 2000, 100
CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledScans:
    """Scans with their teacher's labels, ready to be learnt from."""

    cache: "CacheFolder"
    labels: Path  # folder of the teacher's label maps on the grids of the scans
    learnt_from: tuple[str, ...]
    held_out: tuple[str, ...]
    teacher_s: float  # a case, network and storing
    options: str  # how a command line names model, scans and work folder


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedStudent:
    """A student that is ready to be used, and how it compares with its teacher."""

    tag: str
    bundle: Path
    model: Path  # nnU-Net's own
    fidelity: dict[str, float]  # label -> mean Dice against the teacher's labels of the scans held out; `mean` of all
    seconds: float  # a case, from reading to writing
    megabytes: float  # of the bundle's networks
    parity: str  # of the bundle with PyTorch


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilledImages:
    """What came out of `distil_images`."""

    scans: LabelledScans
    students: tuple[JudgedStudent, ...]
    summary: Path


def schedule_for(number_of_scans: int, patch_voxels: int) -> dict[str, Any]:
    """How a student is trained from this many scans unless it is said otherwise: fields of `DistillSpec`."""
    return {
        "alpha": 0.5,
        "loss": "kl_dice",
        "optimizer": "adamw",
        "batch_size": 2,
        "epochs": STEPS // STEPS_PER_EPOCH,
        "iterations_per_epoch": STEPS_PER_EPOCH,
        "val_iterations_per_epoch": 5,
    }


def distil_images(
    model: PublishedSpec,
    scans: Path,
    output: Path,
    students: Sequence[StudentSpec],
    *,
    work: Path | None = None,
    recipe: CacheSpec = RECIPE,
    training: Mapping[str, Any] = {},
    held_out: int | None = None,
    workers: int = 0,
    threads: int | None = None,
    device: str = "auto",
    augment_on: str = "auto",
    progress: Listener = ignore,
) -> DistilledImages:
    """Label scans with a published model, train students on them, export and judge each; see the guide of this command.

    Interrupted, the same call goes on; with the same `work` (default `output`/work) other students cost only their own
    training. `training`: fields of `DistillSpec` in the place of those of `schedule_for`. `held_out`: how many scans
    students are judged on. Into `output` come summary.json and a folder for every student: its bundle, an nnU-Net model
    folder and its predictions of the scans held out.

    Raises before anything long: what `open_work` raises, SpecError for too few scans, a student twice and a training
    that cannot be, MismatchError. Then what `label`, `distil` and `export` raise.
    """
    from fastnnunet.specs.provenance import hardware, now_utc, versions, write_json
    from fastnnunet.system.files import check_output_folder

    check_output_folder(output)
    _refuse_twice(students)
    opened = _open(model, scans, output / "work" if work is None else work, recipe, held_out, progress)
    number = len(opened.scans.cases)
    distill = _training(opened, training)
    overall = Overall(
        progress, "distil images", _expected(number, students, distill.epochs * distill.iterations_per_epoch)
    )
    with opened.world() as files:
        jobs = [_job(opened, files, student, distill, device, augment_on, threads) for student in students]
        labelled = _label(opened, files, held_out, workers, threads, overall)
        judged = []
        for job in jobs:
            overall.begin(f"training {job.student.tag}")
            trained = _train(opened, labelled, [job], overall)[0]
            overall.begin(f"exporting {job.student.tag}")
            folder = output / job.student.tag
            _export(trained, folder, overall)
            overall.begin(f"judging {job.student.tag}")
            judged.append(_judge(opened, labelled, job.student.tag, folder, threads, overall))
        overall.end()
    summary = output / "summary.json"
    write_json(
        summary,
        {
            "created": now_utc(),
            "versions": versions(),
            "hardware": hardware(),
            "model": str(model.path),
            "folds": [str(fold) for fold in opened.teacher.folds],
            "mirroring": recipe.mirroring,
            "scans": str(scans),
            "work": str(opened.folder),
            "training": distill,
            "learnt_from": labelled.learnt_from,
            "held_out": labelled.held_out,
            "teacher": {"seconds_per_case": labelled.teacher_s, "labels": str(labelled.labels)},
            "students": judged,
        },
    )
    return DistilledImages(scans=labelled, students=tuple(judged), summary=summary)


def label_images(
    model: PublishedSpec,
    scans: Path,
    work: Path,
    *,
    recipe: CacheSpec = RECIPE,
    held_out: int | None = None,
    workers: int = 0,
    threads: int | None = None,
    progress: Listener = ignore,
) -> LabelledScans:
    """The first stages of `distil_images`: everything up to the training. Raises as it does."""
    opened = _open(model, scans, work, recipe, held_out, progress)
    overall = Overall(progress, "labelling scans", _expected(len(opened.scans.cases), (), 0))
    with opened.world() as files:
        labelled = _label(opened, files, held_out, workers, threads, overall)
        overall.end()
    return labelled


def train_on_images(
    model: PublishedSpec,
    scans: Path,
    work: Path,
    students: Sequence[StudentSpec],
    *,
    recipe: CacheSpec = RECIPE,
    training: Mapping[str, Any] = {},
    threads: int | None = None,
    device: str = "auto",
    augment_on: str = "auto",
    progress: Listener = ignore,
) -> list[Student]:
    """The training of `distil_images` alone, in a work folder that is ready for it; never runs a teacher.

    The students stay in the work folder's nnUNet_results. Raises as `distil_images` does, and NotFoundError with the
    command that makes the work folder ready.
    """
    _refuse_twice(students)
    opened = _open(model, scans, work, recipe, None, progress)
    distill = _training(opened, training)
    with opened.world() as files:
        jobs = [_job(opened, files, student, distill, device, augment_on, threads) for student in students]
        return _train(opened, _found(opened, files), jobs, progress)


def _open(
    model: PublishedSpec, scans: Path, work: Path, recipe: CacheSpec, held_out: int | None, progress: Listener
) -> "Work":
    from fastnnunet.nnunet.versions import TRAINING, require_versions
    from fastnnunet.teachers.scans.folder import open_work

    require_versions(TRAINING)
    return open_work(model, scans, work, recipe, held_out, progress)


def _refuse_twice(students: Sequence[StudentSpec]) -> None:
    tags = [student.tag for student in students]
    if twice := sorted({tag for tag in tags if tags.count(tag) > 1}):
        raise SpecError(f"student {', '.join(twice)}: asked for twice, expected each once")


def _training(opened: "Work", training: Mapping[str, Any]) -> DistillSpec:
    """Raises SpecError."""
    from math import prod

    from fastnnunet.specs.load import build_spec

    schedule = schedule_for(len(opened.scans.cases), prod(opened.source.model.patch_size))
    given = {**schedule, "temperature": opened.recipe.temperature, **training}
    return build_spec(DistillSpec, given, where="options")


def _expected(scans: int, students: Sequence[StudentSpec], steps: int) -> dict[str, float]:
    """Stages and about how many seconds each takes, before anything is known of this machine."""
    stages = {"preprocessing": 0.5 * scans, "labelling": 10.0 * scans, "writing labels": 0.2 * scans}
    for student in students:
        stages |= {
            f"training {student.tag}": 0.2 * steps,
            f"exporting {student.tag}": 20.0,
            f"judging {student.tag}": 0.2 * scans,
        }
    return stages


def _label(
    opened: "Work", files: "ModelFolder", held_out: int | None, workers: int, threads: int | None, overall: Overall
) -> LabelledScans:
    """Preprocess, label, hold out, and write the teacher's labels where nnU-Net looks for labels."""
    from fastnnunet.nnunet.unlabelled.teacher_labels import write_split
    from fastnnunet.teachers.scans.found import hold_out
    from fastnnunet.teachers.scans.labels import write_labels

    overall.begin("preprocessing")
    job = opened.unlabelled(files, opened.images(overall))
    images = job.preprocess(workers, overall)
    overall.begin("labelling")
    cache = build(job.cache_job(images, overall), workers=workers, threads=threads, progress=overall)
    overall.begin("writing labels")
    write_labels(cache.path, images, files, opened.cases_folder, opened.labels_folder, workers, overall)
    kept = images.case_ids  # the place to leave bad scans out
    out = hold_out(kept, held_out)
    write_split(opened.base, [case for case in kept if case not in out], out)
    return _labelled(opened, cache)


def _found(opened: "Work", files: "ModelFolder") -> LabelledScans:
    """Scans that were labelled before. Raises NotFoundError with the command that labels them."""
    problem = None
    try:
        cache = opened.prepared(files).open()
        if cache is None or any(p is not None for p in cache.problems(cache.cases).values()):
            problem = "the scans are not labelled yet, or not all of them"
        elif not (opened.base / "splits_final.json").is_file():
            problem = "the teacher's labels are not written yet"
    except NotFoundError:
        problem = "the scans are not preprocessed yet"
    if problem is not None or cache is None:
        raise NotFoundError(
            f"--work {opened.folder} is not ready for a training: {problem}\n"
            f"make it ready with: fastnnunet cache build {opened.options}"
        )
    return _labelled(opened, cache)


def _labelled(opened: "Work", cache: "CacheFolder") -> LabelledScans:
    from fastnnunet.nnunet.files.splits import load_splits

    (split,) = load_splits(opened.base, tuple(cache.cases))
    seconds = [manifest.seconds for case in cache.cases if (manifest := cache.manifest(case)) is not None]
    return LabelledScans(
        cache=cache,
        labels=opened.labels_folder,
        learnt_from=tuple(split["train"]),
        held_out=tuple(split["val"]),
        teacher_s=mean(seconds),
        options=opened.options,
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
    """A training in the work folder's world. Raises what is wrong with the student."""
    from fastnnunet.distill.job import TrainingJob
    from fastnnunet.nnunet.student.fit import check_fit
    from fastnnunet.nnunet.student.plans import student_plans

    trainer = files.facts(opened.teacher.folds[0]).trainer
    plans = student_plans(files.plans, files.configuration, student, distill, files.dataset_json, trainer)
    check_fit(files.plans, plans, files.dataset_json, files.configuration)
    return TrainingJob(
        teacher=opened.teacher,
        student=student,
        distill=distill,
        cache=opened.recipe,
        fold=0,
        device=device,
        augment_on=augment_on,
        threads=threads,
    )


def _train(opened: "Work", labelled: LabelledScans, jobs: "list[TrainingJob]", progress: Listener) -> list[Student]:
    """Train what is not trained yet; a student that learnt from other scans is trained anew."""
    from fastnnunet.distill.job import run_folder
    from fastnnunet.specs.canonical import sha256_of
    from fastnnunet.specs.checks.json_text import read_json_object
    from fastnnunet.specs.provenance import write_json

    trained = []
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
        trained += distil([job], resume=begun, validate=False, progress=progress)
    return trained


def _export(trained: Student, folder: Path, progress: Listener) -> None:
    """Write bundle and nnU-Net model folder of a student into `folder`, unless that of the same weights is there."""
    from fastnnunet.nnunet.files.checkpoint import load_checkpoint, strip_prefix, weights_digest
    from fastnnunet.specs.bundle import is_bundle
    from fastnnunet.specs.checks.json_text import read_json_object

    bundle, model, fold = folder / "bundle", folder / "nnunet_model", trained.folder
    weights = weights_digest(strip_prefix(load_checkpoint(fold / CHECKPOINT)["network_weights"]))
    if is_bundle(bundle):
        known = read_json_object(bundle / "bundle.json").get("provenance", {}).get("weights_sha256")
        if known == {fold.name.removeprefix("fold_"): weights} and (model / fold.name / CHECKPOINT).is_file():
            return
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        made = Path(partial, "model")
        (made / fold.name).mkdir(parents=True)
        for name in ("plans.json", "dataset.json", "dataset_fingerprint.json", f"{fold.name}/{CHECKPOINT}"):
            if (fold.parent / name).is_file():
                shutil.copyfile(fold.parent / name, made / name)
        if model.exists():
            model.rename(Path(partial, "before"))
        made.rename(model)
    export(fold.parent, 0, bundle, overwrite=is_bundle(bundle), progress=progress)


def _judge(
    opened: "Work", labelled: LabelledScans, tag: str, folder: Path, threads: int | None, progress: Listener
) -> JudgedStudent:
    """Predict the scans held out with the bundle in `folder` and compare with the teacher's labels of them."""
    from fastnnunet.evaluate.cases import evaluate_cases, mean_metrics
    from fastnnunet.evaluate.segmentations import make_label_set
    from fastnnunet.export.models import load_model
    from fastnnunet.images.cases import Case
    from fastnnunet.runtime.predict import Planned

    predictor = load_model(folder / "bundle", threads=threads)
    predictions, ending, images = folder / "predictions", opened.file_ending, opened.images()
    planned = []
    for case in labelled.held_out:
        files = tuple(images / f"{case}_{c:04d}{ending}" for c in range(len(opened.scans.cases[case])))
        planned.append(Planned(case=Case(case, files), output=predictions / f"{case}{ending}"))
    results = list(predictor.predict_planned(planned, threaded=False, progress=progress))
    for result in results:
        if result.error is not None:
            raise result.error
    labels = make_label_set(opened.source.dataset_json["labels"], ending)
    scores = list(evaluate_cases(predictions, labelled.labels, labelled.held_out, labels))
    means = mean_metrics(scores, labels.names)
    parity = predictor.spec.provenance["parity"]
    return JudgedStudent(
        tag=tag,
        bundle=folder / "bundle",
        model=folder / "nnunet_model",
        fidelity={name: means[name]["dice"] for name in labels.names} | {"mean": means["foreground_mean"]["dice"]},
        seconds=mean(result.times.total_s for result in results),
        megabytes=sum((folder / "bundle" / name).stat().st_size for name in predictor.spec.model_files) / 1e6,
        parity=f"same label as PyTorch on {parity['label_agreement']:.3%} of voxels of {parity['patches']} patches",
    )
