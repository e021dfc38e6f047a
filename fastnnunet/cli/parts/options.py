"""Options that several commands take, the same wherever they are offered; those of a spec's field are made from it."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from fastnnunet.cli.parts.fields import Asked, Group, ask, option
from fastnnunet.errors import SpecError
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.specs.checks.networks import allow_code
from fastnnunet.specs.distill import SCANS_TRAINING, DistillSpec
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec

# headings of help; what everyone needs stands above them, under none
TEACHER, CACHE, STUDENT, TRAINING = "Teacher", "Cache", "Student", "Training"
GRAPH, MODEL, CASES, MEASURED = "Exported graph", "Model", "Cases", "What is measured"
OUTPUT, LABELS, RUN = "Output", "Tidying of labels", "How it runs"


def _allow_code(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.with_resource(allow_code())  # until the command ends
    return wanted


# which teacher
_NETWORK = ("configuration", "plans", "trainer")
ByName = Annotated[Asked, Group(TeacherSpec, TEACHER, only=_NETWORK)]
Network = Annotated[Asked, Group(TeacherSpec, TEACHER, only=("dataset", *_NETWORK))]
Teacher = Annotated[Asked, Group(TeacherSpec, TEACHER, without=("folds", "previous"))]
TeacherOrModel = Annotated[Asked, Group(TeacherSpec, TEACHER, without=("folds", "previous"), optional=("dataset",))]
Folds = Annotated[list[str] | None, option(TeacherSpec, "folds", panel=TEACHER)]
TeacherFolds = Annotated[list[str] | None, option(TeacherSpec, "folds", "-tf", panel=TEACHER)]
Previous = Annotated[str | None, option(TeacherSpec, "previous", panel=TEACHER)]

# which cache
SpecFile = Annotated[
    Path | None,
    ask("--spec", "Recipe (default: cache_specs/default.yaml's values).", CACHE),
]
CacheRoot = Annotated[
    str | None,
    ask("--root", "Folder of the caches, or s3://bucket/prefix (default: beside the cases).", CACHE),
]
Temperature = Annotated[
    float | None, ask("-temp --temp --temperature", "T of cache and loss (default: the recipe's, else 1).")
]

# which student
Reduction = Annotated[list[int] | None, option(StudentSpec, "r")]
StudentFile = Annotated[
    Path | None,
    ask("--student", "YAML of a student: network_class_name and arch_kwargs, or others.", STUDENT),
]
Student = Annotated[Asked, Group(StudentSpec, STUDENT, without=("r", "plans_name"))]
Depth = Annotated[Asked, Group(StudentSpec, STUDENT, only=("blocks", "architecture"))]
StudentPlans = Annotated[str | None, option(StudentSpec, "plans_name", panel=STUDENT)]

RunName = Annotated[str | None, ask("--name", "Name of the run: of `train`, for `export` and `predict`.")]

# how it is trained; the temperature is the recipe's
_OF_UNLABELLED = ("unlabelled", "unlabelled_share", "pseudo_labels")
_OF_ONE = (*_OF_UNLABELLED, "augmentation", "mirror_augmentation", "soft_on_ignored", "mirroring")
Training = Annotated[Asked, Group(DistillSpec, TRAINING, without=("temperature",))]
ScansTraining = Annotated[
    Asked,
    Group(
        DistillSpec,
        TRAINING,
        without=("temperature", *_OF_UNLABELLED),
        defaults=tuple(SCANS_TRAINING.items()),
    ),
]
ManyTrainings = Annotated[Asked, Group(DistillSpec, TRAINING, without=("temperature", *_OF_ONE))]
Trained = Annotated[Asked, Group(DistillSpec, TRAINING, only=("alpha", "temperature"))]
TrainingDevice = Annotated[str, ask("-device --device", "auto, cpu or cuda.", RUN)]
Graph = Annotated[Asked, Group(GraphSpec, GRAPH)]

# how it runs
AllowCode = Annotated[
    bool,
    ask("--allow-code", "Run code that the model or --student names; only if you trust it.", RUN, callback=_allow_code),
]
Threads = Annotated[int | None, ask("--threads", "CPU threads (default: all).", RUN, min=1)]
Overwrite = Annotated[bool, ask("--overwrite", "Replace what is there already.", RUN)]

# what is written
Outputs = Annotated[Asked, Group(OutputSpec, OUTPUT)]

# tidying of label maps
_WORDS = "'all' (the foreground as one structure), 'each', names or numbers of labels, a+b for both as one"
KeepLargest = Annotated[
    list[str] | None,
    ask("--keep-largest", f"Keep only the largest component of: {_WORDS}. Alone: all.", LABELS),
]
MinSize = Annotated[
    str | None,
    ask("--min-size", "Remove components of a label smaller than this: 20 (voxels) or 50mm3.", LABELS),
]
FillHoles = Annotated[
    list[str] | None,
    ask("--fill-holes", "Fill background enclosed by: 'each' label, names or numbers. Alone: each.", LABELS),
]
PostprocessingFile = Annotated[
    Path | None,
    ask("-pp_pkl_file --pp_pkl_file", "nnU-Net's postprocessing.pkl or .json; no code in it is run.", LABELS),
]


def refuse_besides_name(context: typer.Context, allowed: Collection[str | None]) -> None:
    """Refuse what stands on the command line beside `--name`, which says it already. Raises SpecError."""
    refuse_besides(f"--name {context.params['name']}", "says which model", context, {"name", *allowed})


def refuse_besides(option: str, does: str, context: typer.Context, allowed: Collection[str | None]) -> None:
    """Refuse what stands on the command line beside an option that leaves no room for it. Raises SpecError."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in allowed
        and (source := context.get_parameter_source(parameter.name or "")) is not None
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise SpecError(f"{option} {does}; leave out {' '.join(given)}")
