"""What arms are to each other: ratios of time, agreement of labels, Dice; and the ensemble that was not run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.bench.measure import speed_ratio, spread
from fastnnunet.evaluate.cases import evaluate_cases, mean_metrics
from fastnnunet.evaluate.segmentations import LabelSet, read_segmentation

Results = dict[str, dict[str, Any]]  # arm -> its part of the record
OutputOf = Callable[[str, str], Path]  # (arm, case) -> its prediction


def extrapolated(
    described: Mapping[str, Any], single: Mapping[str, Any], single_name: str, infer_s: Mapping[str, float]
) -> dict[str, Any]:
    """The result of an ensemble that was not run, from that of one of its folds without mirroring.

    The network's part grows with its forward passes, which nnU-Net's predictor makes for every fold and mirror and
    which were counted for the one fold; reading, preprocessing, postprocessing and writing are done once.
    `infer_s`: seconds of the network's part for each case of the one fold.
    """
    times = len(described["folds"]) * described["mirrors"]
    stages = {
        name: {key: seconds * (times if name == "infer" else 1) for key, seconds in of_stage.items()}
        for name, of_stage in single["stages"].items()
    }
    per_case = {case: elapsed_s + (times - 1) * infer_s[case] for case, elapsed_s in single["per_case_s"].items()}
    total = spread(list(per_case.values()))
    return {
        **described,
        "extrapolated": {
            "from": single_name,
            "how": f"{single_name} with its inference {times} times: {len(described['folds'])} folds x "
            f"{described['mirrors']} mirrors, forward passes as counted; everything else once",
            "forward_passes": {case: times * passes for case, passes in single["forward_passes"].items()},
        },
        "cases": single["cases"],
        "samples": 0,
        "median_s": total["p50_s"],
        "p90_s": total["p90_s"],
        "mean_s": float(np.mean(list(per_case.values()))),
        "stages": stages,
        "per_case_s": per_case,
        "peak_memory_bytes": None,
        "peak_gpu_memory_bytes": None,
        "no_gpu_memory_because": "this arm was not run",
    }


def add_ratios(results: Results, baselines: Mapping[str, str]) -> None:
    """`times_faster_than_NAME` for each baseline NAME -> arm, warm over common cases, and cold where both were."""
    for result in results.values():
        for name, baseline in baselines.items():
            slow = results[baseline]
            result[f"times_faster_than_{name}"] = speed_ratio(slow["per_case_s"], result["per_case_s"])
            if "cold" in result and "cold" in slow:
                ratio = slow["cold"]["median_s"] / result["cold"]["median_s"]
                result["cold"][f"times_faster_than_{name}"] = ratio


def add_agreement(results: Results, ensemble: str, same_network: Mapping[str, str], output_of: OutputOf) -> None:
    """Voxels labelled as the ensemble labels them, and as nnunetv2 does that runs the same network; over the cases
    both predicted. None where there is nothing to compare with.
    """
    for name, result in results.items():
        found = agreement(results, name, ensemble, output_of)
        result["agreement_with_ensemble"] = None if found is None else found["share"]
        if name in same_network:
            result["same_network"] = agreement(results, name, same_network[name], output_of)


def agreement(results: Results, name: str, other: str, output_of: OutputOf) -> dict[str, Any] | None:
    """Voxels with the same label in the predictions of two arms; None when one of them has none."""
    if any("extrapolated" in results[arm] for arm in (name, other)):
        return None
    cases = [case for case in results[other]["per_case_s"] if case in results[name]["per_case_s"]]
    voxels = different = 0
    for case in cases:
        mine, theirs = (read_segmentation(output_of(arm, case)).labels_zyx for arm in (name, other))
        voxels += mine.size
        different += int(np.count_nonzero(mine != theirs))
    share = 1 - different / voxels
    return {"arm": other, "cases": len(cases), "voxels": voxels, "different_voxels": different, "share": share}


def add_dice(
    results: Results,
    common: Sequence[str],
    labels: LabelSet,
    label_folder: Path,
    tolerance_mm: float,
    folder_of: Callable[[str], Path],
) -> None:
    """Means per label over the arm's own cases, and the Dice over the `common` ones, which every arm has."""
    for name, result in results.items():
        if "extrapolated" in result:
            continue
        cases = list(result["per_case_s"])
        found = list(evaluate_cases(folder_of(name), label_folder, cases, labels, tolerance_mm))
        result["metrics"] = mean_metrics(found, labels.names)
        on_common = mean_metrics([r for r in found if r.case in common], labels.names)
        result["dice_on_common_cases"] = on_common["foreground_mean"]["dice"]
