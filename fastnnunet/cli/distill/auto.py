"""`fastnnunet distill auto`: the smallest student that is good enough."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.choices import parse_folds, recipe_of, student_specs, teacher_of
from fastnnunet.cli.parts.fields import spread


@spread
def auto(
    teacher: options.Teacher,
    fold: Annotated[str, options.ask("-f --fold", "The students' fold; its validation cases decide.")],
    output: Annotated[Path, options.ask("-o --output", "Folder for record, plot, bundles, predictions.")],
    depth: options.Depth,
    training: options.ManyTrainings,
    within: Annotated[float, options.ask("--within", "Dice points (Dice x 100) a student may lose.")] = 0.5,
    prefer: Annotated[
        str, options.ask("--prefer", "Of those within: smallest (parameters), or fastest (milliseconds a patch).")
    ] = "smallest",
    control: Annotated[
        bool, options.ask("--control", "Also train each without soft labels; the better of the two counts.")
    ] = False,
    reduction: Annotated[list[int] | None, options.ask("-r --reduction", "Sizes (default: 2 4 6 8).")] = None,
    families: Annotated[
        list[str] | None,
        options.ask("--family", "width, lite, or both: every size of each (default: auto).", options.STUDENT),
    ] = None,
    reference: Annotated[
        str, options.ask("--reference", "out-of-fold (the fold that did not see the cases) or ensemble.")
    ] = "out-of-fold",
    temperature: options.Temperature = None,
    teacher_folds: options.TeacherFolds = None,
    spec: options.SpecFile = None,
    cache_root: options.CacheRoot = None,
    device: options.TrainingDevice = "auto",
    threads: options.Threads = None,
    allow_code: options.AllowCode = False,
) -> None:
    """Train several students from one cache on the same batches and name the smallest that is good enough.

    Good enough: mean Dice over the validation cases at most --within points below the reference's, with a paired
    bootstrap interval. Finished runs are kept, interrupted ones go on. Exit code 1 when none is good enough.

    Examples:

      fastnnunet distill auto -d 4 -f 0 --within 0.5 -r 2 4 6 -o auto_hippocampus

      fastnnunet distill auto -d 4 -f 0 --within 0.5 -r 2 4 6 --family width lite --prefer fastest -o auto_hippocampus

      fastnnunet distill auto -d 4 -f 0 --within 0.5 -r 4 6 --control -o auto_hippocampus
    """
    from fastnnunet.cli.train import run_jobs, wait_passively

    wait_passively()
    from fastnnunet.api import View
    from fastnnunet.bench.report.plot import plot_sizes
    from fastnnunet.cache.store.storage import place_at
    from fastnnunet.distill.job import TrainingJob
    from fastnnunet.release.auto import auto_size
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.load import build_spec
    from fastnnunet.specs.provenance import write_json

    recipe = recipe_of(spec, temperature)
    students = [
        student
        for family in dict.fromkeys(families or ["auto"])
        for student in student_specs(
            list(dict.fromkeys(reduction or [2, 4, 6, 8])),
            None,
            {"family": family, **depth},
        )
    ]
    job = TrainingJob(
        teacher=teacher_of(teacher, teacher_folds),
        student=students[0],
        distill=build_spec(DistillSpec, {**training, "temperature": recipe.temperature}, where="options"),
        cache=recipe,
        fold=parse_folds([fold])[0],
        device=device,
        threads=threads,
        cache_spec_file=spec,
        cache_root=None if cache_root is None else place_at(cache_root),
    )
    with View() as view:
        record = auto_size(
            job,
            students,
            within,
            output,
            reference=reference,
            prefer=prefer,
            control=control,
            train=lambda jobs, resume: run_jobs(jobs, resume=resume, overwrite=False, validate=False),
            progress=view,
        )
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

    from fastnnunet.evaluate.tables import wide_console

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
        print(f"{record['prefer']} student within {within:g} points: {choice['name']} ({sure} within the budget)")
    if reference["saw_the_cases"]:
        print("the ensemble was trained on most of these cases, so its Dice is optimistic and the budget stricter")
