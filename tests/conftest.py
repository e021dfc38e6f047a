"""Fixtures shared by the suite. Nothing here needs a GPU or a network."""

import os

# before torch and OpenMP start: small work, and several test processes may share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("nnUNet_def_n_proc", "1")

import contextlib
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import forked
from tests.graphs import list_operators_once, remembering
from tests.tiny import make_world, world_environment

# Files that take long for their number of tests. They begin first, so that no process waits for the other at the end.
LONG = {
    "test_another_python", "test_benchmarks", "test_cli", "test_cli_benchmark", "test_demo",
    "test_distill_distributed", "test_distill_train", "test_docs", "test_engine", "test_kinds", "test_lint",
    "test_loader_processes", "test_nnunet_teacher", "test_notebook", "test_pipeline", "test_platforms",
    "test_read_once", "test_run_names", "test_stock_tools", "test_students", "test_unlabelled_train", "test_wheel",
}  # fmt: skip
# Files that are to have processes as multiprocessing starts them: how those begin and end, or their memory, is tested
SPAWNED = ("test_bench_measure", "test_cli_benchmark", "test_loader_processes", "test_service")
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
def processes_forked():
    """Processes that are to be spawned come from a server that has imported the libraries; see tests/forked.py."""
    with pytest.MonkeyPatch.context() as patch:
        if forked.AVAILABLE:
            forked.install(patch)
        yield


@pytest.fixture(scope="module", autouse=True)
def processes_spawned(request):
    """Before the other fixtures of the modules that want it so."""
    with forked.spawning() if request.path.stem.startswith(SPAWNED) else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def progress_not_drawn():
    """nnU-Net draws a picture of 16 megapixels after each epoch: two seconds. Trainings of commands still do."""
    with pytest.MonkeyPatch.context() as patch:
        if logging := sys.modules.get("nnunetv2.training.logging.nnunet_logger"):
            patch.setattr(logging.LocalLogger, "plot_progress_png", lambda *_: None)
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
            patch.setenv(forked.GRAPHS, str(folder))
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
def operators_listed_once():
    list_operators_once()
