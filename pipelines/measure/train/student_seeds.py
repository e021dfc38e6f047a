"""Students trained from two caches with several seeds: is one cache worse than the other beyond the spread of seeds?

Each student was trained into an `nnUNet_results` folder of its own, for instance

    nnUNet_results=runs/levels_31_0 fastnnunet train -d 4 -f 0 -r 4 --spec cache_specs/levels_31.yaml --seed 0 \\
        -e 40 --iterations 25 --val-iterations 1 --optimizer adamw

with the teacher's model folder linked into it (the record of 24 November, when other values were the defaults: also
-a 0.3 -temp 3 --loss kl --no-soft-deep-supervision --start random, and -temp 3 for its caches). Then

    python -m pipelines.measure.train.student_seeds --arm float16 runs/float16_* --arm levels_31 runs/levels_31_* \\
        -i imagesTs -g labelsTs -o record.json

exports every student, predicts the test images with ONNX Runtime and records mean foreground Dice. The first arm is the
reference: the difference of means is given beside its standard error from the spread between seeds (Welch), and paired
over cases as well, where the seeds' means per case are compared.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fastnnunet.evaluate import segmentations as files
from fastnnunet.evaluate.cases import evaluate_cases
from fastnnunet.export.bundle import export_bundle
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.runtime.predict import Predictor
from pipelines.measure.head import arguments, header, put


def student_dice(model: Path, images: Path, labels: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean foreground Dice per case of one model folder with one fold, and how it was trained."""
    (fold,) = model.glob("fold_*")
    name = fold.name.removeprefix("fold_")
    with tempfile.TemporaryDirectory() as work:
        bundle, out = Path(work) / "bundle", Path(work) / "out"
        export_bundle(model, int(name) if name.isdigit() else name, bundle)
        Predictor.load(bundle, "onnxruntime").predict_files(images, out)
        label_set = files.labels_from_dataset_json(out / "dataset.json")
        pairing = files.pair_cases(out, labels, label_set.file_ending)
        files.require_complete(pairing)
        results = list(evaluate_cases(out, labels, pairing.cases, label_set))
    dice = {r.case: float(np.nanmean([m.dice for m in r.metrics.values()])) for r in results}
    return dice, load_checkpoint(fold / "checkpoint_final.pth").get("fastnnunet", {})


def compare(reference: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float]:
    """Difference of mean Dice, other less reference, against the spread between seeds."""
    means = [[statistics.mean(d.values()) for d in arm] for arm in (reference, other)]
    spread = [statistics.stdev(m) for m in means]
    error = float(np.hypot(*(s / np.sqrt(len(m)) for s, m in zip(spread, means, strict=True))))
    per_case = [np.mean([[d[case] for case in sorted(d)] for d in arm], axis=0) for arm in (reference, other)]
    difference = statistics.mean(means[1]) - statistics.mean(means[0])
    return {
        "difference": difference,
        "standard_error_over_seeds": error,
        "worse_beyond_spread": bool(difference < -2 * error),
        "welch_p": float(stats.ttest_ind(means[1], means[0], equal_var=False).pvalue),
        "paired_over_cases_p": float(stats.wilcoxon(per_case[1], per_case[0]).pvalue),
    }


def measure(arms: dict[str, list[Path]], images: Path, labels: Path) -> dict[str, Any]:
    """The record; `arms` maps a name to model folders."""
    found = {name: [student_dice(model, images, labels) for model in models] for name, models in arms.items()}
    reference, *others = found
    return {
        **header("students of several seeds from different caches, mean foreground Dice on test cases"),
        "arms": {
            name: {
                "dice": [statistics.mean(dice.values()) for dice, _ in students],
                "mean": statistics.mean(statistics.mean(dice.values()) for dice, _ in students),
                "stdev": statistics.stdev(statistics.mean(dice.values()) for dice, _ in students),
                "training": [training for _, training in students],
            }
            for name, students in found.items()
        },
        "against_the_first": {
            name: compare([d for d, _ in found[reference]], [d for d, _ in found[name]]) for name in others
        },
        "cases": sorted(found[reference][0][0]),
    }


def _model_folder(results: Path) -> Path:
    (model,) = (p.parent for p in results.glob("*/*__*_r*__*/fold_*"))
    return model


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--arm", action="append", nargs="+", required=True, metavar=("NAME", "FOLDER"))
    parser.add_argument("-i", type=Path, required=True, help="test images")
    parser.add_argument("-g", type=Path, required=True, help="their labels")
    args = parser.parse_args()
    record = measure({a[0]: [_model_folder(Path(f)) for f in a[1:]] for a in args.arm}, args.i, args.g)
    put(record, args.o)
    for name, arm in record["arms"].items():
        print(f"{name}: {arm['mean']:.4f} +- {arm['stdev']:.4f}  {[round(d, 4) for d in arm['dice']]}")
    for name, row in record["against_the_first"].items():
        print(f"{name}: {row['difference']:+.4f}, standard error {row['standard_error_over_seeds']:.4f}")
