"""Compare a folder of predicted segmentations with a folder of true ones, case by case."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.errors import SpecError
from fastnnunet.evaluate.metrics import METRICS, LabelMetrics, label_metrics, nanmean
from fastnnunet.evaluate.segmentations import LabelSet, Pairing, read_segmentation, require_same_geometry
from fastnnunet.specs.provenance import now_utc, versions
from fastnnunet.system.children import Children

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CaseScores:
    """All labels of one case."""

    case: str
    metrics: dict[str, LabelMetrics]


def evaluate_case(reference_file: Path, prediction_file: Path, labels: LabelSet, tolerance_mm: float) -> CaseScores:
    """Every label of one case. Raises ImageError or MismatchError."""
    case = reference_file.name.removesuffix(labels.file_ending)
    reference, prediction = read_segmentation(reference_file), read_segmentation(prediction_file)
    require_same_geometry(case, reference, prediction)
    known = {0, labels.ignore, *(v for values in labels.names.values() for v in values)}
    for what, segmentation in (("label", reference), ("prediction", prediction)):
        unknown = {int(v) for v in np.unique(segmentation.labels_zyx)} - known
        if unknown:
            logger.warning("case %s: %s holds values that no label has: %s", case, what, sorted(unknown))
    pair = reference.labels_zyx, prediction.labels_zyx
    return CaseScores(
        case,
        {
            name: label_metrics(*pair, values, reference.spacing_mm, tolerance_mm, labels.ignore)
            for name, values in labels.names.items()
        },
    )


def evaluate_cases(
    prediction_folder: Path,
    label_folder: Path,
    cases: Sequence[str],
    labels: LabelSet,
    tolerance_mm: float = 1.0,
    processes: int = 1,
) -> Iterator[CaseScores]:
    """Yield the result of each case in order, computed by `processes` workers."""
    if tolerance_mm < 0:
        raise SpecError(f"tolerance: got {tolerance_mm} mm, expected 0 or more")
    jobs = [
        (label_folder / f"{case}{labels.file_ending}", prediction_folder / f"{case}{labels.file_ending}")
        for case in cases
    ]
    if processes <= 1:
        for reference, prediction in jobs:
            yield evaluate_case(reference, prediction, labels, tolerance_mm)
        return
    children = Children()
    with ProcessPoolExecutor(processes, mp_context=children) as pool:
        try:
            futures = [pool.submit(evaluate_case, *job, labels, tolerance_mm) for job in jobs]
            for future in futures:
                yield future.result()
        except KeyboardInterrupt:  # nobody waits for the cases they are at
            children.end()
            raise


def mean_metrics(results: Sequence[CaseScores], names: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Mean per label over the cases where it is defined, and `foreground_mean`: the mean of those means.

    `cases` counts the cases whose Dice is defined.
    """
    means: dict[str, dict[str, float]] = {}
    for name in names:
        of_label = [r.metrics[name] for r in results]
        means[name] = {m: nanmean(getattr(v, m) for v in of_label) for m in METRICS}
        means[name]["cases"] = sum(not np.isnan(v.dice) for v in of_label)
    means["foreground_mean"] = {m: nanmean(means[name][m] for name in names) for m in METRICS}
    return means


def report(
    results: Sequence[CaseScores], labels: LabelSet, pairing: Pairing, tolerance_mm: float, folders: tuple[Path, Path]
) -> dict[str, Any]:
    """The JSON record of one evaluation; `folders` are those of predictions and labels."""
    return {
        "created": now_utc(),
        "versions": versions(),
        "prediction_folder": str(folders[0]),
        "label_folder": str(folders[1]),
        "tolerance_mm": tolerance_mm,
        "labels": labels.names,
        "ignore_label": labels.ignore,
        "without_prediction": pairing.without_prediction,
        "without_label": pairing.without_label,
        "mean": mean_metrics(results, labels.names),
        "cases": [{"case": r.case, "metrics": {n: asdict(m) for n, m in r.metrics.items()}} for r in results],
    }
