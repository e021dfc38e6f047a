"""`fastnnunet export`: a student as a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastnnunet.cli.tensorrt import tensorrt
from fastnnunet.errors import NotFoundError, SpecError

if TYPE_CHECKING:
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.graph import GraphSpec
    from fastnnunet.specs.student import StudentSpec

app = typer.Typer(no_args_is_help=True, help="Export a student for deployment; always validated on real patches.")


app.command("tensorrt")(tensorrt)


@app.command("onnx")
def onnx(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Data set id or name.")],
    fold: Annotated[str, typer.Option("-f", "--fold", help="The student's fold.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle folder to write.")],
    reduction: Annotated[list[int] | None, typer.Option("-r", "--reduction", help="Student size.")] = None,
    student_file: Annotated[
        Path | None, typer.Option("--student", help="YAML of a student: network_class_name and arch_kwargs, or others.")
    ] = None,
    family: Annotated[str, typer.Option("--family", help="width, or lite: thin full-resolution stage.")] = "width",
    round_to: Annotated[int, typer.Option("--round-to", help="Widths in multiples of this.")] = 1,
    blocks: Annotated[str, typer.Option("-bs", "--blocks", help="reduce, keep, increase or adaptive depth.")] = "auto",
    architecture: Annotated[str, typer.Option("--architecture", help="same, plain or residual.")] = "same",
    size: Annotated[str | None, typer.Option("-ts", "--size", help="A stock Primus: S, B, M or L.")] = None,
    configuration: Annotated[str, typer.Option("-c", "--configuration")] = "3d_fullres",
    alpha: Annotated[float, typer.Option("-a", "--alpha", help="As in training; names the student.")] = 0.3,
    temperature: Annotated[float, typer.Option("-temp", "--temperature", help="As in training.")] = 3.0,
    plans: Annotated[str, typer.Option("-p", "--plans", help="The teacher's plans.")] = "nnUNetPlans",
    student_plans: Annotated[
        str | None, typer.Option("-spl", help="Name of the student's plans, when several students fit.")
    ] = None,
    checkpoint: Annotated[str, typer.Option("-chk", help="Checkpoint of the student.")] = "checkpoint_final.pth",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    patch_size: Annotated[
        list[int] | None,
        typer.Option("--patch-size", help="Window of another size than the trained one, z y x; U-Nets only."),
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="The graph takes any patch size; U-Nets only.")] = False,
    simplify: Annotated[bool, typer.Option("--simplify", help="Fold constants (matters for Primus).")] = False,
    batch: Annotated[int | None, typer.Option("--batch", help="Fixed batch size [default: any].")] = None,
) -> None:
    """Write a bundle: model.onnx with its weights inside, bundle.json, parity.npz.

    The exported model must compute what PyTorch computes on real patches, else nothing is written.

    Example:

      fastnnunet export onnx -d 4 -c 3d_fullres -f 0 -r 4 -o hippocampus_r4
    """
    from fastnnunet.cli.train import student_specs
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.graph import GraphSpec
    from fastnnunet.specs.student import StudentSpec

    graph = GraphSpec(
        patch_size=tuple(patch_size) if patch_size else None,
        dynamic_space=dynamic,
        simplify=simplify,
        batch_size=batch,
    )
    choices = {"family": family, "round_to": round_to, "blocks": blocks, "architecture": architecture, "size": size}
    named = student_plans is not None and not reduction and student_file is None and size is None
    students = [StudentSpec()] if named else student_specs(reduction, student_file, choices)
    if len(students) > 1:
        raise SpecError(f"-r: got {len(students)} sizes, expected one student a bundle")
    export_student(
        dataset=dataset,
        configuration=configuration,
        plans=plans,
        fold=fold,
        student=students[0],
        distill=DistillSpec(alpha=alpha, temperature=temperature),
        output=output,
        checkpoint=checkpoint,
        overwrite=overwrite,
        student_plans=student_plans,
        graph=graph,
    )


def export_student(
    *,
    dataset: str,
    configuration: str,
    plans: str,
    fold: str,
    student: "StudentSpec",
    distill: "DistillSpec",
    output: Path | None,
    checkpoint: str,
    overwrite: bool,
    verbose: bool = True,
    student_plans: str | None = None,
    graph: "GraphSpec | None" = None,
) -> Path:
    """Export a student found by what it was trained with or by its `student_plans`.

    `output` None puts `bundle/` beside its checkpoint.
    """
    from fastnnunet.cli.train import parse_folds
    from fastnnunet.export.bundle import export_bundle
    from fastnnunet.nnunet.paths import model_folder, resolve_dataset
    from fastnnunet.nnunet.student import STOCK_TRAINER, find_student
    from fastnnunet.specs.graph import GraphSpec

    name = resolve_dataset(dataset)
    if student_plans is not None:
        folder = model_folder(name, STOCK_TRAINER, student_plans, configuration)
        found = sorted(folder.parent.glob(f"*__{student_plans}__{configuration}"))  # a stock Primus has its own trainer
        folder = found[0] if found else folder
        if not folder.is_dir():
            there = [p.name.split("__")[1] for p in sorted(folder.parent.glob(f"*__{plans}_*__{configuration}"))]
            raise NotFoundError(f"no student at {folder}\nstudents that exist: {', '.join(there) or '(none)'}")
    else:
        try:
            folder = find_student(name, plans, configuration, student, distill)
        except NotFoundError as e:
            raise NotFoundError(
                f"{e}\ntrain it with: fastnnunet train -d {dataset} -c {configuration} -f {fold} -r {student.r} "
                f"-a {distill.alpha:g} -temp {distill.temperature:g}"
            ) from e
    output = output or folder / f"fold_{fold}" / "bundle"
    report = export_bundle(
        folder,
        parse_folds([fold])[0],
        output,
        checkpoint=checkpoint,
        overwrite=overwrite,
        graph=graph or GraphSpec(),
    )
    print(f"bundle: {output}")
    if verbose:
        print(
            f"parity with PyTorch on {report.patches} real patches: largest logit difference "
            f"{report.max_abs_difference:.2g} (logits up to {report.max_abs_logit:.3g}), "
            f"same label on {report.label_agreement:.3%} of voxels"
        )
    return output
