"""`fastnnunet distill auto`: the smallest student that is good enough."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Find the student to deploy.")


@app.callback()
def _group() -> None:
    """Keeps `distill` a group while it has one command."""


@app.command("auto")
def auto(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Data set id or name.")],
    fold: Annotated[str, typer.Option("-f", "--fold", help="The students' fold; its validation cases decide.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for record, plot, bundles, predictions.")],
    within: Annotated[float, typer.Option("--within", help="Dice points (Dice x 100) a student may lose.")] = 0.5,
    reduction: Annotated[list[int] | None, typer.Option("-r", "--reduction", help="Sizes [default: 2 4 6 8].")] = None,
    reference: Annotated[
        str, typer.Option("--reference", help="out-of-fold (the fold that did not see the cases) or ensemble.")
    ] = "out-of-fold",
    configuration: Annotated[str, typer.Option("-c", "--configuration")] = "3d_fullres",
    alpha: Annotated[float, typer.Option("-a", "--alpha", help="Weight of the soft loss.")] = 0.3,
    temperature: Annotated[float, typer.Option("-temp", "--temperature", help="T of cache and loss.")] = 3.0,
    plans: Annotated[str, typer.Option("-p", "--plans", help="The teacher's plans.")] = "nnUNetPlans",
    trainer: Annotated[str, typer.Option("-tr", "--trainer", help="The teacher's trainer.")] = "nnUNetTrainer",
    teacher_folds: Annotated[list[str] | None, typer.Option("-tf", help="Teacher folds [default: 0 1 2 3 4].")] = None,
    checkpoint: Annotated[str, typer.Option("-chk", help="The teacher's checkpoint.")] = "checkpoint_final.pth",
    spec: Annotated[Path | None, typer.Option("--spec", help="Cache recipe, if not the default one.")] = None,
    cache_root: Annotated[str | None, typer.Option("--root", help="Where the caches are: folder or URL.")] = None,
    epochs: Annotated[int, typer.Option("-e", "--epochs")] = 1000,
    iterations: Annotated[int, typer.Option("--iterations", help="Iterations per epoch.")] = 250,
    val_iterations: Annotated[int, typer.Option("--val-iterations", help="Validation iterations per epoch.")] = 50,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd (nnU-Net's), or adamw for short runs.")] = "sgd",
    lr: Annotated[float | None, typer.Option("--lr", help="Initial learning rate [sgd 0.01, adamw 0.003].")] = None,
    start: Annotated[
        str, typer.Option("--start", help="First weights: teacher (its most important channels) or random.")
    ] = "teacher",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Samples a step [default: the plans'].")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16 (CPU).")] = "auto",
    device: Annotated[str, typer.Option("-device", "--device", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads [default: all].")] = None,
) -> None:
    """Train several sizes from one cache on the same batches and name the smallest that is good enough.

    Good enough: mean Dice over the validation cases at most --within points below the reference's, with a paired
    bootstrap interval. Finished runs are kept, interrupted ones go on. Exit code 1 when no size is good enough.

    Example:

      fastnnunet distill auto -d 4 -f 0 --within 0.5 -r 2 4 6 -o auto_hippocampus
    """
    import dataclasses

    from fastnnunet.cli.train import parse_folds, wait_passively

    wait_passively()
    from fastnnunet.bench.auto import auto_size
    from fastnnunet.bench.plot import plot_sizes
    from fastnnunet.bench.record import write_json
    from fastnnunet.cache.storage import place_at
    from fastnnunet.distill.train import TrainingJob
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.load import build_spec, load_yaml_spec
    from fastnnunet.specs.student import StudentSpec
    from fastnnunet.specs.teacher import TeacherSpec

    distill = {
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
        "start": start,
    }
    recipe = load_yaml_spec(CacheSpec, spec) if spec else CacheSpec()
    sizes = reduction or [2, 4, 6, 8]
    job = TrainingJob(
        teacher=TeacherSpec(
            dataset=dataset,
            configuration=configuration,
            plans=plans,
            trainer=trainer,
            folds=parse_folds(teacher_folds or ["0", "1", "2", "3", "4"]),
            checkpoint=checkpoint,
        ),
        student=StudentSpec(r=sizes[0]),
        distill=build_spec(DistillSpec, distill, where="options"),
        cache=dataclasses.replace(recipe, temperature=temperature),
        fold=parse_folds([fold])[0],
        device=device,
        threads=threads,
        cache_spec_file=spec,
        cache_root=None if cache_root is None else place_at(cache_root),
    )
    record = auto_size(job, sizes, within, output, reference)
    target = output / f"auto_{record['created'][:19].replace('-', '').replace(':', '')}.json"
    write_json(target, record)
    plot_sizes(record, target.with_suffix(".png"))
    print_sizes(record)
    print(f"record: {target}\nplot:   {target.with_suffix('.png')}")
    if not record["choice"]["found"]:
        raise typer.Exit(1)


def print_sizes(record: dict[str, Any]) -> None:
    """The table of students and the choice in words."""
    from rich.table import Table

    from fastnnunet.bench.tables import wide_console

    reference, within = record["reference"], record["within_points"]
    table = Table(title=f"{len(record['cases'])} validation cases of fold {record['job']['fold']}")
    for heading in ("student", "mean Dice", "points from reference", "95 % interval", "ms per patch", "parameters"):
        table.add_column(heading, justify="left" if heading == "student" else "right")
    for name, row in record["students"].items():
        points = row["points"]
        table.add_row(
            name,
            f"{row['mean_dice']:.4f}",
            f"{points['mean']:+.2f}",
            f"{points['low']:+.2f} to {points['high']:+.2f}",
            f"{row['ms_per_patch']:.2f}",
            f"{row['parameters']:,}",
        )
    table.add_row(f"reference ({reference['kind']})", f"{reference['mean_dice']:.4f}", "", "", "", "")
    wide_console().print(table)
    choice = record["choice"]
    if not choice["found"]:
        print(f"no student is within {within:g} points; the best is {choice['name']}: train longer, or a wider one")
    else:
        sure = "the whole interval is" if choice["whole_interval_within"] else "its mean is, the whole interval is not"
        print(f"smallest student within {within:g} points: {choice['name']} ({sure} within the budget)")
    if reference["saw_the_cases"]:
        print("the ensemble was trained on most of these cases, so its Dice is optimistic and the budget stricter")
