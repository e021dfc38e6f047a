"""Milliseconds of one forward pass of one real patch."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastnnunet.engines.base import Precision
from fastnnunet.engines.registry import create_engine
from fastnnunet.specs.bundle import load_bundle_spec

_WARM_UP = 3


def ms_per_patch(
    bundles: Mapping[str, Path],
    *,
    backend: str = "auto",
    precisions: Sequence[Precision] = ("fp32",),
    threads: int | None = None,
    rounds: int = 20,
) -> dict[str, dict[Precision, float]]:
    """Name -> precision -> median over `rounds`, after a warm-up, everything in turns."""
    engines, patches = {}, {}
    for name, bundle in bundles.items():
        spec = load_bundle_spec(bundle)
        with np.load(bundle / "parity.npz") as stored:
            patches[name] = np.ascontiguousarray(stored["image"][:1])
        for precision in precisions:
            engines[name, precision] = create_engine(backend, bundle, spec, threads=threads, precision=precision)
    times: dict[tuple[str, Precision], list[float]] = {key: [] for key in engines}
    for _ in range(_WARM_UP + rounds):
        for (name, precision), engine in engines.items():
            start = time.perf_counter()
            engine.run(patches[name])
            times[name, precision].append(1e3 * (time.perf_counter() - start))
    return {name: {p: statistics.median(times[name, p][_WARM_UP:]) for p in precisions} for name in bundles}
