"""Memory of a GPU while something runs there, as the driver counts it for the whole device."""

import os
import shutil
import subprocess
from collections.abc import Callable
from threading import Event, Thread
from types import TracebackType
from typing import Self, TypeVar

from fastnnunet.errors import BackendError

T = TypeVar("T")
_EVERY_MS = 20
_PATIENCE_S = 30.0
MIB = 2**20


class GpuMeter:
    """Watches the used memory of GPU 0, or of the first of CUDA_VISIBLE_DEVICES, through nvidia-smi.

    Other processes on that device count too: `rise` tells what came on top of what was there before.
    """

    def __init__(self) -> None:
        """Raises BackendError when there is no nvidia-smi."""
        if (tool := shutil.which("nvidia-smi")) is None:
            raise BackendError(
                "the memory of a GPU is read with nvidia-smi, which is not on the PATH\n"
                "it comes with the NVIDIA driver; add its folder to PATH"
            )
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
        query = ("--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", str(_EVERY_MS))
        self._process = subprocess.Popen([tool, "-i", device, *query], stdout=subprocess.PIPE, text=True)
        self._now = self._highest = 0
        self._fresh = Event()
        Thread(target=self._watch, daemon=True).start()

    def rise(self, call: Callable[[], T]) -> tuple[T, int, int]:
        """What `call` gives, bytes it used at most on top of those used before, and bytes it kept."""
        before = self._read()
        self._highest = before
        result = call()
        after = self._read()
        return result, MIB * (self._highest - before), MIB * (after - before)

    def _read(self) -> int:
        """MiB in a sample that was taken after now. Raises BackendError when nvidia-smi gives none."""
        for _ in range(2):  # the first may have been under way
            self._fresh.clear()
            if not self._fresh.wait(_PATIENCE_S):
                raise BackendError(f"nvidia-smi told nothing about the GPU's memory for {_PATIENCE_S:.0f} s; is it up?")
        return self._now

    def _watch(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():
                self._now = int(line)
                self._highest = max(self._highest, self._now)
                self._fresh.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()
