"""In-memory cases and a teacher that computes smooth logits from them: what a cache build needs, without nnU-Net."""

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastnnunet.cache.job import CacheJob, prepare_job
from fastnnunet.specs.cache import CacheSpec

COMMAND = "fastnnunet cache build -d 4"
SHAPES = {"small": (7, 20, 33), "large": (40, 37, 41), "flat": (1, 30, 18)}


@dataclass(frozen=True)
class FakeCases:
    shapes: dict = field(default_factory=lambda: dict(SHAPES))
    seed: int = 0
    nan_in: str | None = None  # this case makes the teacher answer NaN

    @property
    def case_ids(self):
        return tuple(self.shapes)

    def shape_zyx(self, case_id):
        return self.shapes[case_id]

    def image_CZYX(self, case_id):
        rng = np.random.default_rng([self.seed, *case_id.encode()])
        image = rng.normal(size=(1, *self.shapes[case_id])).astype(np.float32)
        if case_id == self.nan_in:
            image[0, 0, 0, 0] = np.nan
        return image

    def digest(self, case_id):
        image = self.image_CZYX(case_id)
        return hashlib.sha256(f"{image.dtype}{image.shape}".encode() + image.tobytes()).hexdigest()


def in_chunks(values_CZYX, chunk_zyx):
    """(chunk number, its values) of a whole array."""
    grid = [-(-n // c) for n, c in zip(values_CZYX.shape[1:], chunk_zyx, strict=True)]
    for number in np.ndindex(*grid):
        inside = tuple(slice(n * c, (n + 1) * c) for n, c in zip(number, chunk_zyx, strict=True))
        yield number, values_CZYX[(slice(None), *inside)]


@dataclass(frozen=True)
class FakeTeacher:
    num_heads: int
    delay_s: float
    labels: str | None = None

    def logits(self, image_CZYX, folds):
        time.sleep(self.delay_s)
        z, y, x = np.indices(image_CZYX.shape[1:], dtype=np.float32)
        heads = [np.full_like(image_CZYX[0], 3.0)]
        for head in range(1, self.num_heads):
            distance = np.hypot(np.hypot(z - 5 * head, y - 9), x - 7 * head)
            heads.append(8 - distance + 0.3 * image_CZYX[0] + 0.1 * sum(int(f) for f in folds))
        logits = np.stack(heads)
        logits[1:, :, -1:] = -1e4  # certain background, so that some chunks of large volumes are empty
        return logits

    def blocks(self, image_CZYX, folds, chunk_zyx, per_fold=None):
        if self.labels is not None:
            shape = "x".join(map(str, image_CZYX.shape[1:]))
            (Path(self.labels) / f"{shape}-{os.getpid()}-{time.perf_counter_ns()}").touch()
        if per_fold is None:
            values = self.logits(image_CZYX, folds)
        else:
            values = np.mean([per_fold(self.logits(image_CZYX, (fold,))) for fold in folds], axis=0)
        yield from in_chunks(values, chunk_zyx)

    def seconds_per_patch(self):
        return 0.5

    def deviation(self, images_CZYX, temperature):
        return {"against": "itself", "patches": len(images_CZYX), "argmax_equal": 1.0, "mean_abs_difference": 0.0}


@dataclass(frozen=True)
class FakeFactory:
    num_heads: int = 3
    has_regions: bool = False
    patch_size: tuple = (16, 16, 16)
    folds: tuple = (0, 1, 2)
    unseen: dict = field(default_factory=lambda: {"small": (0,), "large": (1,), "flat": (2,)})
    weights: str = "abc"
    delay_s: float = 0.0
    loads: str | None = None  # folder where every load leaves a file
    labels: str | None = None  # folder where every case that a teacher begins leaves a file: shape-process-time
    die_once: str | None = None  # the first process that loads the teacher while this file exists dies

    def identity(self):
        return {"plans": "nnUNetPlans", "checkpoints": {str(f): f"{self.weights}{f}" for f in self.folds}}

    def unseen_folds(self, case_id):
        return tuple(f for f in self.unseen[case_id] if f in self.folds)

    def memory_bytes(self, shape_zyx, chunk_zyx):
        return 8 * self.num_heads * int(np.prod(shape_zyx))

    def load(self, threads):
        if self.loads is not None:
            (Path(self.loads) / f"{os.getpid()}-{time.perf_counter_ns()}").touch()
        if self.die_once is not None:
            try:
                Path(self.die_once).unlink()
            except FileNotFoundError:
                pass
            else:
                os._exit(9)
        return FakeTeacher(self.num_heads, self.delay_s, self.labels)


def make_job(root: Path, cases=None, factory=None, spec=None) -> CacheJob:
    return prepare_job(
        cases or FakeCases(), factory or FakeFactory(), spec or CacheSpec(level=3), root, command=COMMAND
    )


def digests(cache) -> dict:
    """What must be equal between two builds of one cache."""
    return {case: cache.manifest(case).content_sha256 for case in cache.cases}
