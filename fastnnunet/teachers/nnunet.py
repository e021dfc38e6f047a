"""The teacher ensemble: trained folds run over preprocessed cases as nnU-Net's sliding window runs them."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.seen import FoldTally
from fastnnunet.engines.base import APART_BYTES, Engine, LiveNetwork, Precision, Settings, side_by_side
from fastnnunet.engines.devices import Device
from fastnnunet.engines.labelling import labelling_precisions, resolve_device, resolve_engine, resolve_precision
from fastnnunet.engines.mirrors import mirrored
from fastnnunet.engines.registry import ENGINES, engine_of_network
from fastnnunet.geometry.chunked_mean import Block, ChunkedMean
from fastnnunet.geometry.chunked_window import ChunkedWindow, chunked_window, own_part
from fastnnunet.geometry.padding import centre_padding, pad_spatial
from fastnnunet.geometry.plain import is_plain
from fastnnunet.nnunet.files.checkpoint import load_weights
from fastnnunet.nnunet.files.model import (
    ModelFolder,
    build_network,
    check_fits,
    check_stand_in,
    network_class_name,
)
from fastnnunet.nnunet.onnx import to_onnx
from fastnnunet.nnunet.reference import fold_reference
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import Fold
from fastnnunet.teachers.deviation import measure_deviation, middle

MEANS_BYTES = 2 << 30  # means over tiles are float32 while they fit in this, beyond it float16, as nnU-Net's always are
PARALLEL_BYTES = 32 << 20  # tiles whose logits are larger than this go through the networks one mirror at a time
PATCHES_AT_ONCE = 64  # of tiles and mirrors together; more keep no more cores busy


@dataclass(frozen=True)
class NnUNetTeacher:
    """A recipe for loading the ensemble. Cheap and picklable; dask workers call `load` once each."""

    files: ModelFolder
    folds: tuple[Fold, ...]
    mirroring: bool
    step_size: float
    precision: Precision
    engine: str  # as in ENGINES
    unseen: dict[str, tuple[Fold, ...]]  # case -> folds whose training set did not contain it

    @property
    def folder(self) -> Path:
        """The model folder."""
        return self.files.folder

    @property
    def num_heads(self) -> int:
        """Number of output channels of the networks."""
        return self.files.model.num_heads

    @property
    def has_regions(self) -> bool:
        """Whether the model is region-based (sigmoid heads)."""
        return self.files.model.has_regions

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Patch size in voxels, zyx (two entries for 2d)."""
        return self.files.model.patch_size

    @property
    def num_channels(self) -> int:
        """Number of input channels of the networks."""
        return self.files.model.num_channels

    def unseen_folds(self, case_id: str) -> tuple[Fold, ...]:
        """Folds of this ensemble that did not train on the case (all of them for a case in no split)."""
        return self.unseen.get(case_id, self.folds)

    def alternatives(self, spec: CacheSpec) -> "Iterator[NnUNetTeacher]":
        """This teacher in every engine and precision that the recipe leaves open."""
        for engine in ENGINES if spec.engine == "auto" else (self.engine,):
            for precision in labelling_precisions(engine):
                if spec.precision in ("auto", precision):
                    yield replace(self, engine=engine, precision=precision)

    def identity(self) -> dict[str, Any]:
        """What of the teacher changes a logit: architecture, patch, labels, weights, mirrors, step, precision."""
        model = self.files.model
        return {
            "dataset": model.manager.dataset_name,
            "plans": model.manager.plans_name,
            "configuration": model.configuration,
            "patch_size": list(self.patch_size),
            "architecture": {
                "class": model.config.network_arch_class_name,
                "kwargs": model.config.network_arch_init_kwargs,
            },
            "labels": model.dataset_json["labels"],
            "folds": [str(f) for f in self.folds],
            "checkpoints": {str(f): self.files.digest(f) for f in self.folds},
            "mirror_axes": list(self.mirror_axes()),
            "step_size": self.step_size,
            "precision": self.precision,
            "engine": self.engine,
        }

    def memory_bytes(self, shape_zyx: Sequence[int], chunk_zyx: Sequence[int]) -> int:
        """Peak memory of labelling an image of this shape, beyond weights and activations."""
        window = chunked_window(shape_zyx, self.patch_size, self.step_size, chunk_zyx)
        tile_bytes, mirrors = self.tile_bytes, self.mirrors_at_once
        means = window.peak_voxels() * (self.num_heads * _mean_dtype(window, self.num_heads).itemsize + 4)
        image = 4 * self.num_channels * math.prod(map(max, shape_zyx, window.tile))
        votes = (len(self.folds) + 5) * math.prod(self.patch_size)  # a label for each fold, one largest logit
        input_bytes = 4 * self.num_channels * math.prod(self.patch_size)
        together = min(self.tiles_at_once, len(window.tiles) * len(self.folds))
        return means + 2 * image + together * ((mirrors + 3) * tile_bytes + (mirrors + 1) * input_bytes + votes)

    @property
    def tile_bytes(self) -> int:
        """Size of the logits of one tile."""
        return 4 * self.num_heads * math.prod(self.patch_size)

    @property
    def mirrors_at_once(self) -> int:
        """Mirrored copies of a tile that a network gets together."""
        return 2 ** len(self.mirror_axes()) if self.tile_bytes <= PARALLEL_BYTES else 1

    @property
    def tiles_at_once(self) -> int:
        """Tiles, each of one fold, that may be under way together."""
        most = min(APART_BYTES // self.tile_bytes, PATCHES_AT_ONCE)
        return max(1, most // self.mirrors_at_once)

    def mirror_axes(self) -> tuple[int, ...]:
        """Spatial axes along which the networks may be mirrored; empty where the recipe switches mirroring off."""
        return self.files.facts(self.folds[0]).mirror_axes if self.mirroring else ()

    @property
    def voxels_per_tile(self) -> int:
        """Voxels that go through networks for one tile: a patch for every fold and mirror."""
        return math.prod(self.patch_size) * len(self.folds) * 2 ** len(self.mirror_axes())

    def load(self, threads: int, device: Device | None = None) -> "LoadedTeacher":
        """Take all folds into engines. `device`: which GPU, where the engine computes on one; None: the first.

        Raises BackendError, CorruptError, MismatchError.
        """
        place = resolve_device(self.engine)
        if device is not None and device.kind == place.kind:
            place = device
        settings = Settings(threads=threads, precision=self.precision, device=place, apart=True)
        model = self.files.model
        engines: dict[Fold, Engine] = {}
        for fold in self.folds:
            weights, path = self.files.take_weights(fold), self.files.path(fold)
            trainer = self.files.facts(self.folds[0]).trainer
            check_fits(model, trainer, weights, path)
            network = build_network(model, trainer=trainer)
            load_weights(network, weights, path)
            live = LiveNetwork(
                module=network,
                channels=model.num_channels,
                num_heads=model.num_heads,
                patch_size=model.patch_size,
                to_onnx=partial(_onnx_bytes, network, model.num_channels, model.patch_size),
            )
            engines[fold] = engine_of_network(self.engine, live, settings)
        return LoadedTeacher(self, engines, model.num_heads, self.mirror_axes(), threads)


@dataclass
class LoadedTeacher:
    """The ensemble in memory."""

    recipe: NnUNetTeacher
    engines: Mapping[Fold, Engine]
    num_heads: int
    mirror_axes: tuple[int, ...]
    threads: int

    def blocks(
        self,
        image_CZYX: np.ndarray,
        folds: Sequence[Fold],
        chunk_zyx: Sequence[int],
        per_fold: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Iterator[Block]:
        """Mean logits over mirrors, tiles and folds, chunk by chunk: (chunk number, float32 (heads, z, y, x)).

        `per_fold`, when given, turns the logits (heads, z, y, x) of each fold's tile into what is averaged instead.
        """
        return self.tallied_blocks(image_CZYX, folds, chunk_zyx, per_fold, None)

    def tallied_blocks(
        self,
        image_CZYX: np.ndarray,
        folds: Sequence[Fold],
        chunk_zyx: Sequence[int],
        per_fold: Callable[[np.ndarray], np.ndarray] | None,
        tally: FoldTally | None,
    ) -> Iterator[Block]:
        """`blocks`; `tally`, when given, counts the labels that each fold gives alone."""
        recipe = self.recipe
        window = chunked_window(image_CZYX.shape[1:], recipe.patch_size, recipe.step_size, chunk_zyx)
        padded = pad_spatial(image_CZYX, centre_padding(image_CZYX.shape[1:], window.tile))
        below = [-axis[0] for axis in window.starts]
        means = ChunkedMean(window, _mean_dtype(window, self.num_heads))
        together = self.recipe.tiles_at_once
        for first in range(0, len(window.tiles), together):
            tiles, votes = [], []
            for number, start in enumerate(window.tiles[first : first + together], first):
                inside = tuple(slice(s + b, s + b + t) for s, b, t in zip(start, below, window.tile, strict=True))
                tiles.append(padded[(slice(None), *inside)])
                votes.append(None if tally is None else Votes(tally, own_part(window, number)[1]))
            for number, mean_HZYX in enumerate(self._tiles(np.stack(tiles), folds, per_fold, votes), first):
                yield from means.add(number, mean_HZYX)

    def _tiles(
        self,
        tiles_NCZYX: np.ndarray,
        folds: Sequence[Fold],
        per_fold: Callable[[np.ndarray], np.ndarray] | None,
        votes: Sequence["Votes | None"],
    ) -> list[np.ndarray]:
        """Means over mirrors and folds (heads, z, y, x) of tiles that go through the networks together."""
        if not folds:
            raise ValueError("no folds")
        shape_HZYX = (self.num_heads, *tiles_NCZYX.shape[2:])
        totals: list[np.ndarray] = []
        for means_NHX in self._of_folds(tiles_NCZYX.reshape(*tiles_NCZYX.shape[:2], *self.recipe.patch_size), folds):
            for number, mean in enumerate(means_NHX):
                if (counted := votes[number]) is not None:
                    counted.add(mean.reshape(shape_HZYX))
                values = mean if per_fold is None else per_fold(mean)
                if len(totals) == number:
                    totals.append(values)
                else:
                    totals[number] += values
        for counted in votes:
            if counted is not None:
                counted.count()
        for total in totals:
            total /= len(folds)
        return [total.reshape(shape_HZYX) for total in totals]

    def _of_folds(self, tiles_NCX: np.ndarray, folds: Sequence[Fold]) -> Iterator[np.ndarray]:
        """Means over mirrors (N, heads, *patch) of each fold, one after the other; the caller's.

        Folds are computed at once where the tiles are too few to keep all threads busy.
        """
        recipe = self.recipe

        def mean_of(fold: Fold) -> np.ndarray:
            run = self.engines[fold].run
            mean_NHX = mirrored(run, tiles_NCX, self.mirror_axes, at_once=recipe.mirrors_at_once)
            return mean_NHX if self.mirror_axes else mean_NHX.copy()  # out of the engine's own memory

        at_once = side_by_side(self.threads, recipe.tile_bytes) // (len(tiles_NCX) * recipe.mirrors_at_once)
        if at_once < 2 or not ENGINES[recipe.engine].side_by_side:
            yield from map(mean_of, folds)
            return
        with ThreadPoolExecutor(at_once) as pool:
            yield from pool.map(mean_of, folds)

    def seconds_per_patch(self) -> float:
        """Seconds for one patch through all folds and mirrors (one timed fold after a warm-up, times the folds).

        As many patches as it takes to keep all threads busy are timed together.
        """
        recipe = self.recipe
        busy = side_by_side(self.threads, recipe.tile_bytes) if ENGINES[recipe.engine].side_by_side else 1
        count = min(recipe.tiles_at_once, math.ceil(busy / recipe.mirrors_at_once))
        images_NCZYX = np.zeros((count, recipe.num_channels, *(1, *recipe.patch_size)[-3:]), np.float32)
        first = recipe.folds[:1]
        self._tiles(images_NCZYX, first, None, [None] * count)
        start = time.perf_counter()
        self._tiles(images_NCZYX, first, None, [None] * count)
        return (time.perf_counter() - start) / count * len(recipe.folds)

    def deviation(self, images_CZYX: Sequence[np.ndarray], temperature: float) -> dict[str, Any]:
        """How far this ensemble is from nnU-Net's own predictor, which loads the same folds from disk.

        Only the patch in the middle of every image is looked at, where it shows something, each by one fold, the folds
        taking turns: a mean over folds is no further off than they are, and nnU-Net needs minutes for all of them.
        """
        recipe = self.recipe
        reference = fold_reference(recipe.files, mirroring=recipe.mirroring, step_size=recipe.step_size)
        size_zyx = (1, *recipe.patch_size)[-3:]
        patches = [middle(image_CZYX, size_zyx) for image_CZYX in images_CZYX]
        patches = [patch for patch in patches if not is_plain(patch)] or patches
        measured = measure_deviation(
            self._patch_logits,
            reference.logits,
            list(zip(patches, itertools.cycle(recipe.folds), strict=False)),
            temperature=temperature,
            has_regions=recipe.has_regions,
        )
        return {"against": reference.name, **measured}

    def _patch_logits(self, patch_CZYX: np.ndarray, fold: Fold) -> np.ndarray:
        return next(logits for _, logits in self.blocks(patch_CZYX, (fold,), patch_CZYX.shape[1:]))


class Votes:
    """What single folds say of one tile, until all have spoken."""

    def __init__(self, tally: FoldTally, own: tuple[slice, ...]) -> None:
        """`own`: the part of the tile that is counted."""
        self._tally, self._own = tally, own
        self._labels: list[np.ndarray] = []

    def add(self, logits_HZYX: np.ndarray) -> None:
        """The logits of the next fold, the whole tile; nothing of them is kept."""
        self._labels.append(self._tally.labels(logits_HZYX[(slice(None), *self._own)]))

    def count(self) -> None:
        """All folds have spoken."""
        self._tally.add(self._labels)


def _onnx_bytes(network: Any, channels: int, patch_size: tuple[int, ...]) -> bytes:
    return to_onnx(network, channels, patch_size).SerializeToString()


def _mean_dtype(window: ChunkedWindow, heads: int) -> np.dtype[Any]:
    return np.dtype(np.float32 if 4 * heads * window.peak_voxels() <= MEANS_BYTES else np.float16)


def make_teacher(
    files: ModelFolder, folds: tuple[Fold, ...], recipe: CacheSpec, unseen: dict[str, tuple[Fold, ...]]
) -> NnUNetTeacher:
    """A teacher of these folds as the recipe wants it computed on this machine. `unseen` as of `NnUNetTeacher`.

    Where the trainer of the first fold is not installed the plans say what the network is: `unknown_trainer` tells.
    """
    network = network_class_name(files.model, files.facts(folds[0]).trainer)
    engine = resolve_engine(recipe.engine, network)
    return NnUNetTeacher(
        files=files,
        folds=folds,
        mirroring=recipe.mirroring,
        step_size=recipe.step_size,
        precision=resolve_precision(recipe.precision, engine),
        engine=engine,
        unseen=unseen,
    )


def unknown_trainer(files: ModelFolder, fold: Fold) -> str | None:
    """What to tell of a model whose trainer is not installed; None where it is.

    Raises MismatchError where its weights do not fit what nnU-Net's own trainer builds.
    """
    facts = files.facts(fold)
    if facts.trainer == facts.trained_by:
        return None
    return check_stand_in(files.model, facts.trained_by, files.take_weights(fold), files.path(fold))
