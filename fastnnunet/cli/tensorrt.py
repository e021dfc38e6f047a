"""`fastnnunet export tensorrt`: engines of a bundle."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def tensorrt(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder of `fastnnunet export onnx`.")],
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            help="GPU architectures: sm80 (A100), sm86 (RTX 30), sm89 (RTX 40), sm120 (RTX 50) ... Default: with "
            "tensorrt_rtx all from sm80 on, with tensorrt the GPU of this machine, for which alone it builds.",
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option("--precision", help="fp32, fp16 (norms in fp32), or int8 (needs the bundle's model_int8.onnx)."),
    ] = "fp16",
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", min=1, help="Batches of 1 to this many patches. Default: 4, for 2d 16, or what the bundle takes."
        ),
    ] = None,
    tile: Annotated[
        list[int] | None,
        typer.Option(
            "--tile", help="Largest tile of one pass, z y x (default: what 2G allow); smaller images take smaller ones."
        ),
    ] = None,
    library: Annotated[
        str | None, typer.Option("--library", help="tensorrt or tensorrt_rtx; default: the first that is installed.")
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache", help="Write to $FASTNNUNET_CACHE_HOME (~/.cache/fastnnunet) instead of BUNDLE/engines."
        ),
    ] = False,
) -> None:
    """Build TensorRT engines of a bundle, strongly typed, one for each fold and architecture; what is there is kept.

    The graph is first run on the CPU on the bundle's patches in the precision asked for, and refused if labels change.

    Example:

      fastnnunet export tensorrt hippocampus_r4 --arch sm86 sm89 --precision fp16
    """
    from fastnnunet.export.tensorrt import export_engines

    built = export_engines(
        bundle,
        precision=precision,
        architectures=tuple(arch or ()),
        library_name=library,
        max_batch=batch,
        largest_tile=tile or None,
        beside_bundle=not cache,
    )
    for engine in built:
        print(f"{'there' if engine.was_there else 'built'}: {engine.stored.key}: {engine.stored.path}")
    parity = min((engine.stored.info.parity for engine in built), key=lambda p: p["label_agreement"])
    print(
        f"the graph on a CPU, {parity['patches']} real patches: same label on {parity['label_agreement']:.3%} of "
        f"voxels, largest difference {parity['max_abs_difference']:.2g} in logits up to {parity['max_abs_logit']:.3g}"
    )
