"""Locate, then look, beside running everywhere: Dice and seconds of both ways of one bundle on test images.

    python -m pipelines.measure.predict.locate -d 111 --only 1 2 -i imagesTs -g labelsTs --work WORK -o record.json

trains (or finds trained in WORK) a locator and a small student on the true labels, with one thread, exports the
student with the locator and without, and predicts the test images both ways in turn, file in and file out. `--only`
keeps some labels of a data set whose images are cropped around all of them, and so makes one whose targets fill a small
part: cases and labels are those of the data set, and the student starts from the channels of its teacher, heads of
other labels left out. The nnU-Net folders of the environment are read; with `--only` WORK gets its own.

`equal_labels` is parity: the share of voxels with the same label both ways. `everywhere_plain` is the bundle without a
locator, which `--no-locate` has to equal to the voxel. The oracle of the Dice is the label file.
"""

import json
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.api import distil, export, train_locator
from fastnnunet.api.distil import Student
from fastnnunet.distill.job import TrainingJob
from fastnnunet.evaluate.metrics import dice_of_labels, nanmean
from fastnnunet.images.cases import find_cases
from fastnnunet.images.io import image_io
from fastnnunet.nnunet.files.cases import PreprocessedCases
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.paths import model_folder, nnunet_folder, resolve_dataset
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.measure.head import header, model_arguments, put

STOCK = ("nnUNetTrainer", "nnUNetPlans")


def restrict(dataset: str, configuration: str, only: Sequence[int], fold: int, work: Path) -> str:
    """The data set with some labels alone, numbered anew, and its teacher's fold, below WORK; returns its name.

    Heads of other labels are taken out of the teacher, whose weights are first weights and nothing more.
    """
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    name = resolve_dataset(dataset)
    other = f"Dataset{900 + int(name[7:10]) % 100}_Restricted"
    base, target = nnunet_folder("nnUNet_preprocessed") / name, work / "preprocessed" / other
    model = model_folder(name, *STOCK, configuration)
    model_target = work / "results" / other / model.name
    if (model_target / f"fold_{fold}" / "checkpoint_final.pth").is_file():
        return other
    plans, dataset_json = (read_json_object(base / n) for n in ("nnUNetPlans.json", "dataset.json"))
    names = {value: label for label, value in dataset_json["labels"].items()}
    dataset_json["labels"] = {"background": 0, **{names[old]: new for new, old in enumerate(only, 1)}}
    plans["dataset_name"] = other
    data = plans["configurations"][configuration]["data_identifier"]
    (target / data).mkdir(parents=True, exist_ok=True)
    shutil.copy(base / "splits_final.json", target)
    (target / "nnUNetPlans.json").write_text(json.dumps(plans))
    (target / "dataset.json").write_text(json.dumps(dataset_json))
    cases = PreprocessedCases(base / data)
    for case in cases.case_ids:
        image, label, _, properties = cases.load(case)
        kept = renumbered(np.asarray(label[:]), only)
        locations = DefaultPreprocessor._sample_foreground_locations(kept, [*range(1, len(only) + 1)])
        nnUNetDatasetBlosc2.save_case(
            np.asarray(image[:]),
            kept,
            {**properties, "class_locations": locations},
            str(target / data / case),
            chunks=image.chunks,
            blocks=image.blocks,
            chunks_seg=label.chunks,
            blocks_seg=label.blocks,
        )
    restrict_teacher(model, model_target, only, fold, plans, dataset_json)
    return other


def renumbered(labels: np.ndarray, only: Sequence[int]) -> np.ndarray:
    """The labels of `only` as 1, 2, ...; others background, and what is below 0 as it was."""
    kept = np.minimum(labels, 0)
    for new, old in enumerate(only, 1):
        kept[labels == old] = new
    return kept


def restrict_teacher(
    model: Path, target: Path, only: Sequence[int], fold: int, plans: dict[str, Any], dataset_json: dict[str, Any]
) -> None:
    import torch

    checkpoint = load_checkpoint(model / f"fold_{fold}" / "checkpoint_final.pth")
    heads = [0, *only]
    weights = checkpoint["network_weights"]
    checkpoint["network_weights"] = {n: w[heads] if "seg_layers" in n else w for n, w in weights.items()}
    checkpoint["init_args"] = {**checkpoint["init_args"], "plans": plans, "dataset_json": dataset_json}
    (target / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
    (target / "plans.json").write_text(json.dumps(plans))
    (target / "dataset.json").write_text(json.dumps(dataset_json))
    torch.save(checkpoint, target / f"fold_{fold}" / "checkpoint_final.pth")


def trained(teacher: TeacherSpec, fold: int, steps: int, locator_steps: int) -> tuple[Student, Student]:
    """Locator and student; what is trained already is taken as it is."""
    locator = train_locator(teacher, fold, {"steps": locator_steps}, resume=True, threads=1, device="cpu")
    job = TrainingJob(
        teacher=teacher,
        student=StudentSpec(r=4, norm="batch"),
        distill=DistillSpec(alpha=0, optimizer="adamw", steps=steps),
        cache=CacheSpec(),
        fold=fold,
        threads=1,
        device="cpu",
    )
    return locator, distil([job], resume=None, validate=False)[0]


def measure(
    bundles: dict[str, Path], images: Path, labels: Path, only: Sequence[int], work: Path, backend: str, rounds: int
) -> dict[str, Any]:
    """Both ways of the bundle `with`, and the bundle `without`, each image in turn."""
    options: dict[str, Any] = {"threads": 1}
    located = Predictor.load(bundles["with"], backend, **options)
    arms = {
        "located": located,
        "everywhere": located.with_settings(step_size=None, mirroring=True, use_gaussian=True, locate=False),
        "everywhere_plain": Predictor.load(bundles["without"], backend, **options),
    }
    spec, io = located.spec, image_io(located.spec.reader_writer)
    names = {n: (v,) for n, v in spec.labels.items() if n != "background"}
    seconds: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    dice: dict[str, dict[str, dict[str, float]]] = {arm: {} for arm in arms}
    same: list[float] = []
    shares: dict[str, float | None] = {}
    covered: dict[str, float] = {}
    for number in range(rounds + 1):  # the first is not counted: kernels are made
        for case in find_cases(images, spec):
            found = {}
            for arm, predictor in arms.items():
                out = work / f"{arm}_{case.case_id}{spec.file_ending}"
                times = predictor.predict_case(case, out).times
                found[arm] = io.read_segmentation(out)[0][0].astype(np.int16)
                if number:
                    stages = {
                        s: getattr(times, f"{s}_s") for s in ("read", "preprocess", "infer", "postprocess", "write")
                    }
                    seconds[arm].append({**stages, "total": times.total_s})
            if number:
                continue
            truth = io.read_segmentation(labels / f"{case.case_id}{spec.file_ending}")[0][0].astype(np.int16)
            truth = renumbered(truth, only) if only else truth
            for arm, prediction in found.items():
                dice[arm][case.case_id] = dice_of_labels(truth, prediction, names)
            same.append(float((found["located"] == found["everywhere"]).mean()))
            assert (found["everywhere"] == found["everywhere_plain"]).all(), case.case_id
            image, properties = io.read(case.channels)
            preprocessed = located.preprocess(image, properties)
            part = located.part_of(preprocessed.data_CZYX)
            shares[case.case_id] = None if part is None else math.prod(part.size) / preprocessed.data_CZYX[0].size
            whole = found["everywhere"] > 0
            covered[case.case_id] = float((whole & (found["located"] > 0)).sum() / max(1, whole.sum()))
    return {
        "dice": {a: nanmean(nanmean(of_case.values()) for of_case in d.values()) for a, d in dice.items()},
        "dice_per_case": dice,
        "seconds": {a: {s: statistics.median(t[s] for t in times) for s in times[0]} for a, times in seconds.items()},
        "equal_labels": statistics.mean(same),
        "share_of_voxels_predicted": shares,
        "foreground_of_everywhere_that_located_finds": covered,
    }


if __name__ == "__main__":
    parser = model_arguments(__doc__)
    parser.add_argument("-f", type=int, default=0, help="fold")
    parser.add_argument("-i", type=Path, required=True, help="test images")
    parser.add_argument("-g", type=Path, required=True, help="their labels")
    parser.add_argument("--only", type=int, nargs="*", default=[], help="labels to keep; default: all")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400, help="of the student")
    parser.add_argument("--locator-steps", type=int, default=400)
    parser.add_argument("--backend", nargs="+", default=["openvino", "onnxruntime"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    dataset = args.d
    if args.only:
        dataset = restrict(args.d, args.c, args.only, args.f, args.work)
        os.environ.update({f"nnUNet_{name}": str(args.work / name) for name in ("preprocessed", "results")})
    teacher = TeacherSpec(dataset=dataset, configuration=args.c, folds=(args.f,))
    locator, student = trained(teacher, args.f, args.steps, args.locator_steps)
    model, bundles = student.folder.parent, {n: args.work / "bundles" / n for n in ("with", "without")}
    told = export(model, args.f, bundles["with"], locator=locator.folder.parent, overwrite=True)
    export(model, args.f, bundles["without"], overwrite=True)
    spec = load_bundle_spec(bundles["with"])
    record = {
        **header("a locator and a student in its box beside the student everywhere, file to file, one thread"),
        "dataset": args.d,
        "only": args.only,
        "labels": spec.labels,
        "steps": args.steps,
        "locator_steps": args.locator_steps,
        "export_said": told.described.splitlines(),
        "locator": spec.provenance["locator"],
        "arms": {b: measure(bundles, args.i, args.g, args.only, args.work, b, args.rounds) for b in args.backend},
        "load_average_after": os.getloadavg(),
    }
    put(record, args.o)
    for backend, arm in record["arms"].items():
        print(backend, {a: (round(arm["dice"][a], 4), round(arm["seconds"][a]["total"], 3)) for a in arm["dice"]})
