"""Trained students in one table: family x size x loss, mean Dice of the seeds, milliseconds a patch, parameters.

Every student under the given `nnUNet_results` folders is exported, predicts the test images with ONNX Runtime and is
scored; what it is and how it was trained is read from its checkpoint. The ensemble runs in nnU-Net's own predictor.
Milliseconds are medians of one forward pass of a real patch in OpenVINO, all students in turns.

    python -m pipelines.measure.train.student_table --results runs/* -m TEACHER_FOLDER -i imagesTs -g labelsTs -o R.json
"""

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.bench.arms import ReferenceArm
from fastnnunet.bench.patch_speed import ms_per_patch
from fastnnunet.engines.base import Precision
from fastnnunet.engines.registry import available_cores
from fastnnunet.evaluate import segmentations as files
from fastnnunet.evaluate.cases import evaluate_cases
from fastnnunet.export.bundle import export_bundle
from fastnnunet.images.cases import Case
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.distill import BEFORE_THERE_WAS_A_CHOICE, DistillSpec
from fastnnunet.specs.load import build_spec
from fastnnunet.specs.provenance import now_utc
from fastnnunet.specs.student import Family, StudentSpec
from pipelines.measure.head import arguments, header, put
from pipelines.measure.train.student_seeds import compare

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
LENGTH = ("steps", "samples_per_step")
ONLINE = "online"  # key in the provenance of students whose teachers ran in every step


def find_students(roots: Sequence[Path]) -> list[Path]:
    """Fold folders of finished students below some nnUNet_results folders."""
    checkpoints = sorted(c for root in roots for c in root.glob("Dataset*/*__*__*/fold_*/checkpoint_final.pth"))
    return [c.parent for c in checkpoints if "nnUNetPlans__" not in c.parent.parent.name]


def soft_loss(distill: DistillSpec, online: bool) -> str:
    """Name of what a student learnt from, beside nnU-Net's own loss; at T = 3 and full resolution unless it says so."""
    if distill.alpha == 0:
        return "none"
    words = [distill.loss] + [f"T={distill.temperature:g}"] * (distill.temperature != 3)
    words += ["every resolution"] * distill.soft_deep_supervision + ["annealed"] * distill.anneal + ["online"] * online
    words += [f"online {distill.online_teacher:g}"] * (distill.online_teacher > 0)
    return " ".join(words)


def dice_per_case(predictions: Path, labels: Path) -> dict[str, float]:
    """Mean foreground Dice of each case."""
    label_set = files.labels_from_dataset_json(predictions / "dataset.json")
    pairing = files.pair_cases(predictions, labels, label_set.file_ending)
    files.require_complete(pairing)
    results = evaluate_cases(predictions, labels, pairing.cases, label_set)
    return {r.case: float(np.nanmean([m.dice for m in r.metrics.values()])) for r in results}


def score(fold_folder: Path, bundle: Path, images: Path, labels: Path, caches: str) -> dict[str, Any]:
    """Export one student to `bundle` and score it; the row of one seed. `caches`: what their cache is, for its name."""
    number = fold_folder.name.removeprefix("fold_")
    export_bundle(fold_folder.parent, int(number) if number.isdigit() else number, bundle)
    with tempfile.TemporaryDirectory() as out:
        Predictor.load(bundle, "onnxruntime").predict_files(images, Path(out))
        dice = dice_per_case(Path(out), labels)
    spec = load_bundle_spec(bundle)
    provenance = spec.provenance
    made = provenance["training"]
    distill = build_spec(DistillSpec, {**BEFORE_THERE_WAS_A_CHOICE, **made["distill"]})
    student = build_spec(StudentSpec, made["student"])
    family: Family = "lite" if student.is_lite else "width"
    loss = " ".join([soft_loss(distill, bool(made.get(ONLINE))), *caches.split()])
    teacher = f"{len(made['teacher']['folds'])} fold(s)"
    steps = distill.epochs * distill.iterations_per_epoch
    samples = spec.plans["configurations"][spec.configuration]["batch_size"]
    return {
        "group": f"{replace(student, family=family).tag} {loss} {teacher} from {distill.start}, {steps} x {samples}",
        "family": family,
        "r": student.r,
        "soft_loss": loss,
        "teacher": teacher,
        "start": distill.start,
        "steps": steps,
        "samples_per_step": samples,
        "seed": distill.seed,
        "distill": made["distill"],
        "cache_key": made["cache_key"],
        "parameters": provenance["parameters"],
        "dice": dice,
        "bundle": bundle,
    }


def ensemble_dice(model: Path, folds: tuple[int, ...], images: Path, labels: Path, threads: int) -> dict[str, float]:
    """The mirrored ensemble in nnU-Net's own predictor."""
    dataset = json.loads((model / "dataset.json").read_text())
    arm = ReferenceArm(name="ensemble", model_folder=model, folds=folds, mirroring=True, threads=threads)
    run = arm.load()
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        (out / "dataset.json").write_text(json.dumps(dataset))
        for file in sorted(images.glob(f"*_0000{dataset['file_ending']}")):
            case = file.name.removesuffix(f"_0000{dataset['file_ending']}")
            channels = tuple(sorted(images.glob(f"{case}_[0-9][0-9][0-9][0-9]{dataset['file_ending']}")))
            run(Case(case, channels), out / f"{case}{dataset['file_ending']}")
        return dice_per_case(out, labels)


def measure(
    roots: Sequence[Path],
    model: Path,
    images: Path,
    labels: Path,
    folds: tuple[int, ...],
    rounds: int = 30,
    threads: int | None = None,
    earlier: dict[str, Any] | None = None,
    caches: str = "",
) -> dict[str, Any]:
    """The record. `threads` of the ensemble, None for all cores.

    With an `earlier` record these students are added to its own; its ensemble and its milliseconds stay.
    """
    with tempfile.TemporaryDirectory() as work:
        rows = [
            score(folder, Path(work) / str(number), images, labels, caches)
            for number, folder in enumerate(find_students(roots))
        ]
        sizes = {f"{r['family']} {r['r']}": r.pop("bundle") for r in rows}
        ms = {f"{r['family']} {r['r']}": r["ms_per_patch"] for r in (earlier or {"table": {}})["table"].values()}
        if new := {size: bundle for size, bundle in sizes.items() if size not in ms}:
            ms |= ms_per_patch(new, backend="openvino", precisions=PRECISIONS, rounds=rounds)
    if earlier is None:
        dice = ensemble_dice(model, folds, images, labels, threads or available_cores())
        ensemble = {"folds": list(folds), "mean_dice": statistics.mean(dice.values()), "dice": dice}
        record = {
            **header("students by family, size and soft loss; mean foreground Dice on test cases"),
            "load_average": list(os.getloadavg()),
            "ensemble": ensemble,
        }
    else:
        record, ensemble = {**earlier, "extended": now_utc()}, earlier["ensemble"]
        rows = [*earlier["students"], *rows]
    return {**record, "table": table_of(rows, ensemble["mean_dice"], ms), "students": rows}


def table_of(rows: Sequence[dict[str, Any]], ensemble: float, ms: dict[str, Any]) -> dict[str, Any]:
    """Rows of seeds by group, beside the ensemble's mean Dice and the group without soft labels."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    table = {}
    for name, members in groups.items():
        first = members[0]
        means = [statistics.mean(m["dice"].values()) for m in members]
        control = groups.get(name.replace(first["soft_loss"], "none", 1)) if first["soft_loss"] != "none" else None
        several = control is not None and min(len(members), len(control)) > 1
        table[name] = {
            **{k: first[k] for k in ("family", "r", "soft_loss", "teacher", "start", *LENGTH, "parameters")},
            "seeds": [m["seed"] for m in members],
            "dice": means,
            "mean_dice": statistics.mean(means),
            "stdev": statistics.stdev(means) if len(means) > 1 else None,
            "points_below_ensemble": 100 * (ensemble - statistics.mean(means)),
            "ms_per_patch": ms[f"{first['family']} {first['r']}"],
            "against_control": compare([c["dice"] for c in control or ()], [m["dice"] for m in members])
            if several
            else None,
        }
    return table


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="nnUNet_results folders of students")
    parser.add_argument("-m", type=Path, required=True, help="the teacher's model folder")
    parser.add_argument("-f", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="folds of the ensemble")
    parser.add_argument("-i", type=Path, required=True, help="test images")
    parser.add_argument("-g", type=Path, required=True, help="their labels")
    parser.add_argument("--caches", default="", help="of what kind the caches of these students are, for their names")
    parser.add_argument("--extend", type=Path, help="a record to which the students are added")
    args = parser.parse_args()
    known = None if args.extend is None else json.loads(args.extend.read_text())
    record = measure(args.results, args.m, args.i, args.g, tuple(args.f), earlier=known, caches=args.caches)
    put(record, args.o)
    print(f"ensemble {record['ensemble']['mean_dice']:.4f}")
    for name, row in sorted(record["table"].items()):
        spread = "" if row["stdev"] is None else f" +- {row['stdev']:.4f}"
        print(
            f"{name:56} {row['mean_dice']:.4f}{spread} ({len(row['seeds'])} seeds, "
            f"{row['points_below_ensemble']:+.2f} points below) fp32 {row['ms_per_patch']['fp32']:.1f} ms, "
            f"bf16 {row['ms_per_patch']['bf16']:.1f} ms, {row['parameters'] / 1e6:.2f} M"
        )
