"""Stage 3: students as validated bundles.

make export DATASET=4 CONFIG=3d_fullres FOLD=0 R="2 4" BUNDLES=bundles
"""

import argparse
from pathlib import Path

from fastnnunet.cli.export import export_student
from fastnnunet.nnunet.files.paths import resolve_dataset
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from pipelines.common import bundle_folder, run


def main(args: argparse.Namespace) -> None:
    name = resolve_dataset(args.dataset)
    for r in args.r:
        export_student(
            dataset=name,
            configuration=args.configuration,
            plans="nnUNetPlans",
            fold=str(args.fold),
            student=StudentSpec(r=r),
            distill=DistillSpec(),
            output=bundle_folder(args.to, name, args.configuration, args.fold, r),
            checkpoint="checkpoint_final.pth",
            overwrite=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("r", type=int, nargs="+")
    parser.add_argument("--to", type=Path, default=Path("bundles"))
    run(lambda: main(parser.parse_args()))
