"""`fastnnunet export`: a student, or a trained nnU-Net ensemble, as a bundle."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.choices import parse_folds, student_specs
from fastnnunet.cli.parts.fields import spread
from fastnnunet.cli.quantize import quantize
from fastnnunet.cli.tensorrt import tensorrt
from fastnnunet.errors import SpecError

if TYPE_CHECKING:
    from fastnnunet.specs.graph import GraphSpec

app = typer.Typer(no_args_is_help=True, help="Export a student or an ensemble for deployment; always validated.")


app.command("tensorrt")(tensorrt)
app.command("quantize")(quantize)


@app.command("onnx")
@spread
def onnx(
    context: typer.Context,
    origin: options.ByName,
    student: options.Student,
    trained: options.Trained,
    shape: options.Graph,
    output: Annotated[Path | None, options.ask("-o --output", "The bundle folder to write.")] = None,
    folds: Annotated[list[str] | None, options.ask("-f --fold", "Fold; several make an ensemble.")] = None,
    name: options.RunName = None,
    dataset: Annotated[str | None, options.ask("-d --dataset", "Data set id or name.")] = None,
    model: Annotated[Path | None, options.ask("-m --model", "Instead of -d: any nnU-Net model folder.")] = None,
    teacher: Annotated[bool, options.ask("--teacher", "With -d: the trained model itself, no student.")] = False,
    reduction: options.Reduction = None,
    student_file: options.StudentFile = None,
    student_plans: options.StudentPlans = None,
    checkpoint: Annotated[
        str, options.ask("-chk", "Checkpoint of the student.", options.STUDENT)
    ] = "checkpoint_final.pth",
    locator: Annotated[
        Path | None,
        options.ask(
            "--locator",
            "Model folder of `train --locator`: it finds the box in which alone the model then runs.",
            options.STUDENT,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    allow_code: options.AllowCode = False,
) -> None:
    """Write a bundle: model.onnx (or one for each fold) with its weights inside, bundle.json, parity.npz.

    The exported model must compute what PyTorch computes on real patches, else nothing is written; a model folder whose
    preprocessed cases are not there is compared on noise.

    Examples:

      fastnnunet export onnx -d 4 -c 3d_fullres -f 0 -r 4 -o hippocampus_r4

      fastnnunet export onnx -d 4 -c 3d_fullres -f 0 1 2 3 4 --teacher -o hippocampus_ensemble

      fastnnunet export onnx -m MODEL_FOLDER -f 0 1 2 3 4 -o ensemble

      fastnnunet export onnx --name my_student
    """
    from fastnnunet.specs.graph import GraphSpec

    configuration, plans, trainer = origin.values()
    graph = GraphSpec(**shape)
    if name is not None:
        own = {"output", "folds", "checkpoint", "overwrite", "allow_code", "locator", *shape}
        options.refuse_besides_name(context, own)
        export_model(
            name, folds or (), output, checkpoint=checkpoint, overwrite=overwrite, graph=graph, locator=locator
        )
        return
    if output is None or not folds:
        raise SpecError("give -o, the bundle folder to write, and -f, the fold or folds; or the --name of a run")
    if model is not None or teacher:
        if model is not None and (teacher or dataset is not None):
            raise SpecError("give either -m, or -d with --teacher")
        if reduction or student_file or student["size"] or student_plans:
            raise SpecError("-m and --teacher export a model as it is: leave out -r, --student, -ts and -spl")
        folder = _teacher(model, dataset, trainer, plans, configuration)
        export_model(
            folder,
            folds,
            output,
            checkpoint=checkpoint,
            overwrite=overwrite,
            graph=graph,
            needs_real_patches=False,
            locator=locator,
            shown=True,
        )
        return
    if dataset is None:
        raise SpecError("which model? give -d for a student or, with --teacher, a trained model; or -m MODEL_FOLDER")
    from fastnnunet.api.export import student_model
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.student import StudentSpec

    named = student_plans is not None and not reduction and student_file is None and student["size"] is None
    students = [StudentSpec()] if named else student_specs(reduction, student_file, student)
    if len(students) > 1:
        raise SpecError(f"-r: got {len(students)} sizes, expected one student a bundle")
    folder = student_model(
        dataset,
        students[0],
        DistillSpec(**trained),
        configuration=configuration,
        plans=plans,
        student_plans=student_plans,
        folds=parse_folds(folds),
    )
    export_model(folder, folds, output, checkpoint=checkpoint, overwrite=overwrite, graph=graph, locator=locator)


def _teacher(model: Path | None, dataset: str | None, trainer: str, plans: str, configuration: str) -> Path:
    from fastnnunet.nnunet.files.paths import trained_model_folder

    if model is not None:
        return model
    if dataset is None:
        raise SpecError("--teacher needs -d, the data set of the trained model")
    return trained_model_folder(dataset, trainer, plans, configuration)


def export_model(
    model: Path | str,
    folds: Sequence[str],
    output: Path | None,
    *,
    checkpoint: str = "checkpoint_final.pth",
    overwrite: bool = False,
    graph: "GraphSpec",
    verbose: bool = True,
    needs_real_patches: bool = True,
    locator: Path | None = None,
    shown: bool = False,
) -> None:
    """Export folds of a model folder, or a run by its name; show how far it is if `shown`, and say how well it went."""
    from fastnnunet.api import View, export, export_named
    from fastnnunet.events import ignore

    with View() as view:
        options: dict[str, Any] = {
            "checkpoint": checkpoint,
            "overwrite": overwrite,
            "graph": graph,
            "needs_real_patches": needs_real_patches,
            "locator": locator,
            "progress": view if shown else ignore,
        }
        if isinstance(model, str):
            exported = export_named(model, parse_folds(list(folds)), output, **options)
        else:
            exported = export(model, parse_folds(list(folds)), output, **options)
    print(f"bundle: {exported.bundle}")
    if verbose:
        print(exported.described)
