"""Fixtures shared by the suite. Nothing here needs a GPU or a network."""

import os

# before torch and OpenMP start: small work, and several test processes may share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("nnUNet_def_n_proc", "1")

import functools
import io
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import remembering
from tests.tiny import make_world, world_environment

# Files that take long for their number of tests. They begin first, so that no process waits for the other at the end.
LONG = {
    "test_another_python", "test_benchmarks", "test_cli", "test_cli_benchmark", "test_demo",
    "test_distill_distributed", "test_distill_train", "test_docs", "test_engine", "test_kinds", "test_lint",
    "test_loader_processes", "test_nnunet_teacher", "test_notebook", "test_pipeline", "test_platforms",
    "test_read_once", "test_run_names", "test_stock_tools", "test_students", "test_unlabelled_train", "test_wheel",
}  # fmt: skip
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG, -tests[item.path]))


@pytest.fixture(scope="session", autouse=True)
def own_cache_home(tmp_path_factory):
    """Compiled models of another run might be of other code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def progress_hardly_drawn():
    """nnU-Net draws a picture of 16 megapixels after each epoch: two seconds. Trainings of commands still do."""
    with pytest.MonkeyPatch.context() as patch:
        if logging := sys.modules.get("nnunetv2.training.logging.nnunet_logger"):
            from PIL import Image

            picture = io.BytesIO()
            Image.new("L", (1, 1)).save(picture, "PNG")

            def draw(_logger, output_folder):
                Path(output_folder, "progress.png").write_bytes(picture.getvalue())

            patch.setattr(logging.LocalLogger, "plot_progress_png", draw)
        yield


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory):
    """Networks that differ in weights alone are traced once, in all processes of the session together."""
    if torch := sys.modules.get("torch"):
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graphs"
        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.onnx, "export", remembering(torch.onnx.export, folder))
            yield
    else:
        yield


@pytest.fixture(scope="session")
def pristine_world(tmp_path_factory):
    """A tiny nnU-Net world, made once; tests that change something take `world` instead."""
    root = tmp_path_factory.mktemp("world") / "pristine"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in world_environment(root).items():
            patch.setenv(name, value)
        make_world(root)
    return root


@pytest.fixture
def world(pristine_world, tmp_path, monkeypatch):
    """A private copy of the tiny world, with the nnU-Net variables pointing at it."""
    root = tmp_path / "nnunet"
    shutil.copytree(pristine_world, root)
    for name, value in world_environment(root).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # load batches in this process: reproducible
    return root


@pytest.fixture
def shared():
    """The folder of real data beside the project; skips where it is absent."""
    if not (SHARED / "data" / "Dataset004_Hippocampus").is_dir():
        pytest.skip(f"real data not found at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def same_start():
    """A test draws the same network and adds in the same order whatever ran before in this process."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def operators_listed_once():
    """torch's exporter lists its operators anew for every network, which is a third of an export: once will do."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(module, "ONNXRegistry", None)
    if registry is not None and not getattr(registry, "listed_once", False):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
        registry.listed_once = True
