"""Whether teacher, preprocessed data and student fit together, and what a student costs."""

import contextlib
import math
from typing import Any

from fastnnunet.errors import MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.files.model import Model, build_network
from fastnnunet.nnunet.files.paths import nnunet_folder
from fastnnunet.nnunet.files.plans import configuration_of, read_json, resolved
from fastnnunet.nnunet.student.primus import PATCH_EMBED, is_primus, stock_trainer_of

SHARED = ("spacing", "normalization_schemes", "data_identifier")  # what a teacher's and its data's plans must agree in


def check_fit(
    teacher: dict[str, Any], student: dict[str, Any], dataset_json: dict[str, Any], configuration: str
) -> None:
    """Refuse a teacher, data and a student that do not fit. Raises MismatchError with all problems."""
    problems = _data_problems(teacher, dataset_json, configuration)
    problems += patch_problems(resolved(student, configuration))
    if problems:
        raise MismatchError(
            f"teacher and student do not fit, {len(problems)} problem(s):\n" + "\n".join(f"  - {p}" for p in problems)
        )


def check_network(student: Model) -> None:
    """Refuse a network that cannot be made from what is written of it. Raises MismatchError with the reason."""
    import torch

    with torch.device("meta"):
        build_network(student)


def check_last_patch(plans: dict[str, Any], configuration: str, size: tuple[int, ...]) -> None:
    """Refuse patches of another size that the student cannot be trained on. Raises SpecError."""
    config = resolved(plans, configuration)
    trained = config["patch_size"]
    if is_primus(config["architecture"]):
        raise SpecError(f"--last-patch: a Primus computes on patches of {trained} only; leave it out")
    problems = (
        [f"got {list(size)}, expected {len(trained)} numbers, as in {trained}"]
        if len(size) != len(trained)
        else patch_problems({**config, "patch_size": list(size)})
    )
    if problems:
        raise SpecError("--last-patch: " + "; ".join(problems))


def patch_problems(config: dict[str, Any]) -> list[str]:
    """Axes along which the network cannot divide the patch."""
    architecture, patch = config["architecture"], list(config["patch_size"])
    if is_primus(architecture):
        if len(patch) != 3:
            return [f"patch_size: got {patch}, expected three axes for Primus"]
        return [
            f"patch_size axis {axis}: got {n}, expected a multiple of {PATCH_EMBED} for Primus"
            for axis, n in enumerate(patch)
            if n % PATCH_EMBED
        ]
    total, strides = stride_products(config), architecture["arch_kwargs"].get("strides")
    if total is None:
        return [] if strides is None else [f"strides: got {strides!r}, expected a list of {len(patch)} numbers a stage"]
    if len(strides) < 3:
        return [f"strides: got {len(strides)} stages, expected at least 3: nnU-Net's deep supervision divides by zero"]
    if any(len(s) != len(patch) for s in strides):
        return [f"strides: got {strides}, expected {len(patch)} numbers a stage for patch {patch}"]
    return [
        f"patch_size axis {axis}: got {n}, expected a multiple of {t} (the product of the strides)"
        for axis, (n, t) in enumerate(zip(patch, total, strict=True))
        if n % t
    ]


def stride_products(config: dict[str, Any]) -> tuple[int, ...] | None:
    """What each axis of a patch has to be a multiple of; None for a network without a list of strides."""
    strides = config["architecture"]["arch_kwargs"].get("strides")
    if not isinstance(strides, list) or not all(isinstance(s, list) for s in strides):
        return None
    return tuple(math.prod(along_axis) for along_axis in zip(*strides, strict=False))


def _data_problems(teacher: dict[str, Any], dataset_json: dict[str, Any], configuration: str) -> list[str]:
    manager, config = configuration_of(teacher, configuration)
    base = nnunet_folder("nnUNet_preprocessed") / manager.dataset_name
    problems = []
    with contextlib.suppress(NotFoundError):  # planned elsewhere; the cases themselves are asked for later
        plans, mine = read_json(base / f"{manager.plans_name}.json"), config.configuration
        theirs = resolved(plans, configuration) if configuration in plans.get("configurations", {}) else {}
        problems += [
            f"{name}: teacher {mine.get(name)}, preprocessed data {theirs[name]}"
            for name in SHARED
            if name in theirs and theirs[name] != mine.get(name)
        ]
    try:
        data = read_json(base / "dataset.json")
    except NotFoundError:
        return problems
    for name in ("labels", "channel_names"):
        if name in data and name in dataset_json and data[name] != dataset_json[name]:
            problems.append(f"{name}: teacher {dataset_json[name]}, preprocessed data {data[name]}")
    return problems


def network_cost(model: Model, trainer: str = "nnUNetTrainer") -> dict[str, int]:
    """parameters, flops and activations (numbers written by all layers) of one patch through the network.

    Counted by torch's flop counter (2 per multiply-add; convolutions and matrix products) on tensors without data.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    name = stock_trainer_of(model.config.configuration["architecture"]) or trainer
    with torch.device("meta"):
        network = build_network(model, trainer=name).eval()
    activations = 0

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal activations
        activations += output.numel() if isinstance(output, torch.Tensor) else 0

    for module in {id(m): m for m in network.modules() if not any(m.children())}.values():
        module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, model.num_channels, *model.patch_size, device="meta"))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops": int(counter.get_total_flops()),
        "activations": activations,
    }
