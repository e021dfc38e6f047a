"""Several students on the same batches are the students they would have become alone."""

import dataclasses
import shutil

import pytest

from fastnnunet.distill.job import run_folder
from fastnnunet.distill.train import train_students
from fastnnunet.errors import SpecError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.specs.student import StudentSpec
from tests.test_distill_seeds import assert_same, build, make_job, trained


def jobs_of(*sizes, **changes):
    return [dataclasses.replace(make_job(**changes), student=StudentSpec(r=r)) for r in sizes]


def final(folder):
    return load_checkpoint(folder / "checkpoint_final.pth")


class TestTogether:
    def test_equal_to_alone(self, world):
        build()
        jobs = jobs_of(1, 2, alpha=0.3, epochs=2)
        alone = [trained(job) for job in jobs]
        seen = []
        folders = train_students(jobs, overwrite=True, validate=False, progress=seen.append)
        assert [(s.student, s.epoch, s.iteration) for s in seen[:4]] == [
            ("r1", 0, 1),
            ("r2", 0, 1),
            ("r1", 0, 2),
            ("r2", 0, 2),
        ]
        for folder, reference in zip(folders, alone, strict=True):
            assert_same(final(folder), reference)

    def test_batches_are_made_once(self, world, monkeypatch):
        from fastnnunet.nnunet.trainer.batches import SampledBatches

        made = []
        original = SampledBatches.make
        monkeypatch.setattr(SampledBatches, "make", lambda self, *of: made.append(self) or original(self, *of))
        train_students(jobs_of(1, epochs=2), overwrite=True, validate=False)
        for_one = len(made)
        train_students(jobs_of(1, 2, 3, epochs=2), overwrite=True, validate=False)
        assert len(made) == 2 * for_one > 0

    def test_one_that_is_ahead_waits(self, world):
        """A kill between two checkpoints leaves students at different epochs."""
        jobs = jobs_of(1, 2, epochs=3)
        reference = [final(f) for f in train_students(jobs, overwrite=True, validate=False)]

        def killed(epochs):
            def kill(state):
                if state.epoch == epochs:
                    raise KeyboardInterrupt

            return kill

        for job, epochs in zip(jobs, (2, 1), strict=True):
            with pytest.raises(KeyboardInterrupt):
                train_students([job], overwrite=True, validate=False, progress=killed(epochs))
        assert [load_checkpoint(run_folder(j) / "checkpoint_latest.pth")["current_epoch"] for j in jobs] == [2, 1]
        seen = []
        folders = train_students(jobs, resume=True, validate=False, progress=seen.append)
        assert [(s.student, s.epoch) for s in seen if s.iteration == 1] == [("r2", 1), ("r1", 2), ("r2", 2)]
        for folder, expected in zip(folders, reference, strict=True):
            assert_same(final(folder), expected)

    def test_finished_ones_are_left_alone(self, world):
        jobs = jobs_of(1, 2, epochs=1)
        train_students(jobs[:1], overwrite=True, validate=False)
        shutil.rmtree(run_folder(jobs[1]).parent, ignore_errors=True)
        seen = []
        train_students(jobs, resume=True, validate=False, progress=seen.append)
        assert {s.student for s in seen} == {"r2"}

    def test_other_batches_are_refused(self, world):
        first, second = jobs_of(1, 2, epochs=1)
        second = dataclasses.replace(second, distill=dataclasses.replace(second.distill, seed=9))
        with pytest.raises(SpecError, match=r"cannot be trained together, their batches differ: seed: 5 and 9"):
            train_students([first, second], overwrite=True, validate=False)
