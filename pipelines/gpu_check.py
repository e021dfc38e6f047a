"""Everything about TensorRT that only a GPU can show, at once, on one bundle: builds, compares, times, writes a record.

    python -m pipelines.gpu_check hippocampus_r4 -o gpu_check.json

For each precision an engine is built for the GPU of this machine, run on the bundle's patches in every batch size and
compared with ONNX Runtime in fp32; of an ensemble its first fold. Times are medians over calls of the loaded backend,
copies to and from the GPU included. Exit code 1 when a precision does not agree.
Wants: pip install 'fastnnunet[rtx]' or 'fastnnunet[gpu]'.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.engines.base import Precision, Settings
from fastnnunet.engines.devices import Device
from fastnnunet.engines.registry import create_engine
from fastnnunet.engines.tensorrt import TensorRTEngine
from fastnnunet.engines.trt.build import LABEL_AGREEMENT
from fastnnunet.engines.trt.cuda import Cuda
from fastnnunet.export.tensorrt import export_engines
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.provenance import hardware, now_utc, versions, write_json
from pipelines.common import run


def check(bundle: Path, precision: Precision, library: str | None = None, repeat: int = 50) -> dict[str, Any]:
    """The part of the record for one precision."""
    cuda = Cuda()
    start = time.perf_counter()
    built, *_ = export_engines(bundle, precision=precision, architectures=[cuda.architecture()], library_name=library)
    build_s = time.perf_counter() - start
    spec = load_bundle_spec(bundle)
    spec, key = replace(spec, model_files=spec.model_files[:1]), built.stored.key
    free_before, _ = cuda.memory_bytes()
    start = time.perf_counter()
    backend = TensorRTEngine.of_bundle(bundle, spec, Settings(threads=1, precision=precision, device=Device("cuda")))
    load_s = time.perf_counter() - start
    with np.load(bundle / "parity.npz") as parity:
        patches_NCX = parity["image"]
    expected_NHX = create_engine("onnxruntime", bundle, spec).run(patches_NCX)

    differences, same, repeats_equal, timings = [], [], [], {}
    for size in range(key.min_batch, key.max_batch + 1):
        index = np.arange(size) % len(patches_NCX)
        batch, expected = patches_NCX[index], expected_NHX[index]
        first = backend.run(batch).copy()  # run and captured
        replayed = backend.run(batch)
        differences.append(float(np.abs(replayed - expected).max()))
        same.append(float((replayed.argmax(1) == expected.argmax(1)).mean()))
        repeats_equal.append(bool(np.array_equal(first, replayed)))
        if size in (key.min_batch, key.max_batch):
            timings[str(size)] = _median_ms(backend, batch, repeat)
    return {
        "engine": str(key),
        "build_s": round(build_s, 3) if not built.was_there else None,
        "load_s": round(load_s, 3),
        "gpu_memory_bytes": free_before - cuda.memory_bytes()[0],
        "cuda_graphs_for_batches": backend.captured(),
        "median_ms_by_batch": timings,
        "max_abs_difference": max(differences),
        "max_abs_logit": float(np.abs(expected_NHX).max()),
        "label_agreement": min(same),
        "replay_equals_first_run": all(repeats_equal),
        "passed": min(same) >= LABEL_AGREEMENT[precision] and bool(np.isfinite(max(differences))),
    }


def _median_ms(backend: TensorRTEngine, batch_NCX: np.ndarray, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        backend.run(batch_NCX)
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 4)


def main(args: argparse.Namespace) -> None:
    cuda = Cuda()
    record = {
        "what": "TensorRT on a GPU against ONNX Runtime in fp32 on a bundle's patches",
        "created": now_utc(),
        "hardware": {**hardware(), "gpu": cuda.device_name(), "gpu_memory_bytes": cuda.memory_bytes()[1]},
        "versions": versions(),
        "bundle": load_bundle_spec(args.bundle).name,
        "precisions": {p: check(args.bundle, p, args.library, args.repeat) for p in args.precision},
    }
    write_json(args.output, record)
    for precision, part in record["precisions"].items():
        print(precision, "passed" if part["passed"] else "FAILED", part)
    if not all(part["passed"] for part in record["precisions"].values()):
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "fp16", "int8"], default=["fp32", "fp16"])
    parser.add_argument("--library", choices=["tensorrt", "tensorrt_rtx"])
    parser.add_argument("--repeat", type=int, default=50)
    run(lambda: main(parser.parse_args()))
