"""A locator put into a bundle: how large its margin has to be, and what it costs and saves, on cases it never saw."""

import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.distill.job import COARSER
from fastnnunet.errors import MismatchError, NotFoundError, SpecError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.export.bundle import export_bundle
from fastnnunet.release.gate import POINTS, compare
from fastnnunet.release.gate_cases import TrainingCases
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.runtime.locate import Box, foreground_box
from fastnnunet.runtime.times import StageTimes
from fastnnunet.specs.bundle import LOCATOR_FORMAT, BundleSpec, is_bundle, load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file, to_plain
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.locator import LOCATOR_FILE, Locator
from fastnnunet.specs.provenance import versions
from fastnnunet.system.files import atomic_output

THRESHOLD = 0.5
SAFETY_VOXELS = 2  # of the locator's own, beyond what the cases need
CASES, FEW = 64, 4  # that decide about the margin, and that both ways are compared on


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """What a locator needs beyond what it sees, over cases with foreground."""

    margin_mm: float
    needed_mm: float  # so that every voxel of the foreground is inside, wherever the locator sees something
    safety_mm: float
    cases: tuple[str, ...]
    held_out: bool  # kept from the training of the locator
    nothing_seen: int  # of the cases; they are predicted everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideEverywhere:
    """Dice are means over cases per label, then over foreground labels; seconds medians of a case; no mirroring."""

    dice_located: float
    dice_everywhere: float
    label_agreement: float  # share of voxels with the same label
    seconds_located: float  # the locator's own included; from the preprocessed image to its labels
    seconds_everywhere: float
    share: float  # of the voxels that are predicted, mean
    cases: tuple[str, ...]
    held_out: bool  # from the training of the model


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A bundle with its locator."""

    margin: Margin
    beside: BesideEverywhere | None  # None where there is nothing to judge in the cases

    def describe(self) -> str:
        """Two lines."""
        m, b = self.margin, self.beside
        kind = "held-out" if m.held_out else "training"
        seen = f", it sees nothing in {m.nothing_seen}" if m.nothing_seen else ""
        text = (
            f"locator: margin {m.margin_mm:g} mm, {m.needed_mm:g} needed for every foreground voxel of {len(m.cases)} "
            f"{kind} case(s) and {m.safety_mm:g} for safety{seen}"
        )
        if b is None:
            return text
        kind = "held-out" if b.held_out else "training"
        return (
            f"{text}\nin the locator's box beside everywhere on {len(b.cases)} {kind} case(s): Dice "
            f"{POINTS * b.dice_located:.2f} and {POINTS * b.dice_everywhere:.2f}, {b.seconds_located:.2f} s and "
            f"{b.seconds_everywhere:.2f} s a case, {b.share:.0%} of the voxels, same label on {b.label_agreement:.3%}"
        )


def export_locator(model: Path, locator: Path, folds: Sequence[int | str], out: Path) -> None:
    """Export the locator in a model folder as a bundle at `out`, validated, for the bundle of `folds` of `model`.

    Everything of the two that does not fit is refused here, before the model is exported. Raises NotFoundError,
    SpecError, MismatchError and what `export_bundle` raises.
    """
    if is_bundle(locator):
        raise SpecError(f"--locator {locator}: got a bundle, expected the model folder that train --locator printed")
    if locator.name.startswith("fold_"):
        locator = locator.parent
    there = [f.parent.name.removeprefix("fold_") for f in sorted(locator.glob("fold_*/checkpoint_final.pth"))]
    mine = [str(fold) for fold in folds if str(fold) in there]
    if not there:
        raise NotFoundError(
            f"--locator {locator}: no trained model there, expected fold_*/checkpoint_final.pth\n"
            "train one with: fastnnunet train -d DATASET -f FOLD --locator"
        )
    if not mine and len(folds) == 1:
        raise MismatchError(
            f"--locator {locator}: it has fold(s) {', '.join(there)}, the student is of fold {folds[0]}\n"
            f"train it on the same cases: fastnnunet train -d DATASET -f {folds[0]} --locator"
        )
    fold = (mine or there)[0]
    _check_fits(locator, fold, model)
    export_bundle(locator, fold, out)


def _check_fits(locator: Path, fold: str, model: Path) -> None:
    """Refuse what is no locator, or one of other data than the model's. Raises SpecError, MismatchError."""
    from fastnnunet.nnunet.files.checkpoint import load_checkpoint
    from fastnnunet.nnunet.files.model import model_of
    from fastnnunet.nnunet.files.plans import has_configuration
    from fastnnunet.nnunet.student.coarse import check_locatable

    checkpoint = load_checkpoint(locator / f"fold_{fold}" / "checkpoint_final.pth")
    factor, configuration = checkpoint.get("fastnnunet", {}).get(COARSER), checkpoint["init_args"]["configuration"]
    if factor is None:
        raise SpecError(
            f"--locator {locator}: got a model that is no locator\n"
            "train one with: fastnnunet train -d DATASET -f FOLD --locator"
        )
    files = [
        [read_json_object(folder / f"{name}.json") for name in ("plans", "dataset")] for folder in (locator, model)
    ]
    if not has_configuration(files[1][0], configuration):
        raise MismatchError(f"--locator {locator}: it is of {configuration}, which the model's plans do not have")
    its, theirs = (model_of(plans, configuration, dataset_json) for plans, dataset_json in files)
    check_locatable(theirs)
    pairs = {
        "data set": (its.manager.dataset_name, theirs.manager.dataset_name),
        "normalization_schemes": (its.config.normalization_schemes, theirs.config.normalization_schemes),
        "transpose_forward": (its.manager.transpose_forward, theirs.manager.transpose_forward),
        "spacing": (
            list(its.config.spacing),
            [float(s) * f for s, f in zip(theirs.config.spacing, factor, strict=True)],
        ),
    }
    if wrong := [f"{what}: locator {a}, expected {b}" for what, (a, b) in pairs.items() if a != b]:
        raise MismatchError(
            f"--locator {locator} is not of the model's data:\n"
            + "\n".join(f"  - {w}" for w in wrong)
            + "\ntrain one with the model's data set, configuration and plans"
        )


def attach_locator(bundle: Path, locator: Path, progress: Listener = ignore) -> Located:
    """Put a locator, as `export_locator` wrote it, into a bundle, which is changed in place.

    The margin is what the locator needs on the cases that it was not trained on, and something for safety. Raises
    NotFoundError without preprocessed cases, MismatchError where a locator is of no use.
    """
    spec, found = load_bundle_spec(bundle), load_bundle_spec(locator)
    (model_file,) = found.model_files
    shutil.copyfile(locator / model_file, bundle / LOCATOR_FILE)
    made = Locator(
        model_file=LOCATOR_FILE,
        factor=tuple(found.provenance["training"][COARSER]),
        patch_size=found.patch_size,
        one_pass=found.one_pass,
        architecture=found.architecture,
        threshold=THRESHOLD,
        margin_mm=0.0,
    )
    files = {**spec.files, LOCATOR_FILE: sha256_of_file(bundle / LOCATOR_FILE)}
    spec = replace(spec, format_version=max(spec.format_version, LOCATOR_FORMAT), locator=made, files=files)
    _write(spec, bundle)
    # the locator's fold says which cases it has not seen
    source = TrainingCases(replace(spec, folds=found.folds), count=CASES)
    margin = _margin(LoadedBundle.load(bundle, mirroring=False), source, made, progress)
    spec = replace(spec, locator=replace(made, margin_mm=margin.margin_mm))
    _write(spec, bundle)
    beside = _beside(LoadedBundle.load(bundle, mirroring=False), margin.cases[:FEW], progress)
    noted: dict[str, Any] = {
        "margin": to_plain(margin),
        "beside_everywhere": None if beside is None else {**to_plain(beside), "versions": versions()},
        **{name: found.provenance[name] for name in ("weights_sha256", "training", "parity", "parameters")},
    }
    _write(replace(spec, provenance={**spec.provenance, "locator": noted}), bundle)
    return Located(margin=margin, beside=beside)


def _write(spec: BundleSpec, bundle: Path) -> None:
    with atomic_output(bundle / "bundle.json") as unfinished:
        write_bundle_json(spec, unfinished)


def _margin(loaded: LoadedBundle, source: TrainingCases, locator: Locator, progress: Listener) -> Margin:
    """Raises MismatchError where the locator sees nothing in any case, or there is nothing to see."""
    spacing = loaded.spec.spacing_mm
    needed, nothing_seen, with_foreground = 0.0, 0, []
    for number, case_id in enumerate(source.choice.judge, 1):
        progress(Progress(what="margin", done=number, total=len(source.choice.judge), unit="cases", note=case_id))
        labels_ZYX = source.labels_ZYX(case_id).transpose(loaded.spec.transpose_forward)
        truth = foreground_box(labels_ZYX > 0)
        if truth is None:
            continue
        with_foreground.append(case_id)
        seen = loaded.box_of(source.preprocessed(case_id).data_CZYX)
        if seen is None:
            nothing_seen += 1
        else:
            needed = max(needed, *beyond_mm(truth, seen, spacing))
    if nothing_seen == len(with_foreground):
        raise MismatchError(
            f"the locator sees nothing in any of {len(with_foreground)} case(s) with foreground, so the model would "
            "always run everywhere\ntrain it longer (--steps), or leave --locator out"
        )
    safety = SAFETY_VOXELS * max(s * f for s, f in zip(spacing, locator.factor, strict=True))
    return Margin(
        margin_mm=ceil(10 * (needed + safety) - 1e-6) / 10,
        needed_mm=needed,
        safety_mm=safety,
        cases=tuple(with_foreground),
        held_out=source.held_out,
        nothing_seen=nothing_seen,
    )


def beyond_mm(truth: Box, seen: Box, spacing_mm: Sequence[float]) -> Iterator[float]:
    """How far the truth reaches beyond what is seen, on each side; below 0 where it does not."""
    for axis, spacing in enumerate(spacing_mm):
        yield (seen.begin[axis] - truth.begin[axis]) * spacing
        yield (truth.end[axis] - seen.end[axis]) * spacing


def _beside(located: LoadedBundle, cases: Sequence[str], progress: Listener) -> BesideEverywhere | None:
    everywhere = located.with_settings(step_size=None, mirroring=False, use_gaussian=True, locate=False)
    source = TrainingCases(located.spec, named=cases)
    try:
        (found,) = compare(source, {everywhere.backend.name: everywhere}, [located], progress)
    except MismatchError:
        return None
    seconds: dict[bool, list[float]] = {True: [], False: []}
    shares = []
    for case_id in cases:  # both have run on images of these shapes
        case = source.preprocessed(case_id)
        for model in (located, everywhere):
            begin = time.perf_counter()
            model.postprocess(model.infer(case, StageTimes()), case)
            seconds[model.locate].append(time.perf_counter() - begin)
        part = located.part_of(case.data_CZYX)
        shares.append(1.0 if part is None else prod(part.size) / case.data_CZYX[0].size)
    return BesideEverywhere(
        dice_located=found.dice,
        dice_everywhere=found.dice_fp32,
        label_agreement=found.label_agreement,
        seconds_located=statistics.median(seconds[True]),
        seconds_everywhere=statistics.median(seconds[False]),
        share=float(np.mean(shares)),
        cases=found.cases,
        held_out=source.held_out,
    )
