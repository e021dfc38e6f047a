"""Ensemble, single fold and bundles over the same images: seconds, memory, parity and Dice in one record."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.bench.arms import StockArm
from fastnnunet.bench.cold import measure_cold
from fastnnunet.bench.compare import add_agreement, add_dice, add_ratios, extrapolated
from fastnnunet.bench.job import ENSEMBLE, SINGLE, BenchmarkJob, Setup, prepare
from fastnnunet.bench.measure import Measured, measure, summarise
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.images.overlap import inputs_of, refuse_overlap
from fastnnunet.nnunet.files.paths import resolve_dataset
from fastnnunet.specs.provenance import hardware, now_utc, versions

TIMED = "image file to label file, models loaded and warm, one case after the other, arms interleaved"
COLD = "a new process from its start to its end, with the label file written; first case, files in the system's cache"
MEMORY = "largest resident set of the arm's own process over the baseline cases, libraries and model included"
GPU_MEMORY = "used memory of the whole device above what was used before, while loading and predicting the first case"

ON_CPU, NO_WARM_UP = "this arm computes on the CPU", "it is measured in the warm-up, which was left out"


def run_benchmark(job: BenchmarkJob, progress: Listener = ignore, other_outputs: Sequence[Path] = ()) -> dict[str, Any]:
    """Measure and return the record; predictions of every arm are left in `job.output`/predictions/ARM.

    `other_outputs`: what the caller writes; none of it may be an image or a label either.
    Raises NotFoundError, CorruptError, MismatchError, SpecError, BackendError before anything is measured, BuildError
    when a measured process dies.
    """
    setup = prepare(job)

    def output_of(arm: str, case: str) -> Path:
        return prediction_folder(job.output, arm) / f"{case}{setup.labels.file_ending}"

    truth = [] if job.labels is None else [job.labels / f"{case}{setup.labels.file_ending}" for case in setup.cases]
    outputs = [output_of(arm.name, case) for arm in setup.arms for case in setup.cases]
    refuse_overlap([*inputs_of(setup.cases.values()), *truth], [*outputs, *other_outputs])
    load_before = hardware()["load_average_1min"]
    measured = measure(setup.arms, setup.cases, setup.limits, output_of, progress)
    common = list(setup.cases)[: min(limit.cases for limit in setup.limits)]
    results = _summaries(setup, measured, len(common), progress)
    if job.cold_rounds:
        first_name, first = next(iter(setup.cases.items()))
        arms = [arm for arm in setup.arms if not isinstance(arm, StockArm)]
        cold = measure_cold(
            arms,
            job.teacher,
            first,
            setup.labels.file_ending,
            job.cold_rounds,
            lambda arm: output_of(arm, first_name),
            progress,
        )
        for name, times in cold.items():
            results[name]["cold"] = {"median_s": float(np.median(times.elapsed_s)), **asdict(times)}
    add_ratios(results, {"ensemble": ENSEMBLE, "single_fold": SINGLE})
    add_agreement(results, ENSEMBLE, setup.same_network, output_of)
    if job.labels is not None:
        progress(Progress(what="Dice", done=0, total=1, unit="steps"))
        add_dice(
            results, common, setup.labels, job.labels, job.tolerance_mm, lambda arm: prediction_folder(job.output, arm)
        )
    return {
        "created": now_utc(),
        "hardware": {**hardware(), "load_average_1min_before": load_before},
        "versions": versions(),
        "threads": setup.threads,
        "dataset": resolve_dataset(job.teacher.dataset),
        "teacher": asdict(job.teacher),
        "cases": list(setup.cases),
        "baseline_cases": len(common),
        "repeat": job.repeat,
        "baseline_repeat": job.baseline_repeat,
        "cold_rounds": job.cold_rounds,
        "timed": TIMED,
        "cold": COLD,
        "memory": MEMORY,
        "gpu_memory": GPU_MEMORY,
        "tolerance_mm": job.tolerance_mm,
        "labels": list(setup.labels.names),
        "label_values": dict(setup.label_values),
        "file_ending": setup.labels.file_ending,
        "left_out": list(setup.left_out),
        "arms": results,
        "samples": [asdict(s) for s in measured.samples],
    }


def prediction_folder(output: Path, arm: str) -> Path:
    """Where an arm's predictions are left."""
    return output / "predictions" / arm.replace(" ", "_")


def _summaries(setup: Setup, measured: Measured, common_cases: int, progress: Listener) -> dict[str, dict[str, Any]]:
    """What every arm is and what it took; an ensemble that was not run comes first, as it does when it was."""
    results: dict[str, dict[str, Any]] = {}
    for number, arm in enumerate(setup.arms):
        progress(Progress(what=f"parity of {arm.name}", done=number, total=len(setup.arms), unit="arms"))
        gpu_bytes = measured.peak_gpu_memory_bytes.get(arm.name)
        results[arm.name] = {
            **arm.describe(),
            **summarise([s for s in measured.samples if s.arm == arm.name], common_cases),
            "peak_gpu_memory_bytes": gpu_bytes,
            **({} if gpu_bytes is not None else {"no_gpu_memory_because": NO_WARM_UP if arm.on_gpu else ON_CPU}),
        }
    if setup.extrapolated is None:
        return results
    infer_s = {
        case: float(np.median([s.stages_s["infer_s"] for s in measured.samples if (s.arm, s.case) == (SINGLE, case)]))
        for case in results[SINGLE]["per_case_s"]
    }
    ensemble = extrapolated(setup.extrapolated.describe(), results[SINGLE], SINGLE, infer_s)
    return {ENSEMBLE: ensemble, **results}
