"""Random patches: this project's reader, zarr-python and tensorstore on one store, and Blosc2 in nnU-Net's own layout.

    python -m pipelines.measure.cache.reader_speed --logits FOLDER -o record.json

All four read the same patches of the same values in turn, patch by patch, in one process, and every patch is compared
bit for bit. nnU-Net's side is written by nnUNetDatasetBlosc2.save_case with the chunks and blocks its preprocessor
computes, and opened by its load_case (memory-mapped, one thread). Opening is not timed for any of them; nnU-Net opens
its file anew for every patch. Only this reader and tensorstore's and zarr-python's crc32c codecs check checksums.
"""

import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.specs.cache import CacheSpec
from pipelines.measure.cache.soft_maps import cache_of, load_maps, mosaic
from pipelines.measure.head import arguments, header, put


def blosc2_of_nnunet(values, folder: Path, patch: int):
    """`values` (S, Z, Y, X) as nnU-Net stores an image of this shape and type, opened as nnU-Net does."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    folder.mkdir()
    blocks, chunks = comp_blosc2_params(values.shape, (patch,) * 3, values.itemsize)
    nnUNetDatasetBlosc2.save_case(values, values[:1], {}, str(folder / "case"), chunks=chunks, blocks=blocks)
    data, *_ = nnUNetDatasetBlosc2(str(folder)).load_case("case")
    layout = {"blocks": list(blocks), "chunks": list(chunks), "bytes": (folder / "case.b2nd").stat().st_size}
    return data, layout


def measure(
    logits_folder: Path | None, edge: int = 256, patch: int = 128, patches: int = 60, temperature: float = 3.0, **layout
) -> dict[str, Any]:
    """The record. `layout` are layout fields of CacheSpec that differ from the defaults."""
    import tensorstore
    import zarr

    maps, origin = load_maps(logits_folder)
    spec = CacheSpec(temperature=temperature, **layout)
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_of({"case": mosaic(maps, 4, edge)}, Path(folder) / "root", spec)
        reader = SoftLabelReader(cache.path)
        values = reader.read_case("case")
        b2nd, nnunet_layout = blosc2_of_nnunet(values, Path(folder) / "nnunet", patch)
        by_zarr = zarr.open_array(str(cache.case_dir("case")), mode="r")
        kvstore = {"driver": "file", "path": str(cache.case_dir("case"))}
        by_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
        out = np.empty((len(values), patch, patch, patch), values.dtype)
        arms = {
            "fastnnunet": lambda lower, box: reader.read_patch("case", lower, [v + patch for v in lower]),
            "fastnnunet, preallocated": lambda lower, box: reader.read_patch(
                "case", lower, [v + patch for v in lower], out=out
            ),
            "blosc2 (nnU-Net)": lambda lower, box: b2nd[box],
            "zarr-python": lambda lower, box: by_zarr[box],
            "tensorstore": lambda lower, box: by_tensorstore[box].read().result(),
        }
        rng = np.random.default_rng(0)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        different = dict.fromkeys(arms, 0)
        for number in range(patches + 3):  # the first three warm up
            lower = [int(v) for v in rng.integers(0, edge - patch + 1, 3)]
            box = (slice(None), *(slice(v, v + patch) for v in lower))
            names = list(arms)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start = time.perf_counter()
                got = arms[name](lower, box)
                elapsed = time.perf_counter() - start
                different[name] += not np.array_equal(got, values[box])
                if number >= 3:
                    seconds[name].append(elapsed)
        median = {name: float(np.median(times)) for name, times in seconds.items()}
        packages = {name: metadata.version(name) for name in ("blosc2", "numcodecs", "tensorstore")}
        ours = median["fastnnunet"]
        manifest = cache.manifest("case")
        document = by_zarr.metadata.to_dict()["codecs"][0]["configuration"]
        return {
            **header("milliseconds of a random patch, median", packages=packages),
            "values": f"mosaic by mirrored tiling, 4 classes, {edge}^3, T = {temperature:g}; {origin}",
            "stored_shape": list(values.shape),
            "patch": [len(values), patch, patch, patch],
            "patches": patches,
            "chunk": [int(n) for n in document["chunk_shape"]],
            "codecs": [codec if isinstance(codec, dict) else codec.to_dict() for codec in document["codecs"]],
            "stored_bytes": manifest.stored_bytes,
            "nnunet_layout": nnunet_layout,
            "median_ms": {name: 1e3 * t for name, t in median.items()},
            "quartiles_ms": {
                name: [1e3 * float(q) for q in np.quantile(t, (0.25, 0.75))] for name, t in seconds.items()
            },
            "times_ours": {name: t / ours for name, t in median.items()},
            "patches_that_differ": different,
        }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--logits", type=Path, help="folder of <case>.npy, float (3, Z, Y, X); default: generated maps")
    parser.add_argument("--patches", type=int, default=60)
    args = parser.parse_args()
    record = {f"T={t:g}": measure(args.logits, patches=args.patches, temperature=t) for t in (3.0, 1.0)}
    put(record, args.o)
    for temperature, run in record.items():
        for arm, value in run["median_ms"].items():
            print(f"{temperature} {arm}: {value:.2f} ms, {run['times_ours'][arm]:.2f} times ours")
