"""The pipeline of cases: order, overlap, bounded memory, failures, interruption."""

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from fastnnunet.errors import FastnnUNetError, ImageError
from fastnnunet.runtime import pipeline
from fastnnunet.runtime.pipeline import WriteGate, run_pipeline
from fastnnunet.system.files import atomic_output
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image


class Thing:
    """Something with a weight, of which we can see whether it is still held."""

    def __init__(self, name: Any) -> None:
        self.name = name


def _run(items: Any, threaded: bool, **functions: Any) -> list[tuple[Any, Any]]:
    load = functions.get("load", lambda item: item)
    infer = functions.get("infer", lambda item, loaded: loaded)
    finish = functions.get("finish", lambda item, inferred: inferred)
    return list(run_pipeline(items, load, infer, finish, WriteGate(), threaded=threaded))


@pytest.mark.parametrize("threaded", [True, False])
class TestOutcomes:
    @pytest.mark.parametrize("count", [0, 1, 2, 5])
    def test_order(self, threaded: bool, count: int) -> None:
        outcomes = _run(
            iter(range(count)),
            threaded,
            load=lambda item: item + 10,
            infer=lambda item, loaded: (item, loaded * 2),
            finish=lambda item, inferred: (item, *inferred),
        )
        assert outcomes == [(i, (i, i, 2 * (i + 10))) for i in range(count)]

    @pytest.mark.parametrize("stage", ["load", "infer", "finish"])
    @pytest.mark.parametrize("kind", [ImageError, MemoryError, ZeroDivisionError])
    def test_a_failure_leaves_the_others_alone(self, threaded: bool, stage: str, kind: type[Exception]) -> None:
        def fail(item: int, *_: Any) -> int:
            if item == 1:
                raise kind("no")
            return item

        outcomes = _run(range(4), threaded, **{stage: fail})
        assert [item for item, _ in outcomes] == [0, 1, 2, 3]
        assert [outcome for _, outcome in outcomes if not isinstance(outcome, Exception)] == [0, 2, 3]
        error = outcomes[1][1]
        assert isinstance(error, FastnnUNetError)
        assert ("not enough memory" in str(error)) == (kind is MemoryError)
        assert ("unexpected ZeroDivisionError: no\nplease report" in str(error)) == (kind is ZeroDivisionError)

    @pytest.mark.parametrize("stage", ["load", "infer", "finish"])
    def test_an_interruption_ends_the_run(self, threaded: bool, stage: str) -> None:
        def interrupt(item: int, *_: Any) -> int:
            if item == 2:
                raise KeyboardInterrupt
            return item

        with pytest.raises(KeyboardInterrupt):
            _run(range(10), threaded, **{stage: interrupt})


def test_stages_overlap_and_three_items_are_alive_at_most() -> None:
    alive: weakref.WeakSet[Thing] = weakref.WeakSet()
    peak, begun = [], {"load": threading.Event(), "finish": threading.Event()}

    def load(item: int) -> Thing:
        thing = Thing(item)
        alive.add(thing)
        peak.append(len(alive))
        if item == 2:
            begun["load"].set()
        return thing

    def infer(item: int, thing: Thing) -> Thing:
        if item == 1:  # goes on only when the next is read and the last is written meanwhile
            assert begun["load"].wait(10)
            assert begun["finish"].wait(10)
        return thing

    def finish(item: int, thing: Thing) -> int:
        if item == 0:
            begun["finish"].set()
        time.sleep(0.01)  # the slowest stage: the others must wait for it
        return thing.name

    assert [outcome for _, outcome in _run(range(12), True, load=load, infer=infer, finish=finish)] == list(range(12))
    assert max(peak) == 3
    assert threading.main_thread() is threading.current_thread()


def test_nothing_is_written_after_an_interruption(tmp_path: Path) -> None:
    """Ctrl-C while a case is in the network: the file being written is finished, the next is not begun."""
    gate, writing, may_finish = WriteGate(), threading.Event(), threading.Event()

    def infer(item: int, loaded: int) -> int:
        if item == 1:
            assert writing.wait(10)
            threading.Timer(0.1, may_finish.set).start()
            raise KeyboardInterrupt
        return loaded

    def finish(item: int, inferred: int) -> None:
        with gate.writing(), atomic_output(tmp_path / str(item)) as partial:
            writing.set()
            partial.write_text("half")
            assert may_finish.wait(10)
            partial.write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        for _ in run_pipeline(range(5), lambda item: item, infer, finish, gate, threaded=True):
            pass
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"0": "whole"}
    with pytest.raises(FastnnUNetError, match="interrupted"):
        finish(2, 2)


def test_a_file_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_GRACE_S", 0.05)
    gate, writing, may_finish = WriteGate(), threading.Event(), threading.Event()
    failed: list[Exception] = []

    def write() -> None:
        try:
            with gate.writing(), atomic_output(tmp_path / "slow") as partial:
                partial.write_text("half")
                writing.set()
                may_finish.wait(10)
        except FastnnUNetError as e:
            failed.append(e)

    thread = threading.Thread(target=write)
    thread.start()
    assert writing.wait(10)
    gate.close()
    assert list(tmp_path.iterdir()) == []
    may_finish.set()
    thread.join()
    assert list(tmp_path.iterdir()) == []
    assert "cannot write" in str(failed[0])


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_ctrl_c(tmp_path: Path) -> None:
    """The command on a folder that would keep it busy for long: exit code 130 at once, whole files and nothing else."""
    model = make_toy_model(Toy(mirror_axes=(0, 1, 2)), tmp_path)
    image = write_image(smooth_noise((30, 40, 48), 0), tmp_path / "in" / "case000_0000.nii.gz")
    for number in range(1, 400):
        os.link(image, tmp_path / "in" / f"case{number:03d}_0000.nii.gz")
    out = tmp_path / "out"
    words = ["-i", tmp_path / "in", "-o", out, "-m", model.bundle, "--backend", "onnxruntime", "--threads", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnnunet.cli.main", "predict", *map(str, words), "--disable_progress_bar"],
        stderr=subprocess.PIPE,
        text=True,
        # a suite started in the background of a shell ignores interrupts, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("*.nii.gz")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    names = sorted(p.name for p in out.iterdir())
    segmentations = [name for name in names if name.endswith(".nii.gz")]
    assert names == sorted([*segmentations, "dataset.json", "plans.json", "predict_from_raw_data_args.json"])
    assert 0 < len(segmentations) < 400
    for name in segmentations:
        gzip.decompress((out / name).read_bytes())  # checks length and checksum
