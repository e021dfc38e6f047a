"""Steps that resume: each leaves a stamp saying which runs of which earlier steps it was made from.

A step is left out when its stamp fits and its output is still valid. When an earlier step had to run again, the steps
made from it start afresh; a step that was merely interrupted goes on where its own work stands.
"""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fastnnunet.specs.provenance import write_json

Report = Callable[[float], None]  # share of the step that is done, 0 to 1
LINE_EVERY_S = 15  # without a terminal


@dataclass(frozen=True, kw_only=True)
class Step:
    """`run(report, fresh)` does the work: from the start when `fresh`, else going on with what is there."""

    key: str
    title: str
    expected_s: float  # on two cores; only the proportions matter
    after: tuple[str, ...]  # keys of the steps whose output it uses
    run: Callable[[Report, bool], None]
    is_valid: Callable[[], bool]


def run_steps(steps: Sequence[Step], stamps: Path) -> dict[str, float]:
    """Run what has to be run, in order; returns the seconds of every step, whenever it ran."""
    ids: dict[str, str] = {}
    elapsed_s: dict[str, float] = {}
    outdated = [not _is_current(step, stamps, steps) for step in steps]
    with Overall(sum(s.expected_s for s, o in zip(steps, outdated, strict=True) if o)) as overall:
        for step in steps:
            stamp, inputs = read_stamp(stamps / f"{step.key}.json"), {key: ids[key] for key in step.after}
            if stamp.get("inputs") != inputs or not stamp.get("id") or not step.is_valid():
                begun = stamps / f"{step.key}.begun.json"
                before = read_stamp(begun)
                fresh = before.get("inputs") != inputs
                spent_s = 0.0 if fresh else before.get("spent_s", 0.0)
                write_json(begun, {"inputs": inputs, "spent_s": spent_s})
                start = time.monotonic()
                overall.begin(step)
                try:
                    step.run(overall.report, fresh)
                finally:
                    spent_s += time.monotonic() - start
                    write_json(begun, {"inputs": inputs, "spent_s": spent_s})
                overall.end(step)
                stamp = {"id": uuid.uuid4().hex, "inputs": inputs, "elapsed_s": round(spent_s, 2)}
                write_json(stamps / f"{step.key}.json", stamp)
            ids[step.key], elapsed_s[step.key] = stamp["id"], stamp["elapsed_s"]
    return elapsed_s


def _is_current(step: Step, stamps: Path, steps: Sequence[Step]) -> bool:
    """Whether the step will be left out, as far as stamps tell."""
    by_key = {s.key: s for s in steps}
    stamp = read_stamp(stamps / f"{step.key}.json")
    inputs = {key: read_stamp(stamps / f"{key}.json").get("id") for key in step.after}
    return bool(stamp) and stamp["inputs"] == inputs and all(_is_current(by_key[k], stamps, steps) for k in step.after)


def read_stamp(path: Path) -> dict[str, Any]:
    """A stamp, empty when there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


class Overall:
    """One bar over all steps with the time that is left; a line now and then where there is no terminal."""

    def __init__(self, expected_s: float) -> None:
        self._expected_s, self._done_s = expected_s, 0.0
        self._start = self._last_line = time.monotonic()
        self._step: Step | None = None
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=self._console)
        self._task = self._bar.add_task("demo", total=max(expected_s, 1e-9), left="")

    def __enter__(self) -> "Overall":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def begin(self, step: Step) -> None:
        self._step = step
        self._show(0.0, line=True)

    def report(self, share: float) -> None:
        self._show(share, line=time.monotonic() - self._last_line > LINE_EVERY_S)

    def end(self, step: Step) -> None:
        self._show(1.0, line=False)
        self._done_s += step.expected_s

    def _show(self, share: float, line: bool) -> None:
        assert self._step is not None
        done_s = self._done_s + share * self._step.expected_s
        elapsed_s = time.monotonic() - self._start
        pace = elapsed_s / done_s if done_s > 20 else 1.0  # too early to judge this machine before that
        left_s = max(0.0, self._expected_s - done_s) * pace
        left = f"{left_s / 60:.1f} min left" if left_s >= 60 else f"{left_s:.0f} s left"
        self._bar.update(self._task, completed=done_s, description=self._step.title, left=left)
        if line and not self._console.is_terminal:
            self._last_line = time.monotonic()
            percent = 100 * done_s / max(self._expected_s, 1e-9)
            self._console.print(f"[{percent:3.0f} %] {self._step.title}, {left}", highlight=False, markup=False)
