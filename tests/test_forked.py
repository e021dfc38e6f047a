"""Forked processes do what started ones do: subprocess.run is the oracle."""

import os
import subprocess
import sys

import pytest

from tests import forked

SCRIPT = """
import multiprocessing, os, sys
sys.modules["json"] = None  # spawned processes run this line as well

def told(number):
    print("from a worker", flush=True)
    return number, os.environ["TOLD"], sys.modules["json"], os.getcwd(), sys.argv

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(told, [1, 2]), flush=True)
    os.system("echo from a command; echo and its error >&2")
    sys.exit(3)
"""
ALWAYS = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TOLD": "yes"}


def outcome(done):
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["script.py", "a", "b c"],
        ["-c", "import os, sys; print(sys.argv, sorted(os.environ)); sys.exit('a message')", "x"],
        ["-m", "fastnnunet", "predict", "--no-such-option"],
        ["-c", "import atexit; atexit.register(print, 'at exit'); print('before')"],
        ["-c", "import os; os._exit(7)"],
        ["-c", "import sys; print('nnunetv2' in sys.modules, 'fastnnunet' in sys.modules, __name__)"],
    ],
    ids=["a script that spawns", "a message", "a module", "at exit", "a hard exit", "nothing imported"],
)
def test_as_started(words, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, *words]
    expected = subprocess.run(command, capture_output=True, text=True, env=ALWAYS, cwd=tmp_path, check=False)
    assert outcome(forked.run(words, env=ALWAYS, cwd=tmp_path)) == outcome(expected)


def test_an_error_ends_with_its_traceback():
    done = forked.run(["-c", "def f(): 1 / 0\nf()"])
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_one_that_takes_too_long_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(["-c", "import time; time.sleep(60)"], timeout=0.5)
    assert outcome(forked.run(["-c", "print(1)"])) == (0, "1\n", "")
