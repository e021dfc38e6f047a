"""`fastnnunet predict`: a bundle on an image or a folder of images."""

import sys
import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastnnunet.cli.label_options import FillHoles, KeepLargest, MinSize, PostprocessingFile

if TYPE_CHECKING:
    from fastnnunet.runtime.cases import Case
    from fastnnunet.runtime.predict import CaseResult


def predict(
    source: Annotated[
        Path,
        typer.Option(
            "-i", "--input", help="Image, folder of images named CASE_0000, CASE_0001, ..., or of DICOM files."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder, or a file for a single image.")],
    model: Annotated[Path, typer.Option("-m", "--model", help="Bundle folder of `fastnnunet export onnx`.")],
    backend: Annotated[
        str, typer.Option("--backend", help="auto (the fastest installed), onnxruntime, openvino, torch or tensorrt.")
    ] = "auto",
    step_size: Annotated[
        float | None,
        typer.Option("-step_size", "--step_size", help="Step between tiles / patch; default: the bundle's."),
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save_probabilities", help="Also write CASE.npz and CASE.pkl.")
    ] = False,
    continue_prediction: Annotated[
        bool, typer.Option("--continue_prediction", help="Leave out cases that are predicted already.")
    ] = False,
    prev_stage_predictions: Annotated[
        Path | None,
        typer.Option(
            "-prev_stage_predictions", "--prev_stage_predictions", help="Cascades: segmentations of the previous stage."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of the backend; default: all cores.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "int8"],
        typer.Option(
            "--precision",
            help="fp32 (as nnU-Net); bf16: faster where the CPU has it, not exact; fp16, int8: engines of tensorrt.",
        ),
    ] = "fp32",
    disable_progress_bar: Annotated[bool, typer.Option("--disable_progress_bar")] = False,
    series: Annotated[
        str | None, typer.Option("--series", help="SeriesInstanceUID, where a DICOM folder holds several.")
    ] = None,
    output_format: Annotated[
        Literal["image", "dicom-seg"],
        typer.Option("--output-format", help="image: the model's file ending; dicom-seg: CASE.dcm, for DICOM input."),
    ] = "image",
    keep_largest: KeepLargest = None,
    min_size: MinSize = None,
    fill_holes: FillHoles = None,
    pp_pkl_file: PostprocessingFile = None,
) -> None:
    """Predict with a bundle: nnU-Net's preprocessing, sliding window, geometry and file names, without nnU-Net.

    In a folder a case that cannot be predicted is reported and left out, and the exit code is 1.

    Example:

      fastnnunet predict -i imagesTs -o predictions -m hippocampus_r4

      fastnnunet predict -i FOLDER_OF_DICOM -o out -m bundle --output-format dicom-seg --keep-largest
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fastnnunet.runtime.label_rules import cleanup_from_words
    from fastnnunet.runtime.predict import Predictor

    start = time.perf_counter()
    predictor = Predictor.load(model, backend, threads=threads, step_size=step_size, precision=precision)
    load_s = time.perf_counter() - start
    cleanup = cleanup_from_words(
        predictor.spec.labels,
        keep_largest=keep_largest or (),
        min_size=min_size,
        fill_holes=fill_holes or (),
        postprocessing_file=pp_pkl_file,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=disable_progress_bar,
    )
    with progress:
        all_cases = progress.add_task("cases", total=None)
        one_case = progress.add_task("tiles", total=None, visible=False)

        def on_start(case: "Case", index: int, total: int) -> None:
            progress.update(all_cases, total=total, completed=index)
            progress.update(one_case, description=case.case_id, visible=False)

        def on_tiles(done: int, total: int) -> None:
            progress.update(one_case, completed=done, total=total, visible=total > 1)

        def on_done(result: "CaseResult") -> None:
            progress.advance(all_cases)
            if result.error is not None:
                message = f"failed: {result.case_id}: {result.error}"
                progress.console.print(message, markup=False, highlight=False, soft_wrap=True)

        results = predictor.predict_files(
            source,
            output,
            save_probabilities=save_probabilities,
            overwrite=not continue_prediction,
            previous=prev_stage_predictions,
            cleanup=cleanup,
            dicom_series=series,
            dicom_seg=output_format == "dicom-seg",
            on_start=on_start,
            on_tiles=on_tiles,
            on_done=on_done,
        )

    done = [r for r in results if r.error is None]
    print(f"{len(done)} case(s) predicted with {predictor.backend.name} into {output} (model loaded in {load_s:.2f} s)")
    if done:
        stages = ("read", "preprocess", "infer", "postprocess", "write")
        parts = ", ".join(f"{s} {1e3 * mean(getattr(r.times, f'{s}_s') for r in done):.1f}" for s in stages)
        print(f"mean per case: {1e3 * mean(r.times.total_s for r in done):.1f} ms ({parts})")
    if len(done) < len(results):
        print(f"{len(results) - len(done)} case(s) failed, see above", file=sys.stderr)
        raise typer.Exit(1)
