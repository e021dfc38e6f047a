"""`fastnnunet train`: distil students from a cache."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastnnunet.cli.guard import SAME_COMMAND, going_on
from fastnnunet.cli.parts import options, published
from fastnnunet.cli.parts.choices import parse_folds, recipe_of, student_specs, teacher_of
from fastnnunet.cli.parts.fields import Asked, spread
from fastnnunet.errors import SpecError

if TYPE_CHECKING:
    from fastnnunet.api.distil import Student
    from fastnnunet.distill.job import TrainingJob
    from fastnnunet.specs.teacher import TeacherSpec

# what a work folder has decided, or does not have
DECIDED = (
    *("fold", "cache_root", "previous", "resume", "overwrite", "together", "validate", "name", "pretrained"),
    *("unlabelled", "unlabelled_share", "pseudo_labels", "soft_labels", "locator"),
)


@spread
def train(
    context: typer.Context,
    teacher: options.TeacherOrModel,
    student: options.Student,
    training: options.Training,
    fold: Annotated[list[str] | None, options.ask("-f --fold", "The student's fold(s): 0 to 4, or all.")] = None,
    name: options.RunName = None,
    reduction: options.Reduction = None,
    student_file: options.StudentFile = None,
    student_plans: options.StudentPlans = None,
    pretrained: Annotated[Path | None, options.ask("-w", "nnU-Net checkpoint to start from.", options.TRAINING)] = None,
    temperature: options.Temperature = None,
    teacher_folds: options.TeacherFolds = None,
    spec: options.SpecFile = None,
    cache_root: options.CacheRoot = None,
    soft_labels: Annotated[
        str | None,
        options.ask(
            "--soft-labels",
            "Take this cache, such as one of `cache import`: its folder, or first digits of its key.",
            options.CACHE,
        ),
    ] = None,
    previous: options.Previous = None,
    resume: Annotated[bool, options.ask("--continue --c", "Continue an unfinished run.")] = False,
    overwrite: options.Overwrite = False,
    device: options.TrainingDevice = "auto",
    augment_on: Annotated[
        str,
        options.ask("--augment-on", "device, loader (CPU processes), or auto: device where it is CUDA.", options.RUN),
    ] = "auto",
    threads: options.Threads = None,
    allow_code: options.AllowCode = False,
    together: Annotated[
        bool,
        options.ask("--together", "Train all sizes on the same batches, which are then made only once.", options.RUN),
    ] = False,
    validate: Annotated[
        bool, options.ask("--validate/--no-validate", "Predict and score the validation fold at the end.", options.RUN)
    ] = True,
    locator: Annotated[
        bool,
        options.ask(
            "--locator",
            "Instead of students: a tiny network that finds where to predict, for `export onnx --locator`.",
            options.STUDENT,
        ),
    ] = False,
    model: published.Model = None,
    scans: published.OptionalScans = None,
    work: published.Work = None,
    no_mirroring: published.NoMirroring = False,
) -> None:
    """Distil students of one or several sizes from one soft-label cache.

    It runs a teacher for --online-teacher alone.

    The student is an ordinary nnU-Net model: `nnUNetv2_predict -p nnUNetPlans_r4_a0.5_T1 -f 0 ...` runs it.

    Example:

      fastnnunet train -d 4 -c 3d_fullres -f 0 -r 2 4

    With images that have no labels (the soft loss alone sees them, with --pseudo-labels the hard loss too); label them
    by the teacher once, then train:

      fastnnunet cache build -d 4 -c 3d_fullres --images more_scans

      fastnnunet train -d 4 -c 3d_fullres -f 0 -r 4 --unlabelled more_scans --unlabelled-share 0.5

    On scans that `fastnnunet cache build -m MODEL -i scans --work work` has labelled, without a data set:

      fastnnunet train -m MODEL -i scans --work work -r 4

    A locator, in whose box alone a student then runs:

      fastnnunet train -d 4 -c 3d_fullres -f 0 --locator

    On several GPUs: torchrun --nproc-per-node 2 -m fastnnunet train -d 4 ...
    """
    import dataclasses

    wait_passively()
    if published.asks_for_scans(context, scans, DECIDED):
        from fastnnunet.api import View, train_on_images

        published.refuse_twice(reduction)
        with going_on(SAME_COMMAND), View() as view:
            trained = train_on_images(
                published.named_model(context, teacher, model, teacher_folds),
                published.required(scans),
                published.required(work),
                student_specs(reduction, student_file, student, student_plans),
                recipe=published.scans_recipe(spec, temperature, None, no_mirroring),
                recipe_file=spec,
                training=published.given_on_command_line(context, training),
                threads=threads,
                device=device,
                augment_on=augment_on,
                progress=view,
            )
        print_trained(trained, None)
        return
    from fastnnunet.cache.store.storage import place_at
    from fastnnunet.distill.check import check_job
    from fastnnunet.distill.job import TrainingJob
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.load import build_spec

    if not fold:
        raise SpecError("which fold? give -f, the student's fold(s): 0 to 4, or all")
    if resume and overwrite:
        raise SpecError("--continue and --overwrite exclude each other; give one")
    if locator:
        run = {"threads": threads, "device": device, "augment_on": augment_on}
        _train_locators(context, teacher_of(teacher, None), fold, training, resume, overwrite, run)
        return
    place = None if cache_root is None else place_at(cache_root)
    recipe = recipe_of(spec, temperature)
    ensemble = teacher_of(teacher, teacher_folds, previous)
    unlabelled = training["unlabelled"]
    settings = {
        "temperature": recipe.temperature,
        "unlabelled": unlabelled and "any",  # its name is looked up once the options are known to be right
    }
    distill = build_spec(DistillSpec, training | settings, where="options")
    if unlabelled is not None:
        from fastnnunet.teachers.images import named_set

        set_name = named_set(ensemble, recipe, unlabelled, place, spec)
        distill = dataclasses.replace(distill, unlabelled=set_name)
    students = student_specs(reduction, student_file, student, student_plans)
    if name is not None and len(students) > 1:
        raise SpecError(f"--name {name}: got {len(students)} students, expected one; train the others by themselves")
    groups = [
        [
            TrainingJob(
                teacher=ensemble,
                student=one,
                distill=distill,
                cache=recipe,
                fold=f,
                device=device,
                augment_on=augment_on,
                threads=threads,
                cache_root=place,
                cache_spec_file=spec,
                soft_labels=soft_labels,
                pretrained=pretrained,
            )
            for one in students
        ]
        for f in parse_folds(fold)
    ]
    if not together:
        groups = [[job] for group in groups for job in group]
    if len(groups) > 1:  # refuse before the first trains for hours; a single one does so itself
        for job in (job for group in groups for job in group):
            check_job(job, resume=resume, overwrite=overwrite)
    with going_on("the same command with --continue goes on after the last whole epoch"):
        for group in groups:
            run_jobs(group, resume=resume, overwrite=overwrite, validate=validate, name=name)


def _train_locators(
    context: typer.Context,
    teacher: "TeacherSpec",
    folds: list[str],
    training: Asked,
    resume: bool,
    overwrite: bool,
    run: dict[str, Any],
) -> None:
    """Train a locator for each fold. Raises SpecError for options that are of students alone."""
    from fastnnunet.api import View, train_locator

    allowed = {"locator", "fold", "dataset", "configuration", "plans", "resume", "overwrite", "allow_code", *training}
    options.refuse_besides("--locator", "takes its network from the data set", context, {*allowed, *run})
    given = published.given_on_command_line(context, training)
    for fold in parse_folds(folds):
        with View() as view:
            trained = train_locator(teacher, fold, given, resume=resume, overwrite=overwrite, progress=view, **run)
        print(f"locator: {trained.folder}")
    print(f"use it with: fastnnunet export onnx ... --locator {shlex.quote(str(trained.folder.parent))}")


def wait_passively() -> None:
    """Let waiting threads sleep, so that loader processes get the core; works until OpenMP starts, so before torch.

    Spinning, which is OpenMP's default, made the loop of an r=4 student a tenth slower on two cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run_jobs(
    jobs: "list[TrainingJob]", *, resume: bool, overwrite: bool, validate: bool, name: str | None = None
) -> list[Path]:
    """Train students on the same batches, shown on standard error; print where they went."""
    from fastnnunet.api import View, distil
    from fastnnunet.api.distil import is_first_process
    from fastnnunet.distill.job import FINAL, run_folder

    finished = [job.student.tag for job in jobs if resume and (run_folder(job) / FINAL).is_file()]
    with View() as view:
        students = distil(jobs, resume=resume, overwrite=overwrite, validate=validate, name=name, progress=view)
    if is_first_process():
        if finished:
            print(f"finished before, so not trained now: {', '.join(finished)}")
        print_trained(students, name)
    return [student.folder for student in students]


def print_trained(students: "list[Student]", name: str | None) -> None:
    """Where students are, and how good they are where that is known."""
    for student in students:
        print(f"student {student.tag}: {student.folder}")
        if student.mean_dice is not None:
            print(f"mean Dice on the {student.judged_on}: {student.mean_dice:.4f}")
        if name is not None:
            print(f"export it with: fastnnunet export onnx --name {name}")
