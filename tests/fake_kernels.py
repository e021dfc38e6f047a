"""The GPU of tests/fake_gpu.py with kernels: their bodies run on the CPU (native/engine/cuda/emulation), put off as the
rest of the work on a stream is, and memory, events and streams have the rules that CUDA gives them.

A stream runs only when somebody waits for it, so what does not wait for another stream where it must finds NaN.
"""

import ctypes
import enum
import shutil
import subprocess
import sys
import tempfile
import types
from functools import cache
from pathlib import Path

import pytest

import fastnnunet
from fastnnunet.engines.cuda import gpu as gpu_module
from tests.fake_gpu import OK, FakeCuda

SOURCES = Path(fastnnunet.__file__).parent / "native" / "engine" / "cuda"
_STATUS = {1: "no such kernel", 2: "threads that do not meet at a barrier", 3: "shared memory overrun", 4: "bad launch"}


@cache
def emulation() -> ctypes.CDLL:
    """The bodies, compiled once for a test process. Skips where there is no compiler."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: the kernels cannot be emulated")
    target = Path(tempfile.mkdtemp(prefix="fastnnunet-kernels-")) / "libkernels.so"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fno-fast-math", "-Wall", "-Wextra", "-Werror"]
    command += ["-shared", "-fPIC", str(SOURCES / "emulation" / "emulate.cpp"), "-o", str(target)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(target))
    shutil.rmtree(target.parent)  # it is mapped
    library.fastnnunet_emulate.argtypes = [
        ctypes.c_char_p, ctypes.c_int64 * 3, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint,
    ]  # fmt: skip
    library.fastnnunet_params_bytes.restype = library.fastnnunet_shared_bytes.restype = ctypes.c_int64
    library.fastnnunet_params_bytes.argtypes = library.fastnnunet_shared_bytes.argtypes = [ctypes.c_char_p]
    library.fastnnunet_kernel_names.restype = ctypes.c_char_p
    return library


class FakeCudaWithKernels(FakeCuda):
    """cuda.bindings.runtime and, as `driver`, the part of cuda.bindings.driver that kernels need."""

    cudaEventDisableTiming = 2
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3}
    )

    def __init__(self, capability: tuple[int, int] = (8, 6), memory_bytes: int = 1 << 30) -> None:
        super().__init__(capability, memory_bytes)
        self.events: dict[int, tuple[int, int] | None] = {}  # event -> stream and how much of its work comes before
        self.started: list[str] = []
        self.uploads: list[int] = []  # bytes of each copy to the device
        self.downloads: list[int] = []
        self.seed = 0
        self.driver = FakeDriver(self)

    # memory in the order of a stream
    def cudaMallocAsync(self, size, stream):
        assert size > 0
        return self._allocate("device", size)

    def cudaFreeAsync(self, address, stream):
        assert self.memory[address][0] == "device", "freed what is not allocated, or twice"

        def free():
            self.left_bytes += ctypes.sizeof(self.memory.pop(address)[1])

        self.streams[stream].put(free)
        return (OK,)

    def cudaMemsetAsync(self, address, byte, size, stream):
        def fill():
            self.check("device", address, size)
            ctypes.memset(address, byte, size)

        self.streams[stream].put(fill)
        return (OK,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        """Page-locked memory as in FakeCuda; ordinary memory is staged on the way in and waited for on the way out."""
        if kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:

            def copy_within():
                self.check("device", target, size)
                self.check("device", source, size)
                ctypes.memmove(target, source, size)

            self.streams[stream].put(copy_within)
            return (OK,)
        to_device = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        (self.uploads if to_device else self.downloads).append(size)
        host = source if to_device else target
        if any(
            kind == "host" and start <= host < start + ctypes.sizeof(block)
            for start, (kind, block) in list(self.memory.items())
        ):
            return super().cudaMemcpyAsync(target, source, size, kind, stream)
        assert self.streams[stream].captured is None, "ordinary memory is copied while a graph is captured"
        if to_device:
            staged = ctypes.string_at(source, size)

            def copy():
                self.check("device", target, size)
                ctypes.memmove(target, staged, size)

            self.streams[stream].put(copy)
        else:
            self._run(stream)
            self.check("device", source, size)
            ctypes.memmove(target, source, size)
        return (OK,)

    def cudaFree(self, address):
        """Waits for the device first, as CUDA does."""
        for stream in list(self.streams):
            self._run(stream)
        return super().cudaFree(address)

    def cudaStreamDestroy(self, stream):
        """What is on the stream is still done."""
        self._run(stream)
        return super().cudaStreamDestroy(stream)

    # events
    def cudaEventCreateWithFlags(self, flags):
        assert flags == self.cudaEventDisableTiming
        event = next(self._handles)
        self.events[event] = None
        return OK, event

    def cudaEventRecord(self, event, stream):
        it = self.streams[stream]
        reached = types.SimpleNamespace(done=False)
        it.put(lambda: setattr(reached, "done", True))
        self.events[event] = (stream, reached)
        return (OK,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        recorded = self.events[event]
        assert recorded is not None, "an event that was never recorded"
        self.streams[stream].put(lambda: self._run_until(*recorded))
        return (OK,)

    def cudaEventSynchronize(self, event):
        self._run_until(*self.events[event])
        return (OK,)

    def cudaEventDestroy(self, event):
        del self.events[event]
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        if self.streams[stream].captured is not None:
            return super().cudaStreamSynchronize(stream)
        self._run(stream)
        return (OK,)

    def _run(self, stream):
        pending = self.streams[stream].pending
        while pending:
            pending.pop(0)()
        self.streams[stream].touched.clear()

    def _run_until(self, stream, reached):
        pending = self.streams[stream].pending
        while not reached.done:
            pending.pop(0)()

    def alive(self):
        return {**super().alive(), "events": len(self.events)}


class FakeDriver(types.ModuleType):
    """cuda.bindings.driver"""

    CUresult = enum.IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_NOT_FOUND": 500})

    def __init__(self, cuda: FakeCudaWithKernels) -> None:
        super().__init__("cuda.bindings.driver")
        self._cuda = cuda

    def cuInit(self, flags):
        return (self.CUresult.CUDA_SUCCESS,)

    def cuModuleLoadData(self, code):
        assert code == b"emulated"
        return self.CUresult.CUDA_SUCCESS, "module"

    def cuModuleGetFunction(self, module, name):
        kernel = name.decode().removeprefix("fastnnunet_")
        if emulation().fastnnunet_params_bytes(kernel.encode()) == 0:
            return self.CUresult.CUDA_ERROR_NOT_FOUND, None
        return self.CUresult.CUDA_SUCCESS, kernel

    def cuLaunchKernel(self, kernel, *rest):
        grid, block, (shared, stream, pointers, extra) = rest[:3], rest[3:6], rest[6:]
        assert block == (32, 8, 1)
        assert extra == 0
        assert grid[0] < 2**31
        assert max(grid[1:]) < 2**16
        (address,) = (ctypes.c_void_p * 1).from_address(pointers)
        size = emulation().fastnnunet_params_bytes(kernel.encode())
        params = ctypes.create_string_buffer(ctypes.string_at(address, size), size)  # as they are now
        cuda = self._cuda
        cuda.started.append(kernel)
        cuda.seed += 1
        seed = cuda.seed

        def run():
            status = emulation().fastnnunet_emulate(
                kernel.encode(), (ctypes.c_int64 * 3)(*grid), shared, ctypes.addressof(params), seed
            )
            assert status == 0, f"{kernel}: {_STATUS[status]}"

        cuda.streams[stream].put(run)
        return (self.CUresult.CUDA_SUCCESS,)


def use_fake_cuda(monkeypatch: pytest.MonkeyPatch, **changes) -> FakeCudaWithKernels:
    """A GPU with kernels in this machine."""
    emulation()
    fake = FakeCudaWithKernels(**changes)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake.driver)
    monkeypatch.setattr(gpu_module, "kernel_code", lambda architecture: b"emulated")
    monkeypatch.setattr(gpu_module, "_gpus", {})
    return fake
