"""Loader processes: errors come out whole and in their turn, and no process outlives the one that started it."""

import faulthandler
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnnunet.errors import BuildError, CorruptError, FastnnUNetError
from fastnnunet.nnunet.trainer.loaders.ordered import ordered_batches
from fastnnunet.nnunet.trainer.loading_errors import loader_ended, unreadable
from fastnnunet.nnunet.unlabelled.parallel import each
from fastnnunet.system.children import Children, interrupts_held, others_children

PATIENCE_S = 60.0  # for what has to happen, on any machine
GONE_WITHIN_S = 5.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def interruptible():
    """A suite that runs in the background ignores Ctrl-C or the loss of its terminal, and so would what it starts."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Batches:
    """Numbers in tensors, and at one of them whatever `fate` does."""

    def __init__(self, fate=None, at=4):
        self._fate, self._at = fate, at

    def make(self, number, _is_loading):
        number.begin()
        value = float(torch.rand(()))  # a function of the batch's number
        if self._fate is not None and abs(value - self._expected()) < 1e-7:
            self._fate()
        return {"data": torch.full((2, 3), value), "keys": ["a", "b"]}

    def _expected(self):
        return value_of(self._at)


def value_of(number):
    from fastnnunet.nnunet.trainer.seeds import generators_kept, seed_generators

    with generators_kept():
        seed_generators(0, 0, number)
        return float(torch.rand(()))


def batches(loader, num_processes):
    return ordered_batches(loader, seed=0, stream=0, start=0, num_processes=num_processes, pin_memory=False)


def finish(made):
    if hasattr(made, "_finish"):
        made._finish()


class Raising:
    def __init__(self, error):
        self._error = error

    def __call__(self):
        raise self._error


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, within_s=PATIENCE_S):
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + within_s
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return done


@pytest.mark.parametrize("num_processes", [0, 1, 3])
class TestErrors:
    def test_come_in_the_turn_of_their_batch(self, num_processes):
        """Batches before the one that fails are handed over, with their tensors."""
        made = batches(Batches(Raising(CorruptError("case x\nmend it"))), num_processes)
        try:
            got = [float(next(made)["data"][0, 0]) for _ in range(4)]
            np.testing.assert_allclose(got, [value_of(n) for n in range(4)])
            with pytest.raises(CorruptError) as caught:
                next(made)
        finally:
            finish(made)
        assert str(caught.value) == "case x\nmend it"
        assert multiprocessing.active_children() == []

    def test_come_where_exceptions_are_pickled_with_their_causes(self, num_processes):
        """dask has tblib do that, for the whole process."""
        from tblib import pickling_support

        pickling_support.install(CorruptError)
        made = batches(Batches(Raising(CorruptError("case x\nmend it")), at=0), num_processes)
        try:
            with pytest.raises(CorruptError, match="case x\nmend it"):
                next(made)
        finally:
            finish(made)

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("blosc2 said\nno"), KeyError("class_locations"), EOFError(), MemoryError(), OSError(24, "x")],
    )
    def test_of_any_kind_are_one_message(self, num_processes, error, capfd):
        made = batches(Batches(Raising(error), at=0), num_processes)
        try:
            with pytest.raises(FastnnUNetError) as caught:
                next(made)
        finally:
            finish(made)
        assert str(error).split("\n")[0].strip("'") in str(caught.value)
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGBUS"])
def test_a_loader_that_is_ended(name):
    """The kernel, out of memory, sends SIGKILL; a damaged file may end in SIGSEGV or SIGBUS."""

    def fate():
        faulthandler.disable()
        os.kill(os.getpid(), getattr(signal, name))

    made = batches(Batches(fate, at=0), 2)
    try:
        with pytest.raises(BuildError, match=name):
            next(made)
    finally:
        finish(made)
    assert "make it again with: do x" in str(loader_ended(-signal.SIGSEGV, "x", lambda case: f"do {case}"))
    assert "do x" not in str(loader_ended(-signal.SIGKILL, "x", lambda case: f"do {case}"))
    assert "while it loaded case x" in str(loader_ended(-signal.SIGKILL, "x", None))


def test_where_processes_are_spawned(monkeypatch):
    """As on macOS and Windows, where everything a loader needs is sent to it."""
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "get_context", lambda: spawn)
    made = batches(Batches(Raising(CorruptError("case x")), at=1), 1)
    try:
        assert float(next(made)["data"][0, 0]) == pytest.approx(value_of(0))
        with pytest.raises(CorruptError, match="case x"):
            next(made)
    finally:
        finish(made)


def test_what_cannot_be_handed_over():
    made = batches(NotPicklable(), 1)
    try:
        with pytest.raises(FastnnUNetError, match="cannot hand over its batch"):
            next(made)
    finally:
        finish(made)


class NotPicklable:
    def make(self, _number, _is_loading):
        return {"data": lambda: 0}


def test_a_missing_file_is_named():
    error = FileNotFoundError(2, "No such file or directory", "/d/case.pkl")
    assert str(unreadable("case", error, "mend it")) == (
        "preprocessed case case is incomplete: [Errno 2] No such file or directory: '/d/case.pkl'\n"
        "make it again with: mend it"
    )


def signals_as_usual():
    """What runs in the background of a shell, or under nohup, ignores some, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def loading_main(pipe, in_thread):
    """A process that trains, as far as its loaders see."""
    signals_as_usual()

    def train():
        made = batches(Batches(), 2)
        try:
            next(made)
            pipe.send([loader.process.pid for loader in made._loaders])
            while True:
                next(made)
        finally:
            made._finish()

    try:
        if in_thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(train).result()
        train()
    except KeyboardInterrupt:
        os._exit(130)


def sleep_long(_item):
    time.sleep(10 * PATIENCE_S)


def spawning_main(pipe, kind):
    signals_as_usual()
    if kind == "others":
        with others_children(), multiprocessing.get_context("spawn").Pool(2) as pool:
            pipe.send([process.pid for process in pool._pool])
            pool.map(sleep_long, range(2))
    elif kind == "each":
        with ThreadPoolExecutor(1) as watcher:
            watcher.submit(tell_children, pipe, 2)
            list(each(sleep_long, {"a": 1, "b": 2}, 2))
    else:
        child = Children().Process(target=sleep_long, args=(0,))
        child.start()
        pipe.send([child.pid])
        child.join()


def tell_children(pipe, count):
    until(lambda: len(multiprocessing.active_children()) == count)
    pipe.send([process.pid for process in multiprocessing.active_children()])


class TestNoProcessOutlivesItsParent:
    @pytest.fixture(autouse=True)
    def nothing_stays(self):
        """A process that did not end would slow down all other tests."""
        self.processes = []
        yield
        for process in self.processes:
            process.kill()
            process.join()

    def started(self, target, *args):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=target, args=(theirs, *args))
        process.start()
        self.processes.append(process)
        theirs.close()
        assert ours.poll(PATIENCE_S)
        pids = ours.recv()
        assert pids
        assert all(map(is_running, pids))
        return process, pids

    @pytest.mark.parametrize("in_thread", [False, True])
    @pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"])
    def test_loaders(self, name, in_thread):
        process, pids = self.started(loading_main, in_thread)
        if name == "SIGINT" and in_thread:
            os.kill(process.pid, signal.SIGKILL)  # Python interrupts its main thread only
        else:
            os.kill(process.pid, getattr(signal, name))
        process.join(PATIENCE_S)
        assert process.exitcode == {"SIGINT": 130}.get(name, -getattr(signal, name)) or in_thread
        assert until(lambda: not any(map(is_running, pids)), GONE_WITHIN_S)

    @pytest.mark.parametrize("kind", ["others", "each", "one"])
    def test_spawned_ones(self, kind):
        process, pids = self.started(spawning_main, kind)
        time.sleep(0.1)
        process.kill()
        process.join(PATIENCE_S)
        assert until(lambda: not any(map(is_running, pids)), PATIENCE_S)  # some have only just begun to start Python

    def test_a_second_loader_does_not_keep_the_first(self):
        """Processes inherit the pipes of those that were started before them."""
        first, second = batches(Batches(), 2), batches(Batches(), 1)
        next(first), next(second)
        pids = [loader.process.pid for loader in first._loaders]
        begin = time.monotonic()
        first._finish()
        assert not any(map(is_running, pids))
        assert time.monotonic() - begin < GONE_WITHIN_S
        assert float(next(second)["data"][0, 0]) == pytest.approx(value_of(1))
        second._finish()


class TestInterrupts:
    def test_wait_for_the_end_of_the_block(self):
        done = []
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            with interrupts_held():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
                done.append("whole")
            done.append("after")
        assert done == ["whole"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())

    def test_nothing_happens_without_one(self):
        with interrupts_held():
            pass

    def test_loaders_do_not_mind_it(self, capfd):
        """Ctrl-C reaches the whole group of processes; the training alone decides what it means."""
        made = batches(Batches(), 2)
        try:
            next(made)
            for loader in made._loaders:
                os.kill(loader.process.pid, signal.SIGINT)
            time.sleep(0.2)
            for number in range(1, 8):
                assert float(next(made)["data"][0, 0]) == pytest.approx(value_of(number))
        finally:
            finish(made)
        assert capfd.readouterr() == ("", "")


def descendants(mark):
    """Running processes with a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and is_running(int(folder.name)):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark.encode() in environment:
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_training(world, name, tmp_path):
    """The command itself: after its death nothing of it is left, and Ctrl-C ends it with one line."""
    mark = f"FASTNNUNET_TEST_MARK={tmp_path.name}-{os.getpid()}"
    words = (
        "-d 998 -f 0 -tf 0 1 -r 2 -a 0 -e 500 --iterations 2 --val-iterations 1 --no-validate --threads 1 --device cpu"
    )
    environment = {**os.environ, "nnUNet_n_proc_DA": "2", **dict([mark.split("=")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnnunet", "train", *words.split()],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if "epoch 1/" in line:
            break
    assert len(descendants(mark)) >= 3
    if name == "SIGKILL":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    said = [line for line in process.stderr if " fold 0 epoch " not in line]
    assert process.wait(PATIENCE_S) == {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}[name]
    assert until(lambda: not descendants(mark), GONE_WITHIN_S)
    how = "the same command with --continue goes on after the last whole epoch"
    assert said == {"SIGKILL": [], "SIGINT": [f"interrupted; {how}\n"]}[name]


def test_no_warning_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        made = batches(Batches(), 1)
        next(made)
        made._finish()
    assert not caplog.records
