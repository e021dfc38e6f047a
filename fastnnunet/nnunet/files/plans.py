"""Plans and their configurations.

Plans are read through nnU-Net's own managers, here and nowhere else: they resolve `inherits_from`, make an
`architecture` of what was written before nnU-Net 2.5, and know older names of the intensity statistics.
"""

import contextlib
import io
import warnings
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.errors import MismatchError, NotFoundError, printable
from fastnnunet.nnunet.files.plans_checks import is_class_name
from fastnnunet.nnunet.files.trust import check_labels, check_trusted
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.checks.problems import shown
from fastnnunet.specs.checks.reproducible import resolve_inheritance

if TYPE_CHECKING:
    from fastnnunet.nnunet.v2 import ConfigurationManager, LabelManager, PlansManager

STOCK_TRAINER = "nnUNetTrainer"
_NETWORKS = "dynamic_network_architectures."
_UNETS = {
    name: f"{_NETWORKS}architectures.unet.{name}" for name in ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises NotFoundError or CorruptError."""
    return read_json_object(path)


def configuration_of(plans: dict[str, Any], configuration: str) -> "tuple[PlansManager, ConfigurationManager]":
    """nnU-Net's managers for one configuration. Raises MismatchError with the configurations that exist, or with what
    nnU-Net says of one that it cannot resolve.
    """
    from fastnnunet.nnunet.v2 import PlansManager

    check_trusted(plans, configuration)
    known = plans.get("configurations", {})
    if configuration not in known:
        raise MismatchError(
            f"plans {plans.get('plans_name')!r} have no configuration {configuration!r}\n"
            f"expected one of: {', '.join(known) or '(none)'}"
        )
    manager = PlansManager(plans)
    try:
        with warnings.catch_warnings():  # about plans of before 2.5, whenever they are read
            warnings.simplefilter("ignore")
            return manager, manager.get_configuration(configuration)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = f"{e} is missing" if isinstance(e, KeyError) else str(e)
        raise MismatchError(
            f"configuration {configuration!r} of plans {plans.get('plans_name')!r} cannot be read as nnU-Net reads it: "
            f"{reason}\ncorrect the plans, or plan the data set again"
        ) from e


def has_configuration(plans: dict[str, Any], configuration: str) -> bool:
    """Whether a `plans.json` as it is read names that configuration."""
    return configuration in plans.get("configurations", {})


def resolved(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration as nnU-Net resolves it, a copy: what it inherits, and always an `architecture`.

    Raises MismatchError.
    """
    config: dict[str, Any] = configuration_of(plans, configuration)[1].configuration
    return config


def with_configuration(plans: dict[str, Any], configuration: str, **changes: Any) -> dict[str, Any]:
    """A copy of the plans in which one configuration is written out in full, with `changes` to its fields.

    All others mean what they meant: those that inherit from it are written out too, whatever they name. Raises
    MismatchError.
    """
    out = deepcopy(plans)
    written = {configuration: resolved(plans, configuration) | changes}
    for name in plans["configurations"]:
        if configuration in _ancestors(plans, name):
            written[name] = deepcopy(resolve_inheritance(plans["configurations"], name))
    for config in written.values():
        config.pop("inherits_from", None)
    out["configurations"] |= written
    return out


def without_previous_stage(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """A copy of the plans in which a cascade's second stage sees the image alone; see `with_configuration`."""
    out = with_configuration(plans, configuration)
    out["configurations"][configuration].pop("previous_stage", None)
    return out


def _ancestors(plans: dict[str, Any], configuration: str) -> list[str]:
    """The configurations that one inherits from, the nearest first; as far as they are there and differ."""
    chain: list[str] = []
    known = plans["configurations"]
    while (parent := known[configuration].get("inherits_from")) in known and parent not in chain:
        chain.append(parent)
        configuration = parent
    return chain


def architecture_of(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """`architecture` of a configuration, a copy, with its network under the name it has now.

    nnU-Net looks for classes of dynamic_network_architectures that were moved; `residual_unet`, which it writes for
    plans of before 2.5, is such a place. Raises MismatchError.
    """
    architecture = deepcopy(resolved(plans, configuration)["architecture"])
    return {**architecture, "network_class_name": _name_now(architecture["network_class_name"])}


def _name_now(class_name: str) -> str:
    moved = _UNETS.get(class_name.rsplit(".", 1)[-1])
    return moved if moved and class_name.startswith(_NETWORKS) else class_name


def intensity_properties(plans_manager: "PlansManager") -> dict[str, Any]:
    """Statistics of the training voxels for each channel. Raises MismatchError for plans that have none."""
    try:
        statistics: dict[str, Any] = plans_manager.foreground_intensity_properties_per_channel
    except KeyError as e:
        raise MismatchError(
            f"plans {plans_manager.plans.get('plans_name')!r} lack {e}\ncorrect them, or plan the data set again"
        ) from e
    return statistics


def label_manager_of(plans_manager: "PlansManager", dataset_json: dict[str, Any]) -> "LabelManager":
    """nnU-Net's label manager: heads, regions, ignore label. Raises MismatchError for labels it does not take."""
    check_labels(plans_manager, dataset_json)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that plans name none, which is usual in old ones
        return plans_manager.get_label_manager(dataset_json)


def num_input_channels(
    plans_manager: "PlansManager", configuration: "ConfigurationManager", dataset_json: dict[str, Any]
) -> int:
    """Image channels plus, in a cascade, one channel per foreground label. Raises MismatchError."""
    from fastnnunet.nnunet.v2 import determine_num_input_channels

    label_manager_of(plans_manager, dataset_json)  # nnU-Net takes it for granted
    return int(determine_num_input_channels(plans_manager, configuration, dataset_json))


def num_image_channels(dataset_json: dict[str, Any]) -> int:
    """Channels of an image, under the name for them that nnU-Net looks for first."""
    return len(dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"])


def trainer_class(name: str) -> Any:
    """nnU-Net's trainer class of this name, also from `nnUNet_extTrainer`, whose code is the user's own.

    Raises NotFoundError.
    """
    from fastnnunet.nnunet.v2 import recursive_find_trainer_class_by_name

    try:
        if not is_class_name(name):
            raise TypeError("no name of a class")
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except (RuntimeError, AssertionError, TypeError) as e:  # also of what is there under this name and is no trainer
        raise NotFoundError(
            f"trainer {shown(name)} is not installed\nput it into nnunetv2, or name its folder in nnUNet_extTrainer"
        ) from e


def builder_of(trainer: str) -> str:
    """The trainer that builds the network of one that `trainer` has trained: itself, or nnU-Net's own where it is not
    installed; what that builds is what the plans describe.

    Raises NotFoundError for what cannot be the name of a trainer.
    """
    try:
        trainer_class(trainer)
    except NotFoundError:
        if not is_class_name(trainer):
            raise
        return STOCK_TRAINER
    return trainer


def unknown_trainer_text(trainer: str, folder: Path) -> str:
    """What to tell of a model in `folder` whose trainer is not installed and whose weights fit its plans."""
    return (
        f"trainer {printable(trainer)} of {folder} is not installed: the network is built from the plans, which its "
        "weights fit. Whatever else the trainer changes is not known here\n"
        "to have it used, put it into nnunetv2, or name its folder in nnUNet_extTrainer"
    )
