"""Teacher logits to measure the store with: recorded ones made larger, or generated ones where none were recorded.

Shapes: (C, Z, Y, X) float32 logits, channel 0 the background.
"""

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.job import prepare_job
from fastnnunet.specs.cache import CacheSpec
from tests.cache_fakes import in_chunks

MAX_MAPS = 16
DECAY = 0.5  # logits per voxel by which a class fades outside the cell it was placed in


def load_maps(folder: Path | None, seed: int = 0):
    """Logits of three classes, and in words what they are: the first `*.npy` of `folder`, or generated ones."""
    files = sorted(folder.glob("*.npy"))[:MAX_MAPS] if folder is not None else []
    if files:
        maps = [np.load(file).astype(np.float32) for file in files]
        return maps, f"mean logits of the teacher ensemble for {len(maps)} cases ({files[0].stem} to {files[-1].stem})"
    rng = np.random.default_rng(seed)
    return [_generated(rng) for _ in range(4)], "generated: two noisy balls in noise, 4 volumes of 32^3"


def mosaic(maps, num_classes: int, edge: int):
    """(C, edge, edge, edge): maps tiled, each mirrored into its neighbours so that there are no seams.

    Classes beyond the third come from further mosaics with another order of maps, two logits lower. As the maps are
    crops around an organ, there is no far background: values everywhere, the hardest case for a compressor.
    """
    first = _tiled(maps, edge)
    further = (_tiled(maps[k:] + maps[:k], edge)[1 + k % 2] - np.float32(2) for k in range(1, max(1, num_classes - 2)))
    return np.stack([*first, *further])[:num_classes]


def lattice(maps, num_classes: int, edge: int):
    """(C, edge, edge, edge): a lattice of cells with the two structures of one map each, for many classes.

    Outside its cell a class has the logit of the nearest voxel of the cell, minus DECAY per voxel of distance. Within
    a cell the background is that map's own; cells beyond the last class are background at 8.
    """
    cells = -(-(num_classes - 1) // 2)
    per_axis = int(np.ceil(cells ** (1 / 3)))
    cuts = np.linspace(0, edge, per_axis + 1).astype(int)
    out = np.full((num_classes, edge, edge, edge), 8, np.float32)
    for cell, corner in zip(range(cells), itertools.product(range(per_axis), repeat=3), strict=False):
        logits = maps[cell % len(maps)]
        axes, distance = [], np.zeros((edge,) * 3, np.float32)
        for axis, i in enumerate(corner):
            position, low, high = np.arange(edge), cuts[i], cuts[i + 1]
            inside = np.clip(position, low, high - 1)
            shape = [-1 if a == axis else 1 for a in range(3)]
            distance += np.abs(position - inside).reshape(shape)
            size = logits.shape[axis + 1]
            axes.append(np.clip(inside - low + (size - (high - low)) // 2, 0, size - 1))  # centre on centre
        box = tuple(slice(cuts[i], cuts[i + 1]) for i in corner)
        out[(0, *box)] = logits[0][np.ix_(*axes)][box]
        for head in (1, 2):
            if (channel := 2 * cell + head) < num_classes:
                out[channel] = logits[head][np.ix_(*axes)] - np.float32(DECAY) * distance
    return out


@dataclass(frozen=True)
class RecordedCases:
    """Cases whose "image" is the teacher's answer to it."""

    logits: dict

    @property
    def case_ids(self):
        return tuple(self.logits)

    def shape_zyx(self, case_id):
        return self.logits[case_id].shape[1:]

    def image_CZYX(self, case_id):
        return self.logits[case_id]

    def digest(self, case_id):
        return hashlib.sha256(np.ascontiguousarray(self.logits[case_id])).hexdigest()


@dataclass(frozen=True)
class RecordedTeacher:
    """Answers with the "image" it is given."""

    def blocks(self, image_CZYX, folds, chunk_zyx, per_fold=None):
        assert per_fold is None, "recorded are mean logits"
        return in_chunks(image_CZYX, chunk_zyx)

    def seconds_per_patch(self):
        return 0.0

    def deviation(self, images_CZYX, temperature):
        return {}


@dataclass(frozen=True)
class RecordedFactory:
    num_heads: int
    has_regions: bool = False
    patch_size: tuple = (16, 16, 16)
    folds: tuple = (0,)

    def identity(self):
        return {"plans": "recorded", "checkpoints": {"0": "recorded"}}

    def unseen_folds(self, case_id):
        return self.folds

    def memory_bytes(self, shape_zyx, chunk_zyx):
        return 0

    def load(self, threads):
        return RecordedTeacher()


def cache_of(logits: dict, root: Path, spec: CacheSpec):
    """A real cache of these logits (case id -> (C, Z, Y, X)), built as any other."""
    heads = next(iter(logits.values())).shape[0]
    job = prepare_job(RecordedCases(logits), RecordedFactory(heads), spec, root, command="python -m pipelines.measure")
    return build_cache(job)


def _tiled(maps, edge: int):
    sizes = np.min([m.shape[1:] for m in maps], axis=0)
    out = np.empty((maps[0].shape[0], edge, edge, edge), np.float32)
    for start in itertools.product(*(range(0, edge, n) for n in sizes)):
        number = [a // n for a, n in zip(start, sizes, strict=True)]
        block = (number[0] // 2 * 7 + number[1] // 2) * 7 + number[2] // 2  # mirrored tiles of one map are 2 x 2 x 2
        tile = maps[block % len(maps)][:, : sizes[0], : sizes[1], : sizes[2]]
        tile = np.flip(tile, [axis + 1 for axis in range(3) if number[axis] % 2])
        target = out[(slice(None), *(slice(a, a + n) for a, n in zip(start, sizes, strict=True)))]
        target[...] = tile[(slice(None), *map(slice, target.shape[1:]))]
    return out


def _generated(rng):
    z, y, x = np.indices((32, 32, 32), dtype=np.float32)
    noise = rng.normal(size=(3, 32, 32, 32)).astype(np.float32)
    for axis in (1, 2, 3):  # smooth, as the logits of a network are
        noise = (noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)) / 3
    heads = [np.full((32, 32, 32), 4, np.float32)]
    for _ in range(2):
        centre = rng.uniform(10, 22, 3)
        heads.append(9 - np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2).astype(np.float32))
    return np.stack(heads) + noise
