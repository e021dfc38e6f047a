"""Resumable steps: what runs again, what does not, and whether it starts afresh."""

from pathlib import Path

import pytest

from pipelines.steps import Report, Step, run_steps


class Kitchen:
    """Three steps a -> b -> c that write files; `log` says what ran and whether afresh."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, list[tuple[str, bool]]()
        self.interrupt: str | None = None

    def steps(self) -> list[Step]:
        return [self._step("a", ()), self._step("b", ("a",)), self._step("c", ("b",))]

    def _step(self, key: str, after: tuple[str, ...]) -> Step:
        def work(report: Report, fresh: bool) -> None:
            self.log.append((key, fresh))
            report(0.5)
            if self.interrupt == key:
                raise KeyboardInterrupt
            (self.root / key).write_text(key)

        return Step(
            key=key,
            title=key,
            expected_s=1,
            after=after,
            run=work,
            is_valid=lambda: (self.root / key).is_file(),
        )

    def run(self) -> list[tuple[str, bool]]:
        self.log = []
        self.elapsed_s = run_steps(self.steps(), self.root / "steps")
        return self.log


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path)


def test_a_second_run_does_nothing(kitchen: Kitchen) -> None:
    assert kitchen.run() == [("a", True), ("b", True), ("c", True)]
    first = kitchen.elapsed_s
    assert kitchen.run() == []
    assert kitchen.elapsed_s == first  # of the run that did the work


def test_an_interrupted_step_goes_on(kitchen: Kitchen) -> None:
    kitchen.interrupt = "b"
    with pytest.raises(KeyboardInterrupt):
        kitchen.run()
    kitchen.interrupt = None
    assert kitchen.run() == [("b", False), ("c", True)]


def test_what_was_made_from_a_lost_output_is_made_afresh(kitchen: Kitchen) -> None:
    kitchen.run()
    (kitchen.root / "a").unlink()
    assert kitchen.run() == [("a", False), ("b", True), ("c", True)]
    (kitchen.root / "c").unlink()
    assert kitchen.run() == [("c", False)]


def test_time_left_is_told_without_a_terminal(kitchen: Kitchen, capfd: pytest.CaptureFixture[str]) -> None:
    kitchen.run()
    told = capfd.readouterr().err.splitlines()
    assert told == ["[  0 %] a, 3 s left", "[ 33 %] b, 2 s left", "[ 67 %] c, 1 s left"]
