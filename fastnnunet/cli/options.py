"""Options that several commands take, the same wherever they are offered."""

from pathlib import Path
from typing import Annotated

import typer

from fastnnunet.specs.checks.networks import allow_code


def _allow_code(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.with_resource(allow_code())  # until the command ends
    return wanted


# which teacher
Dataset = Annotated[str, typer.Option("-d", "--dataset", help="Data set id or name.")]
Configuration = Annotated[str, typer.Option("-c", "--configuration", help="nnU-Net configuration.")]
Plans = Annotated[str, typer.Option("-p", "--plans", help="The teacher's plans.")]
Trainer = Annotated[str, typer.Option("-tr", "--trainer", help="The teacher's trainer.")]
Checkpoint = Annotated[str, typer.Option("-chk", "--checkpoint", help="The teacher's checkpoint, of every fold.")]
Folds = Annotated[list[str] | None, typer.Option("-f", "--fold", help="Teacher folds [default: 0 1 2 3 4].")]
TeacherFolds = Annotated[list[str] | None, typer.Option("-tf", help="Teacher folds [default: 0 1 2 3 4].")]
Previous = Annotated[
    str | None,
    typer.Option("--previous", help="Cascades: `teacher`, or a folder of the previous stage's predicted_next_stage."),
]

# which cache
SpecFile = Annotated[Path | None, typer.Option("--spec", help="Recipe [default: cache_specs/default.yaml's values].")]
CacheRoot = Annotated[
    str | None, typer.Option("--root", help="Folder of the caches, or s3://bucket/prefix [default: beside the cases].")
]
Temperature = Annotated[
    float | None,
    typer.Option("-temp", "--temp", "--temperature", help="T of cache and loss [default: the recipe's, else 3]."),
]

# which student
Reduction = Annotated[
    list[int] | None, typer.Option("-r", "--reduction", help="Student size: width divided by r; may repeat.")
]
StudentFile = Annotated[
    Path | None, typer.Option("--student", help="YAML of a student: network_class_name and arch_kwargs, or others.")
]
Family = Annotated[
    str, typer.Option("--family", help="lite (thin full-resolution stage), width, or auto: lite where r > 1.")
]
RoundTo = Annotated[int, typer.Option("--round-to", help="Widths in multiples of this.")]
Blocks = Annotated[str, typer.Option("-bs", "--blocks", help="reduce, keep, increase or adaptive depth.")]
Architecture = Annotated[str, typer.Option("--architecture", help="same, plain or residual.")]
Size = Annotated[str | None, typer.Option("-ts", "--size", help="A stock Primus: S, B, M or L.")]

RunName = Annotated[str | None, typer.Option("--name", help="Name of the run: of `train`, for `export` and `predict`.")]

# how it is trained
Alpha = Annotated[float, typer.Option("-a", "--alpha", help="Weight of the soft loss; 0 trains the control.")]
Anneal = Annotated[
    bool, typer.Option("--anneal", help="Let the weight of the soft loss fall linearly to 0 during the training.")
]
Epochs = Annotated[int, typer.Option("-e", "--epochs", help="Epochs.")]
Iterations = Annotated[int, typer.Option("--iterations", help="Iterations per epoch.")]
ValIterations = Annotated[int, typer.Option("--val-iterations", help="Validation iterations per epoch.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Samples a step [default: the plans'].")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="sgd (nnU-Net's), or adamw for short runs.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Initial learning rate [sgd 0.01, adamw 0.003].")]
Loss = Annotated[str, typer.Option("--loss", help="Soft loss: kl, or kl_dice (KL and Dice semimetric).")]
Start = Annotated[str, typer.Option("--start", help="First weights: teacher (its most important channels) or random.")]
TrainingPrecision = Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16 (CPU).")]
Seed = Annotated[int, typer.Option("--seed", help="Of batches and first weights.")]
TrainingDevice = Annotated[str, typer.Option("-device", "--device", help="auto, cpu or cuda.")]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", callback=_allow_code, help="Run code that the model or --student names; only if you trust it."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads [default: all].")]
