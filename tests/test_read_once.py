"""Every command reads each file of a model folder once; counted where Python opens files, in a process of its own."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.tiny import DATASET

# Opens by nnU-Net's own predictor do not count: that it reads the folds itself is what makes it a reference.
PROGRAM = """
import json, sys
from pathlib import Path

folder, opened = Path(sys.argv[1]), []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(sys.argv[1]):
        frame, files = sys._getframe(), set()
        while frame is not None:
            files.add(frame.f_code.co_filename)
            frame = frame.f_back
        if not any(file.endswith("predict_from_raw_data.py") for file in files):
            opened.append(str(Path(arguments[0]).relative_to(folder)))

sys.addaudithook(watch)
from fastnnunet.cli.main import main

seen = []
for command in json.loads(sys.argv[2]):
    opened.clear()
    try:
        main(command)
    except SystemExit as stop:
        seen.append([stop.code or 0, list(opened)])
print(json.dumps(seen))
"""

TEACHER = ["-d", "998", "-c", "3d_fullres"]
STUDENT = ["train", *TEACHER, "-r", "2", "--fold", "1", "--device", "cpu", "--epochs", "1", "--iterations", "1"]


@pytest.fixture
def run(world):
    """Runs commands in one process; returns for each the exit code and how often each file was opened."""
    folder = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"

    def commands(*lines):
        program = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(lines)]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [(code, Counter(opened)) for code, opened in json.loads(done.stdout.splitlines()[-1])]

    return commands


def test_once_each(run):
    everything = Counter(["plans.json", "dataset.json", *(f"fold_{f}/checkpoint_final.pth" for f in range(5))])
    lines = {
        "plan": ["cache", "plan", *TEACHER, "--threads", "1"],
        "plan without loading": ["cache", "plan", *TEACHER, "--no-time"],
        "train without a cache": STUDENT,
        "build": ["cache", "build", *TEACHER, "--workers", "0", "--threads", "1"],
        "build of what is there": ["cache", "build", *TEACHER, "--workers", "0"],
        "train": [*STUDENT, "--val-iterations", "1", "--no-validate"],
    }
    expected = dict.fromkeys(lines, (0, everything)) | {"train without a cache": (2, everything)}
    assert dict(zip(lines, run(*lines.values()), strict=True)) == expected
