"""Soft maps as a teacher: every folder of maps is a fold, and its logits are the logarithms of the maps.

softmax(log(p) / T) is softmax(z / T) where p = softmax(z), so that a map is tempered exactly as the logits that it came
from. Shape suffixes: H = heads, Z, Y, X = space of the preprocessed arrays.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.interfaces import Block, Float32Array
from fastnnunet.cache.seen import FoldTally
from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.files.cases import PreprocessedCases, image_digest
from fastnnunet.nnunet.files.model import Model, model_of
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import sha256_of
from fastnnunet.teachers.maps.read import read_map

SMALLEST = float(np.finfo(np.float32).tiny)  # a probability of 0 has no logarithm


@dataclass(frozen=True)
class ChosenCases:
    """Some of the preprocessed cases."""

    cases: PreprocessedCases
    case_ids: tuple[str, ...]

    def shape_zyx(self, case_id: str) -> tuple[int, int, int]:
        """As PreprocessedCases."""
        return self.cases.shape_zyx(case_id)

    def image_CZYX(self, case_id: str) -> Float32Array:
        """As PreprocessedCases."""
        return self.cases.image_CZYX(case_id)

    def digest(self, case_id: str) -> str:
        """As PreprocessedCases."""
        return self.cases.digest(case_id)


@dataclass(frozen=True, kw_only=True)
class SoftMaps:
    """Maps that fit their cases; `folders` and `digests` hold case id -> file and digest for every rater."""

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    num_heads: int
    has_regions: bool
    patch_size: tuple[int, ...]
    cases: PreprocessedCases
    images: dict[str, str]  # digest of a preprocessed image -> its case
    most_voxels: int  # of a map on its own grid
    folders: tuple[dict[str, Path], ...]
    digests: tuple[dict[str, str], ...]

    @property
    def folds(self) -> tuple[int, ...]:
        """The raters."""
        return tuple(range(len(self.folders)))

    def identity(self) -> dict[str, Any]:
        """Digests of the maps where other teachers have those of checkpoints, and the grid they are brought to."""
        model = self.model()
        return {
            "dataset": model.manager.dataset_name,
            "plans": model.manager.plans_name,
            "configuration": self.configuration,
            "labels": self.dataset_json["labels"],
            "folds": list(map(str, self.folds)),
            "maps": {str(fold): sha256_of(digests) for fold, digests in enumerate(self.digests)},
            "resampling": {
                name: model.config.configuration.get(name)
                for name in ("resampling_fn_probabilities", "resampling_fn_probabilities_kwargs")
            },
        }

    def model(self) -> Model:
        """What the plans say."""
        return model_of(self.plans, self.configuration, self.dataset_json)

    def unseen_folds(self, _case_id: str) -> tuple[int, ...]:
        """What raters have seen is not known: none counts as unseen."""
        return ()

    def alternatives(self, _spec: CacheSpec) -> "Iterator[SoftMaps]":
        """A map is read the same way everywhere."""
        yield self

    def memory_bytes(self, shape_zyx: Sequence[int], _chunk_zyx: Sequence[int]) -> int:
        """Maps of all raters on the grid of the case and their mean, one more on its own grid, before and after."""
        return 4 * self.num_heads * ((len(self.folders) + 3) * math.prod(shape_zyx) + 3 * self.most_voxels)

    def load(self, _threads: int) -> "LoadedMaps":
        """Nothing is read yet."""
        return LoadedMaps(self, self.model())


@dataclass
class LoadedMaps:
    """The raters, ready to be asked for the image of a case."""

    recipe: SoftMaps
    model: Model

    def blocks(
        self,
        image_CZYX: Float32Array,
        folds: Sequence[Any],
        chunk_zyx: Sequence[int],
        per_fold: Callable[[Float32Array], Float32Array] | None = None,
    ) -> Iterator[Block]:
        """Logits of the mean of the raters' probabilities; with `per_fold` the mean of what it makes of each's logits.

        Raises MismatchError for an image that is none of the cases', or when a map changed since it was checked.
        """
        return self.tallied_blocks(image_CZYX, folds, chunk_zyx, per_fold, None)

    def tallied_blocks(
        self,
        image_CZYX: Float32Array,
        folds: Sequence[Any],
        chunk_zyx: Sequence[int],
        per_fold: Callable[[Float32Array], Float32Array] | None,
        tally: FoldTally | None,
    ) -> Iterator[Block]:
        """`blocks`; `tally`, when given, counts the labels that each rater gives alone."""
        case = self.recipe.images.get(image_digest(image_CZYX))
        if case is None:
            raise MismatchError("there is no soft map of this image\nrun the same command again")
        maps = [self._on_grid(case, fold, image_CZYX.shape[1:]) for fold in folds]
        zs, ys, xs = (range(math.ceil(n / c)) for n, c in zip(image_CZYX.shape[1:], chunk_zyx, strict=True))
        for number in itertools.product(zs, ys, xs):
            inside = tuple(slice(n * c, (n + 1) * c) for n, c in zip(number, chunk_zyx, strict=True))
            parts = [one[:, *inside] for one in maps]
            if tally is not None:
                tally.add([tally.labels(self._logits(part)) for part in parts])
            if per_fold is None:
                yield number, self._logits(_mean(parts))
            else:
                yield number, _mean([per_fold(self._logits(part)) for part in parts])

    def seconds_per_patch(self) -> float:
        """No network is run."""
        return 0.0

    def deviation(self, _images_CZYX: Sequence[Float32Array], _temperature: float) -> dict[str, Any]:
        """Empty: the maps are what they are, there is nothing to compare them with."""
        return {}

    def _logits(self, probabilities_HZYX: Float32Array) -> Float32Array:
        logits: Float32Array = np.log(np.maximum(probabilities_HZYX, SMALLEST))
        if self.recipe.has_regions:
            logits -= np.log(np.maximum(1 - probabilities_HZYX, SMALLEST))
        return logits

    def _on_grid(self, case: str, fold: int, shape_zyx: Sequence[int]) -> Float32Array:
        soft = read_map(self.recipe.folders[fold][case])
        if soft.digest() != self.recipe.digests[fold][case]:
            raise MismatchError(
                f"{self.recipe.folders[fold][case]} changed since it was checked\nrun the same command again"
            )
        return on_grid(soft.values_CZYX, self.recipe.cases.load(case)[3], self.model, shape_zyx)


def on_grid(
    values_CZYX: Float32Array, properties: Mapping[str, Any], model: Model, shape_zyx: Sequence[int]
) -> Float32Array:
    """Probabilities of a map on the grid of the preprocessed image: float32 (H, Z, Y, X).

    As nnU-Net prepares an image: axes are exchanged, then what lies outside the body is cropped. The plans' resampling
    of probabilities follows, clipped to [0, 1], and classes are divided by their sum.
    """
    forward = model.manager.transpose_forward
    values = values_CZYX.transpose([0, *(axis + 1 for axis in forward)])
    values = values[:, *(slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"])]
    if values.shape[1:] != tuple(shape_zyx):
        spacing = [float(properties["spacing"][axis]) for axis in forward]
        target = [float(s) for s in model.config.spacing]
        values = model.config.resampling_fn_probabilities(
            np.ascontiguousarray(values), tuple(shape_zyx), spacing, [*spacing[: 3 - len(target)], *target]
        )
    values = np.clip(np.asarray(values, np.float32), 0, 1)
    if not model.has_regions:
        values /= values.sum(axis=0)
    return values


def _mean(parts: Sequence[Float32Array]) -> Float32Array:
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0])
    mean: Float32Array = np.mean(parts, axis=0, dtype=np.float32)
    return mean
