"""What is seen of a case while it is labelled: voxels of every label, and how far the folds agree.

The counts come from the pass that labels, so they cost no forward pass. They are stored with the case, among the
attributes of its array, where readers that do not know them pass over them; no count is part of a cache's key.

What is compared are the label maps of single folds, of logits averaged over mirrors as everywhere. Where tiles overlap
a fold's label is not that of the weighted mean, which would take a window for each fold, but that of the one tile in
which the voxel has its greatest weight (`own_part`): each voxel of the image counts once, what pads it never.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.cache.interfaces import Block, Float32Array
from fastnnunet.cache.store.folder import ARRAY_NAME, CacheFolder
from fastnnunet.errors import CorruptError, SpecError
from fastnnunet.specs.checks.json_text import parse_json
from fastnnunet.specs.load import build_spec

Counts = npt.NDArray[np.int64]  # of each head


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Voxels of each head: of exclusive classes those where it is the largest (background is head 0), of regions those
    where its probability is above a half.

    `folds`, `of_folds` and `shared` are empty where the teacher does not tell its folds apart.
    """

    voxels: tuple[int, ...]  # of the whole ensemble
    folds: tuple[str, ...] = ()
    of_folds: tuple[tuple[int, ...], ...] = ()  # of each fold alone
    shared: tuple[tuple[int, ...], ...] = ()  # of both folds of a pair; pairs as itertools.combinations gives them

    def __post_init__(self) -> None:
        pairs = len(self.folds) * (len(self.folds) - 1) // 2
        rows = (self.voxels, *self.of_folds, *self.shared)
        if (len(self.of_folds), len(self.shared)) != (len(self.folds), pairs) or len({len(row) for row in rows}) > 1:
            raise SpecError(f"counts of {len(self.of_folds)} folds and {len(self.shared)} pairs do not fit together")


class FoldTally:
    """Counts where folds give the same label, part by part of an image."""

    def __init__(self, folds: Sequence[Any], num_heads: int, *, has_regions: bool) -> None:
        self.folds, self.num_heads, self.has_regions = tuple(map(str, folds)), num_heads, has_regions
        self._of_folds = np.zeros((len(folds), num_heads), np.int64)
        self._shared = np.zeros((len(folds) * (len(folds) - 1) // 2, num_heads), np.int64)

    def labels(self, logits_HZYX: Float32Array) -> npt.NDArray[Any]:
        """What `add` takes of a fold: the head of each voxel (z, y, x), or whether it is in each region (H, ...)."""
        return logits_HZYX > 0 if self.has_regions else largest_head(logits_HZYX)

    def add(self, labels: Sequence[npt.NDArray[Any]]) -> None:
        """Count one part of the image, `labels` of every fold in their order."""
        heads = self.num_heads
        if self.has_regions:
            self._of_folds += [np.count_nonzero(one, axis=(1, 2, 3)) for one in labels]
            for row, (one, other) in zip(self._shared, combinations(labels, 2), strict=True):
                row += np.count_nonzero(one & other, axis=(1, 2, 3))
            return
        same = np.ones(labels[0].shape, bool)
        for one in labels[1:]:
            same &= one == labels[0]
        agreed = np.bincount(labels[0][same], minlength=heads)
        disputed = [one[~same] for one in labels]  # few voxels, so that pairs cost little
        self._of_folds += [agreed + np.bincount(one, minlength=heads) for one in disputed]
        for row, (one, other) in zip(self._shared, combinations(disputed, 2), strict=True):
            row += agreed + np.bincount(one[one == other], minlength=heads)

    def seen(self, voxels: Counts) -> Seen:
        """With `voxels` of the ensemble."""
        return Seen(
            voxels=tuple(voxels.tolist()),
            folds=self.folds,
            of_folds=tuple(tuple(row) for row in self._of_folds.tolist()),
            shared=tuple(tuple(row) for row in self._shared.tolist()),
        )


@runtime_checkable
class TallyingTeacher(Protocol):
    """A `Teacher` of several folds that can tell them apart while it labels."""

    def tallied_blocks(
        self,
        image_CZYX: Float32Array,
        folds: Sequence[Any],
        chunk_zyx: Sequence[int],
        per_fold: Callable[[Float32Array], Float32Array] | None,
        tally: FoldTally | None,
    ) -> Iterator[Block]:
        """`Teacher.blocks`, the same values; `tally` is complete after the last block."""
        ...


def seen_by(voxels: Counts, tally: FoldTally | None) -> Seen:
    """Of a teacher whose folds were counted or, without `tally`, cannot be told apart."""
    return Seen(voxels=tuple(voxels.tolist())) if tally is None else tally.seen(voxels)


def largest_head(values_HZYX: Float32Array) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """The head with the largest value, the lowest of equal ones."""
    best = np.full(values_HZYX.shape[1:], -np.inf, np.float32)
    heads = np.zeros(best.shape, np.uint8 if len(values_HZYX) <= 256 else np.uint16)
    for head, values in enumerate(values_HZYX if best.size else ()):
        native.label_head(values, head, best, heads, to_half=False, threads=1)
    return heads


def count_heads(values_HZYX: Float32Array, *, has_regions: bool, probabilities: bool) -> Counts:
    """Voxels of each head in values of the ensemble: logits, or soft labels where `probabilities`."""
    if has_regions:
        return np.count_nonzero(values_HZYX > (0.5 if probabilities else 0), axis=(1, 2, 3))
    return np.bincount(largest_head(values_HZYX).ravel(), minlength=len(values_HZYX))


def seen_of(cache: CacheFolder, case_id: str) -> Seen | None:
    """What was seen of a stored case; None of cases labelled before this was counted, and of those not stored.

    Raises CorruptError when the case is damaged.
    """
    manifest = cache.manifest(case_id)
    if manifest is None:
        return None
    file = cache.case_dir(case_id) / ARRAY_NAME
    try:
        text = file.read_bytes()
    except OSError as e:
        raise CorruptError(f"{file} cannot be read ({e})") from e
    if hashlib.sha256(text).hexdigest() != manifest.array_sha256:
        raise CorruptError(f"{file} was changed (its digest does not match the manifest)")
    try:
        raw = parse_json(text, file)["attributes"]["fastnnunet"].get("seen")
        return None if raw is None else build_spec(Seen, raw, where=str(file))
    except (KeyError, TypeError, AttributeError, SpecError) as e:
        raise CorruptError(f"{file} is not that of a soft-label cache: {e}") from e
