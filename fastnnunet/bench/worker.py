"""An arm in a process of its own, so that neither its memory nor what its libraries set mixes with another's."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from fastnnunet.errors import BackendError, BuildError, FastnnUNetError
from fastnnunet.system.children import Children

_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class CaseRun:
    """What an arm tells of one case: seconds per stage (`read_s`, ...), forward passes where it counts them."""

    stages_s: Mapping[str, float]
    forward_passes: int | None = None


Runner = Callable[[Any, Path], CaseRun]  # (case, output file)


class Arm(Protocol):
    """Something to measure. Picklable; `load` is not part of the measured time."""

    @property
    def name(self) -> str: ...

    @property
    def on_gpu(self) -> bool: ...

    def load(self) -> Runner: ...


@dataclass(frozen=True, slots=True)
class Timed:
    """One case as measured in the arm's process: wall seconds, and the largest resident memory it ever had."""

    elapsed_s: float
    run: CaseRun
    peak_memory_bytes: int


class Worker:
    """A process that has loaded an arm and predicts one case after another; a context manager that ends it."""

    def __init__(self, arm: Arm) -> None:
        self._name = arm.name
        context = Children()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arm), daemon=True)
        self._process.start()
        theirs.close()

    def loaded(self) -> None:
        """Wait until the arm is loaded. Raises what loading raised, BuildError when the process died."""
        self._receive()

    def predict(self, case: Any, output: Path) -> Timed:
        """Predict a case into a file. Raises what the arm raised, BuildError when the process died."""
        self._pipe.send((case, output))
        return self._receive()

    def _receive(self) -> Any:
        try:
            outcome = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise BuildError(
                f"{self._name}: its process ended with code {self._process.exitcode} before it was done\n"
                "it may have run out of memory; what it printed is above"
            ) from None
        if isinstance(outcome, FastnnUNetError):
            raise outcome
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pipe.close()  # which tells it to end
        self._process.join(_PATIENCE_S)
        self._process.terminate()  # in the middle of a case that nobody waits for
        self._process.join()


def _serve(pipe: Connection, arm: Arm) -> None:
    try:
        run = arm.load()
        pipe.send(None)
        while True:
            case, output = pipe.recv()
            begin = time.perf_counter()
            told = run(case, output)
            pipe.send(Timed(time.perf_counter() - begin, told, own_peak_bytes()))
    except FastnnUNetError as e:
        pipe.send(e)
    except (EOFError, KeyboardInterrupt):  # nobody asks any more
        pass
    finally:
        pipe.close()


def own_peak_bytes() -> int:
    """The largest resident memory this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # VmHWM, because ru_maxrss of a started process includes that of the one that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        raise BackendError("the memory of a process is read on Linux and macOS only; run the benchmark there")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
