"""Bytes per voxel and the largest stored error of soft-label caches, read off their manifests.

Example:

    python -m pipelines.measure.cache.cache_size CACHE_FOLDER ... -o record.json
"""

import math
from pathlib import Path
from typing import Any

from fastnnunet.cache.store.folder import open_cache
from pipelines.measure.head import arguments, header, put


def measure(folder: Path) -> dict[str, Any]:
    """One cache's row. Raises NotFoundError, CorruptError."""
    cache = open_cache(folder)
    manifests = [m for case in cache.cases if (m := cache.manifest(case)) is not None]
    voxels = sum(math.prod(m.shape[1:]) for m in manifests)
    stored = sum(m.stored_bytes for m in manifests)
    return {
        "key": cache.key,
        "soft_labels": cache.identity["soft_labels"],
        "cases": len(manifests),
        "cases_expected": len(cache.cases),
        "voxels": voxels,
        "stored_bytes": stored,
        "bytes_per_voxel": stored / voxels,
        "float16_bytes_per_voxel": 2 * cache.codec.num_heads,
        "max_error": max(m.max_error for m in manifests),
        "eps": cache.codec.eps,
        "teacher_seconds": sum(m.seconds for m in manifests),
        "deviation": cache.provenance.get("deviation"),
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("cache", type=Path, nargs="+")
    parser.add_argument("--note", default="", help="how the caches were made, if not by a plain build")
    args = parser.parse_args()
    rows = [measure(folder) for folder in args.cache]
    record = {
        **header("size and accuracy of soft-label caches"),
        "note": args.note,
        "caches": rows,
    }
    put(record, args.o)
    for row in rows:
        print(
            f"{row['soft_labels']} {row['cases']} cases, {row['bytes_per_voxel']:.3f} B/voxel, {row['max_error']:.4f}"
        )
