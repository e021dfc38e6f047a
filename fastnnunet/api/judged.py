"""Students judged on the scans that were held out, and the report on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fastnnunet.events import Listener

if TYPE_CHECKING:
    from fastnnunet.evaluate.calibration import CalibrationSummary
    from fastnnunet.evaluate.fidelity import Fidelity
    from fastnnunet.nnunet.files.model import ModelFolder
    from fastnnunet.teachers.scans.folder import Work
    from fastnnunet.teachers.screen import Screening

Files = Mapping[str, tuple[Path, ...]]  # case -> its images, in the order of the channels


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledScans:
    """Scans with their teacher's labels, ready to be learnt from."""

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
    calibration: "CalibrationSummary | None" = None  # against the teacher's soft labels; None where too large to tell


def judge(
    opened: "Work",
    labels: Path,
    held_out: Sequence[str],
    files: Files,
    tag: str,
    folder: Path,
    threads: int | None,
    progress: Listener,
) -> JudgedStudent:
    """Predict the scans held out with the bundle in `folder` and compare with the teacher's labels of them."""
    from fastnnunet.evaluate.fidelity import measure_fidelity
    from fastnnunet.evaluate.segmentations import make_label_set
    from fastnnunet.export.models import load_model
    from fastnnunet.images.cases import Case
    from fastnnunet.nnunet.files.checkpoint import load_checkpoint
    from fastnnunet.runtime.predict import Planned

    predictor = load_model(folder / "bundle", threads=threads)
    predictions, ending = folder / "predictions", opened.file_ending
    planned = [
        Planned(case=Case(case, tuple(files[case])), output=predictions / f"{case}{ending}") for case in held_out
    ]
    results = list(predictor.predict_planned(planned, threaded=False, progress=progress))
    for result in results:
        if result.error is not None:
            raise result.error
    described = make_label_set(opened.source.dataset_json["labels"], ending)
    parity = predictor.spec.provenance["parity"]
    (checkpoint,) = (folder / "nnunet_model").glob("fold_*/*.pth")
    curve = load_checkpoint(checkpoint)["logging"]["mean_fg_dice"]
    return JudgedStudent(
        tag=tag,
        bundle=folder / "bundle",
        model=folder / "nnunet_model",
        fidelity=measure_fidelity(labels, predictions, described, tag, cases=held_out, progress=progress),
        seconds=median(result.times.total_s for result in results),
        parameters=int(predictor.spec.provenance["parameters"]),
        bundle_bytes=sum((folder / "bundle" / name).stat().st_size for name in predictor.spec.model_files),
        parity=f"same label as PyTorch on {parity['label_agreement']:.3%} of voxels of {parity['patches']} patches",
        curve=tuple((float(epoch), float(dice)) for epoch, dice in enumerate(curve, start=1)),
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
    from fastnnunet.nnunet.student.fit import network_cost

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
    parameters = network_cost(model.model, model.facts(opened.teacher.folds[0]).trainer)["parameters"]
    facts = ImagesFacts(
        model=opened.asked.path.name,
        configuration=opened.teacher.configuration,
        folds=tuple(map(str, opened.teacher.folds)),
        mirrored=opened.recipe.mirroring,
        created=record["created"],
        trained_scans=len(scans.learnt_from),
        students=tuple(
            ReportedStudent(
                tag=s.tag,
                parameters=s.parameters,
                bundle_bytes=s.bundle_bytes,
                fidelity=s.fidelity,
                seconds_per_case=s.seconds,
                curve=s.curve,
                calibration=s.calibration,
            )
            for s in students
        ),
        teacher_seconds_per_case=scans.teacher_s,
        teacher_parameters=parameters * len(opened.teacher.folds),
        label_values=value_names(described["labels"], None if order is None else tuple(order)),
        gaps=tuple(fidelity_gap(first.fidelity, other.fidelity) for other in students[1:]),
        pictures=tuple(pictures),
        left_out=_left_out(opened, scans, screening, files),
        left_out_rule=screening.rule,
        kept_all=screening.keep_all,
        rare_labels=scans.rare,
        notes=(
            "The teacher's seconds are those of its networks and of storing their labels; a student's begin with "
            "reading the file and end with writing one.",
        ),
        threads=record["threads"],
        hardware=record["hardware"],
        versions=record["versions"],
        command=command,
    )
    write_images_report(facts, file)


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
