"""`fastnnunet distill images`: a fast student of any nnU-Net from scans without labels."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastnnunet.cli.guard import SAME_COMMAND, going_on
from fastnnunet.cli.parts import options, published
from fastnnunet.cli.parts.choices import student_specs
from fastnnunet.cli.parts.fields import spread
from fastnnunet.specs.cache import CacheSpec, TeacherEngine


@spread
def images(
    context: typer.Context,
    scans: published.Scans,
    output: Annotated[Path, options.ask("-o --output", "Folder for summary and students.")],
    student: options.Student,
    training: options.ScansTraining,
    model: published.Model = None,
    reduction: options.Reduction = None,
    work: Annotated[
        Path | None, options.ask("--work", "Keeps cache and trainings, for other sizes too (default: OUTPUT/work).")
    ] = None,
    dataset: Annotated[
        str | None, options.ask("-d --dataset", "Instead of -m: data set id or name in nnUNet_results.")
    ] = None,
    configuration: Annotated[
        str | None,
        options.ask("-c --configuration", "Where there are several (with -d: 3d_fullres).", options.TEACHER),
    ] = None,
    plans: Annotated[
        str | None, options.ask("-p --plans", "Where there are several (with -d: nnUNetPlans).", options.TEACHER)
    ] = None,
    trainer: Annotated[
        str | None, options.ask("-tr --trainer", "Where there are several (with -d: nnUNetTrainer).", options.TEACHER)
    ] = None,
    fold: Annotated[
        list[str] | None, options.ask("-f --fold", "The teacher's folds (default: all there are).", options.TEACHER)
    ] = None,
    checkpoint: Annotated[
        str | None, options.ask("-chk --checkpoint", "Of every fold (default: checkpoint_final.pth).", options.TEACHER)
    ] = None,
    no_mirroring: published.NoMirroring = False,
    hold_out: published.HoldOut = None,
    keep_all: published.KeepAll = None,
    no_calibration: Annotated[
        bool,
        options.ask(
            "--no-calibration", "Leave probabilities as trained; else one temperature is fitted to the teacher's."
        ),
    ] = False,
    student_file: options.StudentFile = None,
    temperature: options.Temperature = None,
    spec: options.SpecFile = None,
    engine: Annotated[TeacherEngine | None, options.option(CacheSpec, "engine", panel=options.TEACHER)] = None,
    workers: Annotated[
        int, options.ask("--workers", "Processes that preprocess and label; 0: none but this one.", options.RUN, min=0)
    ] = 0,
    threads: options.Threads = None,
    device: options.TrainingDevice = "auto",
    allow_code: options.AllowCode = False,
) -> None:
    """Distil a published nnU-Net into fast students on scans of your own, without labels and without its data set.

    The teacher labels the scans, students learn from most of them and are judged on the others: Dice against the
    teacher's own labels. None of nnU-Net's environment variables are needed. Interrupt it at any time: the same command
    goes on, and other sizes from the same --work cost only their own training.

    Examples:

      fastnnunet distill images -m MODEL_FOLDER -i scans -r 4 -o student

      fastnnunet distill images -m model.zip -i dicom_series -r 2 4 6 -o students --no-mirroring
    """
    from fastnnunet.cli.train import wait_passively

    wait_passively()
    from fastnnunet.api import View, distil_images

    published.refuse_twice(reduction)
    students = student_specs(reduction, student_file, student)
    recipe = published.scans_recipe(spec, temperature, engine, no_mirroring)
    teacher = published.published_model(model, dataset, configuration, plans, trainer, fold, checkpoint)
    with going_on(SAME_COMMAND), View() as view:
        distilled = distil_images(
            teacher,
            scans,
            output,
            students,
            work=work,
            recipe=recipe,
            recipe_file=spec,
            training=published.given_on_command_line(context, training),
            held_out=hold_out,
            keep_all=keep_all,
            calibrate=not no_calibration,
            workers=workers,
            threads=threads,
            device=device,
            command=shlex.join(["fastnnunet", *sys.argv[1:]]),
            progress=view,
        )
    published.print_students(distilled, scans)
