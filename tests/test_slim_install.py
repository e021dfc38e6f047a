"""The base install by itself, in a virtual environment of its own: what it can do, what it lacks, how large it is."""

import py_compile
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.runtime.predict import Predictor
from pipelines.measure.predict import slim_install
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.slim import base_install, importable, make_environment

LIMIT_BYTES = 800e6


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment") / "slim", base_install())


def test_predicts_with_onnx_runtime_as_the_full_install_does(python: Path, tmp_path: Path) -> None:
    bundle = make_toy_model(Toy(), tmp_path).bundle
    image = write_image(smooth_noise((16, 22, 27), 3), tmp_path / "images" / "a_0000.nii.gz", (1.1, 1.0, 0.9))
    command = ("predict", "-i", image.parent, "-o", tmp_path / "slim", "-m", bundle, "--threads", 1, "--statistics")
    command = (*command, "--preview", "--output-format", "image", "mesh")
    done = subprocess.run([python, "-I", "-m", "fastnnunet", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 case(s) predicted with onnxruntime" in done.stdout
    written = {path.name for path in (tmp_path / "slim").iterdir()}
    assert {"a.nii.gz", "a.glb", "a_preview.png", "a_statistics.json", "statistics.csv"} <= written
    (result,) = Predictor.load(bundle, "onnxruntime", threads=1).predict_files(image.parent, tmp_path / "full")
    assert result.output is not None
    slim, full = (sitk.ReadImage(str(tmp_path / where / "a.nii.gz")) for where in ("slim", "full"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(slim), sitk.GetArrayFromImage(full))
    assert slim.GetSpacing() == full.GetSpacing()
    assert len(np.unique(sitk.GetArrayFromImage(slim))) > 1


def test_watches_a_folder_and_asks_a_service(python: Path, tmp_path: Path) -> None:
    bundle = make_toy_model(Toy(), tmp_path).bundle
    image = write_image(smooth_noise((16, 22, 27), 3), tmp_path / "images" / "a_0000.nii.gz", (1.1, 1.0, 0.9))
    watch = ("watch", "-i", image.parent, "-o", tmp_path / "out", "-m", bundle, "--once", "--settle", 0, "--threads", 1)
    done = subprocess.run([python, "-I", "-m", "fastnnunet", *map(str, watch)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz"))))) > 1
    remote = ("remote", "predict", "--url", "http://127.0.0.1:9", "-m", "a", "-i", image, "-o", tmp_path / "b.nii.gz")
    refused = subprocess.run([python, "-I", "-m", "fastnnunet", *map(str, remote)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "nothing listens there" in refused.stderr


def test_has_nothing_of_the_extras_and_says_which_one_is_missing(python: Path) -> None:
    assert importable(python, "onnxruntime")
    for module in ("torch", "nnunetv2", "batchgenerators", "zarr", "openvino", "onnx", "dask", "matplotlib", "pytest"):
        assert not importable(python, module), module
    command = ("predict", "-i", "x", "-o", "y", "-m", "z", "--backend", "openvino")
    missing = subprocess.run([python, "-I", "-m", "fastnnunet", "cache", "list"], capture_output=True, text=True)
    assert missing.returncode == 2
    assert "pip install 'fastnnunet[train]'" in missing.stderr
    assert subprocess.run([python, "-I", "-m", "fastnnunet", *command], capture_output=True).returncode == 2


def test_size_on_disk_and_help(tmp_path: Path) -> None:
    record = slim_install.measure(rounds=1, count_compiled=False)
    sizes = record["size_bytes_of"]
    assert {"fastnnunet", "numpy", "scipy", "simpleitk", "onnxruntime", "typer", "rich", "pyyaml"} <= set(sizes)
    assert not {"torch", "nnunetv2", "zarr", "openvino"} & set(sizes)
    assert sizes["numpy"] > 20e6
    assert record["size_bytes"] == sum(sizes.values()) < LIMIT_BYTES
    assert record["help_median_s"] > 0
    compiled = Path(py_compile.compile(slim_install.__file__, tmp_path / "compiled.pyc", doraise=True))
    assert slim_install.size_compiled(Path(slim_install.__file__)) == compiled.stat().st_size
    (tmp_path / "template.py").write_text("import {{ name }")
    assert slim_install.size_compiled(tmp_path / "template.py") == 0
    assert {"fastapi", "uvicorn"} <= {one.name for one in base_install("serve")} - set(sizes)
