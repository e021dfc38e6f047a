"""`make lint`, a test for each of its tools, so that `make test` runs them beside everything else."""

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPE = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]


@pytest.mark.parametrize("command", re.findall(r"^\t\$\(BIN\)/(.+)$", RECIPE, re.MULTILINE))
def test_lint(command: str) -> None:
    tool, *arguments = command.split()
    program = Path(sysconfig.get_path("scripts"), tool)
    done = subprocess.run([program, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def test_no_tool_is_missed() -> None:
    assert len(re.findall(r"^\t", RECIPE, re.MULTILINE)) == 4
