"""Make a teacher ensemble to measure with, and record how good it is on test images. Weights are not committed.

A first one, by nnU-Net's trainer with AdamW in few steps, of plans whose batch size `-b` replaces:

    python -m pipelines.measure.train.make_teacher -d 120 -c 2d --name Short -b 4 -f 0 1 2 --steps 600 -i imagesTs \\
        -g labelsTs --work W -o record.json

A stronger one from a teacher that is there: folds of size `-r` start from its channels and learn from labels alone:

    python -m pipelines.measure.train.make_teacher -d 4 --from nnUNetPlans --name Strong -r 2 -f 0 1 2 3 4 ...

It lies in nnUNet_results as any other model, with plans of the name given, and mirrors at prediction.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset
from fastnnunet.nnunet.files.plans import read_json
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.provenance import write_json
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.measure.head import header, model_arguments, put
from pipelines.measure.train.soft_or_hard import judge, prepare_test

ITERATIONS = 50  # per epoch


def main() -> None:
    parser = model_arguments(__doc__)
    parser.add_argument("--from", dest="source", help="plans of the teacher to start from")
    parser.add_argument("--name", required=True, help="name of the plans that are made")
    parser.add_argument("-r", type=int, default=1)
    parser.add_argument("--family", default="auto")
    parser.add_argument("--widest", type=int, help="halve the plans' widths, none above this")
    parser.add_argument("-b", type=int, default=2, help="samples a step")
    parser.add_argument("-f", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-i", type=Path, required=True)
    parser.add_argument("-g", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    name = resolve_dataset(args.d)
    plans_name = f"nnUNetPlans{args.name}"
    epochs = max(1, args.steps // ITERATIONS)
    if args.source is None:
        from fastnnunet.nnunet.trainer.train_teacher import train_teacher

        base = nnunet_folder("nnUNet_preprocessed") / name
        plans = read_json(base / "nnUNetPlans.json")
        plans["plans_name"] = plans_name
        plans["configurations"][args.c]["batch_size"] = args.b
        network = plans["configurations"][args.c]["architecture"]["arch_kwargs"]
        if args.widest is not None:  # half of nnU-Net's first width, and no stage wider than this
            network["features_per_stage"] = [min(f // 2, args.widest) for f in network["features_per_stage"]]
        write_json(base / f"{plans_name}.json", plans)
        for fold in args.f:
            made = {"epochs": epochs, "iterations_per_epoch": ITERATIONS, "seed": args.seed}
            train_teacher(args.d, args.c, plans_name, fold, **made)
            print(f"fold {fold} done", flush=True)
    else:
        from fastnnunet.distill.job import TrainingJob
        from fastnnunet.distill.train import train_student

        for fold in args.f:
            job = TrainingJob(
                teacher=TeacherSpec(dataset=args.d, configuration=args.c, plans=args.source),
                student=StudentSpec(r=args.r, family=args.family, plans_name=plans_name),
                distill=DistillSpec(
                    alpha=0,
                    epochs=epochs,
                    iterations_per_epoch=ITERATIONS,
                    val_iterations_per_epoch=2,
                    batch_size=args.b,
                    optimizer="adamw",
                    seed=args.seed,
                    mirroring=True,
                ),
                cache=CacheSpec(),
                fold=fold,
                device="cpu",
                threads=args.threads,
            )
            train_student(job, resume=True, validate=False)
            print(f"fold {fold} done", flush=True)
    teacher = TeacherSpec(dataset=args.d, configuration=args.c, plans=plans_name, folds=tuple(args.f))
    prepare_test(teacher, args.i, args.g, args.work)
    found = judge(lambda _, p: p, args.work)
    told = {k: v for k, v in vars(args).items() if k not in ("i", "g", "work", "o")}
    head = header("a teacher to measure with, mirrored ensemble on test images")
    put({**head, "made": told, "judged": found}, args.o)
    print(f"Dice {found['dice']:.4f} {found['dice_per_label']}")


if __name__ == "__main__":
    main()
