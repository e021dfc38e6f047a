"""Damage on disk: random single-bit flips and lost, swapped and edited files, and whether each is noticed.

    python -m pipelines.measure.cache.bit_flips --flips 200 -o record.json

A small cache is built; then one bit at a time is flipped in the payload of a shard, its index, the array's zarr.json,
the manifest or the group's zarr.json, with as many flips in each. A flip counts as detected when a fresh reader refuses
the whole case *and* `cache verify` reports exactly this case, both before the file is put right again; for the group,
when opening the cache fails, which both begin with. The message must hold the case and the command that rebuilds it.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.store.folder import ARRAY_NAME, GROUP_NAME, CacheFolder, open_cache
from fastnnunet.cache.store.manifest import MANIFEST_NAME
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.shard import SHARD_NAME, layout_of_document
from fastnnunet.cache.verify import verify_cache
from fastnnunet.errors import CorruptError, NotFoundError
from fastnnunet.specs.cache import CacheSpec
from pipelines.measure.head import arguments, header, put
from tests.cache_fakes import FakeCases, digests, make_job

PLACES = ("payload", "shard index", "array zarr.json", "manifest.json", "group zarr.json")
SHAPES = {"first": (20, 21, 22), "second": (20, 21, 22), "third": (33, 17, 9)}


def make_cache(root: Path, compressor: str) -> CacheFolder:
    spec = CacheSpec(compressor=compressor, level=3, chunk_zyx=(12, 12, 12))
    return build_cache(make_job(root, cases=FakeCases(shapes=dict(SHAPES)), spec=spec))


def file_and_bits(cache: CacheFolder, case: str, place: str) -> tuple[Path, int, int]:
    """The file of a place and the range of its bits, first and one past the last."""
    import json

    folder = cache.case_dir(case)
    file = {
        "array zarr.json": folder / ARRAY_NAME,
        "manifest.json": folder / MANIFEST_NAME,
        "group zarr.json": cache.path / GROUP_NAME,
    }.get(place, folder / SHARD_NAME)
    size = file.stat().st_size
    if place not in ("payload", "shard index"):
        return file, 0, 8 * size
    payload = size - layout_of_document(json.loads((folder / ARRAY_NAME).read_text())).index_bytes
    return (file, 0, 8 * payload) if place == "payload" else (file, 8 * payload, 8 * size)


def is_noticed(cache: CacheFolder, case: str, *, group: bool = False) -> bool:
    """Whether the reader and `cache verify` both refuse this case, and no other, and say how to mend it."""
    try:
        SoftLabelReader(cache.path).read_case(case)
    except (CorruptError, NotFoundError) as e:
        # of the group: a flipped digit of the format version reads as a newer version, which another command mends
        commands = ("fastnnunet cache build", "update fastnnunet") if group else (cache.rebuild_command(case),)
        by_reader = any(c in str(e) for c in commands) and (str(cache.path) if group else case) in str(e)
    else:
        by_reader = False
    try:
        reports = verify_cache(open_cache(cache.path))
    except CorruptError:
        by_verify = group
    else:
        by_verify = not group and [r.case_id for r in reports if r.status != "ok"] == [case]
    return by_reader and by_verify


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Put the folder back as it was."""
    with tempfile.TemporaryDirectory() as safe:
        shutil.copytree(folder, Path(safe) / "copy")
        try:
            yield
        finally:
            shutil.rmtree(folder)
            shutil.copytree(Path(safe) / "copy", folder)


def flip_bits(cache: CacheFolder, flips: int, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Flips and how many of them were noticed, per place."""
    found: dict[str, dict[str, Any]] = {place: {"flips": 0, "detected": 0, "missed": []} for place in PLACES}
    for number in range(flips):
        place, case = PLACES[number % len(PLACES)], str(rng.choice(list(cache.cases)))
        file, first, last = file_and_bits(cache, case, place)
        bit = int(rng.integers(first, last))
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        noticed = is_noticed(cache, case, group=place == "group zarr.json")
        file.write_bytes(whole)
        found[place]["flips"] += 1
        found[place]["detected"] += noticed
        if not noticed:
            found[place]["missed"].append({"case": case, "bit": bit})
    return found


def damages(cache: CacheFolder) -> dict[str, Callable[[Path], object]]:
    """Everything else that happens to files, as functions of the folder of a case."""
    other = cache.case_dir("second")

    def swap(folder: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(other, folder)

    def truncate(folder: Path) -> None:
        shard = folder / SHARD_NAME
        shard.write_bytes(shard.read_bytes()[:-1])

    def edit(folder: Path) -> None:
        file = folder / ARRAY_NAME
        file.write_text(file.read_text().replace('"case_id":"first"', '"case_id":"third"'))

    return {
        "shard truncated by one byte": truncate,
        "shard deleted": lambda folder: (folder / SHARD_NAME).unlink(),
        "manifest deleted": lambda folder: (folder / MANIFEST_NAME).unlink(),
        "another case of the same shape in its place": swap,
        "another case's shard in its place": lambda folder: shutil.copy(other / SHARD_NAME, folder / SHARD_NAME),
        "an attribute of the array edited": edit,
    }


def measure(flips: int, seed: int = 0) -> dict[str, Any]:
    """The record, half of the flips on each compressor."""
    rng = np.random.default_rng(seed)
    record: dict[str, Any] = {
        **header("damage on disk that reader and cache verify both refused, with the case named and the command"),
        "seed": seed,
        "flips": 0,
        "detected": 0,
        "compressors": {},
    }
    for compressor in ("zstd", "lz4"):
        with tempfile.TemporaryDirectory() as folder:
            cache = make_cache(Path(folder) / "root", compressor)
            before = digests(cache)
            bits = flip_bits(cache, flips // 2, rng)
            other = {}
            for name, damage in damages(cache).items():
                with restored(cache.case_dir("first")):
                    damage(cache.case_dir("first"))
                    other[name] = is_noticed(cache, "first")
            damages(cache)["shard deleted"](cache.case_dir("first"))
            job = make_job(Path(folder) / "root", cases=FakeCases(shapes=dict(SHAPES)), spec=cache.spec)
            rebuilt = build_cache(job, only=["first"])
            record["compressors"][compressor] = {
                "bit_flips": bits,
                "other_damage_detected": other,
                "same_digests_after_rebuilding_the_case": digests(rebuilt) == before
                and {r.status for r in verify_cache(rebuilt)} == {"ok"},
            }
            record["flips"] += sum(row["flips"] for row in bits.values())
            record["detected"] += sum(row["detected"] for row in bits.values())
    return record


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--flips", type=int, default=200)
    args = parser.parse_args()
    result = measure(args.flips)
    put(result, args.o)
    print(f"{result['detected']} of {result['flips']} single-bit flips detected")
    for compressor, row in result["compressors"].items():
        print(f"{compressor}: {row['other_damage_detected']}; mended: {row['same_digests_after_rebuilding_the_case']}")
