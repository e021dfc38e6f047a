"""Freed memory is reused: the kernel's own count of pages that a process touched for the first time."""

import platform
import subprocess
import sys

import pytest

STEPS, TENSORS, TENSOR_MB = 40, 2, 80
SCRIPT = f"""
import resource, sys
import torch
from fastnnunet.distill.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    first = torch.ones({TENSOR_MB << 18})
    return (first + 1).sum().item()

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert [step() for _ in range({STEPS})] == [2.0 * {TENSOR_MB << 18}] * {STEPS}
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages * resource.getpagesize() / {TENSOR_MB << 20})
"""


def new_tensors(how: str) -> float:
    """The pages that all steps touch for the first time, in tensors; each step makes TENSORS of them."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_steps_reuse_memory() -> None:
    """All tensors of all steps are new without it; with it the heap grows until what is free fits, then never again."""
    every = STEPS * TENSORS
    assert new_tensors("keep") < 0.2 * every
    assert new_tensors("plain") > 0.9 * every  # or this test would show nothing
