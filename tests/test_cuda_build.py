"""What compilers make of the CUDA kernels: registers, spills and shared memory by nvcc, the same sources by NVRTC."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastnnunet.engines.cuda import code
from fastnnunet.engines.cuda.params import KERNELS
from fastnnunet.errors import BackendError

# Two blocks of 256 threads fit the 65536 registers of a multiprocessor: what reads memory all the time needs no more.
MOST_REGISTERS = 128
MOST_SHARED = 8 * 1024  # of a block; sm_75 has 64 KB a multiprocessor
NVCC = shutil.which("nvcc")  # of PyPI: nvidia-cuda-nvcc, -crt, -runtime and -cccl with nvidia-nvvm


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch):
    """cuda.bindings.nvrtc with the library that PyPI has, wherever on sys.path it lies; skips without."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-python is not installed")
    spec = importlib.util.find_spec("nvidia")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for file in sorted(Path(folder).glob("*/lib/libnvrtc*.so.*")):
            ctypes.CDLL(str(file))  # cuda-python takes one that is loaded
    try:
        return code._import_nvrtc()
    except BackendError as e:
        pytest.skip(str(e))


def usage(report: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and static shared memory of each kernel, of what `ptxas -v` prints."""
    found = {}
    pattern = (
        r"Function properties for fastnnunet_(\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes "
        r"spill loads\n.*?Used (\d+) registers([^\n]*)"
    )
    for name, stack, stores, loads, registers, rest in re.findall(pattern, report):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled = int(stack) + int(stores) + int(loads)
        found[name] = max(found.get(name, (0, 0, 0)), (int(registers), spilled, int(shared[1]) if shared else 0))
    return found


def test_the_report_is_read() -> None:
    report = (
        "ptxas info    : Function properties for fastnnunet_scale\n"
        "    16 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 24 bytes smem, 424 bytes cmem[0]\n"
    )
    assert usage(report) == {"scale": (40, 32, 24)}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", [75, 90, 103, 121])
def test_registers_spills_and_shared_memory(tmp_path: Path, architecture: int) -> None:
    """The oldest, the newest, and two between that differ most; `make kernels` compiles all."""
    known = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if f"sm_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    command = [str(NVCC), *code.OPTIONS, "-Xptxas", "-v", "-cubin", f"-arch=sm_{architecture}", "-o", "kernels.cubin"]
    done = subprocess.run(
        [*command, str(code.SOURCES / "kernels.cu")], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    used = usage(done.stderr)
    assert set(used) == set(KERNELS)
    for name, (registers, spilled, shared) in used.items():
        assert registers <= MOST_REGISTERS, f"{name}: {registers} registers"
        assert spilled == 0, f"{name}: {spilled} bytes of stack or spills"
        assert shared + KERNELS[name].shared_bytes <= MOST_SHARED, name


def test_nvrtc_compiles_the_same_sources(nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path))
    made = code.kernel_code("sm86")
    assert made.startswith(b"\x7fELF")
    assert all(f"fastnnunet_{name}".encode() in made for name in KERNELS)
    (kept,) = (tmp_path / "cuda").iterdir()
    monkeypatch.setattr(code, "compile_kernels", lambda architecture: pytest.fail("compiled twice"))
    assert code.kernel_code("sm86") == made
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(pytest.fail.Exception, match="compiled twice"):
        code.kernel_code("sm86")


def test_an_architecture_that_nvrtc_does_not_know_gets_ptx(nvrtc) -> None:
    assert b".visible .entry fastnnunet_gather" in code.compile_kernels("sm199")
    with pytest.raises(BackendError, match="the GPU is of architecture sm30, NVRTC compiles for sm"):
        code.compile_kernels("sm30")


def test_sources_that_do_not_compile_are_told(nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in code.source_files():
        shutil.copy(file, tmp_path)
    (tmp_path / "label.hpp").write_text("nonsense;")
    monkeypatch.setattr(code, "SOURCES", tmp_path)
    with pytest.raises(BackendError, match=r"the CUDA kernels do not compile for sm86: label\.hpp"):
        code.compile_kernels("sm86")


def test_a_fatbin_is_taken_while_the_sources_are_those_it_was_built_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for file in code.source_files():
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(code, "SOURCES", tmp_path)
    monkeypatch.setattr(code, "_import_nvrtc", lambda: pytest.fail("NVRTC was asked"))
    (tmp_path / code.FATBIN).write_bytes(b"fatbin")
    digests = "".join(f"{code.sha256_of_file(file)}  {file}\n" for file in code.source_files())
    (tmp_path / code.DIGESTS).write_text(digests)
    assert code.kernel_code("sm86") == b"fatbin"
    (tmp_path / "label.hpp").write_text("changed")
    with pytest.raises(pytest.fail.Exception, match="NVRTC was asked"):
        code.kernel_code("sm86")
    assert "make kernels builds it again" in caplog.text


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(BackendError, match=r"NVRTC is missing.*\ninstall it: pip install nvidia-cuda-nvrtc"):
        code.compile_kernels("sm86")
