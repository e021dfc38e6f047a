"""Timing and memory primitives: order of steps, statistics by hand, memory of a process of known size."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnnunet.bench.gpu_memory import GpuMeter
from fastnnunet.bench.measure import Limit, Sample, TimedCase, measure, plan_steps, speed_ratio, summarise
from fastnnunet.bench.worker import CaseRun, Runner, Worker
from fastnnunet.errors import BackendError, BuildError
from fastnnunet.specs.provenance import hardware, versions, write_json


def test_arms_alternate() -> None:
    steps = plan_steps([Limit(cases=1, repeat=1), Limit(cases=2, repeat=2)])
    assert steps == [TimedCase(0, 0, 0), TimedCase(1, 0, 0), TimedCase(1, 1, 0), TimedCase(1, 0, 1), TimedCase(1, 1, 1)]


@dataclass(frozen=True)
class Sleeper:
    """An arm that takes `seconds`, 0.3 s more the first time, and notes its calls beside its outputs."""

    name: str
    seconds: float
    on_gpu: bool = False

    def load(self) -> Runner:
        calls = 0

        def run(case: Any, output: Path) -> CaseRun:
            nonlocal calls
            calls += 1
            time.sleep(self.seconds + (0.3 if calls == 1 else 0))
            output.write_text(case)
            with (output.parent / "calls").open("a") as log:
                log.write(f"{self.name} {case}\n")
            return CaseRun({"infer_s": self.seconds}, forward_passes=calls)

        return run


def test_measure_times_the_call_and_leaves_out_the_warm_up(tmp_path: Path) -> None:
    progress: list[tuple[str, float, float]] = []
    measured = measure(
        [Sleeper("fast", 0.01), Sleeper("slow", 0.05)],
        {"a": "A", "b": "B"},
        [Limit(2, 2), Limit(1, 1, warm_up=False)],
        lambda arm, case: tmp_path / f"{arm}_{case}",
        lambda e: progress.append((e.what, e.done, e.total)),
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["fast A", "fast A", "slow A", "fast B", "fast A", "fast B"]
    fast, slow = ([s for s in measured.samples if s.arm == name] for name in ("fast", "slow"))
    assert (len(fast), len(slow)) == (4, 1)
    assert all(0.01 <= s.elapsed_s < 0.3 for s in fast)  # the warm-up took 0.31 s
    assert slow[0].elapsed_s >= 0.35  # there was none
    assert [s.forward_passes for s in fast] == [2, 3, 4, 5]
    assert all(s.stages_s == {"infer_s": 0.01} for s in fast)
    what, done, expected = progress[-1]
    assert what == "measuring"
    assert done == pytest.approx(expected)
    assert (tmp_path / "fast_b").read_text() == "B"
    assert measured.peak_gpu_memory_bytes == {}


def sample(case: str, repetition: int, elapsed_s: float, infer_s: float, peak: int) -> Sample:
    return Sample("x", case, repetition, elapsed_s, {"infer_s": infer_s}, peak, 7)


def test_statistics_by_hand() -> None:
    times = {"a": [1.0, 9.0, 2.0], "b": [4.0, 4.0, 4.0], "c": [3.0, 5.0, 4.5]}
    peaks = {"a": 10, "b": 30, "c": 40}
    samples = [
        sample(case, i, t, t / 2, peaks[case] if i == 0 else 50) for case, ts in times.items() for i, t in enumerate(ts)
    ]
    found = summarise(samples)
    assert found["per_case_s"] == {"a": 2.0, "b": 4.0, "c": 4.5}  # one slow outlier does not move a median
    assert (found["cases"], found["samples"], found["median_s"]) == (3, 9, 4.0)
    assert found["mean_s"] == pytest.approx(3.5)
    assert found["p90_s"] == pytest.approx(4.0 + 0.8 * 0.5)
    assert found["stages"] == {"infer": {"p50_s": 2.0, "p90_s": pytest.approx(2.0 + 0.8 * 0.25)}}
    assert found["forward_passes"] == {"a": 7, "b": 7, "c": 7}
    assert found["peak_memory_bytes"] == 40
    assert summarise(samples, common_cases=2)["peak_memory_bytes"] == 30


def test_ratio_is_taken_on_common_cases_only() -> None:
    assert speed_ratio({"a": 10.0, "b": 30.0}, {"a": 1.0, "b": 1.0, "c": 1000.0}) == 20.0
    assert np.isnan(speed_ratio({"a": 1.0}, {"b": 1.0}))


@dataclass(frozen=True)
class Hungry:
    """An arm that touches `size_bytes` of memory, fails, or kills its process."""

    size_bytes: int
    name: str = "hungry"
    on_gpu: bool = False

    def load(self) -> Runner:
        def run(case: Any, output: Path) -> CaseRun:
            if self.size_bytes == -1:
                raise BackendError("no such engine")
            if self.size_bytes == -2:
                import os

                os._exit(7)
            ballast = np.ones(self.size_bytes, np.uint8)
            return CaseRun({"infer_s": float(ballast[-1])})

        return run


def peak_of(size_bytes: int, output: Path) -> int:
    with Worker(Hungry(size_bytes)) as worker:
        worker.loaded()
        return worker.predict(None, output).peak_memory_bytes


def test_peak_memory_is_that_of_the_arms_own_process(tmp_path: Path) -> None:
    here = np.ones(600_000_000, np.uint8)  # a large parent must not count
    small, large = (peak_of(size, tmp_path / "x") for size in (1000, 300_000_000))
    assert here.nbytes > small
    assert large - small == pytest.approx(300_000_000, rel=0.1)


def test_errors_of_the_measured_process_arrive(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no such engine"):
        peak_of(-1, tmp_path)
    with pytest.raises(BuildError, match="code 7"):
        peak_of(-2, tmp_path)


@pytest.fixture
def fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the MiB that a pretended nvidia-smi tells every 20 ms."""
    used = tmp_path / "used"
    used.write_text("100\n")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\nwhile true; do cat {used}; sleep 0.02; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return used


def test_memory_of_a_gpu_is_what_comes_on_top(fake_gpu: Path) -> None:
    def climb() -> str:
        for mib in (100, 900, 400):
            fake_gpu.write_text(f"{mib}\n")
            time.sleep(0.15)
        return "done"

    with GpuMeter() as meter:
        assert meter.rise(climb) == ("done", 800 * 2**20, 300 * 2**20)
        assert meter.rise(lambda: 1) == (1, 0, 0)


@dataclass(frozen=True)
class OnGpu:
    """An arm whose model takes 50 MiB of the pretended GPU and whose first case takes 200 more."""

    used: Path
    name: str = "gpu"
    on_gpu: bool = True

    def load(self) -> Runner:
        def add(mib: int) -> None:
            self.used.write_text(f"{int(self.used.read_text()) + mib}\n")
            time.sleep(0.15)

        add(50)

        def run(case: Any, output: Path) -> CaseRun:
            add(200)
            add(-200)
            return CaseRun({})

        return run


def test_each_arm_has_its_own_memory_on_the_gpu(fake_gpu: Path, tmp_path: Path) -> None:
    arms = [OnGpu(fake_gpu, "first"), OnGpu(fake_gpu, "second"), Sleeper("cpu", 0.0)]
    measured = measure(arms, {"a": "A"}, [Limit(1, 1)] * 3, lambda arm, case: tmp_path / arm)
    assert measured.peak_gpu_memory_bytes == {"first": 250 * 2**20, "second": 250 * 2**20}


def test_without_nvidia_smi_the_message_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendError, match="NVIDIA driver"):
        GpuMeter()


def test_record_is_whole_or_absent_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "s": sample("c", 0, 1.0, 0.5, 3)})
    assert json.loads(path.read_text()) == {
        "a": None,
        "b": [None, 1.5],
        "s": {
            "arm": "x",
            "case": "c",
            "repetition": 0,
            "elapsed_s": 1.0,
            "stages_s": {"infer_s": 0.5},
            "peak_memory_bytes": 3,
            "forward_passes": 7,
        },
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
