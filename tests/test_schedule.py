"""How long a training is: epochs, steps, or as many epochs as fit into some hours."""

from types import SimpleNamespace

import pytest

from fastnnunet.distill.job import run_folder
from fastnnunet.distill.train import train_student
from fastnnunet.errors import SpecError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.trainer.epochs import planned_epochs
from fastnnunet.specs.distill import DistillSpec
from tests.test_distill_seeds import FOUR, assert_same, build, make_job, trained


class TestSteps:
    @pytest.mark.parametrize(
        ("steps", "epochs", "iterations", "validation"),
        [(2000, 40, 50, 10), (30, 1, 30, 6), (10_000, 100, 100, 20), (250_000, 1000, 250, 50), (1234, 25, 50, 10)],
    )
    def test_divided_into_epochs(self, steps, epochs, iterations, validation):
        spec = DistillSpec(steps=steps)
        assert (spec.epochs, spec.iterations_per_epoch, spec.val_iterations_per_epoch) == (
            epochs,
            iterations,
            validation,
        )
        assert spec == DistillSpec(epochs=epochs, iterations_per_epoch=iterations, val_iterations_per_epoch=validation)
        assert steps <= epochs * iterations < 1.02 * steps
        assert DistillSpec(steps=steps, val_iterations_per_epoch=3).val_iterations_per_epoch == 3

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"steps": 0}, "steps: got 0"),
            ({"steps": 100, "epochs": 4}, "steps: got it beside epochs"),
            ({"steps": 100, "iterations_per_epoch": 4}, "steps: got it beside iterations_per_epoch"),
            ({"steps": 100, "hours": 1.0}, "hours: got it beside steps"),
            ({"hours": 1.0, "epochs": 4}, "hours: got it beside epochs"),
            ({"hours": 0.0}, "hours: got 0.0"),
            ({"hours": float("nan")}, "hours: got nan"),
        ],
    )
    def test_nonsense(self, fields, message):
        with pytest.raises(SpecError, match=message):
            DistillSpec(**fields)


class TestPlan:
    """Seconds by hand."""

    def test_first_steps_are_slow(self):
        # a start at 5 s, then 8 steps of 10 s and 12 of 1 s, validation of 3 s: an epoch is 20 * 1 + 3 s
        ends = [5.0 + 10 * n for n in range(9)]
        ends += [ends[-1] + n for n in range(1, 13)]
        now = ends[-1] + 3
        assert now == 100
        for left, epochs in ((0, 1), (22.9, 1), (23.1, 2), (23 * 9 + 1, 10)):
            trainer = SimpleNamespace(hours=(now + left) / 3600)
            assert planned_epochs(trainer, 0.0, ends, now) == epochs

    def test_an_epoch_longer_than_the_hours(self, caplog):
        assert planned_epochs(SimpleNamespace(hours=0.01), 0.0, [0.0, 50.0], 60.0) == 1
        assert "more --hours or fewer --iterations" in caplog.text


def clock(monkeypatch, seconds):
    """Every look at the clock is so many seconds after the one before."""
    looks = iter(range(10_000))
    monkeypatch.setattr("fastnnunet.nnunet.trainer.epochs.monotonic", lambda: seconds * next(looks))


class TestHours:
    def test_as_with_so_many_epochs_and_a_resumed_run_keeps_the_plan(self, world, monkeypatch):
        """The start, two steps and a validation take a second each, an epoch 3: four of them fit into 14 s."""
        build()
        budget = make_job(alpha=0.3, epochs=DistillSpec().epochs, hours=14 / 3600)
        clock(monkeypatch, 1)
        totals = []
        reference = trained(make_job(alpha=0.3))
        planned = trained(budget, progress=lambda state: totals.append(state.total))
        assert_same(reference, planned)
        assert totals == [None] * 2 + [8] * 6
        assert planned["fastnnunet"]["planned_epochs"] == FOUR.epochs
        assert "_h0.00388889_" in run_folder(budget).parent.name

        def kill(state):
            if state.epoch == 2:
                raise KeyboardInterrupt

        clock(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            train_student(budget, overwrite=True, validate=False, progress=kill)
        assert load_checkpoint(run_folder(budget) / "checkpoint_latest.pth")["current_epoch"] == 2
        clock(monkeypatch, 100)  # another machine
        assert_same(reference, trained(budget, resume=True))
