"""The store and prediction on another version of Python, which has other versions of zarr and NumPy, and no torch."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.runtime.predict import Predictor
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.slim import importable

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("FASTNNUNET_ANOTHER", ""))
FILES = (
    "test_cache_codec", "test_cache_encodings", "test_cache_gc", "test_cache_logit_gap",
    "test_cache_reader", "test_cache_sparse", "test_cache_store", "test_geometry_chunked_mean", "test_label_stream",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not os.environ.get("FASTNNUNET_ANOTHER"),
    reason="no other Python: `make test` looks for one, makes its environment and sets FASTNNUNET_ANOTHER",
)


def version_of(python: Path) -> str:
    code = "import sys, zarr; print(*sys.version_info[:2], zarr.__version__)"
    return subprocess.check_output([python, "-I", "-c", code], text=True)


def test_it_is_another_and_has_no_torch() -> None:
    import sys

    import zarr

    assert version_of(PYTHON).split() != [*map(str, sys.version_info[:2]), zarr.__version__]
    assert not importable(PYTHON, "torch")
    assert not importable(PYTHON, "nnunetv2")


def test_the_store(tmp_path: Path) -> None:
    """Every test of these files runs there; none is skipped."""
    files = [f"tests/{name}.py" for name in FILES]
    options = ("-q", "-rA", "-p", "no:cacheprovider", "--basetemp", tmp_path / "there")
    done = subprocess.run([PYTHON, "-m", "pytest", *options, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"=* ?\d{3} passed(, \d+ warnings?)? in .*", last), done.stdout


def test_prediction(tmp_path: Path) -> None:
    """With ONNX Runtime, as it is predicted here."""
    bundle = make_toy_model(Toy(), tmp_path).bundle
    image = write_image(smooth_noise((16, 22, 27), 3), tmp_path / "images" / "a_0000.nii.gz", (1.1, 1.0, 0.9))
    words = ("predict", "-i", image.parent, "-o", tmp_path / "there", "-m", bundle, "--threads", 1)
    done = subprocess.run([PYTHON, "-I", "-m", "fastnnunet", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    Predictor.load(bundle, "onnxruntime", threads=1).predict_files(image.parent, tmp_path / "here")
    there, here = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / where / "a.nii.gz"))) for where in ("there", "here")
    )
    np.testing.assert_array_equal(there, here)
    assert len(np.unique(here)) > 1
