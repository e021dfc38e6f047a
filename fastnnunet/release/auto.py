"""Several students from one cache, and the smallest or fastest that loses no more Dice than allowed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.bench.arms import ReferenceArm
from fastnnunet.bench.patch_speed import ms_per_patch
from fastnnunet.distill.job import TrainingJob, reached_checkpoint, run_folder
from fastnnunet.distill.train import train_students
from fastnnunet.engines.registry import available_cores
from fastnnunet.errors import ImageError, MismatchError, NotFoundError, SpecError
from fastnnunet.evaluate.bootstrap import paired_points
from fastnnunet.evaluate.cases import evaluate_cases
from fastnnunet.evaluate.segmentations import make_label_set
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.export.bundle import export_bundle
from fastnnunet.images.cases import Case, find_cases
from fastnnunet.nnunet.files.cases import open_cases
from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset, teacher_folder
from fastnnunet.nnunet.files.plans import configuration_of, read_json
from fastnnunet.nnunet.files.splits import split_of
from fastnnunet.release.choose import PREFERENCES, Candidate, choose
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.canonical import to_plain
from fastnnunet.specs.provenance import hardware, now_utc, versions
from fastnnunet.specs.student import StudentSpec
from fastnnunet.system.files import check_output_folder

Train = Callable[[list[TrainingJob], bool], list[Path]]


def train_quietly(jobs: list[TrainingJob], resume: bool) -> list[Path]:
    """Train on the same batches, without a word; returns fold folders."""
    return train_students(jobs, resume=resume, validate=False)


def auto_size(
    job: TrainingJob,
    students: Sequence[StudentSpec],
    within: float,
    output: Path,
    *,
    reference: str = "out-of-fold",
    prefer: str = "smallest",
    control: bool = False,
    train: Train = train_quietly,
    progress: Listener = ignore,
) -> dict[str, Any]:
    """Train `job` for all `students` (finished runs are kept), score the validation fold and choose; the record.

    The reference is by default the teacher's fold of the same number, the only one that did not train on these cases;
    `ensemble` is all its folds, most of which did, so its Dice is optimistic. Both mirror, as nnU-Net does.
    With `control` every student has a twin that is trained without soft labels, NAME_control; of equal networks the one
    with the better Dice is preferred.
    `train(jobs, resume)` trains students on the same batches; `progress` hears of every prediction.
    Raises SpecError, NotFoundError, MismatchError before anything is trained; what `train_student` raises after.
    """
    if not students or not within >= 0:
        raise SpecError(f"got {len(students)} sizes within {within}, expected at least one size and 0 or more points")
    if reference not in ("out-of-fold", "ensemble"):
        raise SpecError(f"reference: got {reference!r}, expected out-of-fold or ensemble")
    if prefer not in PREFERENCES:
        raise SpecError(f"prefer: got {prefer!r}, expected {' or '.join(PREFERENCES)}")
    if control and job.distill.alpha == 0:
        raise SpecError("control: got alpha 0, which is the control; expected alpha above 0")
    check_output_folder(output)
    cases = validation_cases(job)
    folds = job.teacher.folds if reference == "ensemble" else (job.fold,)
    folder = teacher_folder(replace(job.teacher, folds=folds))
    dataset = nnunet_folder("nnUNet_raw") / resolve_dataset(job.teacher.dataset)
    labels = make_label_set(*(read_json(folder / "dataset.json")[k] for k in ("labels", "file_ending")))
    missing = [c for c in cases if not (dataset / "labelsTr" / f"{c}{labels.file_ending}").is_file()]
    if missing:
        raise NotFoundError(f"no label in {dataset / 'labelsTr'} for case(s): {', '.join(missing)}")
    threads = job.threads or available_cores()

    def dice_of(predictions: Path) -> dict[str, float]:
        results = evaluate_cases(predictions, dataset / "labelsTr", cases, labels)
        values = {r.case: [m.dice for m in r.metrics.values() if not np.isnan(m.dice)] for r in results}
        return {case: float(np.mean(v)) if v else float("nan") for case, v in values.items()}

    arm = ReferenceArm(
        name=reference,
        model_folder=folder,
        folds=folds,
        mirroring=True,
        threads=threads,
        checkpoint=job.teacher.checkpoint,
    )
    run = arm.load()  # before hours of training
    jobs = {student.tag: replace(job, student=student) for student in students}
    networks = {name: name for name in jobs}  # the student of the same network, whose time counts
    if control:
        hard = replace(job, distill=replace(job.distill, alpha=0.0, anneal=False, online_teacher=0.0))
        twins = {f"{student.tag}_control": replace(hard, student=student) for student in students}
        networks |= dict(zip(twins, jobs, strict=True))
        jobs |= twins
    fold_folders = _train(jobs, train)
    rows: dict[str, dict[str, Any]] = {}
    found: list[Case] = []
    predictions_done, predictions_total = 0, (len(fold_folders) + 1) * len(cases)

    def predicted() -> None:
        nonlocal predictions_done
        predictions_done += 1
        what = "predicting validation cases"
        progress(Progress(what=what, done=predictions_done, total=predictions_total, unit="cases"))

    for name, fold_folder in fold_folders.items():
        bundle, predictions = output / "bundles" / name, output / "predictions" / name
        export_bundle(fold_folder.parent, job.fold, bundle, overwrite=True)
        spec = load_bundle_spec(bundle)
        found = [c for c in find_cases(dataset / "imagesTr", spec) if c.case_id in cases]
        _require(found, cases)
        predictor = Predictor.load(bundle, "auto", threads=threads)
        for case in found:
            predictor.predict_case(case, predictions / f"{case.case_id}{labels.file_ending}")
            predicted()
        rows[name] = {
            "dice": dice_of(predictions),
            "parameters": spec.provenance["parameters"],
            "backend": predictor.backend.name,
            "soft_labels": jobs[name].distill.alpha > 0,
            "model": fold_folder.parent.name,
            "bundle": str(bundle),
        }
    speed = ms_per_patch({name: output / "bundles" / name for name in set(networks.values())}, threads=threads)
    for case in found:
        run(case, output / "predictions" / "reference" / f"{case.case_id}{labels.file_ending}")
        predicted()
    reference_dice = dice_of(output / "predictions" / "reference")
    candidates = []
    for name, row in rows.items():
        points, ms = paired_points(row["dice"], reference_dice), speed[networks[name]]["fp32"]
        candidates.append(Candidate(name=name, parameters=row["parameters"], ms_per_patch=ms, points=points))
        row |= {
            "ms_per_patch": ms,
            "mean_dice": float(np.nanmean(list(row["dice"].values()))),
            "points": to_plain(points),
        }
    choice = choose(candidates, within, prefer)
    return {
        "created": now_utc(),
        "hardware": hardware(),
        "versions": versions(),
        "threads": threads,
        "job": to_plain(job.teacher) | {"fold": job.fold, "distill": to_plain(job.distill)},
        "cache_policy": job.cache.policy,
        "within_points": within,
        "prefer": prefer,
        "cases": list(cases),
        "reference": {
            "kind": reference,
            "folds": list(folds),
            "saw_the_cases": reference == "ensemble",
            "dice": reference_dice,
            "mean_dice": float(np.nanmean(list(reference_dice.values()))),
        },
        "students": rows,
        "choice": {"name": choice.candidate.name, "found": choice.found, "whole_interval_within": choice.certain},
    }


def _train(jobs: dict[str, TrainingJob], train: Train) -> dict[str, Path]:
    """Fold folders of trained students: what was started is finished, the rest is trained on the same batches.

    Those without soft labels have batches of their own.
    """
    groups: dict[tuple[bool, bool], dict[str, TrainingJob]] = {}
    for name, job in jobs.items():
        started = reached_checkpoint(run_folder(job)) is not None
        groups.setdefault((started, job.distill.alpha > 0), {})[name] = job
    folders: dict[str, Path] = {}
    for (started, _), group in sorted(groups.items(), reverse=True):
        folders |= dict(zip(group, train(list(group.values()), started), strict=True))
    return {name: folders[name] for name in jobs}


def validation_cases(job: TrainingJob) -> tuple[str, ...]:
    """Cases of the student's fold it does not train on. Raises MismatchError where there are none."""
    plans = read_json(teacher_folder(job.teacher) / "plans.json")
    base = nnunet_folder("nnUNet_preprocessed") / configuration_of(plans, job.teacher.configuration)[0].dataset_name
    split = split_of(base, open_cases(plans, job.teacher.configuration).case_ids, job.fold)
    if split is None or not split["val"]:
        raise MismatchError(
            f"fold {job.fold} has no validation cases to judge students on\n"
            f"expected a fold of {base / 'splits_final.json'} with a val list that is not empty"
        )
    return tuple(sorted(split["val"]))


def _require(found: Sequence[Case], cases: Sequence[str]) -> None:
    for case in found:
        if case.problem:
            raise ImageError(case.problem)
    if missing := sorted(set(cases) - {c.case_id for c in found}):
        raise NotFoundError(f"no image in imagesTr for validation case(s): {', '.join(missing)}")
