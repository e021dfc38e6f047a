"""macOS and Windows, as far as Linux can tell: what they lack is not asked for, and prediction works without it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.bundles import Toy, make_toy_model, smooth_noise, write_image

ROOT = Path(__file__).resolve().parents[1]

# other libraries are loaded first: theirs to mind is the platform they were built for
WITHOUT = """
import concurrent.futures.process, multiprocessing.pool, os, pathlib, signal, subprocess, sys, tempfile
import numpy, onnxruntime, PIL.Image, rich.progress, scipy.ndimage, SimpleITK, tifffile, typer, yaml

for module in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[module] = None
for name in {names_of_os}:
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "pthread_sigmask"):
    delattr(signal, name)
is_file = pathlib.Path.is_file
pathlib.Path.is_file = lambda path: not path.is_relative_to("/proc") and is_file(path)
sys.platform = {platform!r}
from fastnnunet.cli.main import main

sys.argv = ["fastnnunet", *sys.argv[1:]]
main()
"""
ABSENT = {
    "darwin": ("sched_getaffinity", "posix_fallocate", "posix_fadvise"),
    "win32": (
        "sched_getaffinity", "fork", "register_at_fork", "sysconf", "pathconf", "killpg", "setsid", "getuid", "nice",
    ),
}  # fmt: skip


def predict(command: list[str], images: Path, bundle: Path, out: Path) -> np.ndarray:
    words = ["predict", "-i", images, "-o", out, "-m", bundle, "--backend", "onnxruntime", "-npp", "2", "-nps", "2"]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in sorted(out.glob("*.nii.gz"))])


def test_prediction_where_there_is_less(tmp_path: Path) -> None:
    """The same labels without the calls, modules and signals that other systems lack."""
    bundle = make_toy_model(Toy(), tmp_path).bundle
    for name in ("a", "b"):
        write_image(smooth_noise((16, 22, 27), ord(name)), tmp_path / "images" / f"{name}_0000.nii.gz")
    here = predict([sys.executable, "-m", "fastnnunet"], tmp_path / "images", bundle, tmp_path / "here")
    assert here.shape[0] == 2
    assert len(np.unique(here)) > 1
    for platform, names in ABSENT.items():
        code = WITHOUT.format(platform=platform, names_of_os=[name for name in names if hasattr(os, name)])
        there = predict([sys.executable, "-c", code], tmp_path / "images", bundle, tmp_path / platform)
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("platform", [name for name in ("linux", "win32") if name != sys.platform])
def test_nothing_is_asked_for_that_a_platform_lacks(platform: str) -> None:
    """mypy knows which functions, signals and modules of Python each has; what macOS lacks, Windows lacks too."""
    mypy = Path(sysconfig.get_path("scripts"), "mypy")
    options = ["--platform", platform, "--cache-dir", ROOT / ".mypy_cache" / platform]
    done = subprocess.run([mypy, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
