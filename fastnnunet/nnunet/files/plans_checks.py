"""Whether plans can be what nnU-Net wrote: kinds, ranges and names, before nnU-Net or anything else works with them.

nnU-Net looks names up as Python does, and takes numbers as they are. Here is no nnU-Net: what it makes of plans that
pass is its own affair.
"""

from collections.abc import Mapping
from typing import Any

from fastnnunet.errors import MismatchError
from fastnnunet.specs.checks.architecture import MAX_STAGES, architecture_problems
from fastnnunet.specs.checks.networks import check_names
from fastnnunet.specs.checks.problems import (
    intensity_problems,
    is_file_ending,
    is_integer,
    is_list,
    is_name,
    label_problems,
    patch_size_problems,
    resampling_problems,
    scheme_list_problems,
    shown,
    spacing_problems,
    transpose_problems,
)
from fastnnunet.specs.checks.reproducible import resolve_inheritance

_STATISTICS = ("foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality")
_MAX_CONFIGURATIONS = 1000
# of plans written before nnU-Net 2.5, which have no `architecture`
_OLD_LISTS = ("n_conv_per_stage_encoder", "n_conv_per_stage_decoder", "conv_kernel_sizes", "pool_op_kernel_sizes")
_OLD_NUMBERS = ("UNet_base_num_features", "unet_max_num_features")


def check_plans(plans: Mapping[str, Any], configuration: str) -> None:
    """Refuse plans that cannot be, or that name code which is on no list. Raises MismatchError with all problems.

    Says nothing of a configuration that is not there.
    """
    problems = _plans_problems(plans)
    config: dict[str, Any] = {}
    if not problems and configuration in plans["configurations"]:
        try:
            config = resolve_inheritance(plans["configurations"], configuration)
            problems = _configuration_problems(plans, config)
        except MismatchError as e:
            problems = [str(e)]
    if problems:
        raise MismatchError(
            f"plans {shown(plans.get('plans_name'))} with configuration {shown(configuration)} cannot be used, "
            f"{len(problems)} problem(s):\n"
            + "\n".join(f"  - {p}" for p in problems[:20])
            + "\ntake the plans that nnU-Net wrote for this model, or plan the data set again"
        )
    if "architecture" in config:
        check_names(config["architecture"])


def check_dataset_json(dataset_json: Mapping[str, Any]) -> None:
    """Refuse a dataset.json without usable labels, channels or file ending. Raises MismatchError."""
    channels = dataset_json.get("modality", dataset_json.get("channel_names"))
    labels = dataset_json.get("labels")
    has_regions = isinstance(labels, dict) and any(is_list(v) and len(v) > 1 for v in labels.values())
    # without regions nnU-Net does not look at their order, and it never looks at the names of channels
    problems = label_problems(labels, dataset_json.get("regions_class_order") if has_regions else None)
    if not isinstance(channels, dict) or not 0 < len(channels) <= 1000 or not all(map(_is_plain, channels.values())):
        problems.append(f"channel_names: got {shown(channels)}, expected numbers with names")
    if not is_file_ending(dataset_json.get("file_ending")):
        problems.append(f"file_ending: got {shown(dataset_json.get('file_ending'))}, expected one such as .nii.gz")
    if problems:
        raise MismatchError(
            f"dataset.json cannot be used, {len(problems)} problem(s):\n" + "\n".join(f"  - {p}" for p in problems)
        )


def _plans_problems(plans: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{field}: got {shown(plans[field])}, expected a name without '/' or control characters"
        for field in ("dataset_name", "plans_name")
        if field in plans and not is_name(plans[field])
    ]
    problems += [
        f"{field}: got {shown(plans[field])}, expected the name of a class"
        for field in ("image_reader_writer", "label_manager")
        if field in plans and not is_class_name(plans[field])
    ]
    problems += [f"{field} is missing" for field in ("dataset_name", "plans_name") if field not in plans]
    configurations = plans.get("configurations")
    if (
        not isinstance(configurations, dict)
        or not all(isinstance(c, dict) and isinstance(c.get("inherits_from", ""), str) for c in configurations.values())
        or len(configurations) > _MAX_CONFIGURATIONS
    ):
        problems.append(f"configurations: got {shown(configurations)}, expected configurations by name")
    if "transpose_forward" in plans or "transpose_backward" in plans:
        problems += transpose_problems(plans.get("transpose_forward"), plans.get("transpose_backward"))
    return problems


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | None)


def is_class_name(value: Any) -> bool:
    """An identifier: nnU-Net searches its own modules for an attribute of that name."""
    return isinstance(value, str) and value.isidentifier() and not value.startswith("_")


def _configuration_problems(plans: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    patch_size = config.get("patch_size")
    problems = patch_size_problems(patch_size)
    if problems:
        return problems
    dims = len(config["patch_size"])
    problems += spacing_problems(config.get("spacing"), dims, "spacing")
    schemes = config.get("normalization_schemes")
    problems += scheme_list_problems(schemes, config.get("use_mask_for_norm"), None)
    if is_list(schemes):
        for name in (n for n in _STATISTICS if n in plans):
            problems += intensity_problems(plans[name], schemes or (), name)
    if config.get("batch_size") is not None and not is_integer(config["batch_size"], 1, 2**16):
        problems.append(f"batch_size: got {shown(config['batch_size'])}, expected a whole number from 1 to 65536")
    if "data_identifier" in config and not is_name(config["data_identifier"]):
        problems.append(f"data_identifier: got {shown(config['data_identifier'])}, expected the name of a folder")
    if "preprocessor_name" in config and not is_class_name(config["preprocessor_name"]):
        problems.append(f"preprocessor_name: got {shown(config['preprocessor_name'])}, expected the name of a class")
    for kind in ("data", "seg", "probabilities"):
        name = f"resampling_fn_{kind}"
        if name in config:
            problems += resampling_problems({"fn": config[name], "kwargs": config.get(f"{name}_kwargs")}, name)
    if "architecture" in config:
        return problems + architecture_problems(config["architecture"], config["patch_size"])
    return problems + _old_architecture_problems(config)


def _old_architecture_problems(config: Mapping[str, Any]) -> list[str]:
    """The network as nnU-Net makes it of the older fields."""
    if "UNet_class_name" not in config:
        return ["architecture: it is missing, and so are the fields that older plans have instead"]
    wrong = [name for name in _OLD_LISTS if not is_list(config.get(name)) or len(config[name]) > MAX_STAGES]
    wrong += [name for name in _OLD_NUMBERS if not is_integer(config.get(name), 1, 2**14)]
    if wrong:
        return [f"{name}: got {shown(config.get(name))}, which no network has" for name in wrong]
    stages = len(config["n_conv_per_stage_encoder"])
    widest = config["unet_max_num_features"]
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [min(config["UNet_base_num_features"] * 2**i, widest) for i in range(stages)],
        "kernel_sizes": config["conv_kernel_sizes"],
        "strides": config["pool_op_kernel_sizes"],
        "n_conv_per_stage": config["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": config["n_conv_per_stage_decoder"],
    }
    made = {"network_class_name": config["UNet_class_name"], "arch_kwargs": kwargs, "_kw_requires_import": []}
    return architecture_problems(made, config["patch_size"])
