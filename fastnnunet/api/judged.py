"""Students judged on the scans that were held out, and the report on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fastnnunet.errors import CorruptError, NotFoundError
from fastnnunet.events import Listener
from fastnnunet.specs.teacher import Fold

if TYPE_CHECKING:
    from fastnnunet.cache.store.folder import CacheFolder
    from fastnnunet.evaluate.calibration import CalibrationSummary
    from fastnnunet.evaluate.fidelity import Fidelity
    from fastnnunet.nnunet.files.model import ModelFolder
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.teachers.scans.folder import Work
    from fastnnunet.teachers.screen import Screening

_IN_WORDS = (  # fields of DistillSpec that have words of their own
    *("epochs", "hours", "iterations_per_epoch", "val_iterations_per_epoch", "batch_size", "optimizer", "initial_lr"),
    *("seed", "alpha", "anneal", "temperature", "loss"),
)
Files = Mapping[str, tuple[Path, ...]]  # case -> its images, in the order of the channels


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledScans:
    """Scans with their teacher's labels, ready to be learnt from."""

    cache: "CacheFolder"  # the teacher's soft labels
    labels: Path  # folder of the teacher's label maps on the grids of the scans
    learnt_from: tuple[str, ...]
    held_out: tuple[str, ...]
    left_out: tuple[str, ...]  # they would do harm
    rare: Mapping[str, int]  # labels that too few of the scans to learn from show, and how many do
    teacher_s: float  # a case, network and storing; median
    train_options: str  # how `fastnnunet train` is told of model, scans and work folder


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedStudent:
    """A student that is ready to be used, and how it compares with its teacher."""

    tag: str
    bundle: Path
    model: Path  # nnU-Net's own
    fidelity: "Fidelity"  # against the teacher's labels of the scans held out
    seconds: float  # a case, from reading to writing; median
    parameters: int
    bundle_bytes: int  # of its networks
    parity: str  # of the bundle with PyTorch
    curve: tuple[tuple[float, float], ...]  # epoch, pseudo Dice
    calibration: "CalibrationSummary | None"  # against the teacher's soft labels; None where too large to tell
    temperature: float = 1.0  # that its logits are divided by, in its last layer


def judge(
    opened: "Work",
    model: "ModelFolder",
    scans: LabelledScans,
    files: Files,
    tag: str,
    folder: Path,
    threads: int | None,
    progress: Listener,
) -> JudgedStudent:
    """Predict the scans held out with the bundle in `folder` and compare with the teacher's labels of them.

    Dice and seconds are noted in the bundle. What was found is kept in `folder`/judged.json and taken from there for
    the same student, scans, labels and threads.
    """
    from fastnnunet.evaluate.fidelity import fidelity_of
    from fastnnunet.nnunet.files.checkpoint import load_checkpoint
    from fastnnunet.specs.bundle import MEASURED, load_bundle_spec
    from fastnnunet.specs.canonical import to_plain
    from fastnnunet.specs.provenance import hardware, write_json
    from fastnnunet.version import __version__

    spec = load_bundle_spec(folder / "bundle")
    asked = {
        "version": __version__,
        "weights": spec.provenance["weights_sha256"],
        "mirror_axes": list(spec.mirror_axes or ()),
        "soft_labels": scans.cache.key,
        "temperature": opened.recipe.temperature,
        "held_out": list(scans.held_out),
        "threads": threads,
    }
    predictions = [folder / "predictions" / f"{case}{opened.file_ending}" for case in scans.held_out]
    kept = folder / "judged.json"
    found = _read_found(kept, asked) if all(file.is_file() for file in predictions) else None
    is_new = found is None
    if found is None:
        found = _find_out(opened, model, scans, files, folder, threads, progress)
        write_json(kept, {"asked": asked, "found": to_plain(found)})
    fidelity = fidelity_of(tag, found.dice)
    if is_new or MEASURED not in spec.provenance:
        _note(folder / "bundle", fidelity, found, threads, hardware()["cpu"] if is_new else None)
    parity = spec.provenance["parity"]
    (checkpoint,) = (folder / "nnunet_model").glob("fold_*/*.pth")
    curve = load_checkpoint(checkpoint)["logging"]["mean_fg_dice"]
    return JudgedStudent(
        tag=tag,
        bundle=folder / "bundle",
        model=folder / "nnunet_model",
        fidelity=fidelity,
        seconds=found.seconds,
        parameters=int(spec.provenance["parameters"]),
        bundle_bytes=sum((folder / "bundle" / name).stat().st_size for name in spec.model_files),
        parity=f"same label as PyTorch on {parity['label_agreement']:.3%} of voxels of {parity['patches']} patches",
        curve=tuple((float(epoch), float(dice)) for epoch, dice in enumerate(curve, start=1)),
        calibration=found.calibration,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What takes long to find out about a student."""

    dice: dict[str, dict[str, float]]  # case -> label -> Dice
    seconds: float
    calibration: "CalibrationSummary | None"


def _note(bundle: Path, fidelity: "Fidelity", found: _Found, threads: int | None, cpu: str | None) -> None:
    """`cpu`: where the seconds were measured, where that is known."""
    from fastnnunet.release.measured import Quality, Speed, note

    cases = len(found.dice)
    quality = Quality(
        dice=fidelity.mean.mean,
        labels={name: one.mean for name, one in fidelity.labels.items() if not isnan(one.mean)},
        cases=cases,
        held_out=True,
        against="teacher",
    )
    speed = Speed(seconds_per_case=found.seconds, cases=cases, begins_with="file", cpu=cpu, threads=threads)
    note(bundle, None if isnan(quality.dice) else quality, speed)


def _read_found(file: Path, asked: Mapping[str, Any]) -> _Found | None:
    """What was found when the same was asked; None where nothing was, or it cannot be read: it is found out again."""
    from fastnnunet.evaluate.calibration import read_summary
    from fastnnunet.specs.checks.json_text import read_json_object

    try:
        record = read_json_object(file)
        found = record["found"]
        if record["asked"] != asked:
            return None
        return _Found(
            dice={
                case: {name: nan if dice is None else float(dice) for name, dice in found["dice"][case].items()}
                for case in asked["held_out"]
            },
            seconds=float(found["seconds"]),
            calibration=None if found["calibration"] is None else read_summary(found["calibration"]),
        )
    except (CorruptError, NotFoundError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _find_out(
    opened: "Work",
    model: "ModelFolder",
    scans: LabelledScans,
    files: Files,
    folder: Path,
    threads: int | None,
    progress: Listener,
) -> _Found:
    from fastnnunet.api.calibrated import student_calibration
    from fastnnunet.engines.registry import available_cores
    from fastnnunet.evaluate.fidelity import measure_fidelity
    from fastnnunet.evaluate.segmentations import make_label_set
    from fastnnunet.export.models import load_model
    from fastnnunet.images.cases import Case
    from fastnnunet.nnunet.files.cases import open_cases
    from fastnnunet.runtime.predict import Planned

    predictor = load_model(folder / "bundle", threads=threads)
    predictions, ending = folder / "predictions", opened.file_ending
    planned = [
        Planned(case=Case(case, tuple(files[case])), output=predictions / f"{case}{ending}") for case in scans.held_out
    ]
    results = list(predictor.predict_planned(planned, threaded=False, progress=progress))
    for result in results:
        if result.error is not None:
            raise result.error
    described = make_label_set(opened.source.dataset_json["labels"], ending)
    fidelity = measure_fidelity(
        scans.labels, predictions, described, folder.name, cases=scans.held_out, progress=progress
    )
    return _Found(
        dice=fidelity.dice,
        seconds=median(result.times.total_s for result in results),
        calibration=student_calibration(
            folder / "nnunet_model",
            model.configuration,
            open_cases(model.plans, model.configuration),
            scans.held_out,
            scans.cache.path,
            opened.recipe.temperature,
            threads or available_cores(),
            progress,
        ),
    )


def write_report(
    file: Path,
    opened: "Work",
    model: "ModelFolder",
    scans: LabelledScans,
    screening: "Screening",
    files: Files,
    students: Sequence[JudgedStudent],
    record: Mapping[str, Any],
    command: str,
) -> None:
    """Write the page on these students. `record`: what summary.json says of machine and versions."""
    from fastnnunet.bench.report.images.facts import ImagesFacts, ReportedStudent, value_names
    from fastnnunet.bench.report.images.page import write_images_report
    from fastnnunet.bench.report.images.pictures import ScanFiles, cases_to_show, judged_case
    from fastnnunet.evaluate.fidelity import fidelity_gap

    ending, first = opened.file_ending, students[0]
    described = opened.source.dataset_json
    order = described.get("regions_class_order") if opened.source.model.has_regions else None
    looks = _looks(opened)
    pictures = []
    for case, place in cases_to_show(first.fidelity).items():
        scan = ScanFiles(
            case=case,
            channels=tuple(files[case]),
            teacher=scans.labels / f"{case}{ending}",
            students={s.tag: s.bundle.parent / "predictions" / f"{case}{ending}" for s in students},
        )
        pictures.append(judged_case(scan, place, first.fidelity.of_cases()[case], **looks))
    parameters = _parameters(model, opened.teacher.folds)
    notes = [
        "The teacher's seconds are those of its networks and of storing their labels; a student's begin with "
        "reading the file and end with writing one."
    ]
    if (before := opened.first) is not None:
        parameters += _parameters(before.files, before.folds)
        notes.append(
            f"The teacher is a cascade: {before.files.configuration} (fold {', '.join(map(str, before.folds))}) labels "
            f"a scan before {opened.teacher.configuration} does; seconds and parameters are those of both. Students "
            "see the scan alone."
        )
    facts = ImagesFacts(
        model=opened.asked.path.name,
        configuration=opened.teacher.configuration,
        folds=tuple(map(str, opened.teacher.folds)),
        mirrored=opened.recipe.mirroring,
        created=record["created"],
        trained_scans=len(scans.learnt_from),
        alpha=record["training"].alpha,
        training=_in_words(record["training"], model.model.config.batch_size),
        students=tuple(
            ReportedStudent(
                tag=s.tag,
                parameters=s.parameters,
                bundle_bytes=s.bundle_bytes,
                fidelity=s.fidelity,
                seconds_per_case=s.seconds,
                curve=s.curve,
                calibration=s.calibration,
                temperature=s.temperature,
            )
            for s in students
        ),
        teacher_seconds_per_case=scans.teacher_s,
        teacher_parameters=parameters,
        teacher_bytes=4 * parameters,
        label_values=value_names(described["labels"], None if order is None else tuple(order)),
        gaps=tuple(fidelity_gap(first.fidelity, other.fidelity) for other in students[1:]),
        pictures=tuple(pictures),
        left_out=_left_out(opened, scans, screening, files),
        left_out_rule=screening.rule,
        kept_all=screening.keep_all,
        rare_labels=scans.rare,
        notes=tuple(notes),
        threads=record["threads"],
        hardware=record["hardware"],
        versions=record["versions"],
        command=command,
    )
    write_images_report(facts, file)


def _in_words(training: "DistillSpec", batch_size: int) -> str:
    """How students were trained. `batch_size`: that of the plans."""
    from fastnnunet.specs.canonical import to_plain
    from fastnnunet.specs.distill import DistillSpec

    many = f"{training.epochs} epoch{'s' * (training.epochs != 1)}"
    long = many if training.hours is None else f"{training.hours:g} hours of epochs"
    words = [
        f"{long} of {training.iterations_per_epoch} steps of {training.batch_size or batch_size} samples",
        f"{training.optimizer} from a learning rate of {training.lr:g}",
        f"seed {training.seed}",
    ]
    default = to_plain(DistillSpec())
    for name, value in to_plain(training).items():
        if name not in _IN_WORDS and value != default[name]:
            words.append(f"{name.replace('_', ' ')} {value}")
    if training.alpha > 0:
        loss = {"kl": "KL", "kl_dice": "KL and Dice semimetric"}[training.loss]
        falling = ", falling to 0" * training.anneal
        words.append(f"soft loss {loss} at T = {training.temperature:g}, of weight {training.alpha:g}{falling}")
    return "; ".join(words)


def _parameters(files: "ModelFolder", folds: Sequence[Fold]) -> int:
    """Of all folds together."""
    from fastnnunet.nnunet.student.fit import network_cost

    return network_cost(files.model, files.facts(folds[0]).trainer)["parameters"] * len(folds)


def _left_out(opened: "Work", scans: LabelledScans, screening: "Screening", files: Files) -> tuple[Any, ...]:
    """The scans that the rule speaks against, each with its numbers and a picture."""
    from fastnnunet.bench.report.images.facts import LeftOutScan
    from fastnnunet.bench.report.images.pictures import scan_picture

    looks = _looks(opened)
    return tuple(
        LeftOutScan(
            case=verdict.case_id,
            reason="; ".join(f"{reason.rule}: {reason.text}" for reason in verdict.reasons),
            numbers={
                "folds' Dice": None if verdict.agreement is None else verdict.agreement.dice,
                **{f"voxels of {name}": voxels for name, voxels in verdict.voxels.items()},
            },
            picture=scan_picture(
                tuple(files[verdict.case_id]),
                labels=scans.labels / f"{verdict.case_id}{opened.file_ending}",
                **looks,
            ),
        )
        for verdict in screening.bad
    )


def _looks(opened: "Work") -> dict[str, Any]:
    """How images are read and shown."""
    model = opened.source.model
    return {
        "reader_writer": str(model.manager.plans["image_reader_writer"]),
        "is_ct": model.config.normalization_schemes[0] == "CTNormalization",
    }
