"""Students are ordinary nnU-Net models: the teacher's plans with another network, under a name of their own."""

import json
import logging
from pathlib import Path
from typing import Any

from fastnnunet.errors import FastnnUNetError, MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.files.paths import model_folder, nnunet_folder
from fastnnunet.nnunet.files.plans import (
    STOCK_TRAINER,
    architecture_of,
    configuration_of,
    trainer_class,
    with_configuration,
)
from fastnnunet.specs.checks.json_text import read_json
from fastnnunet.specs.checks.networks import find_network
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec, student_plans_name
from fastnnunet.system.files import atomic_output

UNETS = "dynamic_network_architectures.architectures.unet."
PLAIN, RESIDUAL = UNETS + "PlainConvUNet", UNETS + "ResidualEncoderUNet"
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)  # of nnU-Net's ResEnc planners, 1 in each decoder stage
# momentum: the statistics follow about the last fifty batches, since one of two patches says little
BATCH_NORM: dict[str, Any] = {"eps": 1e-5, "affine": True, "momentum": 0.02}
PLAIN_CONVOLUTIONS = 2  # of nnU-Net's default planner, in every stage of both sides
STUDENT_MARK = "fastnnunet_student"  # in plans beside the preprocessed data
NNUNET_FILES = ("dataset", "dataset_fingerprint", "splits_final")  # that nnU-Net keeps there
LAYERS = ("conv_op", "norm_op", "dropout_op", "nonlin")
LAYER_KWARGS = ("conv_bias", "norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs")
log = logging.getLogger(__name__)


def reduce_features(features_per_stage: list[int], student: StudentSpec) -> list[int]:
    """`StudentSpec.narrower` of every stage. Raises SpecError when f // r leaves no channel somewhere."""
    if min(features_per_stage) // student.r < 1:
        raise SpecError(
            f"-r {student.r} leaves no channels: the narrowest stage has {min(features_per_stage)} features\n"
            f"expected r of at most {min(features_per_stage)}"
        )
    return [student.narrower(f) for f in features_per_stage]


def student_plans(
    plans: dict[str, Any],
    configuration: str,
    student: StudentSpec,
    distill: DistillSpec,
    dataset_json: dict[str, Any] | None = None,
    trainer: str = STOCK_TRAINER,
) -> dict[str, Any]:
    """The student's plans: another architecture (and batch size) in `configuration`, written out; all else as the
    teacher's.

    The preprocessed data are shared with the teacher because `data_identifier` stays. `dataset_json` is needed for
    teachers whose `trainer` builds the network. Raises MismatchError for an architecture nothing can be derived from,
    SpecError for a student that leaves nothing of it.
    """
    manager, _ = configuration_of(plans, configuration)
    name = student_plans_name(manager.plans_name, student, distill)
    if name == manager.plans_name:
        raise SpecError(f"-spl {name} is the name of the teacher's plans; give the student another")
    changes: dict[str, Any] = {
        "architecture": student_architecture(plans, configuration, student, dataset_json, trainer)
    }
    if distill.batch_size is not None:
        changes["batch_size"] = distill.batch_size
    return with_configuration(plans, configuration, **changes) | {"plans_name": name}


def student_architecture(
    plans: dict[str, Any],
    configuration: str,
    student: StudentSpec,
    dataset_json: dict[str, Any] | None,
    trainer: str = STOCK_TRAINER,
) -> dict[str, Any]:
    """`architecture` of the student's plans."""
    described = architecture_of(plans, configuration)
    if student.is_explicit:
        return _explicit(student, described)
    own_network = trainer != STOCK_TRAINER and _builds_its_own(trainer)
    if student.size is not None or (own_network and student.architecture == "same"):
        return _primus(plans, configuration, student, dataset_json, trainer)
    kwargs = described.get("arch_kwargs", {})
    if not isinstance(kwargs.get("features_per_stage"), list):
        raise MismatchError(
            f"configuration {configuration!r} of {plans['plans_name']} has no list features_per_stage to divide by r\n"
            f"got architecture {described.get('network_class_name')}; expected a U-Net"
        )
    return _unet(described, student)


def _unet(architecture: dict[str, Any], student: StudentSpec) -> dict[str, Any]:
    kwargs = architecture["arch_kwargs"]
    features, stages = kwargs["features_per_stage"], len(kwargs["features_per_stage"])
    if student.architecture == "plain" and "n_blocks_per_stage" in kwargs:
        del kwargs["n_blocks_per_stage"]
        architecture["network_class_name"] = PLAIN
        kwargs["n_conv_per_stage"] = [PLAIN_CONVOLUTIONS] * stages
        kwargs["n_conv_per_stage_decoder"] = [PLAIN_CONVOLUTIONS] * (stages - 1)
    elif student.architecture == "residual" and "n_conv_per_stage" in kwargs:
        del kwargs["n_conv_per_stage"]
        architecture["network_class_name"] = RESIDUAL
        kwargs["n_blocks_per_stage"] = list(RESIDUAL_BLOCKS[:stages])
        kwargs["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    kwargs["features_per_stage"] = reduce_features(features, student)
    if isinstance(kwargs.get("stem_channels"), int):
        kwargs["stem_channels"] = student.narrower(kwargs["stem_channels"])
    if "n_blocks_per_stage" not in kwargs and student.blocks != "auto":
        raise SpecError(f"-bs {student.blocks}: this network has no residual blocks to count; leave it out")
    if "n_blocks_per_stage" in kwargs:
        blocks = _per_stage(kwargs["n_blocks_per_stage"], stages)
        kwargs["n_blocks_per_stage"] = student.fewer_blocks(blocks, features, kwargs["features_per_stage"])
    if student.is_lite:
        _thin(kwargs, stages)
    if student.norm == "batch":
        if kwargs.get("norm_op") is None:
            raise SpecError(
                f"--norm batch: the teacher's {architecture['network_class_name']} has no normalisation that its plans "
                "name (norm_op); leave it out"
            )
        kwargs["norm_op"] = f"torch.nn.modules.batchnorm.BatchNorm{_axes(kwargs)}d"
        kwargs["norm_op_kwargs"] = dict(BATCH_NORM)
        kwargs["conv_bias"] = False  # a norm takes it away again, and its gradient is a twelfth of a training step
        imported = architecture["_kw_requires_import"]
        architecture["_kw_requires_import"] = [*imported, *({"norm_op"} - set(imported))]
    return architecture


def _axes(kwargs: dict[str, Any]) -> int:
    return 2 if "2d" in str(kwargs.get("conv_op")) else 3


def _thin(kwargs: dict[str, Any], stages: int) -> None:
    """Full resolution costs most: one in-plane convolution ([1, 3, 3]) on each side of it.

    OpenVINO in bfloat16, 128^3, r=4, two cores with other load, fastest of seven runs: width 0.595 s; one convolution
    0.399, one [1, 3, 3] 0.294, one [1, 1, 1] 0.237 (measure/train/lite_student.py). [1, 3, 3] halves the time and
    still sees its neighbours in the plane. A two-dimensional network keeps its kernel.
    """
    axes = _axes(kwargs)
    kernels = [[k] * axes if isinstance(k, int) else list(k) for k in _per_stage(kwargs["kernel_sizes"], stages)]
    if len(kernels[0]) == 3:
        kernels[0] = [1, *kernels[0][1:]]
    kwargs["kernel_sizes"] = kernels
    name = "n_blocks_per_stage" if "n_blocks_per_stage" in kwargs else "n_conv_per_stage"
    kwargs[name] = [1, *_per_stage(kwargs[name], stages)[1:]]
    kwargs["n_conv_per_stage_decoder"] = [*_per_stage(kwargs["n_conv_per_stage_decoder"], stages - 1)[:-1], 1]


def _per_stage(value: Any, stages: int) -> list[Any]:
    return [value] * stages if isinstance(value, int) else list(value)


def _primus(
    plans: dict[str, Any],
    configuration: str,
    student: StudentSpec,
    dataset_json: dict[str, Any] | None,
    trainer: str,
) -> dict[str, Any]:
    import torch

    from fastnnunet.nnunet.student.primus import OURS, PRIMUS, narrower_primus, primus_kwargs, stock_trainer

    if dataset_json is None:
        raise MismatchError(f"the network of trainer {trainer} needs dataset.json; got none")
    model = model_of(plans, configuration, dataset_json)
    patch_size = list(model.patch_size)
    if student.size is not None:
        stock = stock_trainer(student.size)
        with torch.device("meta"):  # an L is 1.3 GB
            network = build_network(model, trainer=stock)
        kwargs = primus_kwargs(network, patch_size)
        return _written(PRIMUS, kwargs) | {"stock_trainer": stock}
    kwargs = primus_kwargs(build_network(model, trainer=trainer), patch_size)
    return _written(OURS, narrower_primus(kwargs, student))


def _written(class_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"network_class_name": class_name, "arch_kwargs": kwargs, "_kw_requires_import": []}


def _explicit(student: StudentSpec, described: dict[str, Any]) -> dict[str, Any]:
    """A network written out; kinds of layers that it takes and does not name are the teacher's."""
    import inspect

    kind: Any = find_network(student.network_class_name)
    known = inspect.signature(kind.__init__).parameters
    kwargs = dict(student.arch_kwargs or {})
    problems = [] if "deep_supervision" in known else ["the class takes no deep_supervision, which nnU-Net hands over"]
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        names = ", ".join(n for n in known if n != "self")
        problems += [f"unknown argument {name!r}; known: {names}" for name in kwargs if name not in known]
        given = described.get("arch_kwargs", {})
        kwargs |= {n: given[n] for n in (*LAYERS, *LAYER_KWARGS) if n in known and n in given and n not in kwargs}
    fixed = {"self", "input_channels", "num_classes", "deep_supervision"}
    problems += [
        f"argument {n!r} is missing"
        for n, p in known.items()
        if n not in fixed and n not in kwargs and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    problems += [f"argument {n!r} is set by nnU-Net, not by arch_kwargs" for n in fixed if n in kwargs]
    if problems:
        raise SpecError(f"arch_kwargs: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))
    imported = [n for n in (*LAYERS, "block") if isinstance(kwargs.get(n), str) or (n in kwargs and n in LAYERS)]
    return {
        "network_class_name": student.network_class_name,
        "arch_kwargs": kwargs,
        "_kw_requires_import": imported,
    }


def _builds_its_own(trainer: str) -> bool:
    return (
        trainer_class(trainer).build_network_architecture is not trainer_class(STOCK_TRAINER).build_network_architecture
    )


def student_trainer(student: StudentSpec) -> str:
    """The trainer in the name of a student's folder."""
    from fastnnunet.nnunet.student.primus import stock_trainer

    return STOCK_TRAINER if student.size is None else stock_trainer(student.size)


def check_plans_name(dataset_name: str, plans_name: str) -> None:
    """Refuse a name under which something else than a student's plans lies, or will lie, beside the preprocessed data.

    Raises SpecError.
    """
    path = _published(dataset_name, plans_name)
    taken = plans_name in NNUNET_FILES
    if path.is_file() and not taken:
        try:
            there = read_json(path)
        except ValueError:  # whatever it is, it is none of ours
            there = None
        taken = not (isinstance(there, dict) and there.get(STUDENT_MARK))
    if taken:
        raise SpecError(
            f"-spl {plans_name}: {path} is nnU-Net's or another model's and would be replaced; give another name"
        )


def publish_plans(dataset_name: str, plans: dict[str, Any]) -> None:
    """Write `<plans name>.json` beside the preprocessed data, where nnUNetv2_find_best_configuration looks for it.

    Training does not need it, so a folder that cannot be written to is a warning.
    """
    path = _published(dataset_name, plans["plans_name"])
    try:
        with atomic_output(path) as partial:
            partial.write_text(json.dumps({**plans, STUDENT_MARK: True}, indent=4))
    except FastnnUNetError as error:
        log.warning("%s was not written (%s): nnUNetv2_find_best_configuration will not find it", path, error)


def _published(dataset_name: str, plans_name: str) -> Path:
    return nnunet_folder("nnUNet_preprocessed") / dataset_name / f"{plans_name}.json"


def student_folder(
    dataset_name: str, teacher_plans: str, configuration: str, student: StudentSpec, distill: DistillSpec
) -> Path:
    """The student's model folder in nnUNet_results, where stock nnU-Net looks for it."""
    name = student_plans_name(teacher_plans, student, distill)
    return model_folder(dataset_name, student_trainer(student), name, configuration)


def find_student(
    dataset_name: str, teacher_plans: str, configuration: str, student: StudentSpec, distill: DistillSpec
) -> Path:
    """The one student of this kind, weight of the soft loss and temperature, however else it was trained.

    Raises NotFoundError with the students that exist, MismatchError with the names when several fit.
    """
    exact = student_folder(dataset_name, teacher_plans, configuration, student, distill)
    stem = f"{teacher_plans}_{student.tag}_{distill.soft_tag}"
    pattern = f"{student_trainer(student)}__*__{configuration}"
    named = {p.name.split("__")[1]: p for p in sorted(exact.parent.glob(pattern))}
    fitting = [name for name in named if name == stem or name.startswith(f"{stem}_")]
    if not fitting:
        there = [name for name in named if name != teacher_plans]  # -spl gives any name
        raise NotFoundError(
            f"no student {stem} in {exact.parent} for {configuration}\n"
            f"students that exist: {', '.join(there) or '(none)'}"
        )
    if len(fitting) > 1 and not exact.is_dir():
        raise MismatchError(f"several students {stem}: {', '.join(fitting)}\nname one of them with -spl")
    return exact if exact.is_dir() else named[fitting[0]]
