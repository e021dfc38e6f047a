"""`fastnnunet train`: distil students from a cache."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fastnnunet.errors import SpecError


def parse_folds(folds: list[str]) -> tuple[int | str, ...]:
    """`["0", "all"]` -> (0, "all"). Raises SpecError for anything that is neither a number nor `all`."""
    wrong = [f for f in folds if not f.isdigit() and f != "all"]
    if wrong:
        raise SpecError(f"fold {wrong[0]!r} is no fold; expected numbers such as 0 1 2 3 4, or all")
    return tuple(int(f) if f.isdigit() else f for f in folds)


def train(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Data set id or name.")],
    fold: Annotated[list[str], typer.Option("-f", "--fold", help="The student's fold(s): 0 to 4, or all.")],
    reduction: Annotated[
        list[int] | None, typer.Option("-r", "--reduction", help="Student size: width divided by r; may repeat.")
    ] = None,
    student_file: Annotated[
        Path | None, typer.Option("--student", help="YAML of a student: network_class_name and arch_kwargs, or others.")
    ] = None,
    family: Annotated[str, typer.Option("--family", help="width, or lite: thin full-resolution stage.")] = "width",
    round_to: Annotated[int, typer.Option("--round-to", help="Widths in multiples of this.")] = 1,
    blocks: Annotated[str, typer.Option("-bs", "--blocks", help="reduce, keep, increase or adaptive depth.")] = "auto",
    architecture: Annotated[str, typer.Option("--architecture", help="same, plain or residual.")] = "same",
    size: Annotated[str | None, typer.Option("-ts", "--size", help="A stock Primus: S, B, M or L.")] = None,
    student_plans: Annotated[str | None, typer.Option("-spl", help="Name for the student's plans.")] = None,
    pretrained: Annotated[Path | None, typer.Option("-w", help="nnU-Net checkpoint to start from.")] = None,
    start: Annotated[
        str, typer.Option("--start", help="First weights: teacher (its most important channels) or random.")
    ] = "teacher",
    configuration: Annotated[str, typer.Option("-c", "--configuration")] = "3d_fullres",
    alpha: Annotated[float, typer.Option("-a", "--alpha", help="Weight of the soft loss; 0 trains the control.")] = 0.3,
    temperature: Annotated[float, typer.Option("-temp", "--temperature", help="T of cache and loss.")] = 3.0,
    plans: Annotated[str, typer.Option("-p", "--plans", help="The teacher's plans.")] = "nnUNetPlans",
    trainer: Annotated[str, typer.Option("-tr", "--trainer", help="The teacher's trainer.")] = "nnUNetTrainer",
    teacher_folds: Annotated[list[str] | None, typer.Option("-tf", help="Teacher folds [default: 0 1 2 3 4].")] = None,
    checkpoint: Annotated[str, typer.Option("-chk", help="The teacher's checkpoint.")] = "checkpoint_final.pth",
    spec: Annotated[Path | None, typer.Option("--spec", help="Cache recipe, if not the default one.")] = None,
    cache_root: Annotated[str | None, typer.Option("--root", help="Where the caches are: folder or URL.")] = None,
    previous: Annotated[
        str | None,
        typer.Option("--previous", help="Cascades: `teacher`, or a folder of predictions of the previous stage."),
    ] = None,
    epochs: Annotated[int, typer.Option("-e", "--epochs")] = 1000,
    iterations: Annotated[int, typer.Option("--iterations", help="Iterations per epoch.")] = 250,
    val_iterations: Annotated[int, typer.Option("--val-iterations", help="Validation iterations per epoch.")] = 50,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Samples a step [default: the plans'].")
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd (nnU-Net's), or adamw for short runs.")] = "sgd",
    lr: Annotated[float | None, typer.Option("--lr", help="Initial learning rate [sgd 0.01, adamw 0.003].")] = None,
    loss: Annotated[str, typer.Option("--loss", help="Soft loss: kl, or kl_dice (KL and Dice semimetric).")] = "kl",
    augmentation: Annotated[str, typer.Option("--augmentation", help="nnU-Net's default, or its da5.")] = "default",
    soft_on_ignored: Annotated[
        bool, typer.Option("--soft-on-ignored/--no-soft-on-ignored", help="Soft loss where the label says ignore too.")
    ] = True,
    unlabelled: Annotated[
        str | None,
        typer.Option("--unlabelled", help="Learn from images without labels too: their folder, or name of the set."),
    ] = None,
    unlabelled_share: Annotated[
        float, typer.Option("--unlabelled-share", help="Share of the samples that are unlabelled, above 0, below 1.")
    ] = 0.5,
    mirror_augmentation: Annotated[
        bool, typer.Option("--mirror-augmentation/--no-mirror-augmentation", help="Train on mirrored patches too.")
    ] = True,
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16 (CPU).")] = "auto",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    mirroring: Annotated[
        bool, typer.Option("--mirroring", help="Let the student mirror at prediction (8x slower).")
    ] = False,
    resume: Annotated[bool, typer.Option("--continue", "--c", help="Continue an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")] = False,
    device: Annotated[str, typer.Option("-device", "--device", help="auto, cpu or cuda.")] = "auto",
    augment_on: Annotated[
        str, typer.Option("--augment-on", help="device, loader (CPU processes), or auto: device where it is CUDA.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads [default: all].")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train all sizes on the same batches, which are then made only once.")
    ] = False,
    validate: Annotated[bool, typer.Option(help="Predict and score the validation fold at the end.")] = True,
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
    from fastnnunet.cache.storage import place_at
    from fastnnunet.distill.train import TrainingJob
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.load import build_spec, load_yaml_spec
    from fastnnunet.specs.teacher import TeacherSpec

    if resume and overwrite:
        raise SpecError("--continue and --overwrite exclude each other; give one")
    place = None if cache_root is None else place_at(cache_root)
    teacher = TeacherSpec(
        dataset=dataset,
        configuration=configuration,
        plans=plans,
        trainer=trainer,
        folds=parse_folds(teacher_folds or ["0", "1", "2", "3", "4"]),
        checkpoint=checkpoint,
        previous=previous,
    )
    distill = build_spec(
        DistillSpec,
        {
            "alpha": alpha,
            "temperature": temperature,
            "epochs": epochs,
            "iterations_per_epoch": iterations,
            "val_iterations_per_epoch": val_iterations,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "initial_lr": lr,
            "seed": seed,
            "precision": precision,
            "mirroring": mirroring,
            "start": start,
            "loss": loss,
            "augmentation": augmentation,
            "mirror_augmentation": mirror_augmentation,
            "soft_on_ignored": soft_on_ignored,
            "unlabelled": unlabelled and "any",  # its name is looked up once the options are known to be right
            "unlabelled_share": unlabelled_share,
        },
        where="options",
    )
    recipe = load_yaml_spec(CacheSpec, spec) if spec else CacheSpec()
    recipe = dataclasses.replace(recipe, temperature=temperature)
    if unlabelled is not None:
        from fastnnunet.distill.unlabelled import named_set

        set_name = named_set(teacher, recipe, unlabelled, place, spec)
        distill = dataclasses.replace(distill, unlabelled=set_name)
    choices = {"family": family, "round_to": round_to, "blocks": blocks, "architecture": architecture, "size": size}
    students = student_specs(reduction, student_file, choices, student_plans)
    groups = [
        [
            TrainingJob(
                teacher=teacher,
                student=student,
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
            for student in students
        ]
        for f in parse_folds(fold)
    ]
    for group in groups if together else [[job] for jobs in groups for job in jobs]:
        run_jobs(group, resume=resume, overwrite=overwrite, validate=validate)


def wait_passively() -> None:
    """Let waiting threads sleep, so that loader processes get the core; works until OpenMP starts, so before torch.

    Spinning, which is OpenMP's default, made the loop of an r=4 student a tenth slower on two cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def student_specs(
    reduction: list[int] | None, file: Path | None, choices: dict[str, Any], plans_name: str | None = None
) -> list[Any]:
    """One StudentSpec per size, or the one of `file`. Raises SpecError for options that contradict each other."""
    import dataclasses

    from fastnnunet.specs.load import build_spec, load_yaml_spec
    from fastnnunet.specs.student import StudentSpec

    size = choices.get("size")
    if file is not None:
        default = StudentSpec()
        given = [name for name, value in choices.items() if value != getattr(default, name)]
        if reduction or given:
            raise SpecError(
                f"--student {file}: got also {', '.join([*given, *(['-r'] if reduction else [])])}; give one"
            )
        spec = load_yaml_spec(StudentSpec, file)
        return [spec if plans_name is None else dataclasses.replace(spec, plans_name=plans_name)]
    if size is None and not reduction:
        raise SpecError("which student? give -r 2 4, --student FILE.yaml, or -ts S for a stock Primus")
    if size is not None and reduction:
        raise SpecError(f"-ts {size} is a whole size by itself; leave out -r {' '.join(map(str, reduction))}")
    sizes = reduction or [1]
    if plans_name is not None and len(sizes) > 1:
        raise SpecError(f"-spl {plans_name} names one student, got -r {' '.join(map(str, sizes))}; give one size")
    return [build_spec(StudentSpec, {**choices, "r": r, "plans_name": plans_name}, where="options") for r in sizes]


def run_job(job: Any, *, resume: bool, overwrite: bool, validate: bool) -> Path:
    """Train one student as `run_jobs` does."""
    return run_jobs([job], resume=resume, overwrite=overwrite, validate=validate)[0]


def run_jobs(jobs: list[Any], *, resume: bool, overwrite: bool, validate: bool) -> list[Path]:
    """Train students on the same batches with a progress line on standard error; print where they went."""
    import json
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from fastnnunet.distill.train import TrainingState, train_students

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
    with Progress(*columns, console=console, speed_estimate_period=120, disable=hidden) as progress:
        task = progress.add_task("train", total=total, text="starting")

        def show(state: TrainingState) -> None:
            dice = f" pseudo Dice {' '.join(f'{d:.3f}' for d in state.pseudo_dice)}" if state.pseudo_dice else ""
            own = f"{state.student} " if len(jobs) > 1 else ""
            latest[state.student] = f"{own}hard {state.hard:+.3f} soft {state.soft:.3f}{dice}"
            text = f"epoch {state.epoch + 1}/{state.epochs} {'; '.join(latest.values())}"
            done = state.epoch * state.iterations + state.iteration
            progress.update(task, completed=done, text=text)
            last = state.iteration == state.iterations and state.student == jobs[-1].student.tag
            if not console.is_terminal and last and first_process:  # a log file: one line an epoch
                left_s = (time.monotonic() - start) / done * (total - done)
                print(f"{name} {text} left {left_s:.0f} s", file=sys.stderr, flush=True)

        folders = train_students(jobs, resume=resume, overwrite=overwrite, validate=validate, progress=show)
    for job, folder in zip(jobs, folders, strict=True) if first_process else ():
        print(f"student {job.student.tag}: {folder}")
        summary = folder / "validation" / "summary.json"
        if summary.is_file():
            mean = json.loads(summary.read_text())["foreground_mean"]["Dice"]
            judged = "training cases, fold all has no others" if job.fold == "all" else "validation fold"
            print(f"mean Dice on the {judged}: {mean:.4f}")
    return folders
