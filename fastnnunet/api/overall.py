"""How far work of several stages is as a whole, with the time that is left of all of them."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastnnunet.events import Event, Listener, Progress, Remaining, Stage
from fastnnunet.specs.distill import DistillSpec

if TYPE_CHECKING:
    from fastnnunet.nnunet.files.model import ModelFolder
    from fastnnunet.teachers.nnunet import NnUNetTeacher

_EVERY_S = 1.0
_PASS_S = 4e-6  # a voxel through one of nnU-Net's networks on two cores, until a stage has told
_STEP_PASSES = 0.4  # a voxel of a training step, in such passes: measured on hippocampus and OASIS


@dataclass(frozen=True, slots=True)
class Passes:
    """A stage as long as a network of the teacher takes for so many voxels, on whatever machine this is."""

    voxels: float

    def __rmul__(self, times: int) -> "Passes":
        return Passes(times * self.voxels)


def median_passes(teacher: "NnUNetTeacher", scans: int) -> Passes:
    """To label so many scans of the median size of those that the teacher learnt from."""
    from fastnnunet.cache.plan import count_tiles

    known = teacher.files.model.config.configuration.get("median_image_size_in_voxels")
    shape_zyx = (1, *map(math.ceil, known or teacher.patch_size))[-3:]
    return Passes(scans * count_tiles(shape_zyx, teacher.patch_size, teacher.step_size) * teacher.voxels_per_tile)


def training_passes(files: "ModelFolder", distill: DistillSpec) -> Passes:
    """To train a student of r=4."""
    config = files.model.config
    samples = distill.epochs * distill.iterations_per_epoch * (distill.batch_size or config.batch_size)
    return Passes(samples * math.prod(config.patch_size) * _STEP_PASSES)


class Overall:
    """A listener that passes every event on and tells beside it how many seconds the whole has taken and still takes.

    A stage that goes on is extrapolated at its own pace; those that come are as long as was expected.
    """

    def __init__(self, listener: Listener, what: str, expected: Mapping[str, float | Passes]) -> None:
        """`expected`: the stages in their order and about how long each takes, in seconds or as passes."""
        self._listener, self._what, self._expected = listener, what, dict(expected)
        self._stages = list(expected)
        self._begin = self._stage_begin = time.monotonic()
        self._pass_s = _PASS_S
        self._told = 0.0
        self._number = -1
        self._work: tuple[str, str] | None = None
        self._pace = Remaining()

    def begin(self, stage: str) -> None:
        """A stage begins, and those before it are done."""
        self._number = self._stages.index(stage)
        self._stage_begin, self._work = time.monotonic(), None
        left = self._later() + self._seconds(stage)
        done, total = self._number + 1, len(self._stages)
        note = f"{stage}, {_words(left)} left of all"
        self._listener(Stage(what=self._what, done=done, total=total, unit="stages", note=note))

    def expect(self, stage: str, work: Passes) -> None:
        """A stage that comes is known better now."""
        self._expected[stage] = work

    def took(self, work: Passes) -> None:
        """The stage that goes on is done and was this work: later stages are expected at its pace."""
        if work.voxels:
            self._pass_s = (time.monotonic() - self._stage_begin) / work.voxels

    def end(self) -> None:
        """All stages are done."""
        self._number = len(self._stages)
        self._tell(0.0)

    def __call__(self, event: Event) -> None:
        """Pass an event of the stage on."""
        self._listener(event)
        if not isinstance(event, Progress) or isinstance(event, Stage) or not event.total or self._number < 0:
            return
        if event.unit == "tiles" or event.what.startswith("reading"):  # a part of what is counted otherwise
            return
        work = (event.what if event.unit != "cases" else "", event.unit)  # of cases each may have its name
        if self._work != work:
            self._work, self._pace = work, Remaining(event.done)
        left = event.remaining_s if event.remaining_s is not None else self._pace.seconds(event.done, event.total)
        if time.monotonic() - self._told >= _EVERY_S and left is not None:
            self._tell(self._later() + left)

    def _later(self) -> float:
        return sum(map(self._seconds, self._stages[self._number + 1 :]))

    def _seconds(self, stage: str) -> float:
        expected = self._expected[stage]
        return expected.voxels * self._pass_s if isinstance(expected, Passes) else expected

    def _tell(self, left_s: float) -> None:
        self._told = time.monotonic()
        done = self._told - self._begin
        stage = self._stages[self._number] if self._number < len(self._stages) else "done"
        self._listener(
            Progress(what=self._what, done=done, total=done + left_s, unit="seconds", remaining_s=left_s, note=stage)
        )


def _words(seconds: float) -> str:
    if seconds >= 2 * 3600:
        return f"about {seconds / 3600:.0f} h"
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
