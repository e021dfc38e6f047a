"""`fastnnunet predict`: nnU-Net's predict commands, on a bundle or on an nnU-Net model."""

import os
import sys
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.fields import spread
from fastnnunet.errors import SpecError, printable
from fastnnunet.specs.run.precision import Precision

if TYPE_CHECKING:
    from fastnnunet.api.predict import Predicted
    from fastnnunet.api.view import View
    from fastnnunet.runtime.predict import CaseResult

EXAMPLES = """Examples:

fastnnunet predict -i imagesTs -o predictions -m hippocampus_r4

fastnnunet predict -i imagesTs -o predictions -d 4 -c 3d_fullres -f 0 1 2 3 4

fastnnunet predict -i imagesTs -o predictions -m MODEL_FOLDER -f all --disable_tta

fastnnunet predict -i imagesTs -o predictions -d 4 -c 3d_fullres -num_parts 2 -part_id 0

fastnnunet predict -i FOLDER_OF_DICOM -o out -m bundle --output-format dicom-seg --keep-largest

fastnnunet predict -i patient_0000.nii.gz -o liver.nii.gz -m liver_r4 --profile
"""
PROFILE_FILE = "fastnnunet_profile.json"


@spread
def predict(
    context: typer.Context,
    source: Annotated[
        Path,
        options.ask("-i --input", "Image, folder of images named CASE_0000, CASE_0001, ..., or of DICOM files."),
    ],
    output: Annotated[Path, options.ask("-o --output", "Folder, or a file for a single image.")],
    outputs: options.Outputs,
    model: Annotated[
        Path | None,
        options.ask("-m --model", "Bundle of `fastnnunet export`, or nnU-Net model folder."),
    ] = None,
    name: options.RunName = None,
    dataset: Annotated[
        str | None, options.ask("-d --dataset", "Instead of -m: data set id or name in nnUNet_results.")
    ] = None,
    plans: Annotated[str, options.ask("-p --plans", "With -d: plans.", options.MODEL)] = "nnUNetPlans",
    trainer: Annotated[str, options.ask("-tr --trainer", "With -d: trainer.", options.MODEL)] = "nnUNetTrainer",
    configuration: Annotated[
        str | None, options.ask("-c --configuration", "With -d: configuration, such as 3d_fullres.")
    ] = None,
    folds: Annotated[
        list[str] | None,
        options.ask("-f --fold", "Folds; default: 0 1 2 3 4, of a bundle all that it has."),
    ] = None,
    step_size: Annotated[
        float | None,
        options.ask(
            "-step_size --step_size",
            "Step between tiles / patch, of nnU-Net's window; default: 0.5, or one pass where the bundle allows it.",
            options.MODEL,
        ),
    ] = None,
    passes: Annotated[
        int | None,
        options.ask(
            "--passes", "Instead of one pass: the mean of this many, shifted against the strides.", options.MODEL, min=1
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        options.ask(
            "--memory-limit",
            "Of one pass: memory of the network for a tile, such as 4G; default: 2G, or what the smallest needs.",
            options.RUN,
        ),
    ] = None,
    locate: Annotated[
        bool,
        options.ask(
            "--locate/--no-locate",
            "Predict within the box that the bundle's locator finds, if it has one; or everywhere.",
            options.MODEL,
        ),
    ] = True,
    disable_tta: Annotated[bool, options.ask("--disable_tta", "No mirroring: faster, less accurate.")] = False,
    verbose: Annotated[
        bool, options.ask("--verbose", "A line for each case: its shapes and times.", options.OUTPUT)
    ] = False,
    save_probabilities: Annotated[
        bool, options.ask("--save_probabilities", "Also write CASE.npz and CASE.pkl.", options.OUTPUT)
    ] = False,
    continue_prediction: Annotated[
        bool, options.ask("--continue_prediction --c", "Leave out cases that are predicted already.")
    ] = False,
    checkpoint: Annotated[
        str | None, options.ask("-chk", "Of a model folder; default: checkpoint_final.pth.", options.MODEL)
    ] = None,
    npp: Annotated[
        int, options.ask("-npp", "One thread reads; none where this and -nps are 0.", options.RUN, envvar="nnUNet_npp")
    ] = 3,
    nps: Annotated[
        int, options.ask("-nps", "One thread writes; none where this and -npp are 0.", options.RUN, envvar="nnUNet_nps")
    ] = 3,
    prev_stage_predictions: Annotated[
        Path | None,
        options.ask(
            "-prev_stage_predictions --prev_stage_predictions",
            "Cascades: segmentations of the previous stage.",
            options.MODEL,
        ),
    ] = None,
    num_parts: Annotated[
        int, options.ask("-num_parts", "Number of commands that share the folder, each with its -part_id.", options.RUN)
    ] = 1,
    part_id: Annotated[int, options.ask("-part_id", "Which of them this is, from 0.", options.RUN)] = 0,
    device: Annotated[
        str | None,
        options.ask(
            "-device",
            "cpu, cuda (cuda:1, ... another GPU), or mps (computed on the CPU); default: where the backend "
            "computes, of auto and onnxruntime the CPU.",
            options.RUN,
        ),
    ] = None,
    disable_progress_bar: Annotated[
        bool, options.ask("--disable_progress_bar", "No progress bar.", options.OUTPUT)
    ] = False,
    not_on_device: Annotated[
        bool,
        options.ask(
            "--not_on_device", "Changes nothing: tiles are summed where the network leaves its logits.", options.RUN
        ),
    ] = False,
    backend: Annotated[
        str,
        options.ask(
            "--backend", "auto (the fastest installed), onnxruntime, openvino, torch or tensorrt.", options.RUN
        ),
    ] = "auto",
    precision: Annotated[
        Precision,
        options.ask(
            "--precision",
            "fp32 (as nnU-Net); bf16: faster where the CPU has it, not exact; int8: after `fastnnunet export "
            "quantize`; fp16: engines of tensorrt.",
            options.RUN,
        ),
    ] = "fp32",
    threads: Annotated[
        int | None, options.ask("--threads", "Threads of the backend; default: all cores.", options.RUN)
    ] = None,
    series: Annotated[
        str | None, options.ask("--series", "SeriesInstanceUID, where a DICOM folder holds several.", options.OUTPUT)
    ] = None,
    keep_largest: options.KeepLargest = None,
    min_size: options.MinSize = None,
    fill_holes: options.FillHoles = None,
    pp_pkl_file: options.PostprocessingFile = None,
    allow_code: options.AllowCode = False,
    profile: Annotated[
        bool, options.ask("--profile", "Print the time of every stage of every case.", options.OUTPUT)
    ] = False,
    profile_json: Annotated[
        bool, options.ask("--profile_json", f"Write it beside the output, as {PROFILE_FILE}.", options.OUTPUT)
    ] = False,
) -> None:
    """Predict as `nnUNetv2_predict` and `nnUNetv2_predict_from_modelfolder` do: their flags, names and files.

    Runs a bundle, or a trained nnU-Net model with all its folds and mirrored. The latter is exported on first use (this
    needs torch) and kept in ~/.cache/fastnnunet (FASTNNUNET_CACHE_HOME). The next case is read and the last written
    meanwhile. In a folder, a case that cannot be predicted is reported and left out, and the exit code is 1.
    """
    from fastnnunet.api import View, find_bundle
    from fastnnunet.api import predict as run
    from fastnnunet.events import Event, Progress, Result
    from fastnnunet.images.output import RunArguments
    from fastnnunet.outputs.spec import OutputSpec

    if name is not None:
        model_options = {"model", "dataset", "configuration", "plans", "trainer"}
        options.refuse_besides_name(context, {p.name for p in context.command.params} - model_options)
        model = find_bundle(name)
    written = OutputSpec(**outputs)
    predicting = False
    with View(bars=not disable_progress_bar) as view:

        def show(event: Event) -> None:
            nonlocal predicting
            predicting = predicting or (isinstance(event, Progress) and event.unit == "cases")
            view(event)
            if verbose and isinstance(event, Result) and event.value.error is None:
                view.print(_describe(event.value))

        try:
            prediction = run(
                _model_folder(model, dataset, configuration, plans, trainer),
                source,
                output,
                folds=_folds(folds, model),
                checkpoint=checkpoint,
                backend=backend,
                precision=precision,
                threads=threads,
                device=device,
                step_size=step_size,
                mirroring=not disable_tta,
                passes=passes,
                memory_limit=memory_limit,
                locate=locate,
                arguments=RunArguments(
                    num_processes_preprocessing=npp,
                    num_processes_segmentation_export=nps,
                    num_parts=num_parts,
                    part_id=part_id,
                ),
                save_probabilities=save_probabilities,
                overwrite=not continue_prediction,
                previous=prev_stage_predictions,
                keep_largest=keep_largest or (),
                min_size=min_size,
                fill_holes=fill_holes or (),
                postprocessing_file=pp_pkl_file,
                dicom_series=series,
                outputs=written,
                progress=show,
            )
        except KeyboardInterrupt:
            if not predicting:
                raise
            _leave_interrupted(view)

    done, total = prediction.done, len(prediction.cases)
    loaded = f"(model loaded in {prediction.load_s:.2f} s)"
    way = "" if prediction.described["way"] == "window" else f" in {prediction.described['way']}"
    way += " in the locator's box" if prediction.described.get("locate") else ""
    print(f"{len(done)} case(s) predicted with {prediction.engine}{way} into {output} {loaded}")
    if done:
        stages = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in _means(done).items())
        print(f"{1e3 * prediction.wall_s / total:.1f} ms per case; mean of its stages: {stages}")
    if profile:
        _print_profile(done)
    if profile_json:
        _write_profile(prediction, output)
    if len(done) < total:
        print(f"{total - len(done)} case(s) failed, see above", file=sys.stderr)
        raise typer.Exit(1)


def _model_folder(model: Path | None, dataset: str | None, configuration: str | None, plans: str, trainer: str) -> Path:
    """The folder that -m, or -d with -c, -p and -tr, name. Raises SpecError when it is both or neither."""
    if (model is None) == (dataset is None):
        raise SpecError("which model? give either -m (a bundle or a model folder) or -d with -c (as in nnUNet_results)")
    if model is not None:
        return model
    if configuration is None:
        raise SpecError("-d needs a configuration too, such as -c 3d_fullres")
    from fastnnunet.nnunet.files.paths import trained_model_folder

    return trained_model_folder(str(dataset), trainer, plans, configuration)


def _folds(given: list[str] | None, model: Path | None) -> "tuple[int | str, ...] | None":
    """nnU-Net's default for model folders; None, all there are, for bundles."""
    from fastnnunet.cli.parts.choices import parse_folds
    from fastnnunet.specs.bundle import is_bundle

    if given:
        return parse_folds(given)
    return None if model is not None and is_bundle(model) else (0, 1, 2, 3, 4)


def _leave_interrupted(view: "View") -> NoReturn:
    """Exit code 130 at once: threads that read or compute are not waited for, and what they hold is not torn down."""
    view.__exit__(None, None, None)
    print("interrupted; finished cases are kept, --continue_prediction goes on after them", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


def _describe(result: "CaseResult") -> str:
    times = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in _means([result]).items())
    return f"{printable(result.case_id)}: image {result.image_shape}, network sees {result.network_shape}; ms: {times}"


def _means(results: "list[CaseResult]") -> dict[str, float]:
    """Mean seconds of every stage."""
    from fastnnunet.runtime.times import STAGES

    return {stage: mean(getattr(r.times, f"{stage}_s") for r in results) for stage in STAGES}


def _print_profile(done: "list[CaseResult]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="milliseconds (cases overlap: the time on the clock is shorter than the sum)")
    table.add_column("case")
    for stage in (*_means(done[:1]), "total") if done else ():
        table.add_column(stage, justify="right")
    for result in done:
        values = [*_means([result]).values(), result.times.total_s]
        table.add_row(Text(printable(result.case_id)), *(f"{1e3 * value:.1f}" for value in values))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _write_profile(prediction: "Predicted", output: Path) -> None:
    import json
    from dataclasses import asdict

    from fastnnunet.system.files import atomic_output, make_folder

    record = {
        **prediction.described,
        "load_s": prediction.load_s,
        "wall_s": prediction.wall_s,
        "cases": [{"case": r.case_id, **asdict(r.times)} for r in prediction.cases if r.error is None],
        "failed": {r.case_id: str(r.error) for r in prediction.cases if r.error is not None},
    }
    folder = output.parent if any(r.output == output for r in prediction.cases) else output
    make_folder(folder)
    with atomic_output(folder / PROFILE_FILE) as partial:
        partial.write_text(json.dumps(record, indent=1))
