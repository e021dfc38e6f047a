"""A benchmark in a few sentences."""

from collections.abc import Mapping
from typing import Any

from fastnnunet.bench.job import ENSEMBLE, SINGLE
from fastnnunet.bench.report.numbers import dice, seconds, times

Record = Mapping[str, Any]


def students(record: Record) -> dict[str, Mapping[str, Any]]:
    """The bundles that were measured, but not the ensemble through this runtime."""
    return {
        name: arm
        for name, arm in record["arms"].items()
        if arm["kind"] == "bundle" and (arm.get("same_network") or {}).get("arm") != ENSEMBLE
    }


def fastest(record: Record) -> str:
    """The student with the smallest median."""
    found = students(record)
    return min(found, key=lambda name: found[name]["median_s"])


def headline(record: Record) -> str:
    """What the fastest student reaches, against both baselines."""
    name = fastest(record)
    arm, ensemble, single = record["arms"][name], record["arms"][ENSEMBLE], record["arms"][SINGLE]
    told = " (extrapolated)" if "extrapolated" in ensemble else ""
    than_ensemble, than_single = (times(arm[f"times_faster_than_{what}"]) for what in ("ensemble", "single_fold"))
    sentences = [
        f"{name} predicts a case in {seconds(arm['median_s'])}: {than_ensemble} faster than nnunetv2 with the ensemble "
        f"({len(ensemble['folds'])} folds, mirrored; {seconds(ensemble['median_s'])}{told}) and {than_single} faster "
        f"than nnunetv2 with one fold, not mirrored ({seconds(single['median_s'])})."
    ]
    if "dice_on_common_cases" in arm:
        other, what = (single, "the one fold") if told else (ensemble, "the ensemble")
        sentences.append(
            f"Mean Dice {dice(arm['dice_on_common_cases'])}, {dice(other['dice_on_common_cases'])} for {what}."
        )
    if "cold" in arm:
        other, key = (single, "single_fold") if told else (ensemble, "ensemble")
        ratio = times(arm["cold"][f"times_faster_than_{key}"])
        sentences.append(
            f"A new process needs {seconds(arm['cold']['median_s'])} from start to file, {ratio} faster than "
            f"nnUNetv2_predict ({seconds(other['cold']['median_s'])})."
        )
    return " ".join(sentences)
