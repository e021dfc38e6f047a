"""`fastnnunet train`: distil students from a cache."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastnnunet.cli import options
from fastnnunet.errors import SpecError

if TYPE_CHECKING:
    from fastnnunet.distill.train import TrainingJob
    from fastnnunet.specs.cache import CacheSpec


def parse_folds(folds: list[str]) -> tuple[int | str, ...]:
    """`["0", "all"]` -> (0, "all"). Raises SpecError for anything that is neither a number nor `all`."""
    wrong = [f for f in folds if not re.fullmatch("[0-9]+", f) and f != "all"]
    if wrong:
        raise SpecError(f"fold {wrong[0]!r} is no fold; expected numbers such as 0 1 2 3 4, or all")
    return tuple(f if f == "all" else int(f) for f in dict.fromkeys(folds))


def train(
    dataset: options.Dataset,
    fold: Annotated[list[str], typer.Option("-f", "--fold", help="The student's fold(s): 0 to 4, or all.")],
    name: options.RunName = None,
    reduction: options.Reduction = None,
    student_file: options.StudentFile = None,
    family: options.Family = "auto",
    round_to: options.RoundTo = 1,
    blocks: options.Blocks = "auto",
    architecture: options.Architecture = "same",
    size: options.Size = None,
    student_plans: Annotated[str | None, typer.Option("-spl", help="Name for the student's plans.")] = None,
    pretrained: Annotated[Path | None, typer.Option("-w", help="nnU-Net checkpoint to start from.")] = None,
    start: options.Start = "teacher",
    configuration: options.Configuration = "3d_fullres",
    alpha: options.Alpha = 0.3,
    anneal: options.Anneal = False,
    temperature: options.Temperature = None,
    plans: options.Plans = "nnUNetPlans",
    trainer: options.Trainer = "nnUNetTrainer",
    teacher_folds: options.TeacherFolds = None,
    checkpoint: options.Checkpoint = "checkpoint_final.pth",
    spec: options.SpecFile = None,
    cache_root: options.CacheRoot = None,
    previous: options.Previous = None,
    epochs: options.Epochs = 1000,
    iterations: options.Iterations = 250,
    val_iterations: options.ValIterations = 50,
    batch_size: options.BatchSize = None,
    optimizer: options.Optimizer = "sgd",
    lr: options.LearningRate = None,
    loss: options.Loss = "kl",
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
    precision: options.TrainingPrecision = "auto",
    seed: options.Seed = 0,
    mirroring: Annotated[
        bool, typer.Option("--mirroring", help="Let the student mirror at prediction (8x slower).")
    ] = False,
    resume: Annotated[bool, typer.Option("--continue", "--c", help="Continue an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")] = False,
    device: options.TrainingDevice = "auto",
    augment_on: Annotated[
        str, typer.Option("--augment-on", help="device, loader (CPU processes), or auto: device where it is CUDA.")
    ] = "auto",
    threads: options.Threads = None,
    allow_code: options.AllowCode = False,
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
    from fastnnunet.cache.store.storage import place_at
    from fastnnunet.distill.train import TrainingJob, check_job
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.load import build_spec
    from fastnnunet.specs.teacher import TeacherSpec

    if resume and overwrite:
        raise SpecError("--continue and --overwrite exclude each other; give one")
    place = None if cache_root is None else place_at(cache_root)
    recipe = recipe_of(spec, temperature)
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
            "anneal": anneal,
            "temperature": recipe.temperature,
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
    if unlabelled is not None:
        from fastnnunet.teachers.images import named_set

        set_name = named_set(teacher, recipe, unlabelled, place, spec)
        distill = dataclasses.replace(distill, unlabelled=set_name)
    choices = {"family": family, "round_to": round_to, "blocks": blocks, "architecture": architecture, "size": size}
    students = student_specs(reduction, student_file, choices, student_plans)
    if name is not None and len(students) > 1:
        raise SpecError(f"--name {name}: got {len(students)} students, expected one; train the others by themselves")
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
    if not together:
        groups = [[job] for group in groups for job in group]
    if len(groups) > 1:  # refuse before the first trains for hours; a single one does so itself
        for job in (job for group in groups for job in group):
            check_job(job, resume=resume, overwrite=overwrite)
    for group in groups:
        run_jobs(group, resume=resume, overwrite=overwrite, validate=validate, name=name)


def recipe_of(spec: Path | None, temperature: float | None, engine: str | None = None) -> "CacheSpec":
    """The cache recipe of `--spec`, else the default one, at its own temperature and engine unless others are given."""
    import dataclasses

    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.load import load_yaml_spec

    recipe = CacheSpec() if spec is None else load_yaml_spec(CacheSpec, spec)
    given: dict[str, Any] = {"temperature": temperature, "engine": engine}
    return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})


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
        if spec == default:
            raise SpecError(f"--student {file} says nothing of a student; expected r, or network_class_name, or others")
        return [spec if plans_name is None else dataclasses.replace(spec, plans_name=plans_name)]
    if size is None and not reduction:
        raise SpecError("which student? give -r 2 4, --student FILE.yaml, or -ts S for a stock Primus")
    if size is not None and reduction:
        raise SpecError(f"-ts {size} is a whole size by itself; leave out -r {' '.join(map(str, reduction))}")
    sizes = list(dict.fromkeys(reduction or [1]))
    if plans_name is not None and len(sizes) > 1:
        raise SpecError(f"-spl {plans_name} names one student, got -r {' '.join(map(str, sizes))}; give one size")
    return [build_spec(StudentSpec, {**choices, "r": r, "plans_name": plans_name}, where="options") for r in sizes]


def run_jobs(
    jobs: "list[TrainingJob]", *, resume: bool, overwrite: bool, validate: bool, name: str | None = None
) -> list[Path]:
    """Train students on the same batches, shown on standard error; print where they went."""
    from fastnnunet.api import View, distil
    from fastnnunet.api.distil import is_first_process

    with View() as view:
        students = distil(jobs, resume=resume, overwrite=overwrite, validate=validate, name=name, progress=view)
    for student in students if is_first_process() else ():
        print(f"student {student.tag}: {student.folder}")
        if student.mean_dice is not None:
            print(f"mean Dice on the {student.judged_on}: {student.mean_dice:.4f}")
        if name is not None:
            print(f"export it with: fastnnunet export onnx --name {name}")
    return [student.folder for student in students]
