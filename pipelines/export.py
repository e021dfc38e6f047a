"""Stage 3: students as validated bundles.

make export DATASET=4 CONFIG=3d_fullres FOLD=0 R="2 4" BUNDLES=bundles
"""

import argparse
from pathlib import Path

from fastnnunet import api
from fastnnunet.specs.student import StudentSpec
from pipelines.common import bundle_folder, run


def main(args: argparse.Namespace) -> None:
    for r in args.r:
        model = api.student_model(args.dataset, StudentSpec(r=r), configuration=args.configuration)
        bundle = bundle_folder(args.to, model.parent.name, args.configuration, args.fold, r)
        with api.View() as view:
            exported = api.export(model, args.fold, bundle, overwrite=True, progress=view)
        print(f"bundle: {exported.bundle}\n{exported.described}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("r", type=int, nargs="+")
    parser.add_argument("--to", type=Path, default=Path("bundles"))
    run(lambda: main(parser.parse_args()))
