"""Chunk edge x channels per chunk x compressor x level: bytes per voxel against milliseconds of a random patch.

    python -m pipelines.measure.cache.cache_layout --logits FOLDER -o record.json

Soft labels of 3, 20 and 105 classes at T = 1, 2, 3, 4 are stored in every layout and read back patch by patch with this
project's reader (mapped, checksums verified), all layouts of one volume in turn; every patch is compared with the
values. Times are CPU time of the reading thread, which does all the work, so that other load on the machine matters
less. A layout is on the Pareto front when no other of the same volume is both smaller and faster. Beside them stands
Blosc2 in nnU-Net's own layout, and the size of single cases as they were recorded, cut as `layout_for` cuts them.
"""

import mmap
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd

from fastnnunet.cache.codecs import make_codec
from fastnnunet.cache.store.reader import OpenCase, fill_patch
from fastnnunet.cache.store.shard import ABSENT, CRC_BYTES, ShardLayout, layout_for
from fastnnunet.specs.cache import CacheSpec
from pipelines.measure.cache.reader_speed import blosc2_of_nnunet
from pipelines.measure.cache.soft_maps import lattice, load_maps, mosaic
from pipelines.measure.head import arguments, header, put

TEMPERATURES = (1.0, 2.0, 3.0, 4.0)
SLAB = 16  # planes encoded at a time


@dataclass(frozen=True, kw_only=True)
class Volume:
    """One volume to store, and the layouts to try on it."""

    classes: int
    edge: int
    patch: int
    chunk_edges: tuple[int, ...]
    codecs: tuple[tuple[str, int], ...]
    channels: tuple[int | None, ...] = (None,)  # per chunk; None: all


VOLUMES = (
    Volume(
        classes=3,
        edge=192,
        patch=128,
        chunk_edges=(16, 24, 32, 48, 64),
        codecs=(("zstd", 3), ("zstd", 9), ("zstd", 19), ("lz4", 5), ("lz4", 9)),
    ),
    Volume(
        classes=20,
        edge=128,
        patch=96,
        chunk_edges=(16, 32, 64),
        codecs=(("zstd", 3), ("zstd", 9), ("lz4", 9)),
        channels=(None, 2),
    ),
    Volume(
        classes=105,
        edge=96,
        patch=64,
        chunk_edges=(16, 32, 48),
        codecs=(("zstd", 3), ("zstd", 9), ("lz4", 9)),
        channels=(None, 2),
    ),
)


def soft_labels(logits_CZYX, temperature: float):
    """Stored values (C - 1, Z, Y, X) uint8 of the default encoding."""
    codec = make_codec("simplex_u8", len(logits_CZYX))
    slabs = range(0, logits_CZYX.shape[1], SLAB)
    parts = (codec.encode(codec.target(logits_CZYX[:, z : z + SLAB], temperature)) for z in slabs)
    return np.concatenate(list(parts), axis=1)


def pack(chunk, layout: ShardLayout) -> bytes:
    """One chunk as it stands in a shard."""
    if layout.compressor == "zstd":
        packed = bytes(zstd.compress(chunk, layout.level))
    else:
        packed = bytes(blosc.compress(chunk, b"lz4hc", min(layout.level, 9), blosc.NOSHUFFLE, 0))
    return packed + google_crc32c.value(packed).to_bytes(CRC_BYTES, "little")


def chunks_of(values, layout: ShardLayout):
    """Number in the grid and values of every chunk that is not all zero, padded with zeros."""
    for number in np.ndindex(*layout.grid):
        part = values[tuple(slice(i * n, (i + 1) * n) for i, n in zip(number, layout.chunk, strict=True))]
        if part.any():
            chunk = np.zeros(layout.chunk, np.uint8)
            chunk[tuple(map(slice, part.shape))] = part
            yield number, chunk


def write_shard(values, layout: ShardLayout, file: Path) -> OpenCase:
    index = np.full((*layout.grid, 2), ABSENT, np.uint64)
    with file.open("wb") as f:
        for number, chunk in chunks_of(values, layout):
            packed = pack(chunk, layout)
            index[number] = f.tell(), len(packed)
            f.write(packed)
        f.write(index.tobytes())
        f.write(google_crc32c.value(index.tobytes()).to_bytes(CRC_BYTES, "little"))
    with file.open("rb") as f:
        return OpenCase(layout, index, np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), np.uint8))


def layouts(volume: Volume, stored_channels: int):
    for edge in volume.chunk_edges:
        for channels in volume.channels:
            for compressor, level in volume.codecs:
                chunk = (channels or stored_channels, edge, edge, edge)
                shape = (stored_channels, *(volume.edge,) * 3)
                yield ShardLayout(shape=shape, chunk=chunk, compressor=compressor, level=level)


def measure_volume(volume: Volume, logits_CZYX, temperature: float, patches: int) -> list[dict[str, Any]]:
    """One row per layout."""
    values = soft_labels(logits_CZYX, temperature)
    voxels, extent = values[0].size, (volume.patch,) * 3
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            write_shard(values, layout, Path(folder) / str(number))
            for number, layout in enumerate(layouts(volume, len(values)))
        ]
        b2nd, nnunet = blosc2_of_nnunet(values, Path(folder) / "nnunet", volume.patch)
        seconds: list[list[float]] = [[] for _ in range(len(cases) + 1)]
        rng = np.random.default_rng(0)
        for number in range(patches + 1):
            lower = [int(v) for v in rng.integers(0, volume.edge - volume.patch + 1, 3)]
            box = (slice(None), *(slice(v, v + volume.patch) for v in lower))
            for case, times in zip([*cases, None], seconds, strict=True):
                start = time.thread_time()
                if case is None:
                    out = b2nd[box]
                else:
                    out = np.empty((len(values), *extent), np.uint8)
                    fill_patch(case, lower, out)
                if number:  # the first warms up
                    times.append(time.thread_time() - start)
                if not np.array_equal(out, values[box]):
                    raise AssertionError(f"{'Blosc2' if case is None else case.layout} read other values than stored")
        rows = [
            {
                "chunk": list(case.layout.chunk),
                "compressor": case.layout.compressor,
                "level": case.layout.level,
                "bytes_per_voxel": len(case.shard) / voxels,
                "patch_ms": 1e3 * float(np.median(times)),
            }
            for case, times in zip(cases, seconds, strict=False)
        ]
        for row in rows:
            row["pareto"] = not any(
                other["bytes_per_voxel"] <= row["bytes_per_voxel"] and other["patch_ms"] < row["patch_ms"]
                for other in rows
            )
        reference = {"bytes_per_voxel": nnunet["bytes"] / voxels, "patch_ms": 1e3 * float(np.median(seconds[-1]))}
        rows.append({"chunk": nnunet["chunks"], "compressor": "blosc2 (nnU-Net)", "level": 5, **reference})
    return rows


def sizes_of_cases(maps, temperature: float) -> list[dict[str, Any]]:
    """Bytes per voxel of single cases, index included, each cut by `layout_for`."""
    labels = [soft_labels(logits, temperature) for logits in maps]
    rows = []
    for edge in (24, 32, 48):
        for compressor, level in (("zstd", 3), ("zstd", 19), ("lz4", 9)):
            spec = CacheSpec(chunk_zyx=(edge,) * 3, compressor=compressor, level=level)
            total = 0
            for values in labels:
                layout = layout_for(spec, len(values), values.shape[1:])
                total += sum(len(pack(chunk, layout)) for _, chunk in chunks_of(values, layout)) + layout.index_bytes
            rows.append(
                {
                    "temperature": temperature,
                    "chunk_edge": edge,
                    "compressor": compressor,
                    "level": level,
                    "bytes_per_voxel": total / sum(values[0].size for values in labels),
                }
            )
    return rows


def measure(
    logits_folder: Path | None,
    volumes: tuple[Volume, ...] = VOLUMES,
    temperatures: tuple[float, ...] = TEMPERATURES,
    patches: int = 12,
    progress=lambda text: None,
) -> dict[str, Any]:
    """The whole record."""
    blosc.use_threads = False
    maps, origin = load_maps(logits_folder)
    tables = []
    for volume in volumes:
        make = mosaic if volume.classes == 3 else lattice
        logits = make(maps, volume.classes, volume.edge)
        for temperature in temperatures:
            rows = measure_volume(volume, logits, temperature, patches)
            tables.append(
                {
                    "classes": volume.classes,
                    "temperature": temperature,
                    "volume_zyx": [volume.edge] * 3,
                    "patch_zyx": [volume.patch] * 3,
                    "rows": rows,
                }
            )
            progress(table_text(tables[-1]))
    return {
        **header("layouts of the soft-label store: bytes per voxel against CPU milliseconds of a random patch, median"),
        "maps": origin,
        "volumes": {
            "3 classes": "the maps tiled, each mirrored into its neighbours: no far background, the densest case",
            "20 and 105 classes": "no teacher with so many classes was at hand: " + " ".join(lattice.__doc__.split()),
        },
        "patches": patches,
        "tables": tables,
        "cases_as_recorded": [row for t in temperatures for row in sizes_of_cases(maps, t)],
    }


def table_text(table: dict[str, Any]) -> str:
    """The rows of one volume, smallest first, `*` for the Pareto front."""
    lines = [f"{table['classes']} classes, T = {table['temperature']:g}, patch {table['patch_zyx'][0]}^3"]
    for row in sorted(table["rows"], key=lambda row: row["bytes_per_voxel"]):
        chunk = "x".join(map(str, row["chunk"]))
        lines.append(
            f"{'*' if row.get('pareto') else ' '} {chunk:>16} {row['compressor']:>16} {row['level']:>2} "
            f"{row['bytes_per_voxel']:8.4f} B/voxel {row['patch_ms']:8.2f} ms"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--logits", type=Path, help="folder of <case>.npy, float (3, Z, Y, X); default: generated maps")
    parser.add_argument("--patches", type=int, default=12)
    args = parser.parse_args()
    put(measure(args.logits, patches=args.patches, progress=lambda text: print(text, flush=True)), args.o)
