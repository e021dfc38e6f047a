"""Ensemble, single fold and bundles over the same images: seconds, memory, parity and Dice in one record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastnnunet.bench.arms import BundleArm, ReferenceArm
from fastnnunet.bench.evaluate import evaluate_cases, mean_metrics
from fastnnunet.bench.measure import Limit, Runner, measure, peak_memory_bytes, speed_ratio, summarise
from fastnnunet.bench.record import hardware, now_utc, versions
from fastnnunet.bench.segmentations import LabelSet, make_label_set, read_segmentation
from fastnnunet.errors import ImageError, MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.paths import resolve_dataset, teacher_folder
from fastnnunet.runtime.backends.base import Precision, available_cores, installed_cpu_backends
from fastnnunet.runtime.cases import Case, find_cases
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec
from fastnnunet.specs.teacher import TeacherSpec

ENSEMBLE, SINGLE = "nnunetv2 ensemble", "nnunetv2 one fold"  # mirrored; fold not mirrored
Progress = Callable[[str, float, float], None]  # what, seconds done, seconds expected


@dataclass(frozen=True, kw_only=True)
class BenchmarkJob:
    """What to measure. `images` in nnU-Net's naming; `labels` (optional) named as the cases."""

    teacher: TeacherSpec
    bundles: tuple[Path, ...]
    images: Path
    labels: Path | None
    output: Path
    backends: tuple[str, ...] = ()  # empty: every installed one that needs no GPU
    precisions: tuple[Precision, ...] = ("fp32",)
    threads: int | None = None  # None: all cores, for every arm alike
    cases: int | None = None
    baseline_cases: int = 5
    repeat: int = 5
    baseline_repeat: int = 1
    memory: bool = True
    device: str = "cpu"  # of the two nnU-Net arms
    tolerance_mm: float = 1.0


@dataclass
class _Setup:
    references: list[ReferenceArm]
    bundles: list[BundleArm]
    cases: dict[str, Case]
    labels: LabelSet
    threads: int
    runners: list[Runner] = field(default_factory=list)

    @property
    def arms(self) -> list[ReferenceArm | BundleArm]:
        return [*self.references, *self.bundles]


def run_benchmark(job: BenchmarkJob, progress: Progress | None = None) -> dict[str, Any]:
    """Measure and return the record; predictions of every arm are left in `job.output`/predictions/ARM.

    Raises NotFoundError, CorruptError, MismatchError, SpecError, BackendError before anything is measured.
    """
    tell = progress or (lambda _what, _done, _expected: None)
    setup = _prepare(job)
    tell("loading models", 0, 1)
    setup.runners = [arm.load() for arm in setup.arms]

    def output_of(arm: str, case: str) -> Path:
        return prediction_folder(job.output, arm) / f"{case}{setup.labels.file_ending}"

    baseline = Limit(min(job.baseline_cases, len(setup.cases)), job.baseline_repeat)
    limits = [baseline] * len(setup.references) + [Limit(len(setup.cases), job.repeat)] * len(setup.bundles)
    names = [arm.name for arm in setup.arms]
    load_before = hardware()["load_average_1min"]
    samples = measure(
        names, setup.runners, setup.cases, limits, output_of, lambda done, expected: tell("measuring", done, expected)
    )
    results: dict[str, dict[str, Any]] = {}
    first_name, first_case = next(iter(setup.cases.items()))
    for number, arm in enumerate(setup.arms):
        tell(f"memory and parity of {arm.name}", number, len(setup.arms))
        result = {**arm.describe(), **summarise([s for s in samples if s.arm == arm.name])}
        if job.memory:
            result["peak_memory_bytes"] = peak_memory_bytes(arm, first_case, output_of(arm.name, first_name))
        results[arm.name] = result
    _add_ratios(results)
    _add_agreement(job, setup, results)
    if job.labels is not None:
        _add_dice(job, setup, results)
    return {
        "created": now_utc(),
        "hardware": {**hardware(), "load_average_1min_before": load_before},
        "versions": versions(),
        "threads": setup.threads,
        "dataset": resolve_dataset(job.teacher.dataset),
        "teacher": asdict(job.teacher),
        "cases": list(setup.cases),
        "baseline_cases": baseline.cases,
        "repeat": job.repeat,
        "baseline_repeat": job.baseline_repeat,
        "timed": "image file to label file, models loaded and warm, one case after the other, arms interleaved",
        "tolerance_mm": job.tolerance_mm,
        "arms": results,
        "samples": [asdict(s) for s in samples],
    }


def prediction_folder(output: Path, arm: str) -> Path:
    """Where an arm's predictions are left."""
    return output / "predictions" / arm.replace(" ", "_")


def _prepare(job: BenchmarkJob) -> _Setup:
    """Everything that can be refused is refused here."""
    for name in ("repeat", "baseline_repeat", "baseline_cases", "cases"):
        value = getattr(job, name)
        if value is not None and value < 1:
            raise SpecError(f"{name}: got {value}, expected at least 1")
    if not job.bundles:
        raise SpecError("no bundle to measure: give at least one with -m")
    folder = teacher_folder(job.teacher)
    specs = {path: load_bundle_spec(path) for path in job.bundles}
    first = next(iter(specs.values()))
    for path, spec in specs.items():
        if spec.labels != first.labels or spec.file_ending != first.file_ending:
            raise MismatchError(
                f"bundles {job.bundles[0]} and {path} have other labels or file endings than each other"
            )
    cases = find_cases(job.images, first)[: job.cases]
    for case in cases:
        if case.problem:
            raise ImageError(case.problem)
        if case.series:
            raise ImageError(f"{case.case_id} is a DICOM series, which nnU-Net does not read; convert the images first")
    labels = make_label_set(first.labels, first.file_ending)
    if job.labels is not None:
        missing = [c.case_id for c in cases if not (job.labels / f"{c.case_id}{first.file_ending}").is_file()]
        if missing:
            raise NotFoundError(f"no label in {job.labels} for case(s): {', '.join(missing)}")
    threads = job.threads or available_cores()
    return _Setup(
        _reference_arms(job, folder, threads),
        _bundle_arms(job, specs, threads),
        {case.case_id: case for case in cases},
        labels,
        threads,
    )


def _reference_arms(job: BenchmarkJob, folder: Path, threads: int) -> list[ReferenceArm]:
    def arm(name: str, folds: Sequence[int | str], mirroring: bool) -> ReferenceArm:
        return ReferenceArm(
            name=name,
            model_folder=folder,
            folds=tuple(folds),
            mirroring=mirroring,
            threads=threads,
            checkpoint=job.teacher.checkpoint,
            device=job.device,
        )

    return [arm(ENSEMBLE, job.teacher.folds, True), arm(SINGLE, job.teacher.folds[:1], False)]


def _bundle_arms(job: BenchmarkJob, specs: Mapping[Path, BundleSpec], threads: int) -> list[BundleArm]:
    backends = job.backends or installed_cpu_backends()
    arms = []
    for path, spec in specs.items():
        short = path.name if [p.name for p in specs].count(path.name) == 1 else spec.name
        for backend in backends:
            for precision in job.precisions:
                name = f"{short} {backend}" + ("" if precision == "fp32" else f" {precision}")
                arms.append(BundleArm(name=name, bundle=path, backend=backend, precision=precision, threads=threads))
    if len({arm.name for arm in arms}) < len(arms):
        raise SpecError("two of the bundles have the same name; give each bundle once")
    return arms


def _add_ratios(results: dict[str, dict[str, Any]]) -> None:
    for result in results.values():
        for key, baseline in (("times_faster_than_ensemble", ENSEMBLE), ("times_faster_than_single_fold", SINGLE)):
            result[key] = speed_ratio(results[baseline]["per_case_s"], result["per_case_s"])


def _add_agreement(job: BenchmarkJob, setup: _Setup, results: dict[str, dict[str, Any]]) -> None:
    """Share of voxels labelled as the ensemble labels them, over the cases the ensemble predicted."""
    for name, result in results.items():
        shares = []
        for case in results[ENSEMBLE]["per_case_s"]:
            pair = [
                read_segmentation(prediction_folder(job.output, arm) / f"{case}{setup.labels.file_ending}").labels_zyx
                for arm in (ENSEMBLE, name)
            ]
            shares.append(float(np.mean(pair[0] == pair[1])))
        result["agreement_with_ensemble"] = float(np.mean(shares))


def _add_dice(job: BenchmarkJob, setup: _Setup, results: dict[str, dict[str, Any]]) -> None:
    """Means per label over the arm's own cases, and the Dice over the cases that every arm has."""
    label_folder = cast(Path, job.labels)
    common = list(results[ENSEMBLE]["per_case_s"])
    for name, result in results.items():
        predictions = prediction_folder(job.output, name)
        found = list(
            evaluate_cases(predictions, label_folder, list(result["per_case_s"]), setup.labels, job.tolerance_mm)
        )
        result["metrics"] = mean_metrics(found, setup.labels.names)
        on_common = mean_metrics([r for r in found if r.case in common], setup.labels.names)
        result["dice_on_common_cases"] = on_common["foreground_mean"]["dice"]
