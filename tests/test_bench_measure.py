"""Timing and memory primitives: order of steps, statistics by hand, memory of a process of known size."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnnunet.bench.measure import (
    Limit,
    Runner,
    Sample,
    Step,
    measure,
    peak_memory_bytes,
    plan_steps,
    speed_ratio,
    summarise,
)
from fastnnunet.bench.record import hardware, versions, write_json
from fastnnunet.errors import BackendError, BuildError


def test_every_arm_is_warmed_up_then_arms_alternate() -> None:
    steps = plan_steps([Limit(cases=1, repeat=1), Limit(cases=2, repeat=2)])
    assert steps[:2] == [Step(0, 0, -1), Step(1, 0, -1)]
    assert steps[2:] == [Step(0, 0, 0), Step(1, 0, 0), Step(1, 1, 0), Step(1, 0, 1), Step(1, 1, 1)]


def test_measure_times_the_call_and_leaves_out_the_warm_up(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []

    def runner(name: str, seconds: float) -> Runner:
        def run(case: Any, output: Path) -> Mapping[str, float]:
            calls.append((name, case))
            warm = len([c for c in calls if c[0] == name]) > 1
            time.sleep(seconds if warm else 0.2)
            output.write_text(case)
            return {"infer_s": seconds}

        return run

    progress: list[tuple[float, float]] = []
    samples = measure(
        ["fast", "slow"],
        [runner("fast", 0.01), runner("slow", 0.05)],
        {"a": "A", "b": "B"},
        [Limit(2, 3), Limit(1, 2)],
        lambda arm, case: tmp_path / f"{arm}_{case}",
        lambda done, expected: progress.append((done, expected)),
    )
    assert len(calls) == len(progress) == 2 + 6 + 2
    assert calls[:2] == [("fast", "A"), ("slow", "A")]
    fast = [s for s in samples if s.arm == "fast"]
    assert len(fast) == 6
    assert all(0.01 <= s.elapsed_s < 0.2 for s in fast)  # the warm-up took 0.2 s
    assert all(s.stages_s == {"infer_s": 0.01} for s in fast)
    assert progress[-1][0] == pytest.approx(progress[-1][1])
    assert (tmp_path / "fast_b").read_text() == "B"


def test_statistics_by_hand() -> None:
    times = {"a": [1.0, 9.0, 2.0], "b": [4.0, 4.0, 4.0], "c": [3.0, 5.0, 4.5]}
    samples = [Sample("x", case, i, t, {"infer_s": t / 2}) for case, ts in times.items() for i, t in enumerate(ts)]
    found = summarise(samples)
    assert found["per_case_s"] == {"a": 2.0, "b": 4.0, "c": 4.5}  # one slow outlier does not move a median
    assert (found["cases"], found["samples"], found["median_s"]) == (3, 9, 4.0)
    assert found["mean_s"] == pytest.approx(3.5)
    assert found["p90_s"] == pytest.approx(4.0 + 0.8 * 0.5)
    assert found["median_of_stages_s"] == {"infer_s": 2.0}


def test_ratio_is_taken_on_common_cases_only() -> None:
    assert speed_ratio({"a": 10.0, "b": 30.0}, {"a": 1.0, "b": 1.0, "c": 1000.0}) == 20.0
    assert np.isnan(speed_ratio({"a": 1.0}, {"b": 1.0}))


@dataclass(frozen=True)
class Hungry:
    """An arm that touches `size_bytes` of memory, fails, or kills its process."""

    size_bytes: int
    name: str = "hungry"

    def load(self) -> Runner:
        def run(case: Any, output: Path) -> Mapping[str, float]:
            if self.size_bytes == -1:
                raise BackendError("no such engine")
            if self.size_bytes == -2:
                import os

                os._exit(7)
            ballast = np.ones(self.size_bytes, np.uint8)
            return {"infer_s": float(ballast[-1])}

        return run


def test_peak_memory_is_that_of_the_arms_own_process(tmp_path: Path) -> None:
    here = np.ones(600_000_000, np.uint8)  # a large parent must not count
    small, large = (peak_memory_bytes(Hungry(size), None, tmp_path / "x") for size in (1000, 300_000_000))
    assert here.nbytes > small
    assert large - small == pytest.approx(300_000_000, rel=0.1)


def test_errors_of_the_measured_process_arrive(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no such engine"):
        peak_memory_bytes(Hungry(-1), None, tmp_path)
    with pytest.raises(BuildError, match="code 7"):
        peak_memory_bytes(Hungry(-2), None, tmp_path)


def test_record_is_whole_or_absent_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "s": Sample("x", "c", 0, 1.0, {})})
    assert json.loads(path.read_text()) == {
        "a": None,
        "b": [None, 1.5],
        "s": {"arm": "x", "case": "c", "repetition": 0, "elapsed_s": 1.0, "stages_s": {}},
    }
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [None, 1.5]
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_machine_is_described() -> None:
    machine = hardware()
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert {"python", "numpy", "scipy"} <= versions().keys()
