"""`fastnnunet train`: distil students from a cache."""

import os
from pathlib import Path
from typing import Annotated, Any

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.choices import parse_folds, recipe_of, student_specs, teacher_of
from fastnnunet.cli.parts.fields import spread
from fastnnunet.errors import SpecError


@spread
def train(
    teacher: options.Teacher,
    fold: Annotated[list[str], options.ask("-f --fold", "The student's fold(s): 0 to 4, or all.")],
    student: options.Student,
    training: options.Training,
    reduction: options.Reduction = None,
    student_file: options.StudentFile = None,
    student_plans: options.StudentPlans = None,
    pretrained: Annotated[Path | None, options.ask("-w", "nnU-Net checkpoint to start from.", options.TRAINING)] = None,
    temperature: options.Temperature = None,
    teacher_folds: options.TeacherFolds = None,
    spec: options.SpecFile = None,
    cache_root: options.CacheRoot = None,
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
) -> None:
    """Distil students of one or several sizes from one soft-label cache. Never runs a teacher.

    The student is an ordinary nnU-Net model: `nnUNetv2_predict -p nnUNetPlans_r4_a0.3_T3 -f 0 ...` runs it.

    Example:

      fastnnunet train -d 4 -c 3d_fullres -f 0 -r 2 4 -a 0.3 -temp 3.0

    With images that have no labels (the soft loss alone sees them); label them by the teacher once, then train:

      fastnnunet cache build -d 4 -c 3d_fullres --images more_scans

      fastnnunet train -d 4 -c 3d_fullres -f 0 -r 4 --unlabelled more_scans --unlabelled-share 0.5

    On several GPUs: torchrun --nproc-per-node 2 -m fastnnunet train -d 4 ...
    """
    import dataclasses

    wait_passively()
    from fastnnunet.cache.store.storage import place_at
    from fastnnunet.distill.train import TrainingJob, check_job
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.load import build_spec

    if resume and overwrite:
        raise SpecError("--continue and --overwrite exclude each other; give one")
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
    for group in groups:
        run_jobs(group, resume=resume, overwrite=overwrite, validate=validate)


def wait_passively() -> None:
    """Let waiting threads sleep, so that loader processes get the core; works until OpenMP starts, so before torch.

    Spinning, which is OpenMP's default, made the loop of an r=4 student a tenth slower on two cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run_job(job: Any, *, resume: bool, overwrite: bool, validate: bool) -> Path:
    """Train one student as `run_jobs` does."""
    return run_jobs([job], resume=resume, overwrite=overwrite, validate=validate)[0]


def run_jobs(jobs: list[Any], *, resume: bool, overwrite: bool, validate: bool) -> list[Path]:
    """Train students on the same batches with a progress line on standard error; print where they went."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from fastnnunet.distill.train import TrainingState, train_students
    from fastnnunet.specs.checks.json_text import read_json_object

    first = jobs[0]
    name = f"{' '.join(job.student.tag for job in jobs)} fold {first.fold}"
    columns = (
        TextColumn(f"[bold]{name}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    total = first.distill.epochs * first.distill.iterations_per_epoch
    first_process = os.environ.get("RANK", "0") == "0"  # of those that torchrun started
    console = Console(stderr=True)
    hidden = not (console.is_terminal and first_process)
    start = time.monotonic()
    latest: dict[str, str] = {}
    done_before: list[int] = []  # iterations of an earlier run that this one continues
    with Progress(*columns, console=console, speed_estimate_period=120, disable=hidden) as progress:
        task = progress.add_task("train", total=total, text="starting")

        def show(state: TrainingState) -> None:
            dice = f" pseudo Dice {' '.join(f'{d:.3f}' for d in state.pseudo_dice)}" if state.pseudo_dice else ""
            own = f"{state.student} " if len(jobs) > 1 else ""
            latest[state.student] = f"{own}hard {state.hard:+.3f} soft {state.soft:.3f}{dice}"
            text = f"epoch {state.epoch + 1}/{state.epochs} {'; '.join(latest.values())}"
            done = state.epoch * state.iterations + state.iteration
            done_before[:] = done_before or [state.epoch * state.iterations]
            progress.update(task, completed=done, text=text)
            last = state.iteration == state.iterations and state.student == jobs[-1].student.tag
            if not console.is_terminal and last and first_process:  # a log file: one line an epoch
                left_s = (time.monotonic() - start) / (done - done_before[0]) * (total - done)
                print(f"{name} {text} left {left_s:.0f} s", file=sys.stderr, flush=True)

        folders = train_students(jobs, resume=resume, overwrite=overwrite, validate=validate, progress=show)
    for job, folder in zip(jobs, folders, strict=True) if first_process else ():
        print(f"student {job.student.tag}: {folder}")
        summary = folder / "validation" / "summary.json"
        if summary.is_file():
            mean = read_json_object(summary)["foreground_mean"]["Dice"]
            judged = "training cases, fold all has no others" if job.fold == "all" else "validation fold"
            print(f"mean Dice on the {judged}: {mean:.4f}")
    return folders
