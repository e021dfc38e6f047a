"""What each step of the demo does and when its output counts as there. Every function is a few library calls."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnnunet import api
from fastnnunet.distill.job import reached_checkpoint, run_folder
from fastnnunet.engines.registry import available_cores, is_installed
from fastnnunet.errors import FastnnUNetError
from fastnnunet.events import Event, Listener, Progress
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.prepare import plan_and_preprocess
from fastnnunet.nnunet.trainer.train_teacher import train_teacher
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import cache_job
from pipelines.demo_data import make_dataset
from pipelines.steps import Report

DATASET_ID, NAME = 901, "ProceduralCT"
FINAL = "checkpoint_final.pth"
STUDENT_FOLD = "all"  # every training case: students are judged on volumes that no model saw


@dataclass(frozen=True, kw_only=True)
class DemoSpec:
    """How much of everything."""

    n_train: int = 24
    n_test: int = 6
    seed: int = 20240901
    iterations: int = 20  # per epoch
    teacher_epochs: int = 6
    student_epochs: int = 30
    sizes: tuple[int, ...] = (2, 4)
    repeat: int = 3  # timings per case and student


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A spec and where everything lies: folders of nnU-Net under `out`/nnunet."""

    out: Path
    spec: DemoSpec

    @property
    def teacher(self) -> TeacherSpec:
        return TeacherSpec(dataset=f"Dataset{DATASET_ID:03d}_{NAME}")

    def distill(self, r: int) -> DistillSpec:
        # one seed: at r=4 and 3e-3 no tumour is found after 240 iterations, at 8e-3 it is from 140 on
        return DistillSpec(
            epochs=self.spec.student_epochs,
            iterations_per_epoch=self.spec.iterations,
            val_iterations_per_epoch=1,
            optimizer="adamw",
            initial_lr=8e-3 if r >= 4 else 3e-3,
            anneal=True,
            seed=self.spec.seed,
        )

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec()

    @property
    def raw(self) -> Path:
        return self.out / "nnunet" / "raw" / self.teacher.dataset

    @property
    def preprocessed(self) -> Path:
        return self.out / "nnunet" / "preprocessed" / self.teacher.dataset

    @property
    def results(self) -> Path:
        return self.out / "nnunet" / "results" / self.teacher.dataset

    def fold_folder(self, fold: int) -> Path:
        t = self.teacher
        return self.results / f"{t.trainer}__{t.plans}__{t.configuration}" / f"fold_{fold}"

    def bundle(self, r: int) -> Path:
        return self.out / "bundles" / f"student_r{r}"

    @property
    def benchmark_file(self) -> Path:
        return self.out / "benchmark" / "record.json"


def make_data(demo: Demo, report: Report, fresh: bool) -> None:
    if fresh:
        shutil.rmtree(demo.raw, ignore_errors=True)
    spec = demo.spec
    make_dataset(demo.raw.parent, DATASET_ID, NAME, spec.n_train, spec.n_test, spec.seed, report)


def has_data(demo: Demo) -> bool:
    return len(list(demo.raw.glob("labelsTr/*.nii.gz"))) == demo.spec.n_train and (demo.raw / "dataset.json").is_file()


def prepare(demo: Demo, report: Report, fresh: bool) -> None:
    shutil.rmtree(demo.preprocessed, ignore_errors=True)  # nnU-Net cannot tell a half-written case from a whole one
    plan_and_preprocess(demo.teacher.dataset, demo.teacher.configuration, available_cores(), demo.out / "planning.log")


def is_prepared(demo: Demo) -> bool:
    plans = demo.preprocessed / f"{demo.teacher.plans}.json"
    return plans.is_file() and len(list(demo.preprocessed.glob("*/*_seg.b2nd"))) >= demo.spec.n_train


def teach(demo: Demo, fold: int, report: Report, fresh: bool) -> None:
    if fresh:
        shutil.rmtree(demo.fold_folder(fold), ignore_errors=True)
    train_teacher(
        demo.teacher.dataset,
        demo.teacher.configuration,
        demo.teacher.plans,
        fold,
        epochs=demo.spec.teacher_epochs,
        iterations_per_epoch=demo.spec.iterations,
        val_iterations_per_epoch=1,
        progress=lambda done, total: report(done / total),
    )


def is_taught(demo: Demo, fold: int) -> bool:
    return _is_checkpoint(demo.fold_folder(fold) / FINAL)


def label(demo: Demo, report: Report, fresh: bool) -> None:
    api.label(demo.teacher, demo.cache_spec, progress=_share(report, "labelling"))


def is_labelled(demo: Demo) -> bool:
    try:
        return not cache_job(demo.teacher, demo.cache_spec).todo()
    except FastnnUNetError:
        return False


def student_job(demo: Demo, r: int) -> "api.TrainingJob":
    return api.TrainingJob(
        teacher=demo.teacher,
        student=StudentSpec(r=r),
        distill=demo.distill(r),
        cache=demo.cache_spec,
        fold=STUDENT_FOLD,
    )


def distil(demo: Demo, report: Report, fresh: bool) -> None:
    """All sizes at once: each batch is loaded and augmented for all of them."""
    jobs = [student_job(demo, r) for r in demo.spec.sizes]
    resume = not fresh and any(reached_checkpoint(run_folder(job)) for job in jobs)
    api.distil(jobs, resume=resume, overwrite=fresh, validate=False, progress=_share(report))


def is_distilled(demo: Demo) -> bool:
    return all(_is_checkpoint(run_folder(student_job(demo, r)) / FINAL) for r in demo.spec.sizes)


def export(demo: Demo, r: int, report: Report, fresh: bool) -> None:
    api.export(run_folder(student_job(demo, r)).parent, STUDENT_FOLD, demo.bundle(r), overwrite=True)


def is_exported(demo: Demo, r: int) -> bool:
    try:
        load_bundle_spec(demo.bundle(r))
    except FastnnUNetError:
        return False
    return True


def measure(demo: Demo, report: Report, fresh: bool) -> None:
    job = api.BenchmarkJob(
        teacher=demo.teacher,
        bundles=tuple(demo.bundle(r) for r in demo.spec.sizes),
        images=demo.raw / "imagesTs",
        labels=demo.raw / "labelsTs",
        output=demo.benchmark_file.parent,
        backends=("openvino" if is_installed("openvino") else "onnxruntime",),
        baseline_cases=demo.spec.n_test,
        repeat=demo.spec.repeat,
        threads=available_cores(),
        same_network=False,
    )
    api.benchmark(job, command=["make", "demo"], file=demo.benchmark_file, progress=_share(report, "measuring"))


def is_measured(demo: Demo) -> bool:
    return demo.benchmark_file.is_file()


def cache_statistics(demo: Demo) -> dict[str, Any]:
    """Bytes per voxel and largest rounding error of the demo's cache."""
    cache = cache_job(demo.teacher, demo.cache_spec).open()
    manifests = cache.stored_manifests() if cache is not None else []
    stored, voxels = sum(m.stored_bytes for m in manifests), sum(m.voxels for m in manifests)
    return {
        "cases": len(manifests),
        "voxels": voxels,
        "stored_bytes": stored,
        "bytes_per_voxel": stored / voxels,
        "float16_bytes_per_voxel": 2 * len(json.loads((demo.raw / "dataset.json").read_text())["labels"]),
        "largest_error": max(m.max_error for m in manifests),
    }


def _share(report: Report, what: str | None = None) -> Listener:
    """A listener that reports the share done of the work called `what`, or of any."""

    def advance(event: Event) -> None:
        if isinstance(event, Progress) and what in (None, event.what) and event.total:
            report(event.done / event.total)

    return advance


def _is_checkpoint(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except FastnnUNetError:
        return False
    return True
