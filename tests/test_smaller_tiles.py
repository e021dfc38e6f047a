"""One pass on a machine that finds no memory for large tiles: smaller ones, the same labels, in Python and in C++."""

import itertools
import shutil
import subprocess
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnnunet import native
from fastnnunet.engines.failures import batch_failed
from fastnnunet.errors import BackendError, NoMemoryError
from fastnnunet.events import Event, Progress
from fastnnunet.export.bundle import export_bundle
from fastnnunet.geometry.tiles import Axis, fewest_tiles, least_cost, smaller_limit
from fastnnunet.runtime import loaded
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.specs.bundle import load_bundle_spec
from tests import engine
from tests.bundles import NO_RESAMPLING, Toy, smooth_noise
from tests.engine import Engine, EngineError
from tests.one_pass_models import write_batchnorm_model

IMAGE = smooth_noise((61, 66, 75), 0)[None]
PROPERTIES = {"spacing": [1.0, 1.0, 1.0]}
WHOLE = 64 * 68 * 76  # voxels of its frame


class Limited:
    """The engine of `limited_backend.c`, which keeps what tiles it was asked for."""

    name, precision = "onnxruntime", "fp32"
    overhead, largest_tile = 1.0, None

    def __init__(self, most: int) -> None:
        self.most, self.asked = most, list[int]()

    def run(self, batch_NCX: np.ndarray) -> np.ndarray:
        voxels = prod(batch_NCX.shape[2:])
        self.asked.append(voxels)
        if voxels > self.most:
            raise batch_failed(self.name, batch_NCX.shape, "std::bad_alloc")
        head = np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1, 1)
        return head * batch_NCX - head * head / 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("one_pass")
    folder, _ = write_batchnorm_model(where / "model", Toy(resampling=NO_RESAMPLING))
    export_bundle(folder, 0, where / "bundle", needs_real_patches=False)
    return where / "bundle"


def limited(bundle: Path, most: int, **settings: Any) -> tuple[LoadedBundle, Limited]:
    network = Limited(most)
    return LoadedBundle(load_bundle_spec(bundle), [network], threads=1, **settings), network


@pytest.mark.parametrize("stream_bytes", [0, 2**29])
def test_labels_are_those_of_enough_memory(
    stream_bytes: int, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loaded, "STREAM_BYTES", stream_bytes)
    model, network = limited(bundle, WHOLE)
    expected = model.predict_array(IMAGE, PROPERTIES).segmentation_ZYX
    assert network.asked == [WHOLE]
    assert set(np.unique(expected)) == {0, 1, 2}
    model, network = limited(bundle, WHOLE // 5)
    np.testing.assert_array_equal(model.predict_array(IMAGE, PROPERTIES).segmentation_ZYX, expected)
    failed = [voxels for voxels in network.asked if voxels > network.most]
    assert failed == sorted(failed, reverse=True)
    assert len(failed) == len(set(failed)) == caplog.text.count("going on with smaller tiles")
    for one, following in itertools.pairwise(failed):
        assert following <= one // 2 * 1.02  # half of the cost, of which what is kept of a band is a small part
    assert len(network.asked) > len(failed) + 4


def test_no_tile_is_small_enough(bundle: Path) -> None:
    model, network = limited(bundle, 1000)
    with pytest.raises(NoMemoryError, match=r"failed on a batch of shape \(1, 1, .*std::bad_alloc"):
        model.predict_array(IMAGE, PROPERTIES)
    axes = model.way._axes(IMAGE.shape[1:])  # the least tile there is was tried
    assert network.asked[-1] == prod(axis.cuts()[-1].tile for axis in axes)
    window, network = limited(bundle, 1000, step_size=0.5)
    with pytest.raises(NoMemoryError):
        window.predict_array(IMAGE, PROPERTIES)
    assert len(network.asked) == 1


def test_what_makers_say() -> None:
    for said in (
        "std::bad_alloc",
        "Failed to allocate memory for requested buffer of size 123",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA failure 2: cudaErrorMemoryAllocation; OUT_OF_MEMORY",
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "could not create a memory object",
    ):
        assert isinstance(batch_failed("one", (1,), said), NoMemoryError)
    other = batch_failed("one", (1, 2), "the input has another rank")
    assert type(other) is BackendError
    assert str(other) == "one failed on a batch of shape (1, 2): the input has another rank"


def test_limits_by_hand() -> None:
    """An axis of 40 in tiles of 40, 24 or 16 that share a halo of 4, and two of one tile of 8."""
    axes = [Axis(size=40, least=8, multiple=8, halo=4), *[Axis(size=8, least=8, multiple=8, halo=0)] * 2]
    least = least_cost(axes, prod)
    assert least == 16 * 64
    limits, limit = [], 10**6
    while (smaller := smaller_limit(axes, prod, limit)) is not None:
        limits.append(smaller)
        limit = smaller
    tiling = fewest_tiles(axes, prod, 10**6)
    assert tiling is not None
    assert tiling.tile == (40, 8, 8)
    assert limits == [40 * 64 // 2]  # in which 16 x 64 fits, and 24 x 64 does not
    last = fewest_tiles(axes, prod, limits[0])
    assert last is not None
    assert last.tile == (16, 8, 8)
    assert native.smaller_limit(axes, prod, 5) is None  # no tile at all


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backend that finds no memory, under the name of another."""
    engine.build()
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("plugins")
    source = Path(__file__).with_name("limited_backend.c")
    library = folder / "libfastnnunet_onnxruntime.so"
    include = f"-I{engine.NATIVE / 'engine'}"
    subprocess.run([compiler, "-shared", "-fPIC", "-std=c99", include, str(source), "-o", str(library)], check=True)
    return folder


@pytest.mark.parametrize("stream_bytes", [0, 2**29])
@pytest.mark.parametrize("most", [WHOLE, WHOLE // 5])
def test_the_engine_halves_as_python_does(
    stream_bytes: int, most: int, bundle: Path, plugins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "STREAM_BYTES", stream_bytes)
    monkeypatch.setenv("FASTNNUNET_TEST_MOST", str(most))
    heard = list[tuple[int, int]]()
    expected_tiles = list[tuple[int, int | None]]()

    def hear(event: Event) -> None:
        if isinstance(event, Progress):
            expected_tiles.append((event.done, event.total))

    expected = limited(bundle, most)[0].predict_array(IMAGE, PROPERTIES, progress=hear)
    before = engine.stream_bytes(stream_bytes)
    try:
        one = Engine(bundle, plugins=str(plugins))
        got = one.predict(IMAGE, (1, 1, 1), heard=lambda done, total: heard.append((done, total)) or 0)
    finally:
        engine.stream_bytes(before)
    np.testing.assert_array_equal(got.labels_ZYX, expected.segmentation_ZYX)
    assert heard == expected_tiles


def test_the_engine_says_what_python_says(bundle: Path, plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNNUNET_TEST_MOST", "1000")
    with pytest.raises(NoMemoryError) as expected:
        limited(bundle, 1000)[0].predict_array(IMAGE, PROPERTIES)
    with pytest.raises(EngineError) as got:
        Engine(bundle, plugins=str(plugins)).predict(IMAGE, (1, 1, 1))
    assert str(got.value) == str(expected.value)
    assert got.value.status == engine.BACKEND
