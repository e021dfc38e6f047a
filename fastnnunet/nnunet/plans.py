"""Plans, configurations and the networks they describe."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.errors import CorruptError, MismatchError, NotFoundError

if TYPE_CHECKING:
    import torch
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises NotFoundError or CorruptError."""
    if not path.is_file():
        raise NotFoundError(f"{path} is missing")
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise CorruptError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def configuration_of(plans: dict[str, Any], configuration: str) -> "tuple[PlansManager, ConfigurationManager]":
    """nnU-Net's managers for one configuration. Raises MismatchError with the configurations that exist."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    if configuration not in plans.get("configurations", {}):
        raise MismatchError(
            f"plans {plans.get('plans_name')!r} have no configuration {configuration!r}\n"
            f"expected one of: {', '.join(plans.get('configurations', {})) or '(none)'}"
        )
    manager = PlansManager(plans)
    return manager, manager.get_configuration(configuration)


def label_manager_of(plans_manager: "PlansManager", dataset_json: dict[str, Any]) -> "LabelManager":
    """nnU-Net's label manager: heads, regions, ignore label."""
    return plans_manager.get_label_manager(dataset_json)


def num_input_channels(
    plans_manager: "PlansManager", configuration: "ConfigurationManager", dataset_json: dict[str, Any]
) -> int:
    """Image channels plus, in a cascade, one channel per foreground label."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    return int(determine_num_input_channels(plans_manager, configuration, dataset_json))


def build_network(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], deep_supervision: bool = False
) -> "torch.nn.Module":
    """The network the plans describe, with nnU-Net's own initialisation."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plans_manager, config = configuration_of(plans, configuration)
    return get_network_from_plans(
        config.network_arch_class_name,
        config.network_arch_init_kwargs,
        config.network_arch_init_kwargs_req_import,
        num_input_channels(plans_manager, config, dataset_json),
        label_manager_of(plans_manager, dataset_json).num_segmentation_heads,
        allow_init=True,
        deep_supervision=deep_supervision,
    )
