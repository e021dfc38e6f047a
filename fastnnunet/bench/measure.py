"""Timing and memory of things that predict one case, measured so that the numbers can be compared.

Each arm lives in a process of its own (`worker.py`). All are loaded and warmed up first; then repetitions, cases and
arms are walked in that nesting, so that whatever else the machine does meanwhile falls on all of them alike.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from fastnnunet.bench.gpu_memory import GpuMeter
from fastnnunet.bench.worker import Arm, Worker
from fastnnunet.events import Listener, Progress, ignore


@dataclass(frozen=True, slots=True)
class TimedCase:
    """One prediction to time: arm, case and repetition by index."""

    arm: int
    case: int
    repetition: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed prediction: wall seconds from file to file, its stages, the arm's peak resident memory so far."""

    arm: str
    case: str
    repetition: int
    elapsed_s: float
    stages_s: dict[str, float]
    peak_memory_bytes: int
    forward_passes: int | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """How many of the first cases an arm is measured on, how often, and whether it predicts the first one before."""

    cases: int
    repeat: int
    warm_up: bool = True


@dataclass(frozen=True, slots=True)
class Measured:
    """Samples of all arms; peak bytes on the GPU of those that compute there, while loading and warming up."""

    samples: list[Sample]
    peak_gpu_memory_bytes: dict[str, int]


def plan_steps(limits: Sequence[Limit]) -> list[TimedCase]:
    """All measured predictions, arms innermost."""
    steps = []
    for repetition in range(max((limit.repeat for limit in limits), default=0)):
        for case in range(max(limit.cases for limit in limits)):
            for arm, limit in enumerate(limits):
                if case < limit.cases and repetition < limit.repeat:
                    steps.append(TimedCase(arm, case, repetition))
    return steps


def measure(
    arms: Sequence[Arm],
    cases: Mapping[str, Any],
    limits: Sequence[Limit],
    output_of: Callable[[str, str], Path],
    progress: Listener = ignore,
) -> Measured:
    """Load, warm up, and run the plan; nothing is written unless every arm can be loaded.

    `cases` maps case names to what the arms take; `output_of(arm, case)` says where a prediction goes;
    `progress`: seconds done and expected, estimated from the latest time of each arm.
    Raises what an arm raises, BuildError when its process dies, BackendError without nvidia-smi for an arm on a GPU.
    """
    case_names = list(cases)
    samples: list[Sample] = []
    with ExitStack() as stack:
        meter = stack.enter_context(GpuMeter()) if any(arm.on_gpu for arm in arms) else None
        workers, kept = _load(arms, stack, meter, progress)
        first = cases[case_names[0]]
        peaks = {}
        for number, (arm, worker, limit) in enumerate(zip(arms, workers, limits, strict=True)):
            if limit.warm_up:
                progress(Progress(what=f"warming up {arm.name}", done=number, total=len(arms), unit="arms"))
                warm_up = partial(worker.predict, first, output_of(arm.name, case_names[0]))
                _, highest, _ = meter.rise(warm_up) if meter and arm.on_gpu else (warm_up(), 0, 0)
                if arm.on_gpu:
                    loading, model = kept[arm.name]
                    peaks[arm.name] = max(loading, model + highest)
        steps = plan_steps(limits)
        latest: dict[int, float] = {}
        started = perf_counter()
        for number, step in enumerate(steps):
            name, case = arms[step.arm].name, case_names[step.case]
            timed = workers[step.arm].predict(cases[case], output_of(name, case))
            latest[step.arm] = timed.elapsed_s
            samples.append(
                Sample(
                    name,
                    case,
                    step.repetition,
                    timed.elapsed_s,
                    dict(timed.run.stages_s),
                    timed.peak_memory_bytes,
                    timed.run.forward_passes,
                )
            )
            left_s = sum(latest.get(s.arm, timed.elapsed_s) for s in steps[number + 1 :])
            done_s = perf_counter() - started
            total_s = done_s + left_s
            progress(Progress(what="measuring", done=done_s, total=total_s, unit="s", remaining_s=left_s))
    return Measured(samples, peaks)


def _load(
    arms: Sequence[Arm], stack: ExitStack, meter: GpuMeter | None, progress: Listener
) -> tuple[list[Worker], dict[str, tuple[int, int]]]:
    """A worker per arm, loaded one after another; of arms on a GPU the most bytes this took there and those kept."""
    workers, on_gpu = [], {}
    for number, arm in enumerate(arms):
        progress(Progress(what=f"loading {arm.name}", done=number, total=len(arms), unit="arms"))
        worker = stack.enter_context(Worker(arm))
        if meter is not None and arm.on_gpu:
            _, highest, kept = meter.rise(worker.loaded)
            on_gpu[arm.name] = (highest, kept)
        else:
            worker.loaded()
        workers.append(worker)
    return workers, on_gpu


def summarise(samples: Sequence[Sample], common_cases: int | None = None) -> dict[str, Any]:
    """Statistics of one arm: median over repetitions per case, then over cases median, 90th percentile and mean.

    Stages likewise. Peak memory is that over the first `common_cases` cases (None: all) in the first repetition, so
    that arms measured on other numbers of cases can be compared.
    """
    cases = list(dict.fromkeys(s.case for s in samples))
    per_case = {case: float(np.median([s.elapsed_s for s in samples if s.case == case])) for case in cases}
    stages = {
        name.removesuffix("_s"): spread(
            [float(np.median([s.stages_s[name] for s in samples if s.case == case])) for case in cases]
        )
        for name in dict.fromkeys(name for s in samples for name in s.stages_s)
    }
    passes = {s.case: s.forward_passes for s in samples if s.forward_passes is not None}
    common = cases[:common_cases]
    return {
        "cases": len(per_case),
        "samples": len(samples),
        "median_s": float(np.median(list(per_case.values()))),
        "p90_s": float(np.percentile(list(per_case.values()), 90)),
        "mean_s": float(np.mean(list(per_case.values()))),
        "stages": stages,
        "per_case_s": per_case,
        **({"forward_passes": passes} if passes else {}),
        "peak_memory_bytes": max(s.peak_memory_bytes for s in samples if s.repetition == 0 and s.case in common),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile."""
    return {"p50_s": float(np.median(seconds)), "p90_s": float(np.percentile(seconds, 90))}


def speed_ratio(slow_per_case_s: Mapping[str, float], fast_per_case_s: Mapping[str, float]) -> float:
    """Median over the cases both were measured on of slow / fast; NaN when there is no such case."""
    ratios = [slow_per_case_s[case] / fast_per_case_s[case] for case in slow_per_case_s if case in fast_per_case_s]
    return float(np.median(ratios)) if ratios else float("nan")
