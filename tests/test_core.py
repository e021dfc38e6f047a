"""The C++ core by itself: its own tests (`fastnnunet/native/tests/`) compiled and run without Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[1] / "fastnnunet" / "native"
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # cmake may be pip's
COMPILERS = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]


@pytest.mark.skipif(not any(shutil.which(name) for name in COMPILERS), reason="no C++ compiler")
def test_the_core_passes_its_own_tests(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=TOOLS)
    assert cmake, "cmake is missing: pip install cmake, or -e .[dev]"

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, done.stdout
        return done.stdout

    run(cmake, "-S", NATIVE, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Debug")
    run(cmake, "--build", tmp_path, "--target", "core_tests", "--config", "Debug", "--parallel", "2")
    (program,) = (p for p in tmp_path.rglob("core_tests*") if p.is_file() and p.suffix in ("", ".exe"))
    assert " 0 failed" in run(program)  # no cases at all would be a failure too
