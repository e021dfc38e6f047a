"""`fastnnunet export quantize`: int8 and bf16 of a bundle, measured beside fp32."""

from pathlib import Path
from typing import Annotated, cast

import typer

from fastnnunet.errors import SpecError


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder of `fastnnunet export onnx`.")],
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision", help="int8 (models of its own) and/or bf16 (measured only; OpenVINO). Default: int8."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", help="onnxruntime (Q/DQ, TensorRT builds from it too), openvino. Default: what is installed."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "-i", "--input", help="Folder of images to calibrate and judge on. Default: the preprocessed data set."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("-g", "--labels", help="With -i: true segmentations. Default: the fp32 prediction is the truth."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option("--case", help="Cases to judge on. Default: held-out ones of the fold; with -i the first."),
    ] = None,
    cases: Annotated[int, typer.Option("--cases", help="Without --case: how many.")] = 8,
    patches: Annotated[int, typer.Option("--patches", help="Patches to calibrate on, none from judged cases.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of the places of these patches.")] = 0,
    max_dice_loss: Annotated[
        float, typer.Option("--max-dice-loss", help="Points of Dice that may be lost; nothing is written beyond.")
    ] = 0.2,
    threads: Annotated[int | None, typer.Option("--threads", help="Of both backends; default: all cores.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the measurement as JSON too.")] = None,
) -> None:
    """Make int8 models of a bundle, calibrated on real patches, and measure what they lose beside fp32.

    Both predict the same cases; a loss above --max-dice-loss is refused and the bundle left as it was. What was
    measured is kept in bundle.json. Without nnU-Net's preprocessed data (or without nnU-Net) give images with -i.

    Examples:

      fastnnunet export quantize hippocampus_r4

      fastnnunet export quantize hippocampus_r4 --precision int8 bf16 -i imagesVal -g labelsVal

      fastnnunet predict -i imagesTs -o predictions -m hippocampus_r4 --precision int8
    """
    from fastnnunet.api import View
    from fastnnunet.engines.base import Precision
    from fastnnunet.release.gate import describe
    from fastnnunet.release.quantize import QuantizeJob, quantize_bundle
    from fastnnunet.specs.provenance import write_json

    if output is not None and output.suffix != ".json":
        raise SpecError(f"-o: got {output}, expected a file name ending in .json")
    job = QuantizeJob(
        bundle=bundle,
        precisions=tuple(cast(Precision, name) for name in precision or ["int8"]),  # the job checks them
        backends=tuple(backend or ()),
        images=images,
        labels=labels,
        cases=tuple(case or ()),
        num_cases=cases,
        patches=patches,
        seed=seed,
        max_loss_points=max_dice_loss,
        threads=threads,
    )
    with View() as view:
        result = quantize_bundle(job, view)
    print(f"judged on {result.judged_on}")
    for comparison in result.comparisons:
        print(describe(comparison))
    print(", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in result.sizes_bytes.items()))
    if output is not None:
        write_json(output, result.record)
        print(f"record: {output}")
