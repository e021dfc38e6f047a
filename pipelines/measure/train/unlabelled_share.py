"""Few labelled images, many without labels: students of one data set cut in two, over shares of unlabelled samples.

Some training cases keep their labels, five more validate, the others are given to the teacher as images that nobody
labelled. Both caches are built by the user's command; the test images that `soft_or_hard test` prepared judge.

    python -m pipelines.measure.train.unlabelled_share -d 4 -i imagesTr --test W/test --work S --spec RECIPE.yaml \\
        --labelled 25 --seeds 0 1 --steps 1000 --arm none alpha=0 --arm half \\
        --arm mixed unlabelled=more_scans unlabelled_share=0.5 pseudo_labels=true -o R.json

An arm is a name and fields of DistillSpec, as in `soft_or_hard`; what it does not name is the default. The same command
resumes. `nnUNet_results` holds the teacher, `nnUNet_preprocessed` the whole data set.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fastnnunet.api.distil import distil
from fastnnunet.distill.job import TrainingJob
from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import to_plain
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.load import build_spec, load_yaml_spec
from fastnnunet.specs.provenance import write_json
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.measure.head import header, model_arguments, put
from pipelines.measure.train.soft_or_hard import arm, judge, schedule, student_probabilities, subset

SCANS = "more_scans"
VALIDATE = 5  # cases; nothing is chosen by them


def cut_in_two(name: str, configuration: str, plans: str, images: Path, labelled: int, work: Path) -> dict[str, str]:
    """Make W/nnUNet_preprocessed of the labelled cases, W/more_scans of the others; the environment that names them."""
    source = nnunet_folder("nnUNet_preprocessed") / name
    target = work / "nnUNet_preprocessed" / name
    data = json.loads((source / f"{plans}.json").read_text())["configurations"][configuration]["data_identifier"]
    cases = sorted(p.stem for p in (source / data).glob("*.pkl"))
    kept = subset(cases, labelled + VALIDATE, 0)
    training = subset(kept, labelled, 0)
    scans = work / SCANS
    for folder in (target / data, target / "gt_segmentations", scans, work / "nnUNet_raw"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    split = {"train": training, "val": sorted(set(kept) - set(training))}
    (target / "splits_final.json").write_text(json.dumps([split]))
    for case in kept:
        for part in (data, "gt_segmentations"):
            for file in (source / part).glob(f"{case}*"):
                shutil.copy(file, target / part)
    for case in set(cases) - set(kept):
        for file in images.glob(f"{case}_[0-9]*"):
            shutil.copy(file, scans)
    results = work / "nnUNet_results" / name
    results.mkdir(parents=True, exist_ok=True)
    teacher = f"nnUNetTrainer__{plans}__{configuration}"
    if not (results / teacher).exists():
        (results / teacher).symlink_to((nnunet_folder("nnUNet_results") / name / teacher).resolve())
    return {n: str(work / n) for n in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}


def main() -> None:
    parser = model_arguments(__doc__)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-tf", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("-i", type=Path, required=True, help="images of all training cases")
    parser.add_argument("--test", type=Path, required=True, help="the folder of `soft_or_hard test --work`")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--spec", type=Path, required=True, help="recipe of the caches")
    parser.add_argument("--labelled", type=int, default=25)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("-r", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arm", nargs="+", action="append", default=[])
    args = parser.parse_args()
    work: Path = args.work.resolve()
    name = resolve_dataset(args.d)
    os.environ |= cut_in_two(name, args.c, args.p, args.i, args.labelled, work)
    teacher = TeacherSpec(dataset=name, configuration=args.c, folds=tuple(args.tf), plans=args.p)
    for images in ([], ["--images", str(work / SCANS)]):
        words = ["-d", args.d, "-c", args.c, "-p", args.p, "-f", *map(str, args.tf), "--spec", str(args.spec.resolve())]
        command = ["cache", "build", *words, "--threads", str(args.threads), *images]
        subprocess.run([sys.executable, "-m", "fastnnunet", *command], check=True)
    recipe = load_yaml_spec(CacheSpec, args.spec)
    record = json.loads(args.o.read_text()) if args.o.is_file() else {**header(__doc__.splitlines()[0]), "rows": []}
    for seed in args.seeds:
        for arm_name, fields in map(arm, args.arm):
            key = {"arm": arm_name, "seed": seed, "r": args.r, "steps": args.steps, "labelled": args.labelled}
            if any(key.items() <= row.items() for row in record["rows"]):
                continue
            job = TrainingJob(
                teacher=teacher,
                student=StudentSpec(r=args.r),
                distill=build_spec(DistillSpec, schedule(args.steps, seed) | fields, where="--arm"),
                cache=recipe,
                fold=0,
                device="cpu",
                threads=args.threads,
            )
            (student,) = distil([job], resume=None, validate=False)
            found = judge(student_probabilities(student.folder, args.c, args.threads), args.test.parent)
            record["rows"].append({**key, "distill": to_plain(job.distill), **found})
            write_json(args.o, record)
            print(f"seed {seed}, {arm_name}: Dice {found['dice']:.4f} fidelity {found['fidelity']:.4f}", flush=True)
    put(record, args.o)


if __name__ == "__main__":
    main()
