"""What a benchmark is asked for, checked and turned into arms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastnnunet.bench.arms import BundleArm, ReferenceArm, StockArm
from fastnnunet.bench.measure import Limit
from fastnnunet.engines.base import Precision
from fastnnunet.engines.registry import ENGINES, available_cores, choose_engine, installed_cpu_engines
from fastnnunet.errors import BackendError, ImageError, MismatchError, NotFoundError, SpecError
from fastnnunet.evaluate.segmentations import LabelSet, make_label_set
from fastnnunet.images.cases import Case, find_cases
from fastnnunet.nnunet.files.paths import teacher_folder
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec
from fastnnunet.specs.teacher import TeacherSpec

ENSEMBLE, SINGLE = "nnunetv2 ensemble", "nnunetv2 one fold"  # mirrored; fold not mirrored
OURS = "ensemble"  # through this runtime, beginning of the names


@dataclass(frozen=True, kw_only=True)
class BenchmarkJob:
    """What to measure. `images` in nnU-Net's naming; `labels` (optional) named as the cases."""

    teacher: TeacherSpec
    bundles: tuple[Path, ...]
    images: Path
    labels: Path | None
    output: Path
    backends: tuple[str, ...] = ()  # `name` or `name:device`; empty: every installed one that needs no GPU
    precisions: tuple[Precision, ...] = ("fp32",)
    threads: int | None = None  # None: all cores, for every arm alike
    cases: int | None = None
    baseline_cases: int = 5
    repeat: int = 5
    baseline_repeat: int = 1
    baseline_warm_up: bool = True
    extrapolate_ensemble: bool = False  # do not run it: from one fold and counted forward passes
    runtime_ensemble: bool = False  # the ensemble through this runtime too
    same_network: bool = True  # the network of each bundle in nnunetv2 too, for parity
    cold_rounds: int = 0  # new processes per arm, from start to the file written
    device: str = "cpu"  # of nnU-Net's arms
    tolerance_mm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A job's arms in the order of the record, with the limits of each; `same_network` of a bundle's arm is nnunetv2's
    arm with that network.
    """

    arms: tuple[ReferenceArm | StockArm | BundleArm, ...]
    limits: tuple[Limit, ...]
    same_network: Mapping[str, str]
    left_out: tuple[str, ...]
    cases: Mapping[str, Case]
    labels: LabelSet
    label_values: Mapping[str, Any]  # as in dataset.json
    threads: int
    extrapolated: ReferenceArm | None


def prepare(job: BenchmarkJob) -> Setup:
    """Everything that can be refused without loading a model is refused here.

    Raises NotFoundError, CorruptError, MismatchError, ImageError, SpecError, BackendError.
    """
    for name in ("repeat", "baseline_repeat", "baseline_cases", "cases"):
        value = getattr(job, name)
        if value is not None and value < 1:
            raise SpecError(f"{name}: got {value}, expected at least 1")
    if job.cold_rounds < 0:
        raise SpecError(f"cold_rounds: got {job.cold_rounds}, expected 0 or more")
    if not job.bundles:
        raise SpecError("no bundle to measure: give at least one with -m")
    if job.extrapolate_ensemble and job.runtime_ensemble:
        raise SpecError("an ensemble that is extrapolated is not run: leave out one of the two options")
    needed = job.teacher.folds[:1] if job.extrapolate_ensemble else job.teacher.folds
    folder = teacher_folder(replace(job.teacher, folds=needed))
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
    if job.labels is not None:
        missing = [c.case_id for c in cases if not (job.labels / f"{c.case_id}{first.file_ending}").is_file()]
        if missing:
            raise NotFoundError(f"no label in {job.labels} for case(s): {', '.join(missing)}")
    return _setup(job, folder, specs, {case.case_id: case for case in cases})


def _setup(job: BenchmarkJob, folder: Path, specs: Mapping[Path, BundleSpec], cases: Mapping[str, Case]) -> Setup:
    first = next(iter(specs.values()))
    threads = job.threads or available_cores()
    engines, left_out = _engines(job)
    names = short_names(specs)
    ensemble = _reference_arm(job, folder, ENSEMBLE, job.teacher.folds, True, threads)
    arms: list[ReferenceArm | StockArm | BundleArm] = [] if job.extrapolate_ensemble else [ensemble]
    arms.append(_reference_arm(job, folder, SINGLE, job.teacher.folds[:1], False, threads))
    same_network: dict[str, str] = {}
    if job.runtime_ensemble:
        from fastnnunet.export.models import cached_bundle

        bundle = cached_bundle(folder, job.teacher.folds, job.teacher.checkpoint)
        ours = [_bundle_arm(OURS, bundle, engine, threads) for engine in engines]
        same_network |= {arm.name: ENSEMBLE for arm in ours}
        arms += ours
    for path, name in names.items():
        students = [_bundle_arm(name, path, engine, threads) for engine in engines]
        if job.same_network:
            stock = StockArm(name=f"{name} nnunetv2", bundle=path, threads=threads, device=job.device)
            arms.append(stock)
            same_network |= {arm.name: stock.name for arm in students}
        arms += students
    if len({arm.name for arm in arms}) < len(arms):
        raise SpecError("two of the bundles have the same name; give each bundle once")
    baseline = Limit(min(job.baseline_cases, len(cases)), job.baseline_repeat, job.baseline_warm_up)
    ours_in_full = Limit(len(cases), job.repeat)
    ours_as_baseline = Limit(baseline.cases, job.baseline_repeat)  # five networks, mirrored: slow enough
    return Setup(
        arms=tuple(arms),
        limits=tuple(
            baseline
            if not isinstance(arm, BundleArm)
            else ours_as_baseline
            if same_network.get(arm.name) == ENSEMBLE
            else ours_in_full
            for arm in arms
        ),
        same_network=same_network,
        left_out=left_out,
        cases=cases,
        labels=make_label_set(first.labels, first.file_ending),
        label_values=first.labels,
        threads=threads,
        extrapolated=ensemble if job.extrapolate_ensemble else None,
    )


def short_names(specs: Mapping[Path, BundleSpec]) -> dict[Path, str]:
    """A name for each bundle: its folder's where no other folder is called so."""
    folders = [path.name for path in specs]
    return {path: path.name if folders.count(path.name) == 1 else spec.name for path, spec in specs.items()}


@dataclass(frozen=True, slots=True)
class ArmEngine:
    """What computes a bundle."""

    backend: str
    device: str
    precision: Precision

    @property
    def name(self) -> str:
        """The backend, and what is not its default."""
        words = [self.backend]
        if self.device != ENGINES[self.backend].devices[0]:
            words.append(self.device)
        if self.precision != "fp32":
            words.append(self.precision)
        return " ".join(words)


def _engines(job: BenchmarkJob) -> tuple[list[ArmEngine], tuple[str, ...]]:
    """Backends with the precisions they compute in, and those pairs that there are not.

    Raises BackendError where no backend has a precision or a device, SpecError for unknown names.
    """
    backends = job.backends or installed_cpu_engines()
    places = []
    for words in backends:
        name, _, device = words.partition(":")
        if name not in ENGINES:
            raise SpecError(f"--backend: got {words!r}, expected some of {', '.join(ENGINES)}, or onnxruntime:cuda")
        places.append((name, str(choose_engine(name, device or None)[1])))
    wanted = [ArmEngine(*place, precision) for place in places for precision in job.precisions]
    engines = [engine for engine in wanted if engine.precision in ENGINES[engine.backend].precisions]
    for precision in job.precisions:
        if precision not in [engine.precision for engine in engines]:
            raise BackendError(
                f"--precision {precision}: none of the backends {', '.join(backends)} computes in it\n"
                "leave it out, or name another backend with --backend"
            )
    return engines, tuple(
        f"{engine.name}: this backend does not compute in {engine.precision}"
        for engine in wanted
        if engine not in engines
    )


def _reference_arm(
    job: BenchmarkJob, folder: Path, name: str, folds: Sequence[int | str], mirroring: bool, threads: int
) -> ReferenceArm:
    return ReferenceArm(
        name=name,
        model_folder=folder,
        folds=tuple(folds),
        mirroring=mirroring,
        threads=threads,
        checkpoint=job.teacher.checkpoint,
        device=job.device,
    )


def _bundle_arm(short: str, bundle: Path, engine: ArmEngine, threads: int) -> BundleArm:
    return BundleArm(
        name=f"{short} {engine.name}",
        bundle=bundle,
        backend=engine.backend,
        precision=engine.precision,
        threads=threads,
        device=engine.device,
    )
