"""How good and how fast a bundle is, as it tells of itself: in its provenance, which older versions pass over."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from fastnnunet.errors import CorruptError, MismatchError, NotFoundError
from fastnnunet.evaluate.segmentations import make_label_set
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.release.gate import CaseDice
from fastnnunet.release.gate_cases import TrainingCases
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.runtime.times import StageTimes
from fastnnunet.specs.bundle import MEASURED, load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import to_plain
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.checks.problems import is_number
from fastnnunet.specs.provenance import hardware
from fastnnunet.system.files import atomic_output

FEW = 4  # cases: an export is not to take long


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Dice, 0..1: the mean over labels of their means over cases; of the held-out cases unless `held_out` is False."""

    dice: float
    labels: dict[str, float]  # name of label or region -> mean over the cases that have it
    cases: int
    held_out: bool  # kept from the training
    against: Literal["labels", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Median seconds of a case."""

    seconds_per_case: float
    cases: int
    begins_with: Literal["file", "preprocessed image"]  # it ends with the file, or with the labels
    cpu: str | None
    threads: int | None  # None: as many as there are


def note(bundle: Path, quality: Quality | None, speed: Speed | None) -> None:
    """Write into a bundle what was measured of it, in place of what it told before.

    Raises what `load_bundle_spec` raises, FastnnUNetError where it cannot be written.
    """
    spec = load_bundle_spec(bundle)
    found = {"quality": quality, "speed": speed}
    told = {name: to_plain(one) for name, one in found.items() if one is not None}
    with atomic_output(bundle / "bundle.json") as unfinished:
        write_bundle_json(replace(spec, provenance={**spec.provenance, MEASURED: told}), unfinished)


def validated(fold_folder: Path, labels: dict[str, object], fold: str) -> Quality | None:
    """What nnU-Net's validation of a fold found; None where there is none that can be read.

    `labels`: of dataset.json.
    """
    try:
        summary = read_json_object(fold_folder / "validation" / "summary.json")
        names = make_label_set(labels, "").names
        of_label = {str(key): value["Dice"] for key, value in summary["mean"].items()}
        found = {}
        for name, values in names.items():  # nnU-Net writes a region as its values in a tuple
            keys = [str(values[0])] * (len(values) == 1) + [str(values)]
            told: Any = next((of_label[key] for key in keys if key in of_label), None)
            if is_number(told):
                found[name] = float(told)
        dice, cases = summary["foreground_mean"]["Dice"], len(summary["metric_per_case"])
    except (NotFoundError, CorruptError, KeyError, TypeError, AttributeError, ValueError, OSError):
        return None
    if not is_number(dice) or not cases:
        return None
    return Quality(dice=float(dice), labels=found, cases=cases, held_out=fold.isdigit(), against="labels")


def measure_few(bundle: Path, progress: Listener = ignore) -> tuple[Quality, Speed] | None:
    """Predict a few preprocessed cases as `predict` would, held-out ones where there are any, and time it.

    None where there are no such cases, or nothing to judge in them. Raises what `LoadedBundle.load` raises.
    """
    spec = load_bundle_spec(bundle)
    try:
        source = TrainingCases(spec, count=FEW)
        loaded = LoadedBundle.load(bundle)
        of_labels, seconds = CaseDice(make_label_set(spec.labels, "")), []
        cases = source.choice.judge
        for number, case_id in enumerate((cases[0], *cases)):  # the first one twice: engines get ready in it
            case = source.preprocessed(case_id)
            begin = time.perf_counter()
            labels_ZYX = loaded.postprocess(loaded.infer(case, StageTimes()), case)[0]
            if number:
                seconds.append(time.perf_counter() - begin)
                of_labels.add(source.labels_ZYX(case_id), labels_ZYX)
                progress(Progress(what="measuring", done=number, total=len(cases), unit="cases", note=case_id))
    except (NotFoundError, MismatchError):
        return None
    if not (found := of_labels.of_labels()):
        return None
    quality = Quality(dice=of_labels.mean(), labels=found, cases=len(cases), held_out=source.held_out, against="labels")
    return quality, Speed(
        seconds_per_case=median(seconds),
        cases=len(cases),
        begins_with="preprocessed image",
        cpu=hardware()["cpu"],
        threads=None,
    )
