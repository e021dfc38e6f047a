"""Stage 2: students of several sizes from one cache.

make train DATASET=4 CONFIG=3d_fullres FOLD=0 R="2 4" EXTRA="--epochs 60 --iterations 25 --optimizer adamw"
"""

import argparse

from fastnnunet import api
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.load import build_spec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.common import run


def main(args: argparse.Namespace) -> None:
    settings = {"epochs": args.epochs, "iterations_per_epoch": args.iterations, "optimizer": args.optimizer}
    for r in args.r:
        job = api.TrainingJob(
            teacher=TeacherSpec(dataset=args.dataset, configuration=args.configuration),
            student=StudentSpec(r=r),
            distill=build_spec(DistillSpec, settings, where="options"),
            cache=CacheSpec(),
            fold=args.fold,
        )
        with api.View() as view:
            (student,) = api.distil([job], resume=None, progress=view)
        print(f"student {student.tag}: mean Dice on the {student.judged_on} {student.mean_dice:.4f}: {student.folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("r", type=int, nargs="+")
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--optimizer", default="sgd")
    run(lambda: main(parser.parse_args()))
