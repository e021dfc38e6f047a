"""The wheel of `make wheel`, installed where there is no compiler, no network and nothing but the base install."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from packaging.tags import Tag, sys_tags
from packaging.utils import parse_wheel_filename

import fastnnunet
from fastnnunet.engines.cuda.code import source_files
from fastnnunet.runtime.predict import Predictor
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
from tests.slim import NAME, base_install, make_environment

FOLDER = os.environ.get("FASTNNUNET_WHEELS")

pytestmark = pytest.mark.skipif(not FOLDER, reason="`make test` makes the wheel and sets FASTNNUNET_WHEELS")


def tags_of(wheel: Path) -> frozenset[Tag]:
    return parse_wheel_filename(wheel.name)[3]


@pytest.fixture(scope="module")
def wheel() -> Path:
    assert FOLDER is not None
    here = frozenset(sys_tags())
    fitting = [path for path in Path(FOLDER).glob(f"{NAME}-*.whl") if tags_of(path) & here]
    assert fitting, f"no wheel for this Python in {FOLDER}: make wheel"
    return max(fitting, key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, beside what it requires."""
    required = [distribution for distribution in base_install() if distribution.name != NAME]
    python = make_environment(tmp_path_factory.mktemp("environment") / "wheel", required)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-compile", wheel]
    done = subprocess.run(install, env=bare(python), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def bare(python: Path) -> dict[str, str]:
    """Nothing on the path but the environment: neither compiler nor CMake."""
    return {"PATH": str(python.parent), "OMP_NUM_THREADS": "1"}


def test_holds_the_package_and_no_sources_of_the_core(wheel: Path) -> None:
    package = Path(fastnnunet.__file__).parent
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    modules = {f"{NAME}/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert f"{NAME}/py.typed" in names
    # of the sources the wheel has those of the CUDA kernels alone, which NVRTC compiles where there is a GPU
    sources = {name for name in names if name.endswith((".cpp", ".hpp", ".c", ".cu", "CMakeLists.txt"))}
    assert sources == {f"fastnnunet/native/engine/cuda/{file.name}" for file in source_files()}


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux")
def test_runs_on_other_linux_machines(wheel: Path, python: Path) -> None:
    """It says which glibc it needs, and OpenMP is its own, wherever that of the system is."""
    assert all(tag.platform.startswith("manylinux_2_") for tag in tags_of(wheel))
    code = (
        "import numpy as np, fastnnunet.native as native; "
        "lines = [line for line in open('/proc/self/maps') if 'libgomp' in line or 'fastnnunet_core' in line]; "
        "print(*{line.split()[-1] for line in lines})"
    )
    loaded = subprocess.run([python, "-I", "-c", code], env=bare(python), capture_output=True, text=True, check=True)
    files = {Path(word) for word in loaded.stdout.split()}
    assert len(files) == 2
    assert all(path.is_relative_to(python.parents[1]) for path in files)


def test_commands_and_a_prediction(python: Path, tmp_path: Path) -> None:
    command = python.parent / "fastnnunet"
    assert "predict" in subprocess.check_output([command, "--help"], env=bare(python), text=True)
    bundle = make_toy_model(Toy(), tmp_path).bundle
    image = write_image(smooth_noise((16, 22, 27), 3), tmp_path / "images" / "a_0000.nii.gz", (1.1, 1.0, 0.9))
    words = ("predict", "-i", image.parent, "-o", tmp_path / "wheel", "-m", bundle)
    done = subprocess.run([command, *map(str, words)], env=bare(python), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    Predictor.load(bundle, "onnxruntime", threads=1).predict_files(image.parent, tmp_path / "here")
    wheel, here = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / where / "a.nii.gz"))) for where in ("wheel", "here")
    )
    np.testing.assert_array_equal(wheel, here)
    assert len(np.unique(here)) > 1


def test_the_engine(python: Path, tmp_path: Path) -> None:
    """Program, library, plugins and header; the program finds the libraries of the environment by itself."""
    program = python.parent / "fastnnunet-engine"
    if not program.is_file():
        pytest.skip("the engine is part of wheels of Unix alone")
    folder = next(path for path in python.parents[1].rglob("fastnnunet/native/lib"))
    assert {path.name for path in folder.iterdir()} >= {
        *("libfastnnunet.so", "libfastnnunet_openvino.so", "libfastnnunet_onnxruntime.so")
    }
    assert (folder.parent / "include" / "fastnnunet.h").is_file()
    assert sum(path.stat().st_size for path in (program, folder / "libfastnnunet.so")) < 8 * 2**20
    bundle = make_toy_model(Toy(), tmp_path).bundle
    image = write_image(smooth_noise((16, 22, 27), 3), tmp_path / "images" / "a_0000.nii.gz", (1.1, 1.0, 0.9))
    words = ("predict", "-i", image.parent, "-o", tmp_path / "engine", "-m", bundle, "--backend", "onnxruntime")
    done = subprocess.run([program, *map(str, words)], env=bare(python), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    Predictor.load(bundle, "onnxruntime", threads=1).predict_files(image.parent, tmp_path / "here")
    got, expected = (sitk.ReadImage(str(tmp_path / where / "a.nii.gz")) for where in ("engine", "here"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(expected))
