"""The C++ engine for tests, and its C interface by ctypes.

Built into a folder that later runs find again; `make test` names that of the wheel, where all is compiled already.
`make engine-sanitized` names one with sanitizers, which other folders that tests build then have too.
"""

import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
NATIVE = CHECKOUT / "fastnnunet" / "native"
BUILD = Path(os.environ.get("FASTNNUNET_ENGINE_BUILD") or CHECKOUT / "build" / "engine-tests")
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # cmake may be pip's
COMPILERS = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
OK, BAD_ARGUMENT, BAD_OPTION, NOT_FOUND, CORRUPT, NEWER, BAD_IMAGE, BACKEND = range(8)
NO_ROOM, CANCELLED = 9, 10


@functools.cache
def build(target: str = "engine", folder: Path = BUILD, *options: str) -> Path:
    """The folder of a build, in which a target is brought up to date. Skips the test where nothing can be built."""
    cmake = shutil.which("cmake", path=TOOLS)
    if cmake is None or not any(shutil.which(name) for name in COMPILERS if name):
        pytest.skip("the engine is not tested: " + ("no cmake" if cmake is None else "no C++ compiler"))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # of another test process
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "CMakeCache.txt").is_file():
            # -O1 takes half the time of -O2, and rounds nothing otherwise
            _run(cmake, "-S", NATIVE, "-B", folder, "-DFASTNNUNET_ENGINE=ON", "-DCMAKE_BUILD_TYPE=None",
                 "-DCMAKE_CXX_FLAGS=-O1", "-DCMAKE_C_FLAGS=-O1", *options, *sanitizers())  # fmt: skip
        _run(cmake, "--build", folder, "--target", target, "--parallel", "2")
    return folder


def sanitizers() -> list[str]:
    """What `BUILD` is configured with."""
    cache = BUILD / "CMakeCache.txt"
    option = "-DFASTNNUNET_SANITIZE=ON"
    return [option] if cache.is_file() and f"{option[2:-3]}:BOOL=ON" in cache.read_text() else []


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout[-20000:]


def environment() -> dict[str, str]:
    """Where the libraries of the makers are that this Python has."""
    found = dict(os.environ)
    for variable, package, folder in (
        ("FASTNNUNET_OPENVINO", "openvino", "libs"),
        ("FASTNNUNET_ONNXRUNTIME", "onnxruntime", "capi"),
    ):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found[variable] = str(Path(spec.origin).parent / folder)
    if sanitizers():
        found["FASTNNUNET_OPENVINO"] = str(BUILD)  # where it is not: AddressSanitizer ends processes with it
    return found


class Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("backend", ctypes.c_char_p), ("precision", ctypes.c_char_p),
        ("device", ctypes.c_char_p), ("folds", ctypes.c_char_p), ("threads", ctypes.c_int32),
        ("step_size", ctypes.c_double), ("no_mirroring", ctypes.c_int32), ("no_gaussian", ctypes.c_int32),
        ("passes", ctypes.c_int32), ("memory_limit", ctypes.c_char_p), ("plugins", ctypes.c_char_p),
        ("no_locate", ctypes.c_int32),
    ]  # fmt: skip


Heard = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Image(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("voxels", ctypes.c_void_p), ("shape", ctypes.c_int64 * 4),
        ("spacing_mm", ctypes.c_double * 3), ("previous", ctypes.c_void_p), ("progress", Heard),
        ("user", ctypes.c_void_p), ("probabilities", ctypes.c_int32),
    ]  # fmt: skip


class Labels(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("voxels", ctypes.c_void_p), ("bytes_per_voxel", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 3), ("network_shape", ctypes.c_int64 * 4), ("preprocess_s", ctypes.c_double),
        ("infer_s", ctypes.c_double), ("postprocess_s", ctypes.c_double), ("probabilities", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
    ]  # fmt: skip


class Files(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("channels", ctypes.POINTER(ctypes.c_char_p)),
        ("channel_count", ctypes.c_int32), ("output", ctypes.c_char_p), ("previous", ctypes.c_char_p),
        ("series_uid", ctypes.c_char_p), ("keep_largest", ctypes.c_char_p), ("min_size", ctypes.c_char_p),
        ("fill_holes", ctypes.c_char_p), ("progress", Heard), ("user", ctypes.c_void_p),
        ("save_probabilities", ctypes.c_int32), ("postprocessing", ctypes.c_char_p),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    os.environ.update(environment())
    found = ctypes.CDLL(str(build() / "lib" / "libfastnnunet.so"))
    for name in ("last_error", "describe", "version"):
        getattr(found, f"fastnnunet_{name}").restype = ctypes.c_char_p
    for name in ("free", "describe", "result_free"):
        getattr(found, f"fastnnunet_{name}").argtypes = [ctypes.c_void_p]
    return found


class EngineError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(library().fastnnunet_last_error().decode())
        self.status = status


def _check(status: int) -> None:
    if status != OK:
        raise EngineError(status)


@dataclass
class Segmented:
    labels_ZYX: np.ndarray
    network_shape: tuple[int, ...]
    probabilities_HZYX: np.ndarray | None


class Engine:
    """A bundle loaded by the C interface."""

    def __init__(self, bundle: Path, backend: str = "onnxruntime", *, threads: int = 1, **options: Any) -> None:
        given = Options()
        library().fastnnunet_options_init(ctypes.byref(given), ctypes.sizeof(given))
        given.backend, given.threads = backend.encode(), threads
        for name, value in options.items():
            setattr(given, name, value.encode() if isinstance(value, str) else value)
        self._model = ctypes.c_void_p()
        _check(library().fastnnunet_load(str(bundle).encode(), ctypes.byref(given), ctypes.byref(self._model)))

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            library().fastnnunet_free(self._model)

    def describe(self) -> str:
        return library().fastnnunet_describe(self._model).decode()

    def predict(
        self,
        image_CZYX: np.ndarray,
        spacing_mm: Sequence[float],
        previous_ZYX: np.ndarray | None = None,
        heard: Callable[[int, int], int] | None = None,
        *,
        probabilities: bool = False,
    ) -> Segmented:
        image_CZYX = np.ascontiguousarray(image_CZYX, np.float32)
        previous = None if previous_ZYX is None else np.ascontiguousarray(previous_ZYX, np.int32)
        given = Image()
        library().fastnnunet_image_init(ctypes.byref(given), ctypes.sizeof(given))
        given.voxels = image_CZYX.ctypes.data
        given.shape[:] = image_CZYX.shape
        given.spacing_mm[:] = spacing_mm
        if previous is not None:
            given.previous = previous.ctypes.data
        given.probabilities = probabilities
        if heard is not None:
            given.progress = Heard(lambda _, done, total: heard(done, total))
        result = ctypes.c_void_p()
        _check(library().fastnnunet_predict(self._model, ctypes.byref(given), ctypes.byref(result)))
        found = Labels()
        library().fastnnunet_labels_init(ctypes.byref(found), ctypes.sizeof(found))
        _check(library().fastnnunet_result_labels(result, ctypes.byref(found)))
        dtype = {1: np.uint8, 2: np.uint16}[found.bytes_per_voxel]
        size = int(np.prod(found.shape[:]))
        content = ctypes.string_at(found.voxels, size * found.bytes_per_voxel)
        of_heads = None
        if found.probabilities:
            values = ctypes.string_at(found.probabilities, 4 * size * found.heads)
            of_heads = np.frombuffer(values, np.float32).reshape(found.heads, *found.shape[:])
        library().fastnnunet_result_free(result)
        labels = np.frombuffer(content, dtype).reshape(found.shape[:])
        return Segmented(labels, tuple(found.network_shape[:]), of_heads)

    def predict_files(self, channels: Sequence[Path], output: Path, **options: Any) -> None:
        given = Files()
        library().fastnnunet_files_init(ctypes.byref(given), ctypes.sizeof(given))
        given.channels = (ctypes.c_char_p * len(channels))(*(str(channel).encode() for channel in channels))
        given.channel_count, given.output = len(channels), str(output).encode()
        for name, value in options.items():
            setattr(given, name, str(value).encode() if isinstance(value, str | Path) else value)
        _check(library().fastnnunet_predict_files(self._model, ctypes.byref(given)))


def stream_bytes(limit: int) -> int:
    """Set from which size on logits are not kept; returns what it was."""
    set_bytes = library().fastnnunet_testing_stream_bytes
    set_bytes.restype, set_bytes.argtypes = ctypes.c_int64, [ctypes.c_int64]
    return set_bytes(limit)
