"""What int8 and bf16 cost in Dice on images nobody saw, and what they save: bytes, and CPU time of a patch.

Bundles are those `fastnnunet export quantize` was run on; each precision it measured is compared with fp32 on the same
backend, without mirroring. CPU time is that of one thread (the process's clock, so that waiting for other programs does
not count), median of one forward pass of a real patch, everything in turns.

    python -m pipelines.measure.predict.precisions BUNDLE [BUNDLE ...] -i imagesTs -g labelsTs -o record.json
"""

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.engines.base import Engine, Precision
from fastnnunet.engines.registry import create_engine
from fastnnunet.images.cases import find_cases
from fastnnunet.release.gate import compare, describe
from fastnnunet.release.gate_cases import ImageCases
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.specs.bundle import PRECISIONS, load_bundle_spec
from pipelines.measure.head import arguments, header, put

FILES = {  # of a model, by what it is loaded from
    ("int8", "onnxruntime"): ("model_int8.onnx",),
    ("int8", "openvino"): ("model_int8.xml", "model_int8.bin"),
}


def cpu_ms(backends: dict[str, Engine], patch: np.ndarray, rounds: int) -> dict[str, float]:
    """Median milliseconds of CPU time of one patch on each backend."""
    times: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(1 + rounds):
        for name, backend in backends.items():
            start = time.process_time()
            backend.run(patch)
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(bundle: Path, images: Path, labels: Path, rounds: int = 20) -> dict[str, Any]:
    """The row of one bundle."""
    spec = load_bundle_spec(bundle)
    wanted: list[tuple[Precision, str]] = [
        (precision, backend) for precision, of in spec.provenance[PRECISIONS].items() for backend in of
    ]

    def load(backend: str, precision: Precision) -> LoadedBundle:
        engine = create_engine(backend, bundle, spec, threads=1, precision=precision)
        return LoadedBundle(spec, [engine], mirroring=False)

    fp32 = {backend: load(backend, "fp32") for _, backend in wanted}
    others = [load(backend, precision) for precision, backend in wanted]
    everyone = tuple(case.case_id for case in find_cases(images, spec))
    source = ImageCases(next(iter(fp32.values())), images, labels, everyone)
    comparisons = compare(source, fp32, others)
    with np.load(bundle / "parity.npz") as stored:
        patch = np.ascontiguousarray(stored["image"][:1])
    engines = {f"{m.backend.precision} {m.backend.name}": m.backend for m in (*fp32.values(), *others)}
    return {
        "name": spec.name,
        "parameters": spec.provenance.get("parameters"),
        "size_bytes": {
            "fp32": (bundle / spec.model_file).stat().st_size,
            **{
                f"int8 {b}": sum((bundle / file).stat().st_size for file in FILES[p, b])
                for p, b in wanted
                if p == "int8"
            },
        },
        "comparisons": [asdict(c) | {"loss_points": c.loss_points} for c in comparisons],
        "lines": [describe(c) for c in comparisons],
        "cpu_ms_per_patch": cpu_ms(engines, patch, rounds),
        "at_export": spec.provenance[PRECISIONS],
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("-i", "--images", type=Path, required=True)
    parser.add_argument("-g", "--labels", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    rows = []
    for bundle in args.bundles:
        rows.append(measure(bundle, args.images, args.labels, args.rounds))
        print(bundle.name, *rows[-1].pop("lines"), rows[-1]["size_bytes"], rows[-1]["cpu_ms_per_patch"], sep="\n  ")
    put({**header("int8 and other precisions of bundles: Dice, size, CPU time a patch"), "bundles": rows}, args.o)
