"""Timing and memory of things that predict one case, measured so that the numbers can be compared.

All arms are loaded and warmed up first; then repetitions, cases and arms are walked in that nesting, so that whatever
else the machine does meanwhile falls on all of them alike. Memory is measured in a process of its own per arm.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastnnunet.errors import BuildError, FastnnUNetError

Runner = Callable[[Any, Path], Mapping[str, float]]  # (case, output file) -> seconds per stage


class Arm(Protocol):
    """Something to measure. Picklable; `load` is not part of the measured time."""

    @property
    def name(self) -> str: ...

    def load(self) -> Runner: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One prediction to time: arm, case and repetition by index; repetition -1 is the warm-up."""

    arm: int
    case: int
    repetition: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed prediction: wall seconds from file to file and, as far as the arm tells them, its stages."""

    arm: str
    case: str
    repetition: int
    elapsed_s: float
    stages_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Limit:
    """How many of the first cases an arm is measured on, and how often."""

    cases: int
    repeat: int


def plan_steps(limits: Sequence[Limit]) -> list[Step]:
    """Warm-up of every arm on the first case, then all measured predictions, arms innermost."""
    steps = [Step(arm, 0, -1) for arm in range(len(limits))]
    for repetition in range(max(limit.repeat for limit in limits)):
        for case in range(max(limit.cases for limit in limits)):
            for arm, limit in enumerate(limits):
                if case < limit.cases and repetition < limit.repeat:
                    steps.append(Step(arm, case, repetition))
    return steps


def measure(
    names: Sequence[str],
    runners: Sequence[Runner],
    cases: Mapping[str, Any],
    limits: Sequence[Limit],
    output_of: Callable[[str, str], Path],
    on_step: Callable[[float, float], None] | None = None,
) -> list[Sample]:
    """Run the plan; warm-ups are not among the samples.

    `cases` maps case names to what the runners take; `output_of(arm, case)` says where a prediction goes;
    `on_step(done_s, expected_s)` reports progress in seconds, estimated from the latest time of each arm.
    """
    steps = plan_steps(limits)
    case_names = list(cases)
    latest: dict[int, float] = {}
    samples = []
    started = time.perf_counter()
    for number, step in enumerate(steps):
        arm, case = names[step.arm], case_names[step.case]
        begin = time.perf_counter()
        stages = runners[step.arm](cases[case], output_of(arm, case))
        elapsed_s = time.perf_counter() - begin
        latest[step.arm] = elapsed_s
        if step.repetition >= 0:
            samples.append(Sample(arm, case, step.repetition, elapsed_s, dict(stages)))
        if on_step is not None:
            left_s = sum(latest.get(s.arm, elapsed_s) for s in steps[number + 1 :])
            done_s = time.perf_counter() - started
            on_step(done_s, done_s + left_s)
    return samples


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Statistics of one arm: median over repetitions per case, then median, 90th percentile and mean over cases."""
    per_case = {
        case: float(np.median([s.elapsed_s for s in samples if s.case == case]))
        for case in dict.fromkeys(s.case for s in samples)
    }
    values = list(per_case.values())
    stages = dict.fromkeys(name for s in samples for name in s.stages_s)
    return {
        "cases": len(per_case),
        "samples": len(samples),
        "median_s": float(np.median(values)),
        "p90_s": float(np.percentile(values, 90)),
        "mean_s": float(np.mean(values)),
        "median_of_stages_s": {n: float(np.median([s.stages_s.get(n, 0.0) for s in samples])) for n in stages},
        "per_case_s": per_case,
    }


def speed_ratio(slow_per_case_s: Mapping[str, float], fast_per_case_s: Mapping[str, float]) -> float:
    """Median over the cases both were measured on of slow / fast; NaN when there is no such case."""
    ratios = [slow_per_case_s[case] / fast_per_case_s[case] for case in slow_per_case_s if case in fast_per_case_s]
    return float(np.median(ratios)) if ratios else float("nan")


def peak_memory_bytes(arm: Arm, case: Any, output: Path) -> int:
    """Largest resident memory of a fresh process that loads `arm` and predicts one case.

    Raises what the arm raised there, or BuildError when that process died (out of memory, for instance).
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, arm, case, output))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise BuildError(
            f"{arm.name}: the process that measures its memory ended with code {process.exitcode} before it was done\n"
            "it may have run out of memory; leave this out with --no-memory"
        ) from None
    process.join()
    if isinstance(outcome, FastnnUNetError):
        raise outcome
    return int(outcome)


def _report_peak(sender: Connection, arm: Arm, case: Any, output: Path) -> None:
    try:
        arm.load()(case, output)
        sender.send(_own_peak_bytes())
    except FastnnUNetError as e:
        sender.send(e)
    finally:
        sender.close()


def _own_peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # VmHWM, because ru_maxrss of a started process includes that of the one that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
