"""Freed memory is reused: the kernel's own count of pages that a process touched for the first time."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from fastnnunet.distill.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    first = torch.ones(20 << 20)  # 80 MB
    return (first + 1).sum().item()

step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert [step() for _ in range(5)] == [2.0 * (20 << 20)] * 5
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(how: str) -> int:
    """Pages first touched in five steps after two others."""
    run = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_steps_reuse_memory() -> None:
    assert new_pages("keep") < 100
    assert new_pages("plain") > 5 * 100  # or this test would show nothing
