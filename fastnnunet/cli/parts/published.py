"""Options that name a model without its data set, and scans without labels, and what they mean together."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.choices import parse_folds
from fastnnunet.cli.parts.fields import Asked
from fastnnunet.errors import SpecError

if TYPE_CHECKING:
    from fastnnunet.api.images import DistilledImages
    from fastnnunet.api.judged import LabelledScans
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.teacher import PublishedSpec

Model = Annotated[
    Path | None, options.ask("-m --model", "nnU-Net model folder, or the zip it came in; needs no data set.")
]
Scans = Annotated[
    Path, options.ask("-i --input", "Folder of scans named CASE_0000, CASE_0001, ..., or of DICOM series.")
]
OptionalScans = Annotated[
    Path | None, options.ask("-i --input", "With -m: folder of scans without labels, or of DICOM series.")
]
Work = Annotated[Path | None, options.ask("--work", "With -m: the work folder, which keeps the cache.")]
NoMirroring = Annotated[
    bool, options.ask("--no-mirroring", "The teacher labels without mirroring: 8 times faster.", options.TEACHER)
]
HoldOut = Annotated[
    int | None,
    options.ask(
        "--hold-out",
        "Scans that judge the students and teach none (default: as before in this work folder, at first a fifth; of 9 "
        "or more, at least 3).",
        options.CASES,
    ),
]
KeepAll = Annotated[
    bool | None,
    options.ask(
        "--keep-all/--no-keep-all",
        "Train also on scans that would do harm; they are listed anyway (default: as before in this work folder, at "
        "first no).",
        options.CASES,
    ),
]

OF_SCANS = ("model", "work", "no_mirroring", "hold_out", "keep_all")  # parameters that mean nothing without scans


def published_model(
    model: Path | None,
    dataset: str | None,
    configuration: str | None,
    plans: str | None,
    trainer: str | None,
    folds: list[str] | None,
    checkpoint: str | None,
) -> "PublishedSpec":
    """The model of -m, or that of nnUNet_results that -d and its companions name. Raises SpecError, NotFoundError."""
    from fastnnunet.specs.teacher import PublishedSpec

    if (model is None) == (dataset is None):
        raise SpecError("which model? give either -m, its folder or zip, or -d, its data set in nnUNet_results")
    chosen = parse_folds(folds) if folds else None
    if dataset is not None:
        from fastnnunet.nnunet.files.paths import trained_model_folder

        names = trainer or "nnUNetTrainer", plans or "nnUNetPlans", configuration or "3d_fullres"
        return PublishedSpec(path=trained_model_folder(dataset, *names), folds=chosen, checkpoint=checkpoint)
    return PublishedSpec(
        path=model or Path(),
        configuration=configuration,
        folds=chosen,
        checkpoint=checkpoint,
        trainer=trainer,
        plans=plans,
    )


def asks_for_scans(context: typer.Context, scans: Path | None, apart: tuple[str, ...]) -> bool:
    """Whether a command is about scans (-i) of a work folder. `apart`: parameters that have no meaning there then.

    Raises SpecError for options that need -i, or exclude it.
    """
    given = {p.name: p.opts[0] for p in context.command.params if given_on_command_line(context, {p.name or "": None})}
    with_scans = [given[name] for name in OF_SCANS if name in given]
    if scans is None:
        if with_scans:
            raise SpecError(f"{' '.join(with_scans)}: expected with -i, the folder of scans, and --work")
        return False
    if "work" not in given:
        raise SpecError(f"-i {scans}: name also the work folder, which keeps the cache, with --work")
    if excluded := [given[name] for name in apart if name in given]:
        raise SpecError(f"-i {scans}: leave out {' '.join(excluded)}, which the work folder decides")
    return True


def scans_recipe(spec: Path | None, temperature: float | None, engine: str | None, no_mirroring: bool) -> "CacheSpec":
    """The recipe of `--spec`, else the default, with what else was given."""
    import dataclasses

    from fastnnunet.cli.parts.choices import recipe_of

    recipe = recipe_of(spec, temperature, engine)
    return dataclasses.replace(recipe, mirroring=False) if no_mirroring else recipe


def given_on_command_line(context: typer.Context, asked: Asked) -> Asked:
    """Of the values of a group of options those that were asked for; the others are the defaults of their spec."""
    return {
        name: value
        for name, value in asked.items()
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }


def required(path: Path | None) -> Path:
    """What `asks_for_scans` has seen to."""
    assert path is not None
    return path


def refuse_twice(reduction: list[int] | None) -> None:
    """Raises SpecError where a size stands twice behind -r."""
    sizes = reduction or []
    if twice := sorted({r for r in sizes if sizes.count(r) > 1}):
        raise SpecError(f"-r {' '.join(map(str, sizes))}: got {twice[0]} twice, expected each size once")


def named_model(context: typer.Context, teacher: Asked, model: Path | None, folds: list[str] | None) -> "PublishedSpec":
    """`published_model` of a command whose options of a teacher have the defaults of a data set's."""
    given = given_on_command_line(context, teacher)
    dataset, configuration, plans, trainer, checkpoint = (
        given.get(name) for name in ("dataset", "configuration", "plans", "trainer", "checkpoint")
    )
    return published_model(model, dataset, configuration, plans, trainer, folds, checkpoint)


def print_scans(labelled: "LabelledScans") -> None:
    """What the teacher's labels are for."""
    names = " ".join(labelled.held_out)
    print(f"scans:   {len(labelled.learnt_from)} to learn from, {len(labelled.held_out)} held out: {names}")
    print(f"labels:  {labelled.labels} (the teacher's, {labelled.teacher_s:.2f} s per case)")


def print_training_command(labelled: "LabelledScans") -> None:
    """What comes after `cache build`."""
    print(f"train with: fastnnunet train {labelled.train_options} -r 4")


def print_students(distilled: "DistilledImages", scans: Path) -> None:
    """Fidelity, seconds and size of every student, and the command that predicts with the first."""
    from rich.table import Table

    from fastnnunet.evaluate.tables import MOST_COLUMNS, number, wide_console

    print_scans(distilled.scans)
    first = distilled.students[0]
    names = list(first.fidelity.labels) if len(first.fidelity.labels) <= MOST_COLUMNS else []
    many = len(distilled.scans.held_out)
    table = Table(title=f"Dice against the teacher's labels of {many} scan{'s' * (many != 1)} held out")
    table.add_column("student")
    for heading in (*names, "mean", "95 % interval", "s per case", "MB"):
        table.add_column(heading, justify="right")
    for student in distilled.students:
        mean = student.fidelity.mean
        dice = [number(student.fidelity.labels[name].mean) for name in names]
        interval = "-" if mean.low == mean.high else f"{number(mean.low)} to {number(mean.high)}"  # of one scan: none
        size = f"{student.bundle_bytes / 1e6:.1f}"
        table.add_row(student.tag, *dice, number(mean.mean), interval, f"{student.seconds:.2f}", size)
    wide_console().print(table)
    print(f"report:  {distilled.report}\nsummary: {distilled.summary}")
    for student in distilled.students:
        print(f"student {student.tag}: {student.bundle} (fidelity {number(student.fidelity.mean.mean)})")
        print(f"  as an nnU-Net model: {student.model}")
    words = ["fastnnunet", "predict", "-m", os.fspath(first.bundle), "-i", os.fspath(scans), "-o", "predictions"]
    print(f"predict with: {shlex.join(words)}")
