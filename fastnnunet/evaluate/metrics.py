"""Agreement of a predicted segmentation with the truth, per label or region.

- Dice = 2 TP / (2 TP + FP + FN) over voxels (L. R. Dice, Ecology 26, 1945), as nnU-Net's own evaluation counts it.
- Surface Dice at tolerance t: share of the two surfaces' area that lies within t mm of the other surface
  (S. Nikolov et al., arXiv:1809.04430, 2018; surfaces and areas as `bench.surface` defines them).
- HD95: the larger of the two directed 95th percentiles, by area, of the distance between the surfaces, in mm.

A label that neither truth nor prediction contains says nothing about the model: all its values are NaN and means leave
it out, as nnU-Net does. A label that only one of them contains is an outright failure: both Dice are 0 and the distance
is NaN, because there is no second surface to measure to.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastnnunet.errors import MismatchError
from fastnnunet.evaluate.surface import SurfaceDistances, surface_distances

METRICS = ("dice", "surface_dice", "hd95_mm")


@dataclass(frozen=True, slots=True)
class LabelMetrics:
    """Metrics of one label or region in one case; `reference_voxels` and `prediction_voxels` are its sizes."""

    dice: float
    surface_dice: float
    hd95_mm: float
    reference_voxels: int
    prediction_voxels: int


def region_mask(segmentation_ZYX: NDArray[np.integer], values: Sequence[int]) -> NDArray[np.bool_]:
    """Voxels whose label is one of `values`."""
    if len(values) == 1:
        return segmentation_ZYX == values[0]
    return np.isin(segmentation_ZYX, list(values))


def dice_of_masks(reference: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> float:
    """2 TP / (2 TP + FP + FN) of two masks of one shape; NaN when both are empty."""
    voxels = int(reference.sum()) + int(prediction.sum())
    return 2.0 * int((reference & prediction).sum()) / voxels if voxels else float("nan")


def dice_of_labels(
    reference_ZYX: NDArray[np.integer],
    prediction_ZYX: NDArray[np.integer],
    names: Mapping[str, Sequence[int]],
    ignore_label: int | None = None,
) -> dict[str, float]:
    """Dice of every label or region (name -> its values) of two label maps of one shape; NaN where both lack it.

    Voxels that the reference marks with `ignore_label` count nowhere. One pass over the voxels for any number of
    labels. Raises MismatchError when the shapes differ.
    """
    if reference_ZYX.shape != prediction_ZYX.shape:
        raise MismatchError(
            f"segmentations differ in shape: reference {reference_ZYX.shape}, prediction {prediction_ZYX.shape}"
        )
    values_named = {int(v) for values in names.values() for v in values}
    known = sorted(values_named if ignore_label is None else values_named | {ignore_label})
    place_of = {value: place for place, value in enumerate(known, start=1)}  # 0: a value that no label has
    table = np.zeros(max(known, default=0) + 3, np.intp)  # of the values -1, 0, 1, ..., and one above all
    for value, place in place_of.items():
        table[value + 1] = place
    counts = np.zeros((len(known) + 1,) * 2, np.int64)
    for slices in zip(reference_ZYX, prediction_ZYX, strict=True):
        reference, prediction = (table[s.astype(np.intp).clip(-1, len(table) - 2) + 1] for s in slices)
        pairs = np.bincount((reference * len(counts) + prediction).ravel(), minlength=counts.size)
        counts += pairs.reshape(counts.shape)
    if ignore_label is not None:
        counts[place_of[ignore_label]] = 0
    found = {}
    for name, values in names.items():
        of = [place_of[int(v)] for v in dict.fromkeys(values)]
        voxels = int(counts[of].sum()) + int(counts[:, of].sum())
        found[name] = 2.0 * int(counts[np.ix_(of, of)].sum()) / voxels if voxels else float("nan")
    return found


def label_metrics(
    reference_ZYX: NDArray[np.integer],
    prediction_ZYX: NDArray[np.integer],
    values: Sequence[int],
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float = 1.0,
    ignore_label: int | None = None,
) -> LabelMetrics:
    """Compare one label (`values` of length 1) or region of two segmentations of one shape (z, y, x).

    Voxels that the reference marks with `ignore_label` count nowhere. Raises MismatchError when the shapes differ.
    """
    if reference_ZYX.shape != prediction_ZYX.shape:
        raise MismatchError(
            f"segmentations differ in shape: reference {reference_ZYX.shape}, prediction {prediction_ZYX.shape}"
        )
    ignore = reference_ZYX == ignore_label if ignore_label is not None else None
    reference, prediction = region_mask(reference_ZYX, values), region_mask(prediction_ZYX, values)
    if ignore is not None:
        reference, prediction = reference & ~ignore, prediction & ~ignore
    n_reference, n_prediction = int(reference.sum()), int(prediction.sum())
    if n_reference + n_prediction == 0:
        return LabelMetrics(np.nan, np.nan, np.nan, 0, 0)
    distances = surface_distances(reference, prediction, spacing_mm, ignore)
    if distances is None:
        return LabelMetrics(0.0, 0.0, np.nan, n_reference, n_prediction)
    return LabelMetrics(
        dice_of_masks(reference, prediction),
        surface_dice(distances, tolerance_mm),
        robust_hausdorff_mm(distances),
        n_reference,
        n_prediction,
    )


def surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Area of both surfaces within `tolerance_mm` of the other, over all their area; NaN when all of it is ignored."""
    near = total = 0.0
    for distance_mm, area_mm2 in (
        (distances.reference_mm, distances.reference_area_mm2),
        (distances.prediction_mm, distances.prediction_area_mm2),
    ):
        near += float(area_mm2[distance_mm <= tolerance_mm].sum())
        total += float(area_mm2.sum())
    return near / total if total > 0 else float("nan")


def robust_hausdorff_mm(distances: SurfaceDistances, quantile: float = 0.95) -> float:
    """The larger of the two directed `quantile`s of the distance, by area; NaN when all of a surface is ignored."""
    return float(
        np.maximum(
            _weighted_quantile(distances.reference_mm, distances.reference_area_mm2, quantile),
            _weighted_quantile(distances.prediction_mm, distances.prediction_area_mm2, quantile),
        )
    )


def _weighted_quantile(values: NDArray[np.float64], weights: NDArray[np.float64], quantile: float) -> float:
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    if cumulative.size == 0 or cumulative[-1] <= 0:
        return float("nan")
    index = int(np.searchsorted(cumulative, quantile * cumulative[-1]))
    return float(values[order][min(index, values.size - 1)])


def nanmean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN when there are none (without NumPy's warning)."""
    finite = [v for v in values if not np.isnan(v)]
    return float(np.mean(finite)) if finite else float("nan")
