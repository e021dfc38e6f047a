"""`fastnnunet benchmark`: the ensemble, a single fold and bundles on the same images."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from fastnnunet.cli import options
from fastnnunet.errors import SpecError


def benchmark(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Data set id or name of the teacher.")],
    images: Annotated[Path, typer.Option("-i", "--input", help="Folder of images named CASE_0000, CASE_0001, ...")],
    bundles: Annotated[list[Path], typer.Option("-m", "--model", help="Bundle folder(s).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the record, the plot, the predictions.")],
    labels: Annotated[Path | None, typer.Option("-g", "--labels", help="True segmentations: adds Dice.")] = None,
    configuration: options.Configuration = "3d_fullres",
    folds: options.Folds = None,
    plans: options.Plans = "nnUNetPlans",
    trainer: options.Trainer = "nnUNetTrainer",
    checkpoint: options.Checkpoint = "checkpoint_final.pth",
    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            help="openvino, onnxruntime, onnxruntime:cuda, torch, tensorrt [default: all installed, no GPU].",
        ),
    ] = None,
    precisions: Annotated[
        list[str] | None, typer.Option("--precision", help="fp32, bf16, fp16, int8, where a backend has it [fp32].")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="For every arm alike [default: all cores].")] = None,
    cases: Annotated[int | None, typer.Option("--cases", help="Only the first so many images.")] = None,
    repeat: Annotated[int, typer.Option("--repeat", help="Measurements per case.")] = 5,
    baseline_cases: Annotated[int, typer.Option("--baseline-cases", help="Images for the two nnU-Net arms.")] = 5,
    baseline_repeat: Annotated[int, typer.Option("--baseline-repeat", help="Measurements per case for them.")] = 1,
    baseline_warm_up: Annotated[
        bool, typer.Option(help="Let them predict one case unmeasured before; leave it out for large images.")
    ] = True,
    extrapolate_ensemble: Annotated[
        bool, typer.Option("--extrapolate-ensemble", help="Do not run the ensemble: one fold, forward passes counted.")
    ] = False,
    runtime_ensemble: Annotated[
        bool, typer.Option("--runtime-ensemble", help="The ensemble through fastnnunet's runtime too.")
    ] = False,
    same_network: Annotated[
        bool, typer.Option(help="Run each bundle's network in nnunetv2 too and count voxels that differ.")
    ] = True,
    cold_rounds: Annotated[int, typer.Option("--cold-rounds", help="New processes per arm; 0: no cold start.")] = 3,
    device: Annotated[str, typer.Option("-device", "--device", help="Of the nnU-Net arms: cpu or cuda.")] = "cpu",
    tolerance_mm: Annotated[float, typer.Option("--tolerance", help="Of the surface Dice in mm.")] = 1.0,
    allow_code: options.AllowCode = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also a page with plots and slices, one file without links.")
    ] = None,
) -> None:
    """Measure cold start, seconds per stage, memory, parity and Dice of bundles against nnU-Net's own predictor.

    Examples:

      fastnnunet benchmark -d 4 -i imagesTs -g labelsTs -m hippocampus_r4 -o benchmark_out --html benchmark.html

      fastnnunet benchmark -d 7 -i big -m bundle -o out --extrapolate-ensemble --no-baseline-warm-up --cold-rounds 0
    """
    import sys

    from fastnnunet.api import View
    from fastnnunet.api.benchmark import benchmark as run
    from fastnnunet.bench.job import BenchmarkJob
    from fastnnunet.cli.train import parse_folds
    from fastnnunet.engines.base import Precision
    from fastnnunet.evaluate.tables import wide_console
    from fastnnunet.specs.teacher import TeacherSpec

    wrong = [p for p in precisions or [] if p not in get_args(Precision)]
    if wrong:
        raise SpecError(f"--precision: got {wrong[0]!r}, expected one of {', '.join(get_args(Precision))}")
    job = BenchmarkJob(
        teacher=TeacherSpec(
            dataset=dataset,
            configuration=configuration,
            plans=plans,
            trainer=trainer,
            folds=parse_folds(folds or ["0", "1", "2", "3", "4"]),
            checkpoint=checkpoint,
        ),
        bundles=tuple(bundles),
        images=images,
        labels=labels,
        output=output,
        backends=tuple(backends or ()),
        precisions=tuple(cast(Precision, p) for p in precisions or ["fp32"]),
        threads=threads,
        cases=cases,
        baseline_cases=baseline_cases,
        repeat=repeat,
        baseline_repeat=baseline_repeat,
        baseline_warm_up=baseline_warm_up,
        extrapolate_ensemble=extrapolate_ensemble,
        runtime_ensemble=runtime_ensemble,
        same_network=same_network,
        cold_rounds=cold_rounds,
        device=device,
        tolerance_mm=tolerance_mm,
    )
    with View() as view:
        done = run(job, command=["fastnnunet", *sys.argv[1:]], page=html, progress=view)
    print(done.table)
    console = wide_console()
    console.print(done.record["summary"], highlight=False)
    console.print(f"record: {done.file}\nplot:   {done.plot}", highlight=False, soft_wrap=True)
    if html is not None:
        console.print(f"page:   {html}", highlight=False, soft_wrap=True)
