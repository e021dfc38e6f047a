"""`fastnnunet benchmark`: the ensemble, a single fold and bundles on the same images."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.choices import teacher_of
from fastnnunet.cli.parts.fields import spread
from fastnnunet.errors import SpecError


@spread
def benchmark(
    teacher: options.Teacher,
    images: Annotated[Path, options.ask("-i --input", "Folder of images named CASE_0000, CASE_0001, ...")],
    bundles: Annotated[list[Path], options.ask("-m --model", "Bundle folder(s).")],
    output: Annotated[Path, options.ask("-o --output", "Folder for the record, the plot, the predictions.")],
    labels: Annotated[Path | None, options.ask("-g --labels", "True segmentations: adds Dice.")] = None,
    folds: options.Folds = None,
    backends: Annotated[
        list[str] | None,
        options.ask(
            "--backend",
            "openvino, onnxruntime, onnxruntime:cuda, torch, tensorrt (default: all installed, no GPU).",
            options.RUN,
        ),
    ] = None,
    precisions: Annotated[
        list[str] | None,
        options.ask("--precision", "fp32, bf16, fp16, int8, where a backend has it (fp32).", options.RUN),
    ] = None,
    threads: Annotated[
        int | None, options.ask("--threads", "For every arm alike (default: all cores).", options.RUN)
    ] = None,
    cases: Annotated[int | None, options.ask("--cases", "Only the first so many images.", options.MEASURED)] = None,
    repeat: Annotated[int, options.ask("--repeat", "Measurements per case.", options.MEASURED)] = 5,
    baseline_cases: Annotated[
        int, options.ask("--baseline-cases", "Images for the two nnU-Net arms.", options.MEASURED)
    ] = 5,
    baseline_repeat: Annotated[
        int, options.ask("--baseline-repeat", "Measurements per case for them.", options.MEASURED)
    ] = 1,
    baseline_warm_up: Annotated[
        bool, typer.Option(help="Let them predict one case unmeasured before; leave it out for large images.")
    ] = True,
    extrapolate_ensemble: Annotated[
        bool,
        options.ask(
            "--extrapolate-ensemble", "Do not run the ensemble: one fold, forward passes counted.", options.MEASURED
        ),
    ] = False,
    runtime_ensemble: Annotated[
        bool, options.ask("--runtime-ensemble", "The ensemble through fastnnunet's runtime too.", options.MEASURED)
    ] = False,
    same_network: Annotated[
        bool, typer.Option(help="Run each bundle's network in nnunetv2 too and count voxels that differ.")
    ] = True,
    cold_rounds: Annotated[
        int, options.ask("--cold-rounds", "New processes per arm; 0: no cold start.", options.MEASURED)
    ] = 3,
    device: Annotated[str, options.ask("-device --device", "Of the nnU-Net arms: cpu or cuda.", options.RUN)] = "cpu",
    tolerance_mm: Annotated[float, options.ask("--tolerance", "Of the surface Dice in mm.", options.MEASURED)] = 1.0,
    allow_code: options.AllowCode = False,
    html: Annotated[
        Path | None, options.ask("--html", "Also a page with plots and slices, one file without links.")
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
    from fastnnunet.engines.base import Precision
    from fastnnunet.evaluate.tables import wide_console

    wrong = [p for p in precisions or [] if p not in get_args(Precision)]
    if wrong:
        raise SpecError(f"--precision: got {wrong[0]!r}, expected one of {', '.join(get_args(Precision))}")
    job = BenchmarkJob(
        teacher=teacher_of(teacher, folds),
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
