"""The stream of events: remaining time, what a view shows of it, and `api.predict` as a service uses it."""

import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from fastnnunet import api, events
from fastnnunet.api import View
from fastnnunet.errors import NotFoundError
from fastnnunet.events import Event, Message, Progress, Remaining, Result, Stage, Timed
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    return now


def _at(done: float, total: float | None = 10, what: str = "reading", unit: str = "cases", **more: object) -> Progress:
    return Progress(what=what, done=done, total=total, unit=unit, **more)  # type: ignore[arg-type]


class TestRemainingTime:
    def test_at_the_pace_since_the_beginning(self, clock: list[float]) -> None:
        remaining = Remaining(done=4)
        assert remaining.seconds(4, 10) is None
        clock[0] += 6
        assert remaining.seconds(6, 10) == pytest.approx(12)  # 2 in 6 s, 4 left
        assert remaining.seconds(10, 10) == 0

    def test_of_each_work_by_itself(self, clock: list[float]) -> None:
        heard: list[Event] = []
        timed = Timed(heard.append)
        timed(_at(1))
        clock[0] += 2
        timed(_at(1, 5, "a", "tiles"))  # within the first case
        clock[0] += 2
        timed(_at(3, 5, "a", "tiles"))
        timed(_at(2))
        clock[0] += 100
        timed(_at(1, 5, "b", "tiles"))  # of the next case: its pace is not known
        timed(_at(1, None))
        timed(_at(9, remaining_s=77.0))
        timed(Message(text="hello"))
        told = [e.remaining_s for e in heard if isinstance(e, Progress)]
        assert told == [None, None, pytest.approx(2), pytest.approx(32), None, None, 77.0]
        assert heard[-1] == Message(text="hello")


def _shown(*shown: Event, terminal: bool, bars: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200, color_system=None)
    with View(console=console, bars=bars) as view:
        for event in shown:
            view(event)
    return file.getvalue()


class TestView:
    STREAM = (
        Message(text="cache: [x]/place"),
        _at(1, note="[a]"),
        _at(2, note="quick", logged=True, remaining_s=3.0),
        Stage(what="export", done=1, total=4, unit="stages", note="building"),
        Result(what="a", value=None),
        Message(text="bad \x1b[2Jname", level="error"),
    )

    @pytest.mark.parametrize("where", [{"terminal": False}, {"terminal": True, "bars": False}])
    def test_lines_where_there_are_no_bars(self, where: dict[str, bool]) -> None:
        assert _shown(*self.STREAM, **where).splitlines() == [
            "cache: [x]/place",
            "reading quick left 3 s",
            "export 1/4: building",
            "bad \\x1b[2Jname",
        ]

    def test_bars_on_a_terminal(self) -> None:
        shown = _shown(*self.STREAM, terminal=True)
        assert "cache: [x]/place" in shown
        assert "2/10 quick" in shown
        assert "left 0:00:03" in shown
        assert "\x1b[2J" not in shown

    def test_finished_work_makes_room(self) -> None:
        training = _at(1, 3, "training", "iterations")
        for done, stays in ((9, True), (10, False)):
            shown = _shown(_at(done), training, terminal=True)
            assert "training" in shown
            assert ("reading" in shown) == stays


class TestApi:
    def test_import_is_light(self) -> None:
        heavy = ("torch", "nnunetv2", "zarr", "numpy", "rich", "onnxruntime")
        code = f"import fastnnunet.api, sys; print([m for m in {heavy} if m in sys.modules])"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

    def test_predicts_in_a_thread_and_prints_nothing(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        model = make_toy_model(Toy(), tmp_path / "toy")
        good = write_image(smooth_noise((12, 25, 20), 0), tmp_path / "in" / "good_0000.nii.gz")
        (tmp_path / "in" / "bad_0000.nii.gz").write_bytes(good.read_bytes()[:2000])
        capfd.readouterr()
        heard: list[tuple[int, Event]] = []
        done: list[api.Prediction] = []

        def work() -> None:
            done.append(
                api.predict(
                    model.bundle,
                    tmp_path / "in",
                    tmp_path / "out",
                    backend="onnxruntime",
                    threads=1,
                    progress=lambda event: heard.append((threading.get_ident(), event)),
                )
            )

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert capfd.readouterr() == ("", "")
        assert [case.case_id for case in done[0].done] == ["good"]
        assert (tmp_path / "out" / "good.nii.gz").is_file()
        assert {who for who, _ in heard} == {thread.ident}
        results = {e.what: e.value.error for _, e in heard if isinstance(e, Result)}
        assert set(results) == {"good", "bad"}
        assert results["good"] is None
        assert [e.text.split(":")[:2] for _, e in heard if isinstance(e, Message)] == [["failed", " bad"]]
        tiles = [(e.done, e.total) for _, e in heard if isinstance(e, Progress) and e.unit == "tiles"]
        assert tiles[-1][0] == tiles[-1][1] == len(tiles) > 1
        assert [e for _, e in heard if isinstance(e, Progress) and e.unit == "cases"][-1].done == 2

    def test_what_a_listener_raises_ends_the_work(self, tmp_path: Path) -> None:
        model = make_toy_model(Toy(), tmp_path / "toy")
        write_image(smooth_noise((12, 15, 20), 0), tmp_path / "in" / "a_0000.nii.gz")

        def stop(event: Event) -> None:
            raise KeyError("stop")

        with pytest.raises(KeyError, match="stop"):
            api.predict(model.bundle, tmp_path / "in", tmp_path / "out", backend="onnxruntime", progress=stop)
        assert not (tmp_path / "out" / "a.nii.gz").exists()

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="no bundle at"):
            api.predict(tmp_path / "none", tmp_path, tmp_path / "out")
