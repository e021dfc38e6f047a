"""Processes of their own that need not import: a server, which has imported the libraries, forks them.

The commands, nnU-Net's tools and what either spawns import for seconds what every test process has imported already. By
`install`, what multiprocessing is to spawn comes from the server too, with everything that a spawned process is given.
"""

import atexit
import ctypes
import importlib.util
import multiprocessing
import multiprocessing.context as context
import multiprocessing.process
import multiprocessing.reduction as reduction
import multiprocessing.spawn as spawn
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from tests.graphs import remembering

# not from 3.14 on, whose server wants a key of everyone who asks; without torch little is to be saved
AVAILABLE = sys.platform == "linux" and sys.version_info < (3, 14) and importlib.util.find_spec("torch") is not None

GRAPHS = "FASTNNUNET_TESTS_GRAPHS"  # the folder of tests/graphs.py, for commands that export
_prepare_for_spawn, _spawn = spawn.get_preparation_data, context.SpawnProcess._Popen


class Output(int):
    """A file descriptor which, pickled for a new process, is one of that process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return methodcaller("detach"), (reduction.DupFd(int(self)),)


def _preparation_data(name: str) -> dict[str, Any]:
    return _prepare_for_spawn(name) | {"environment": dict(os.environ), "output": [Output(1), Output(2)]}


def install(patch: pytest.MonkeyPatch | None = None) -> None:
    """From now on, or until `patch` is undone, the server forks what multiprocessing is to spawn."""
    patch = patch or pytest.MonkeyPatch()
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    patch.setattr(spawn, "get_preparation_data", _preparation_data)
    patch.setattr(context.SpawnProcess, "_Popen", staticmethod(context.ForkServerProcess._Popen))


@contextmanager
def spawning() -> Iterator[None]:
    """Within, processes are spawned as multiprocessing does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn, "get_preparation_data", _prepare_for_spawn)
        patch.setattr(context.SpawnProcess, "_Popen", staticmethod(_spawn))
        yield


def run(
    words: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run([sys.executable, *words], capture_output=True, text=True, ...) but for the imports.

    `words` begin with -c and a program, -m and a module, or a file. Raises subprocess.TimeoutExpired.
    """
    arguments = list(map(str, words))
    if not AVAILABLE:
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=timeout, check=False)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        install(patch)
        output = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in output:
            file.touch()
        given = (arguments, output, dict(os.environ if env is None else env), cwd or Path.cwd())
        process = multiprocessing.get_context("spawn").Process(target=_run, args=given)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        said = [file.read_text() for file in output]
        return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def stand_in(
    command: Sequence[object], *, check: bool, capture_output: bool, text: bool
) -> subprocess.CompletedProcess[str]:
    """In the place of subprocess.run, for commands of this Python whose output is captured as text."""
    assert (command[0], capture_output, text) == (sys.executable, True, True)
    done = run(command[1:])
    if check:
        done.check_returncode()
    return done


def _run(words: list[str], output: list[Path], environment: dict[str, str], folder: Path) -> None:
    for place, file in enumerate(output, start=1):
        with file.open("a") as opened:
            os.dup2(opened.fileno(), place)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(place), "w", buffering=1) for place in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # below which a process that it spawns looks for its script
    if GRAPHS in environment:
        torch = sys.modules["torch"]
        torch.onnx.export = remembering(torch.onnx.export, Path(environment[GRAPHS]))
    multiprocessing.process._parent_process = None  # the command's own view: nobody's child
    try:
        match words:
            case ["-c", program, *rest]:
                sys.argv = ["-c", *rest]
                main = sys.modules["__main__"] = types.ModuleType("__main__")
                exec(compile(program, "<string>", "exec"), main.__dict__)
            case ["-m", module, *rest]:
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case [file, *rest]:
                sys.argv = [file, *rest]
                sys.path.insert(0, str(Path(file).parent))
                runpy.run_path(file, run_name="__main__")
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()
        ctypes.CDLL(None).fflush(None)
