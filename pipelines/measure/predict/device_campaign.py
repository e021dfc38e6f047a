"""Everything about the CUDA kernels that only a GPU can show, at once, without a network, within ten minutes.

    python -m pipelines.measure.predict.device_campaign -o record.json

build       the kernels compiled for this GPU (a fatbin of `make kernels` is taken where there is one)
tests       tests/test_cuda_kernels.py with the kernels on the GPU: every kernel against the core, bit for bit
stages      a generated CT of --shape through every stage: medians on GPU and CPU, and whether results are equal
engines     a small model through ONNX Runtime and TensorRT, as far as they are installed: labels with every step on the
            GPU against those with what comes before and after the network on the CPU
engine      the same model through the engine in C++ (`make engine`) with the same backends: its files in both ways, and
            the medians of their times; with --bundle those of another bundle, of an image of --shape, too

Exit code 1 when anything differs; without a GPU nothing is run (exit code 2).
Wants: pip install 'fastnnunet[rtx]' or 'fastnnunet[gpu]', and pytest and hypothesis for the tests.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet import native
from fastnnunet.engines.cuda import intensity
from fastnnunet.engines.cuda.code import DIGESTS, SOURCES, kernel_code
from fastnnunet.engines.cuda.gpu import Gpu, gpu_with_kernels
from fastnnunet.engines.cuda.label import label_logits
from fastnnunet.engines.cuda.resample import resample
from fastnnunet.engines.cuda.stream import Stream
from fastnnunet.engines.registry import is_installed, why_no_cuda
from fastnnunet.engines.trt.cuda import Cuda
from fastnnunet.errors import BackendError, FastnnUNetError
from fastnnunet.export.tensorrt import export_engines
from fastnnunet.geometry.gaussian import gaussian_weights
from fastnnunet.geometry.resample import ResampleSpec, plan_resampling
from fastnnunet.runtime.loaded import STAGES_VARIABLE, LoadedBundle
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.home import HOME_VARIABLE
from pipelines.common import run
from pipelines.measure.head import CHECKOUT, arguments, header, put

MOST_S = 600
TEST_VARIABLE = "FASTNNUNET_TEST_GPU"  # tests/test_cuda_kernels.py takes the GPU of this machine
HEADS, TILE = 3, (128, 128, 128)
IN_SMALL = (60, 80, 96)  # an image for the small model


def require_gpu(index: int) -> Gpu:
    """Raises BackendError where there is none."""
    reason = None
    try:
        reason = Cuda(index).why_no_device()
    except BackendError as e:
        reason = str(e)
    if reason is not None:
        raise BackendError(f"the device campaign needs an NVIDIA GPU, and there is none: {reason}\nrun it where one is")
    return gpu_with_kernels(index)


def build_part(gpu: Gpu) -> dict[str, Any]:
    """Compiled anew, whatever was kept."""
    with tempfile.TemporaryDirectory() as home, _variable(HOME_VARIABLE, home):
        start = time.perf_counter()
        code = kernel_code(gpu.architecture())
        seconds = time.perf_counter() - start
    return {"bytes": len(code), "seconds": round(seconds, 3), "fatbin": (SOURCES / DIGESTS).is_file()}


def tests_part(left_s: float) -> dict[str, Any]:
    """The tests of the kernels on the GPU, and the end of what pytest says."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda_kernels.py"]
    try:
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            env={**os.environ, TEST_VARIABLE: "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=left_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "says": [f"not done after {left_s:.0f} s"]}
    return {"passed": done.returncode == 0, "says": done.stdout.splitlines()[-15:]}


def stages_part(gpu: Gpu, shape: tuple[int, int, int], repeat: int) -> dict[str, Any]:
    """Each stage by itself, on the GPU and on the CPU."""
    random = np.random.default_rng(0)
    image = random.standard_normal((1, *shape), np.float32) * 300
    image[:, : shape[0] // 10] = 0
    stream = Stream(gpu)
    on_gpu = stream.upload(image)
    parts = {
        "upload": _stage(stream, repeat, lambda: stream.upload(image), lambda: image.copy()),
        "nonzero box": _stage(
            stream, repeat, lambda: intensity.nonzero_box(stream, on_gpu), lambda: native.nonzero_box(image)
        ),
        "z-score": _stage(
            stream, repeat, lambda: _then(intensity.z_score, stream, image), lambda: _then_cpu(native.z_score, image)
        ),
    }
    smaller = tuple(max(1, round(n * 0.8)) for n in shape)
    specs = {"cubic": ResampleSpec(convention="scipy"), "separate z": ResampleSpec(convention="scipy")}
    for name, spec in specs.items():
        spacing = (5.0, 0.8, 0.8) if name == "separate z" else (0.8, 0.8, 0.8)
        plan = plan_resampling(spec, shape, smaller, spacing, (1.0, 1.0, 1.0))
        assert plan is not None
        parts[f"resampling, {name}"] = _stage(
            stream,
            repeat,
            lambda plan=plan: resample(stream, on_gpu, plan),  # type: ignore[misc]
            lambda plan=plan: native.resample_planned(image, plan),  # type: ignore[misc]
        )
    tile = tuple(min(a, b) for a, b in zip(TILE, shape, strict=True))
    weights, logits = gaussian_weights(tile), random.standard_normal((HEADS, *tile), np.float32) * 9
    sums = random.standard_normal((HEADS, *tile), np.float32).astype(np.float16)
    weights_there, logits_there = stream.upload(weights), stream.upload(logits)

    def add() -> Any:
        target = stream.upload(sums)
        stream.add_weighted(logits_there, weights_there, target, is_first=False)
        return target

    def add_cpu() -> np.ndarray:
        target = sums.copy()
        native.add_weighted(logits, weights, target)
        return target

    parts["a tile added"] = _stage(stream, repeat, add, add_cpu)
    whole = random.standard_normal((HEADS, *smaller), np.float32).astype(np.float16)
    whole_there = stream.upload(whole)
    plan = plan_resampling(ResampleSpec(convention="scipy", order=1), smaller, shape, (1, 1, 1), (0.8, 0.8, 0.8))
    assert plan is not None

    def label() -> Any:
        labels = stream.filled(shape, np.uint8)
        label_logits(stream, whole_there, labels, plan, None)
        return labels

    def label_cpu() -> np.ndarray:
        labels = np.zeros(shape, np.uint8)
        native.label_logits(whole, labels, plan.orders, to_half=plan.keeps_dtype)
        return labels

    parts["labels"] = _stage(stream, repeat, label, label_cpu)
    return parts


def _then(change: Callable[..., None], stream: Stream, image: np.ndarray) -> Any:
    there = stream.upload(image)
    change(stream, there[0])
    return there


def _then_cpu(change: Callable[..., None], image: np.ndarray) -> np.ndarray:
    here = image.copy()
    change(here[0])
    return here


def _stage(stream: Stream, repeat: int, on_gpu: Callable[[], Any], on_cpu: Callable[[], Any]) -> dict[str, Any]:
    times: dict[str, list[float]] = {"gpu": [], "cpu": []}
    results: dict[str, Any] = {}
    try:
        for _ in range(repeat + 1):  # the first is warm-up
            for name, call in (("gpu", on_gpu), ("cpu", on_cpu)):
                start = time.perf_counter()
                results[name] = call()
                stream.synchronize()
                times[name].append(1e3 * (time.perf_counter() - start))
        there, here = results["gpu"], results["cpu"]
        got = there if isinstance(there, tuple) else stream.download(there)
    except BackendError as e:  # the record tells of it, and of all the rest
        return {"equal": False, "error": str(e)}
    median = {f"{name}_ms": round(statistics.median(values[1:]), 3) for name, values in times.items()}
    return {**median, "equal": bool(np.array_equal(np.asarray(got), np.asarray(here)))}


def engines_part(index: int, program: Path, repeat: int) -> dict[str, Any]:
    """Labels of a small model by each engine that is installed, all on the GPU and with the CPU around the network; in
    Python, and as `in C++` by the engine's program."""
    from tests.bundles import Toy, make_toy_model, smooth_noise

    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_toy_model(Toy(mirror_axes=(0, 1, 2)), Path(folder))
        image, spacing = smooth_noise((40, 50, 60), 1, border=3), (1.2, 0.9, 0.8)
        for name in ("onnxruntime", "tensorrt"):
            missing = why_no_cuda(name) if name == "onnxruntime" else None if is_installed(name) else "not installed"
            if missing is not None:
                parts[name] = {"not run": missing.splitlines()[0]}
                continue
            try:
                if name == "tensorrt":
                    export_engines(model.bundle, precision="fp32", architectures=[Cuda(index).architecture()])
                labels = {}
                for place in ("cpu", "gpu"):
                    with _variable(STAGES_VARIABLE, place):
                        loaded = LoadedBundle.load(model.bundle, name, device=_device(index))
                        properties = {"spacing": list(spacing)}
                        labels[place] = loaded.predict_array(image[None], properties).segmentation_ZYX
                parts[name] = {"labels_equal": bool(np.array_equal(labels["cpu"], labels["gpu"]))}
            except FastnnUNetError as e:  # the record tells of it, and of all the rest
                parts[name] = {"labels_equal": False, "error": str(e)}
            parts[f"{name} in C++"] = program_part(program, model.bundle, name, index, (image, spacing), repeat)
    return parts


def program_part(
    program: Path,
    bundle: Path,
    backend: str,
    index: int,
    image: tuple[np.ndarray, tuple[float, float, float]],
    repeat: int,
    shape: tuple[int, int, int] = IN_SMALL,
) -> dict[str, Any]:
    """The engine's program on a GPU: labels of an image and its spacing (z, y, x) with every step there, against those
    with the CPU around the network, and the times of predictions of noise of `shape`."""
    from tests.bundles import write_image

    if not program.is_file():
        return {"not run": f"{program} is missing; make engine builds it"}
    part: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        ending, labels = load_bundle_spec(bundle).file_ending, dict[str, bytes]()
        file = write_image(image[0], Path(folder) / f"case_0000{ending}", image[1][::-1])
        given = ["-m", bundle, "--backend", backend, "-device", _device(index)]
        for place in ("cpu", "gpu"):
            out = Path(folder) / f"{place}{ending}"
            done = _run_program(place, program, "predict", "-i", file, "-o", out, *given)
            if done.returncode != 0 or (place == "gpu" and done.stderr):  # it says what stays on the CPU
                return {"labels_equal": False, "error": done.stderr.strip()}
            labels[place] = out.read_bytes()
            done = _run_program(place, program, "bench", *given, "--runs", repeat + 1, "--shape", *shape)
            if done.returncode != 0:
                return {"labels_equal": False, "error": done.stderr.strip()}
            runs = json.loads(done.stdout)["runs"][1:]  # the first is warm-up
            for stage in ("preprocess_s", "infer_s", "postprocess_s", "wall_s"):
                median = statistics.median(run[stage] for run in runs)
                part[f"{place}_{stage.removesuffix('_s')}_ms"] = round(1e3 * median, 3)
    return {"labels_equal": labels["cpu"] == labels["gpu"], "shape": list(shape), **part}


def _run_program(place: str, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, STAGES_VARIABLE: place}
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, env=environment, check=False)


def bundle_part(args: argparse.Namespace) -> dict[str, Any]:
    """A bundle of the user's through the program, with each backend that can be used for it."""
    spec = load_bundle_spec(args.bundle)
    image = np.random.default_rng(0).integers(1, 200, args.shape).astype(np.float32)
    if len(spec.channel_names) != 1:
        return {"not run": f"the bundle has {len(spec.channel_names)} channels, expected 1"}
    noise = (image, (1.0, 1.0, 1.0))
    return {
        name: program_part(args.engine, args.bundle, name, args.device, noise, args.repeat, tuple(args.shape))
        for name in ("onnxruntime", "tensorrt")
    }


def _device(index: int) -> str:
    return f"cuda:{index}" if index else "cuda"


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set in the environment for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def campaign(args: argparse.Namespace) -> int:
    """Runs it all and writes the record; the exit code. Raises BackendError without a GPU, before anything is run."""
    start = time.perf_counter()
    gpu = require_gpu(args.device)
    record = header("the CUDA kernels on a GPU: equality with the core, and times of the stages") | {
        "gpu": {"name": gpu.device_name(), "architecture": gpu.architecture(), "memory_bytes": gpu.memory_bytes()[1]},
        "build": build_part(gpu),
        "shape": list(args.shape),
        "stages": stages_part(gpu, tuple(args.shape), args.repeat),
        "engines": engines_part(args.device, args.engine, args.repeat),
        "bundle": bundle_part(args) if args.bundle else {},
    }
    record["tests"] = tests_part(max(1.0, MOST_S - 30 - (time.perf_counter() - start)))
    equal = [stage["equal"] for stage in record["stages"].values()]
    equal += [part.get("labels_equal", True) for part in record["engines"].values()]
    equal += [part.get("labels_equal", True) for part in record["bundle"].values() if isinstance(part, dict)]
    record["passed"] = all(equal) and record["tests"]["passed"]
    record["seconds"] = round(time.perf_counter() - start, 1)
    put(record, args.o)
    print("passed" if record["passed"] else "FAILED: see the record")
    return 0 if record["passed"] else 1


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = arguments(__doc__)
    made.add_argument("--device", type=int, default=0, help="which GPU")
    made.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], metavar=("Z", "Y", "X"))
    made.add_argument("--repeat", type=int, default=5)
    made.add_argument(
        "--engine", type=Path, default=CHECKOUT / "build" / "engine" / "bin" / "fastnnunet-engine", help="its program"
    )
    made.add_argument("--bundle", type=Path, help="of one channel; the program's times with it are measured as well")
    return made


if __name__ == "__main__":
    run(lambda: sys.exit(campaign(parser().parse_args())))
