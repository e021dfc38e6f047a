"""One model in many threads: every prediction is, bit for bit, what it is alone. And what becomes of it in a fork."""

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

import fastnnunet
from fastnnunet.engines.base import Engine
from fastnnunet.engines.registry import create_engine
from fastnnunet.engines.trt import library as seam
from fastnnunet.errors import SpecError
from fastnnunet.images.cases import Case
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file
from tests.bundles import PATCH_3D, Toy, make_toy_model, smooth_noise, write_image
from tests.fake_gpu import FakeCuda, FakeTensorRT
from tests.test_trt_backend import store, use_libraries

BACKENDS = ("onnxruntime", "openvino", "torch")
THREADS, TURNS = 8, 24
SHAPES = {  # one tile or several, in batches of different sizes
    3: ((12, 15, 20), (16, 20, 24), (14, 20, 30), (20, 18, 22), (10, 24, 12)),
    2: ((3, 20, 30), (1, 30, 40), (5, 24, 32), (2, 40, 40), (9, 24, 30)),
}
PROPERTIES = {"spacing": [1.0, 1.0, 1.0]}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inside": 3}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kinds of models: plain; of two axes with two folds, with regions, and the second stage of a cascade."""
    flat = Toy(dims=2, spacing=(1.0, 1.0), mirror_axes=(1,))
    made = {
        "plain": make_toy_model(Toy(), tmp_path_factory.mktemp("plain")).bundle,
        "ensemble": make_toy_model(flat, tmp_path_factory.mktemp("ensemble")).bundle,
        "regions": make_toy_model(
            replace(flat, labels=REGIONS, regions_class_order=[1, 2, 3]), tmp_path_factory.mktemp("regions")
        ).bundle,
        "cascade": make_toy_model(replace(flat, channels=3), tmp_path_factory.mktemp("cascade")).bundle,
    }
    _second_fold(made["ensemble"])
    spec = load_bundle_spec(made["cascade"])
    one_channel = {
        "channel_names": spec.channel_names[:1],
        "normalization_schemes": spec.normalization_schemes[:1],
        "use_mask_for_norm": spec.use_mask_for_norm[:1],
    }
    write_bundle_json(replace(spec, previous_labels=(1, 2), **one_channel), made["cascade"] / "bundle.json")
    return made


def _second_fold(bundle: Path) -> None:
    """Another model beside that of the bundle, with other weights."""
    import onnx

    model = onnx.load(str(bundle / "model.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name.startswith("decoder.seg_layers"):
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, axis=0), tensor.name))
    onnx.save(model, str(bundle / "fold_1.onnx"))
    spec = load_bundle_spec(bundle)
    files = {**spec.files, "fold_1.onnx": sha256_of_file(bundle / "fold_1.onnx")}
    several = replace(spec, folds=("0", "1"), model_files=("model.onnx", "fold_1.onnx"), files=files)
    write_bundle_json(several, bundle / "bundle.json")


def _predictor(bundle: Path, backend: str, threads: int = 1) -> Any:
    predictor = fastnnunet.FastPredictor(device="cpu", allow_tqdm=False, backend=backend, threads=threads)
    predictor.initialize_from_trained_model_folder(bundle)
    return predictor


def _image(number: int, dims: int = 2) -> np.ndarray:
    return smooth_noise(SHAPES[dims][number % 5], number)[None]


def _count_equal(predict: Callable[[int], Any], expected: list[Any]) -> int:
    """How many of THREADS * TURNS predictions, in THREADS threads at once, are as expected."""
    start = threading.Barrier(THREADS)

    def one_thread(thread: int) -> int:
        start.wait()
        numbers = [(thread * 5 + turn) % len(expected) for turn in range(TURNS)]
        return sum(np.array_equal(predict(number), expected[number]) for number in numbers)

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(one_thread, range(THREADS)))


class TestEqual:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(("kind", "dims"), [("plain", 3), ("ensemble", 2)])
    def test_every_backend(self, kind: str, dims: int, backend: str, bundles: dict[str, Path]) -> None:
        predictor = _predictor(bundles[kind], backend)
        images = [_image(number, dims) for number in range(TURNS)]

        def predict(number: int) -> Any:
            return predictor.predict_single_npy_array(images[number], PROPERTIES)

        expected = [predict(number) for number in range(TURNS)]
        assert set(np.unique(np.concatenate([labels.ravel() for labels in expected]))) == {0, 1, 2}
        assert _count_equal(predict, expected) == THREADS * TURNS

    @pytest.mark.parametrize("kind", ["regions", "cascade"])
    def test_other_models(self, kind: str, bundles: dict[str, Path]) -> None:
        predictor = Predictor.load(bundles[kind], "onnxruntime", threads=2)

        def predict(number: int) -> Any:
            image = _image(number)
            previous = None
            if kind == "cascade":
                previous = np.random.default_rng(number).integers(0, 3, image.shape[1:])
            done = predictor.predict_array(image, PROPERTIES, previous_ZYX=previous, return_probabilities=True)
            assert done.probabilities_HZYX is not None
            return np.concatenate([done.segmentation_ZYX[None], done.probabilities_HZYX])

        expected = [predict(number) for number in range(5)]
        assert _count_equal(predict, expected) == THREADS * TURNS

    def test_a_fixed_batch(self, bundles: dict[str, Path]) -> None:
        spec = replace(load_bundle_spec(bundles["regions"]), batch_size=3)
        backend = create_engine("openvino", bundles["regions"], spec, threads=1)
        predictor = LoadedBundle(spec, [backend], threads=1)

        def predict(number: int) -> Any:
            return predictor.predict_array(_image(number), PROPERTIES).segmentation_ZYX

        expected = [predict(number) for number in range(5)]
        assert _count_equal(predict, expected) == THREADS * TURNS

    def test_every_method_at_once(self, bundles: dict[str, Path], tmp_path: Path) -> None:
        """Arrays, logits, lists, files and folders, in threads that use one predictor."""
        ours = _predictor(bundles["ensemble"], "openvino")
        below = Predictor.load(bundles["ensemble"], "openvino", threads=1)
        files = [write_image(_image(n)[0], tmp_path / "in" / f"case{n}_0000.nii.gz") for n in range(5)]
        (preprocessed,) = ours.get_data_iterator_from_raw_npy_data(_image(3), None, PROPERTIES, None)

        def to_a_file(number: int) -> Any:
            out = tmp_path / f"{number}-{threading.get_ident()}" / "out.nii.gz"
            below.predict_case(Case("case", (files[number],)), out)
            return sitk.GetArrayFromImage(sitk.ReadImage(str(out)))

        def to_one_folder(number: int) -> Any:
            ours.predict_from_files([[str(file)] for file in files], [str(tmp_path / "out" / f.stem) for f in files])
            name = f"{files[number].stem}.nii.gz"
            return sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / name)))

        calls: list[Callable[[], Any]] = [
            lambda: ours.predict_single_npy_array(_image(0), PROPERTIES),
            lambda: ours.predict_single_npy_array(_image(1), PROPERTIES, None, None, True)[1],
            lambda: ours.predict_logits_from_preprocessed_data(preprocessed["data"]),
            lambda: ours.predict_from_list_of_npy_arrays([_image(2), _image(3)], None, [PROPERTIES] * 2, None)[1],
            lambda: ours.predict_from_files([[str(f)] for f in files[:2]], None)[1],
            lambda: below.predict_array(_image(4), PROPERTIES).segmentation_ZYX,
            lambda: to_a_file(1),
            lambda: to_one_folder(4),
        ]
        expected = [call() for call in calls]
        assert _count_equal(lambda number: calls[number](), expected) == THREADS * TURNS
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            *(f"{file.stem}.nii.gz" for file in files),
            *("plans.json", "dataset.json", "predict_from_raw_data_args.json"),
        }

    def test_tensorrt(self, engine: Path) -> None:
        predictor = Predictor.load(engine, "tensorrt")

        def predict(number: int) -> Any:
            return predictor.predict_array(_image(number, 3), PROPERTIES).segmentation_ZYX

        expected = [predict(number) for number in range(5)]
        assert _count_equal(predict, expected) == THREADS * TURNS


@pytest.fixture
def engine(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the plain bundle with an engine for a simulated GPU."""
    cuda = FakeCuda((8, 6))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    library = FakeTensorRT(cuda)
    use_libraries(monkeypatch, library)
    copied = tmp_path / "with_engine"
    shutil.copytree(bundles["plain"], copied)
    store(SimpleNamespace(bundle=copied), library, copied)
    yield copied
    monkeypatch.undo()
    seam._load.cache_clear()


@pytest.fixture(params=[*BACKENDS, "tensorrt"])
def backend(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Engine:
    bundle = request.getfixturevalue("engine") if request.param == "tensorrt" else bundles["plain"]
    return create_engine(request.param, bundle, load_bundle_spec(bundle), threads=1)


def _batch(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, 1, *PATCH_3D)).astype(np.float32)


def _in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


class TestBackends:
    def test_a_result_stays_while_other_threads_compute(self, backend: Engine) -> None:
        """It may be the engine's own memory, but not memory that is written for another thread."""
        result = backend.run(_batch(0, 2))
        before = result.copy()
        others = [_in_a_thread(lambda size=size: backend.run(_batch(1, size)).copy()) for size in (2, 1, 3)]
        np.testing.assert_array_equal(result, before)
        for size, other in zip((2, 1, 3), others, strict=True):
            np.testing.assert_array_equal(backend.run(_batch(1, size)), other)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
    def test_a_fork_while_another_thread_computes(self, backend: Engine) -> None:
        """Locks of the engine may be held for ever in the child: it is told, and does not hang."""
        backend.run(_batch(0, 1))
        inside, leave = threading.Event(), threading.Event()

        def compute() -> None:
            with backend._calls:  # type: ignore[attr-defined]
                inside.set()
                leave.wait(60)

        thread = threading.Thread(target=compute)
        thread.start()
        assert inside.wait(60)
        said = _said_by_a_child(lambda: backend.run(_batch(0, 1)))
        leave.set()
        thread.join()
        assert said.startswith("BackendError: ")
        assert "before this process was forked" in said
        assert "spawn" in said
        np.testing.assert_array_equal(backend.run(_batch(0, 1)).shape, (1, 3, *PATCH_3D))  # the parent goes on

    def test_a_gpu_is_refused_in_a_child(self, engine: Path) -> None:
        backend = create_engine("tensorrt", engine, load_bundle_spec(engine))
        assert "its GPU belongs to the parent" in _said_by_a_child(lambda: backend.run(_batch(0, 1)))


def _said_by_a_child(call: Callable[[], Any]) -> str:
    """The error of `call` in a process forked from this one, or nothing. Fails where it hangs."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            call()
        except Exception as e:
            os.write(write, f"{type(e).__name__}: {e}".encode())
        finally:
            os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 60)  # until it has written or ended
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(read, "rb") as f:
        said = f.read().decode()
    assert ready, "the child hangs"
    return said


CHILDREN = """
import multiprocessing, sys
import numpy as np
import fastnnunet

def predict(number):
    image = np.random.default_rng(number).standard_normal((1, 18, 24, 30))
    return predictor.predict_single_npy_array(image, {"spacing": [1, 1, 1]})

if __name__ == "__main__":
    predictor = fastnnunet.FastPredictor(device="cpu", allow_tqdm=False, backend=sys.argv[2], threads=int(sys.argv[3]))
    predictor.initialize_from_trained_model_folder(sys.argv[1])
    expected = [predict(number) for number in range(3)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        got = pool.map(predict, range(3))
    print(min((a == b).mean() for a, b in zip(got, expected)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize(("backend_name", "threads"), [("onnxruntime", 2), ("openvino", 1), ("torch", 2)])
def test_forked_workers_of_multiprocessing(backend_name: str, threads: int, bundles: dict[str, Path]) -> None:
    """As a global of a script whose workers are forked: PyTorch's pool of threads is not there, which hung."""
    words = [sys.executable, "-c", CHILDREN, str(bundles["plain"]), backend_name, str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) >= 0.999  # another number of threads may round otherwise


INTERRUPTED = """
import signal, sys, threading
import numpy as np
import fastnnunet

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it

def predictor():
    made = fastnnunet.FastPredictor(device="cpu", allow_tqdm=False, backend="openvino", threads=1)
    made.initialize_from_trained_model_folder(sys.argv[1])
    made.predict_single_npy_array(np.ones((1, 12, 15, 20), np.float32), {"spacing": [1.0, 1.0, 1.0]})
    return made

predictors = [predictor(), predictor()]
for _ in range(2):
    last = threading.Thread(target=predictors.pop)
    last.start()
    last.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_after_models_are_let_go(bundles: dict[str, Path]) -> None:
    """By another thread: on CPUs with AMX what OpenVINO leaves behind made a Ctrl-C a segmentation fault."""
    words = [sys.executable, "-c", INTERRUPTED, str(bundles["plain"])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["interrupted"]), done.stderr


class TestSettings:
    def test_those_of_the_moment_a_call_begins(self, bundles: dict[str, Path]) -> None:
        """Another thread changes them between two images of a call, and loads another model."""
        ours = _predictor(bundles["regions"], "onnxruntime")
        items = list(ours.get_data_iterator_from_raw_npy_data([_image(3), _image(1)], None, [PROPERTIES] * 2, None))
        expected = ours.predict_from_data_iterator(iter(items), True)

        def change() -> None:
            ours.tile_step_size, ours.use_gaussian, ours.use_mirroring = 1.0, False, False
            ours.initialize_from_trained_model_folder(bundles["ensemble"])

        def feed() -> Iterator[Any]:
            yield items[0]
            _in_a_thread(change)
            yield items[1]

        got = ours.predict_from_data_iterator(feed(), True, 0)
        for mine, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine[1], other[1])
        changed = ours.predict_from_data_iterator(iter(items), True)
        assert not np.array_equal(changed[0][1], expected[0][1])

    def test_two_threads_with_settings_of_their_own(self, bundles: dict[str, Path]) -> None:
        loaded = Predictor.load(bundles["regions"], "onnxruntime", threads=1)
        settings = [
            {"step_size": 0.5, "mirroring": True, "use_gaussian": True},
            {"step_size": 0.5, "mirroring": False, "use_gaussian": True},
            {"step_size": 0.5, "mirroring": True, "use_gaussian": False},
            {"step_size": 0.9, "mirroring": True, "use_gaussian": True},
        ]
        image = _image(3)

        def predict(number: int) -> Any:
            mine = loaded.with_settings(**settings[number])
            return mine.predict_array(image, PROPERTIES, return_probabilities=True).probabilities_HZYX

        expected = [
            Predictor.load(bundles["regions"], "onnxruntime", threads=1, **each)
            .predict_array(image, PROPERTIES, return_probabilities=True)
            .probabilities_HZYX
            for each in settings
        ]
        assert len({each.tobytes() for each in expected}) == len(settings)
        assert _count_equal(predict, expected) == THREADS * TURNS
        assert loaded.describe()["step_size"] == 0.5
        with pytest.raises(SpecError, match=r"step_size: got 0, expected"):
            loaded.with_settings(step_size=0, mirroring=True, use_gaussian=True)
