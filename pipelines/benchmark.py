"""Students against the five-fold mirrored ensemble and a single fold, on the data set's own test images.

make benchmark DATASET=4 CONFIG=3d_fullres FOLD=0 R="2 4" BUNDLES=bundles
"""

import argparse
import sys
from pathlib import Path

from fastnnunet import api
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.common import bundle_folder, run


def main(args: argparse.Namespace) -> None:
    raw = api.raw_folder(args.dataset)
    job = api.BenchmarkJob(
        teacher=TeacherSpec(dataset=raw.name, configuration=args.configuration),
        bundles=tuple(bundle_folder(args.bundles, raw.name, args.configuration, args.fold, r) for r in args.r),
        images=raw / "imagesTs",
        labels=raw / "labelsTs" if (raw / "labelsTs").is_dir() else None,
        output=args.output,
        baseline_cases=args.baseline_cases,
        cold_rounds=3,
    )
    command, file = ["python", "-m", "pipelines.benchmark", *sys.argv[1:]], args.output / f"benchmark_{raw.name}.json"
    with api.View() as view:
        done = api.benchmark(job, command=command, file=file, page=file.with_suffix(".html"), progress=view)
    print(f"{done.table}\nrecord: {done.file}\npage:   {done.page}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("r", type=int, nargs="+")
    parser.add_argument("--bundles", type=Path, default=Path("bundles"))
    parser.add_argument("--output", type=Path, default=Path("benchmark_out"))
    parser.add_argument("--baseline-cases", type=int, default=5)
    run(lambda: main(parser.parse_args()))
