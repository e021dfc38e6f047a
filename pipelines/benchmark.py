"""Students against the five-fold mirrored ensemble and a single fold, on the data set's own test images.

make benchmark DATASET=4 CONFIG=3d_fullres FOLD=0 R="2 4" BUNDLES=bundles
"""

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fastnnunet.bench.benchmark import run_benchmark
from fastnnunet.bench.job import BenchmarkJob
from fastnnunet.bench.report.headline import headline
from fastnnunet.bench.report.page import pictures_of, write_page
from fastnnunet.bench.report.plot import plot_benchmark
from fastnnunet.bench.report.table import benchmark_table
from fastnnunet.evaluate.tables import wide_console
from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset
from fastnnunet.specs.provenance import write_json
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.common import bundle_folder, run


def main(args: argparse.Namespace) -> None:
    name = resolve_dataset(args.dataset)
    raw = nnunet_folder("nnUNet_raw") / name
    labels = raw / "labelsTs"
    job = BenchmarkJob(
        teacher=TeacherSpec(dataset=name, configuration=args.configuration),
        bundles=tuple(bundle_folder(args.bundles, name, args.configuration, args.fold, r) for r in args.r),
        images=raw / "imagesTs",
        labels=labels if labels.is_dir() else None,
        output=args.output,
        baseline_cases=args.baseline_cases,
        cold_rounds=3,
    )
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("preparing", total=None)
        record = run_benchmark(
            job, lambda what, done, expected: bar.update(task, description=what, completed=done, total=expected)
        )
    record["command"] = shlex.join(["python", "-m", "pipelines.benchmark", *sys.argv[1:]])
    record["summary"] = headline(record)
    target = args.output / f"benchmark_{name}.json"
    write_json(target, record)
    plot_benchmark(record, target.with_suffix(".png"))
    wide_console().print(benchmark_table(record))
    page = target.with_suffix(".html")
    write_page(record, pictures_of(record, job.images, job.labels, job.output), page)
    print(f"record: {target}\npage:   {page}")


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
