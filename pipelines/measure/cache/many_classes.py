"""A case of 105 classes and 300^3 voxels: peak memory of its build, bytes per voxel, and what a patch read touches.

The teacher is a small untrained U-Net of the real classes of nnU-Net with as many heads as asked for (nothing about
memory depends on its weights), run and stored by the product's own code in a process of its own. Its last bias makes
most heads unlikely, so that the maps are sparse as those of a trained network are. Peak memory is the process's highest
resident set less what it held with the teacher loaded.

Example:

    python -m pipelines.measure.cache.many_classes --heads 105 --size 300 --patch 64 -o record.json
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.crew import InProcess
from fastnnunet.cache.job import prepare_job
from fastnnunet.cache.label import CaseTask
from fastnnunet.cache.plan import MEMORY_LIMIT_BYTES, plan_cache
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.shard import ABSENT
from fastnnunet.engines.base import LiveNetwork, Settings
from fastnnunet.engines.labelling import resolve_precision
from fastnnunet.engines.openvino import OpenVINOEngine
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.load import load_yaml_spec
from fastnnunet.teachers.nnunet import LoadedTeacher, NnUNetTeacher
from pipelines.measure.head import arguments, header, put

REPOSITORY = Path(__file__).resolve().parents[3]
PATCH = 128
PATCHES = 7


@dataclass(frozen=True)
class OneCase:
    """A generated volume: smooth noise."""

    size: int

    @property
    def case_ids(self) -> tuple[str, ...]:
        return ("case",)

    def shape_zyx(self, case_id: str) -> tuple[int, int, int]:
        return self.size, self.size, self.size

    def image_CZYX(self, case_id: str) -> np.ndarray:
        from scipy.ndimage import zoom

        coarse = np.random.default_rng(0).normal(size=(self.size // 20 + 2,) * 3).astype(np.float32)
        return zoom(coarse, 20, order=1)[: self.size, : self.size, : self.size][None]

    def digest(self, case_id: str) -> str:
        return f"{self.size:064x}"


@dataclass(frozen=True)
class BigTeacher(NnUNetTeacher):
    """The product's teacher with a network that is made here instead of read."""

    heads: int = 105
    patch: int = 64

    @property
    def num_heads(self) -> int:
        return self.heads

    @property
    def has_regions(self) -> bool:
        return False

    @property
    def patch_size(self) -> tuple[int, ...]:
        return (self.patch,) * 3

    @property
    def num_channels(self) -> int:
        return 1

    def mirror_axes(self) -> tuple[int, ...]:
        return ()

    def unseen_folds(self, case_id: str) -> tuple[int | str, ...]:
        return self.folds

    def identity(self) -> dict[str, Any]:
        return {"heads": self.heads, "patch": self.patch, "precision": self.precision, "engine": self.engine}

    def load(self, threads: int) -> LoadedTeacher:
        import torch
        from dynamic_network_architectures.architectures.unet import PlainConvUNet

        torch.manual_seed(0)
        network = PlainConvUNet(
            1,
            3,
            (8, 16, 32),
            torch.nn.Conv3d,
            3,
            (1, 2, 2),
            (1, 1, 1),
            self.heads,
            (1, 1),
            conv_bias=True,
            norm_op=torch.nn.InstanceNorm3d,
            norm_op_kwargs={"affine": True},
            nonlin=torch.nn.LeakyReLU,
        )
        head = network.decoder.seg_layers[-1]
        with torch.no_grad():
            head.weight.normal_(0, 2.5)
            head.bias.normal_(-8, 2)
            head.bias[0] = 8
        live = LiveNetwork(
            module=network, channels=1, num_heads=self.heads, patch_size=self.patch_size, to_onnx=lambda: b""
        )
        engine = OpenVINOEngine.of_network(live, Settings(threads=threads, precision=self.precision, apart=True))
        return NoReference(self, {0: engine}, self.heads, ())


class NoReference(LoadedTeacher):
    """There is no nnU-Net model on disk to compare with."""

    def deviation(self, images_CZYX: Any, temperature: float) -> dict[str, Any]:
        return {}


def build(heads: int, size: int, patch: int, recipe: Path, root: Path) -> dict[str, Any]:
    """Build one case in this process and read random patches of it."""
    factory = BigTeacher(
        files=ModelFolder(Path(), "3d_fullres", ""),
        folds=(0,),
        mirroring=False,
        step_size=0.5,
        precision=resolve_precision("auto"),
        engine="openvino",
        unseen={},
        heads=heads,
        patch=patch,
    )
    job = prepare_job(OneCase(size), factory, load_yaml_spec(CacheSpec, recipe), root, command="-")
    planned = plan_cache(job).memory_per_worker
    teacher = factory.load(threads=2)
    for _ in teacher.blocks(np.zeros((1, patch, patch, patch), np.float32), (0,), (patch,) * 3):
        pass  # activations are there now
    with (Path("/proc/self/statm")).open() as f:
        before = int(f.read().split()[1]) * resource.getpagesize()
    crew = InProcess(teacher)
    cache = job.create({})
    task = CaseTask(case_id="case", cache=cache, source=job.source, factory=factory, folds=factory.folds, threads=2)
    start = time.perf_counter()
    ((_, manifest),) = crew.label([task])
    elapsed_s = time.perf_counter() - start
    if isinstance(manifest, Exception):
        raise manifest
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "recipe": recipe.name,
        "planned_memory_bytes": planned,
        "peak_memory_bytes": peak,
        "limit_bytes": MEMORY_LIMIT_BYTES,
        "build_s": elapsed_s,
        "bytes_per_voxel": manifest.stored_bytes / manifest.voxels,
        "dense_float16_bytes_per_voxel": 2 * heads,
        "chunks": int(np.prod(_reader_case(cache.path)[1].layout.grid)),
        "absent_chunks": manifest.absent_chunks,
        "max_error": manifest.max_error,
        "eps": manifest.eps,
        **_read(cache.path, size),
    }


def _reader_case(path: Path) -> tuple[SoftLabelReader, Any]:
    reader = SoftLabelReader(path)
    return reader, reader._open("case")


def _read(path: Path, size: int) -> dict[str, Any]:
    """Random patches: milliseconds, and chunks decoded of those the patch covers."""
    reader, case = _reader_case(path)
    side = min(PATCH, size)
    rng = np.random.default_rng(0)
    out = np.empty((case.layout.shape[0], side, side, side), np.uint8)
    seconds, decoded, covered = [], [], []
    for _ in range(PATCHES):
        lower = rng.integers(0, size - side + 1, 3)
        inside = tuple(
            slice(int(low) // c, -(-(int(low) + side) // c))
            for low, c in zip(lower, case.layout.chunk[1:], strict=True)
        )
        entries = case.index[(slice(None), *inside)][..., 0]
        decoded.append(int((entries != ABSENT).sum()))
        covered.append(entries.size)
        start = time.perf_counter()
        reader.read_patch("case", lower, lower + side, out)
        seconds.append(time.perf_counter() - start)
    return {
        "patch": side,
        "patch_read_median_ms": 1e3 * statistics.median(seconds),
        "patch_chunks_decoded_median": statistics.median(decoded),
        "patch_chunks_covered_median": statistics.median(covered),
    }


def measure(heads: int, size: int, patch: int, recipes: list[Path]) -> dict[str, Any]:
    """The record; every recipe is built in a process of its own."""
    rows = []
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as root:
            call = (heads, size, patch, recipe, Path(root) / "root")
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(build, *call).result())
        print(
            f"{rows[-1]['recipe']}: peak {rows[-1]['peak_memory_bytes'] / 2**30:.2f} GiB, "
            f"{rows[-1]['bytes_per_voxel']:.2f} B/voxel",
            flush=True,
        )
    return {
        **header("memory of building one case of many classes; an untrained network, see the script"),
        "heads": heads,
        "size": size,
        "teacher_patch": patch,
        "recipes": rows,
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--heads", type=int, default=105)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--recipe", type=Path, nargs="+", default=[REPOSITORY / "cache_specs" / "many_classes.yaml"])
    args = parser.parse_args()
    put(measure(args.heads, args.size, args.patch, args.recipe), args.o)
