"""`fastnnunet student`: what students would be, before anything is trained."""

import json
from typing import Annotated, Any

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.choices import student_specs
from fastnnunet.cli.parts.fields import spread

app = typer.Typer(no_args_is_help=True, help="What students of a teacher would look like and cost.")


@app.callback()
def _group() -> None:
    """Keeps `student` a group while it has one command."""


@app.command("describe")
@spread
def describe(
    network: options.Network,
    student: options.Student,
    reduction: options.Reduction = None,
    student_file: options.StudentFile = None,
    folds: Annotated[int, options.ask("--folds", "Folds of the ensemble to compare with.", options.TEACHER, min=1)] = 5,
    allow_code: options.AllowCode = False,
    as_json: Annotated[bool, options.ask("--json", "Print JSON.", options.RUN)] = False,
) -> None:
    """Stages, parameters and work per patch of students, from the plans alone.

    The speed-up is a range: from the ratio of numbers written (where memory is the limit) to the ratio of FLOPs (where
    arithmetic is). Measure before you rely on it.

    Example:

      fastnnunet student describe -d 4 -c 3d_fullres -r 2 4 6
    """
    from fastnnunet.nnunet.files.model import model_of
    from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset
    from fastnnunet.nnunet.files.plans import architecture_of, configuration_of, read_json
    from fastnnunet.nnunet.student.fit import check_fit, network_cost
    from fastnnunet.nnunet.student.plans import student_plans
    from fastnnunet.specs.distill import DistillSpec

    dataset, configuration, plans, trainer = network.values()
    specs = student_specs(reduction, student_file, student)
    base = nnunet_folder("nnUNet_preprocessed") / resolve_dataset(dataset)
    teacher, dataset_json = read_json(base / f"{plans}.json"), read_json(base / "dataset.json")
    _, config = configuration_of(teacher, configuration)
    cost = network_cost(model_of(teacher, configuration, dataset_json), trainer)
    copies = folds * 2 ** len(config.patch_size)
    rows: list[dict[str, Any]] = [{"name": "teacher", **cost}]
    for spec in specs:
        made = student_plans(teacher, configuration, spec, DistillSpec(), dataset_json, trainer)
        check_fit(teacher, made, dataset_json, configuration)
        own = network_cost(model_of(made, configuration, dataset_json))
        ratios = sorted(cost[n] / own[n] for n in ("activations", "flops"))
        rows.append(
            {
                "name": spec.tag,
                **own,
                "network": architecture_of(made, configuration),
                "faster_than_network": ratios,
                "faster_than_ensemble": [copies * ratio for ratio in ratios],
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        _show(row, folds, copies)


def _show(row: dict[str, Any], folds: int, copies: int) -> None:
    work = f"{row['parameters'] / 1e6:.3f} M parameters, {row['flops'] / 1e9:.2f} GFLOP per patch"
    print(f"{row['name']}: {work}")
    if "network" not in row:
        return
    kwargs = row["network"]["arch_kwargs"]
    print(f"  {row['network']['network_class_name'].rsplit('.', 1)[-1]}")
    shown = ("features_per_stage", "n_blocks_per_stage", "n_conv_per_stage", "n_conv_per_stage_decoder", "strides")
    for name in (*shown, "embed_dim", "eva_numheads", "eva_depth"):
        if name in kwargs:
            print(f"  {name}: {kwargs[name]}")
    low, high = row["faster_than_network"]
    print(f"  expected speed-up: {low:.1f} to {high:.1f} over one network, ", end="")
    print(f"{low * copies:.0f} to {high * copies:.0f} over {folds} folds x {copies // folds} mirrors")
