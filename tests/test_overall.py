"""The time that is left of work in stages, with a clock that the tests set."""

import math
from types import SimpleNamespace

import pytest

from fastnnunet.api import overall
from fastnnunet.api.overall import Overall, Passes, median_passes, training_passes
from fastnnunet.events import Progress, Stage
from fastnnunet.specs.distill import DistillSpec


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the stages believe have gone by."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(overall.time, "monotonic", lambda: now.s)
    return now


def notes(events):
    return [event.note for event in events if isinstance(event, Stage)]


class TestPaceOfStages:
    def test_a_stage_that_is_done_tells_how_fast_the_machine_is(self, clock):
        events = []
        whole = Overall(events.append, "all", {"labelling": Passes(1e6), "training": Passes(4e6), "exporting": 20.0})
        whole.expect("labelling", Passes(2e6))  # there are twice as many tiles
        whole.begin("labelling")
        clock.s += 600.0
        whole.took(Passes(2e6))
        whole.begin("training")
        assert notes(events) == ["labelling, about 44 s left of all", "training, about 20 min left of all"]

    def test_what_was_there_already_tells_nothing(self, clock):
        events = []
        whole = Overall(events.append, "all", {"labelling": Passes(0), "training": Passes(100e6)})
        whole.begin("labelling")
        clock.s += 5.0
        whole.took(Passes(0))
        whole.begin("training")
        assert notes(events)[-1] == "training, about 7 min left of all"

    def test_cases_that_are_done_extrapolate_their_own_stage(self, clock):
        events = []
        whole = Overall(events.append, "all", {"labelling": Passes(1e6), "exporting": 20.0})
        whole.begin("labelling")
        whole(Progress(what="a", done=0, total=4, unit="cases"))
        clock.s += 30.0
        whole(Progress(what="b", done=1, total=4, unit="cases"))
        assert events[-1].remaining_s == 3 * 30.0 + 20.0


def teacher(patch_size, median, folds=5, mirrors=8):
    config = SimpleNamespace(configuration={"median_image_size_in_voxels": median}, patch_size=patch_size, batch_size=2)
    return SimpleNamespace(
        files=SimpleNamespace(model=SimpleNamespace(config=config)),
        patch_size=patch_size,
        step_size=0.5,
        voxels_per_tile=math.prod(patch_size) * folds * mirrors,
    )


class TestPasses:
    def test_a_median_image_is_cut_into_nnunets_tiles(self):
        asked = teacher((64, 80, 64), [97.0, 124.0, 91.0])  # 33 in steps of 32: three; 44 in 40: three; 27: two
        assert median_passes(asked, 7) == Passes(7 * 18 * 64 * 80 * 64 * 40)

    def test_slices_are_tiles_of_two_dimensions(self):
        assert median_passes(teacher((64, 64), [10.0, 64.0, 90.0]), 3) == Passes(3 * 10 * 2 * 64 * 64 * 40)

    def test_plans_that_name_no_median_image_have_one_tile(self):
        assert median_passes(teacher((64, 80, 64), None), 7) == Passes(7 * 64 * 80 * 64 * 40)

    @pytest.mark.parametrize(("batch_size", "samples"), [(None, 2), (5, 5)])
    def test_a_training_is_as_long_as_its_samples(self, batch_size, samples):
        spec = DistillSpec(epochs=3, iterations_per_epoch=50, batch_size=batch_size)
        expected = 0.4 * 150 * samples * 64 * 80 * 64
        assert training_passes(teacher((64, 80, 64), None).files, spec).voxels == pytest.approx(expected)


def test_seconds_of_the_hippocampus_are_about_those_that_were_measured():
    """Five folds, mirrored, one or two tiles: 55 CPU seconds a case; a step of two samples: 0.6 CPU seconds."""
    asked = teacher((40, 56, 40), [36.0, 50.0, 35.0])
    labelling = median_passes(asked, 200).voxels * overall._PASS_S
    training = training_passes(asked.files, DistillSpec(epochs=80, batch_size=2, iterations_per_epoch=50))
    assert 0.3 < labelling / (200 * 55 / 2) < 3
    assert 0.3 < training.voxels * overall._PASS_S / (4000 * 0.6 / 2) < 3
