"""`fastnnunet export`: a student, or a trained nnU-Net ensemble, as a bundle."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.choices import parse_folds, student_specs
from fastnnunet.cli.parts.fields import spread
from fastnnunet.cli.quantize import quantize
from fastnnunet.cli.tensorrt import tensorrt
from fastnnunet.errors import NotFoundError, SpecError

if TYPE_CHECKING:
    from fastnnunet.export.parity import ParityReport
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.graph import GraphSpec
    from fastnnunet.specs.student import StudentSpec

app = typer.Typer(no_args_is_help=True, help="Export a student or an ensemble for deployment; always validated.")


app.command("tensorrt")(tensorrt)
app.command("quantize")(quantize)


@app.command("onnx")
@spread
def onnx(
    output: Annotated[Path, options.ask("-o --output", "The bundle folder to write.")],
    folds: Annotated[list[str], options.ask("-f --fold", "Fold; several make an ensemble.")],
    origin: options.ByName,
    student: options.Student,
    trained: options.Trained,
    shape: options.Graph,
    dataset: Annotated[str | None, options.ask("-d --dataset", "Data set id or name.")] = None,
    model: Annotated[Path | None, options.ask("-m --model", "Instead of -d: any nnU-Net model folder.")] = None,
    teacher: Annotated[bool, options.ask("--teacher", "With -d: the trained model itself, no student.")] = False,
    reduction: options.Reduction = None,
    student_file: options.StudentFile = None,
    student_plans: options.StudentPlans = None,
    checkpoint: Annotated[
        str, options.ask("-chk", "Checkpoint of the student.", options.STUDENT)
    ] = "checkpoint_final.pth",
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
    """
    from fastnnunet.specs.graph import GraphSpec

    configuration, plans, trainer = origin.values()
    graph = GraphSpec(**shape)
    if model is not None or teacher:
        if model is not None and (teacher or dataset is not None):
            raise SpecError("give either -m, or -d with --teacher")
        if reduction or student_file or student["size"] or student_plans:
            raise SpecError("-m and --teacher export a model as it is: leave out -r, --student, -ts and -spl")
        folder = _teacher(model, dataset, trainer, plans, configuration)
        export_teacher(folder, folds, output, checkpoint, overwrite=overwrite, graph=graph)
        return
    if dataset is None:
        raise SpecError("which model? give -d for a student or, with --teacher, a trained model; or -m MODEL_FOLDER")
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.student import StudentSpec

    named = student_plans is not None and not reduction and student_file is None and student["size"] is None
    students = [StudentSpec()] if named else student_specs(reduction, student_file, student)
    if len(students) > 1:
        raise SpecError(f"-r: got {len(students)} sizes, expected one student a bundle")
    export_student(
        dataset=dataset,
        configuration=configuration,
        plans=plans,
        fold=folds,
        student=students[0],
        distill=DistillSpec(**trained),
        output=output,
        checkpoint=checkpoint,
        overwrite=overwrite,
        student_plans=student_plans,
        graph=graph,
    )


def _teacher(model: Path | None, dataset: str | None, trainer: str, plans: str, configuration: str) -> Path:
    from fastnnunet.nnunet.files.paths import trained_model_folder

    if model is not None:
        return model
    if dataset is None:
        raise SpecError("--teacher needs -d, the data set of the trained model")
    return trained_model_folder(dataset, trainer, plans, configuration)


def export_teacher(
    folder: Path, folds: Sequence[str], output: Path, checkpoint: str, *, overwrite: bool, graph: "GraphSpec"
) -> None:
    """Export folds of a model folder as it is, and say how well that went."""
    from fastnnunet.export.bundle import export_bundle

    report = export_bundle(
        folder,
        parse_folds(list(folds)),
        output,
        checkpoint=checkpoint,
        overwrite=overwrite,
        graph=graph,
        needs_real_patches=False,
        on_stage=lambda number, total, what: print(f"export {number}/{total}: {what}", file=sys.stderr),
    )
    print(f"bundle: {output}")
    print(_parity(report))


def _parity(report: "ParityReport") -> str:
    kind = "real" if report.real else "noise"
    return (
        f"parity with PyTorch on {report.patches} {kind} patches: largest logit difference "
        f"{report.max_abs_difference:.2g} (logits up to {report.max_abs_logit:.3g}), "
        f"same label on {report.label_agreement:.3%} of voxels"
    )


def _train_command(
    dataset: str, configuration: str, plans: str, folds: Sequence[str], student: "StudentSpec", distill: "DistillSpec"
) -> str:
    """The `fastnnunet train` command of a student; one that is written out comes from a file."""
    words = ["fastnnunet", "train", "-d", dataset, "-c", configuration, "-p", plans, "-f", *folds]
    if student.is_explicit:
        words += ["--student", "FILE"]
    elif student.size is not None:
        words += ["-ts", student.size]
    else:
        words += ["-r", str(student.r)]
        flags = {"--family": "family", "--round-to": "round_to", "-bs": "blocks", "--architecture": "architecture"}
        default = type(student)()
        for flag, field in flags.items():
            if (value := getattr(student, field)) != getattr(default, field):
                words += [flag, str(value)]
    return shlex.join([*words, "-a", f"{distill.alpha:g}", "-temp", f"{distill.temperature:g}"])


def export_student(
    *,
    dataset: str,
    configuration: str,
    plans: str,
    fold: str | Sequence[str],
    student: "StudentSpec",
    distill: "DistillSpec",
    output: Path | None,
    checkpoint: str,
    overwrite: bool,
    verbose: bool = True,
    student_plans: str | None = None,
    graph: "GraphSpec | None" = None,
) -> Path:
    """Export a student found by what it was trained with or by its `student_plans`; several folds as an ensemble.

    `output` None puts `bundle/` beside its checkpoint.
    """
    from fastnnunet.export.bundle import export_bundle
    from fastnnunet.nnunet.files.paths import model_folder, resolve_dataset
    from fastnnunet.nnunet.student.plans import STOCK_TRAINER, find_student
    from fastnnunet.specs.graph import GraphSpec

    folds = [fold] if isinstance(fold, str) else list(fold)
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
            command = _train_command(dataset, configuration, plans, folds, student, distill)
            raise NotFoundError(f"{e}\ntrain it with: {command}") from e
    output = output or folder / f"fold_{folds[0]}" / "bundle"
    report = export_bundle(
        folder,
        parse_folds(folds),
        output,
        checkpoint=checkpoint,
        overwrite=overwrite,
        graph=graph or GraphSpec(),
    )
    print(f"bundle: {output}")
    if verbose:
        print(_parity(report))
    return output
