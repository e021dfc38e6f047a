"""`fastnnunet export`: a student as a bundle."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Export a student for deployment; always validated on real patches.")


@app.callback()
def _group() -> None:
    """Keeps `export` a group while it has one command."""


@app.command("onnx")
def onnx(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Data set id or name.")],
    fold: Annotated[str, typer.Option("-f", "--fold", help="The student's fold.")],
    reduction: Annotated[int, typer.Option("-r", "--reduction", help="Student size.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle folder to write.")],
    configuration: Annotated[str, typer.Option("-c", "--configuration")] = "3d_fullres",
    alpha: Annotated[float, typer.Option("-a", "--alpha", help="As in training; names the student.")] = 0.3,
    temperature: Annotated[float, typer.Option("-temp", "--temperature", help="As in training.")] = 3.0,
    plans: Annotated[str, typer.Option("-p", "--plans", help="The teacher's plans.")] = "nnUNetPlans",
    checkpoint: Annotated[str, typer.Option("-chk", help="Checkpoint of the student.")] = "checkpoint_final.pth",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
) -> None:
    """Write a bundle: model.onnx with its weights inside, bundle.json, parity.npz.

    The exported model must compute what PyTorch computes on real patches, else nothing is written.

    Example:

      fastnnunet export onnx -d 4 -c 3d_fullres -f 0 -r 4 -o hippocampus_r4
    """
    from fastnnunet.cli.train import parse_folds
    from fastnnunet.export.bundle import export_bundle
    from fastnnunet.nnunet.paths import resolve_dataset
    from fastnnunet.nnunet.student import student_folder
    from fastnnunet.specs.distill import DistillSpec, StudentSpec

    folder = student_folder(
        resolve_dataset(dataset),
        plans,
        configuration,
        StudentSpec(r=reduction),
        DistillSpec(alpha=alpha, temperature=temperature),
    )
    report = export_bundle(folder, parse_folds([fold])[0], output, checkpoint=checkpoint, overwrite=overwrite)
    print(f"bundle: {output}")
    print(
        f"parity with PyTorch on {report.patches} real patches: largest logit difference "
        f"{report.max_abs_difference:.2g} (logits up to {report.max_abs_logit:.3g}), "
        f"same label on {report.label_agreement:.3%} of voxels"
    )
