"""The teacher beside a training: what all its folds say of the patches of a batch, without mirrors, without a window.

Shapes: N batch, C channels, H network heads, S soft-label channels of a cache (C - 1 classes, or all regions), X space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastnnunet.cache.codecs.base import sigmoid, softmax
from fastnnunet.engines.devices import Device
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import Fold, TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from fastnnunet.teachers.nnunet import LoadedTeacher


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineTeacher:
    """A loaded ensemble that answers at one temperature; make one with `online_teacher`."""

    loaded: LoadedTeacher
    recipe: CacheSpec
    temperature: float

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels of a patch, zyx or yx."""
        return self.loaded.recipe.patch_size

    def soft_labels(self, patches_NCX: np.ndarray, cases: Sequence[str]) -> np.ndarray:
        """Float32 (N, S, *patch) of float32 patches (N, C, *patch).

        Folds are chosen and averaged as the recipe of a cache says: with `out_of_fold` those that did not train on the
        case of a patch. Raises BackendError.
        """
        regions, pooled = self.loaded.recipe.has_regions, self.recipe.pooling == "probabilities"
        soft = partial(sigmoid if regions else softmax, temperature=self.temperature)
        total_NHX = np.zeros((len(cases), self.loaded.num_heads, *self.patch_size), np.float32)
        count_N = np.zeros((len(cases),) + (1,) * (total_NHX.ndim - 1), np.float32)
        folds = [self._folds(case) for case in cases]
        for fold, engine in self.loaded.engines.items():
            rows = [n for n, chosen in enumerate(folds) if fold in chosen]
            if rows:
                logits_NHX = engine.run(np.ascontiguousarray(patches_NCX[rows]))
                for n, logits_HX in zip(rows, logits_NHX, strict=True):
                    total_NHX[n] += soft(logits_HX) if pooled else logits_HX
                count_N[rows] += 1
        total_NHX /= count_N
        targets = total_NHX if pooled else np.stack([soft(logits_HX) for logits_HX in total_NHX])
        return targets if regions else targets[:, 1:]

    def _folds(self, case: str) -> tuple[Fold, ...]:
        teacher = self.loaded.recipe
        return teacher.folds if self.recipe.policy == "ensemble" else teacher.unseen_folds(case)


def online_teacher(
    spec: TeacherSpec, recipe: CacheSpec, files: ModelFolder, *, temperature: float, threads: int, device: Device
) -> OnlineTeacher:
    """Load the teacher of a cache for a training on `device`, in the engine and precision of the recipe.

    `files`: its model folder, open already. An engine without GPUs computes on the CPU.
    Raises what `open_teacher` raises, MismatchError for a network that cannot be loaded, BackendError.
    """
    _, factory, _ = open_teacher(spec, recipe, files)
    return OnlineTeacher(loaded=factory.load(threads, device), recipe=recipe, temperature=temperature)
