"""One configuration of a model, and the folder it lies in: every file is read and checked once, and then known."""

import inspect
import warnings
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.errors import MismatchError, printable
from fastnnunet.nnunet.files.checkpoint import Weights, load_checkpoint, load_weights, strip_prefix, weights_digest
from fastnnunet.nnunet.files.paths import teacher_folder
from fastnnunet.nnunet.files.plans import (
    STOCK_TRAINER,
    architecture_of,
    builder_of,
    configuration_of,
    label_manager_of,
    num_input_channels,
    read_json,
    trainer_class,
    unknown_trainer_text,
)
from fastnnunet.specs.checks.architecture import unet_problems
from fastnnunet.specs.teacher import Fold, TeacherSpec

if TYPE_CHECKING:
    import torch

    from fastnnunet.nnunet.v2 import ConfigurationManager, LabelManager, PlansManager


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What plans and a dataset.json say of one configuration; make one with `model_of`. Its parts are not changed."""

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    manager: "PlansManager"
    config: "ConfigurationManager"
    labels: "LabelManager"
    num_channels: int  # of the image and, in a cascade, one per foreground label
    num_heads: int
    patch_size: tuple[int, ...]  # voxels, zyx; two entries for 2d
    has_regions: bool  # sigmoid heads


def model_of(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> Model:
    """Check plans and labels and ask nnU-Net what they mean. Raises MismatchError."""
    manager, config = configuration_of(plans, configuration)
    labels = label_manager_of(manager, dataset_json)
    return Model(
        plans=plans,
        configuration=configuration,
        dataset_json=dataset_json,
        manager=manager,
        config=config,
        labels=labels,
        num_channels=num_input_channels(manager, config, dataset_json),
        num_heads=int(labels.num_segmentation_heads),
        patch_size=tuple(int(p) for p in config.patch_size),
        has_regions=bool(labels.has_regions),
    )


def build_network(model: Model, deep_supervision: bool = False, trainer: str = STOCK_TRAINER) -> "torch.nn.Module":
    """The network `trainer` builds from the plans, with nnU-Net's own initialisation.

    Most trainers build what the plans describe; some, such as nnU-Net's Primus trainers, build one of their own.
    Raises NotFoundError for a trainer that is not installed, MismatchError when it cannot build a network.
    """
    config = deepcopy(model.config)
    config.configuration["architecture"] = architecture_of(model.plans, model.configuration)
    described = (
        config.network_arch_class_name,
        config.network_arch_init_kwargs,
        config.network_arch_init_kwargs_req_import,
    )
    sizes = (model.num_channels, model.num_heads)
    build = trainer_class(trainer).build_network_architecture
    takes_plans = "plans_manager" in inspect.signature(build).parameters
    arguments = (model.manager, config, *sizes) if takes_plans else (*described, *sizes)
    try:
        return build(*arguments, enable_deep_supervision=deep_supervision)
    except Exception as e:  # what an architecture raises for arguments it cannot take shares no base class
        raise MismatchError(
            f"trainer {trainer} cannot build a network for {model.configuration} with patch size "
            f"{list(config.patch_size)}: {type(e).__name__} {e}\nPrimus needs a three-dimensional patch divisible by 8"
        ) from e


def check_fits(model: Model, trainer: str, weights: Weights, where: Path) -> None:
    """Refuse a network that the weights of the checkpoint `where` do not fit before any memory is taken for it.

    Raises MismatchError, and what `build_network` raises.
    """
    import torch

    if problems := unet_problems(model.config.configuration["architecture"], model.config.patch_size):
        raise MismatchError(f"the plans beside {where} cannot be used: " + "; ".join(problems))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that loading into a tensor without memory does nothing
        load_weights(build_network(model, trainer=trainer), weights, where)


def check_stand_in(model: Model, trained_by: str, weights: Weights, where: Path) -> str | None:
    """What to tell of the checkpoint `where` if the network in the plans has to stand in for that of a trainer that is
    not installed; None where it is.

    Raises MismatchError where the weights do not fit that network, NotFoundError for what is no name of a trainer.
    """
    trainer = builder_of(trained_by)
    if trainer == trained_by:
        return None
    try:
        check_fits(model, trainer, weights, where)
    except MismatchError as e:
        raise MismatchError(
            f"trainer {printable(trained_by)} of {where} is not installed, and its network is not the "
            f"one in the plans: {e}\nput the trainer into nnunetv2, or name its folder in nnUNet_extTrainer"
        ) from e
    return unknown_trainer_text(trained_by, where.parent.parent)


def network_class_name(model: Model, trainer: str) -> str:
    """Class of the network: the plans' own, or of what a trainer builds that pays no heed to the plans."""
    if trainer == STOCK_TRAINER:
        return str(model.config.network_arch_class_name)
    kind = type(build_network(model, trainer=trainer))
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldFacts:
    """What a checkpoint says besides its weights."""

    trained_by: str  # the trainer
    trainer: str  # builds the network: the same, or nnU-Net's own where that is not installed
    mirror_axes: tuple[int, ...]  # along which it may be mirrored


class ModelFolder:
    """A model folder. A pickle of it holds names only, so that another process reads for itself.

    Weights go once their digest is known, except those of the folds in `keep`, which wait for `take_weights`: a command
    that will load these folds reads them once, and one that only names a cache holds one fold at a time.
    """

    def __init__(self, folder: Path, configuration: str, checkpoint: str, keep: Collection[Fold] = ()) -> None:
        self.folder, self.configuration, self.checkpoint = folder, configuration, checkpoint
        self._keep = keep
        self._facts: dict[Fold, FoldFacts] = {}
        self._digests: dict[Fold, str] = {}
        self._kept: dict[Fold, Weights] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelFolder, (self.folder, self.configuration, self.checkpoint)

    @cached_property
    def plans(self) -> dict[str, Any]:
        """plans.json. Raises NotFoundError, CorruptError."""
        return read_json(self.folder / "plans.json")

    @cached_property
    def dataset_json(self) -> dict[str, Any]:
        """dataset.json. Raises NotFoundError, CorruptError."""
        return read_json(self.folder / "dataset.json")

    @cached_property
    def model(self) -> Model:
        """Raises NotFoundError, CorruptError, MismatchError."""
        return model_of(self.plans, self.configuration, self.dataset_json)

    def path(self, fold: Fold) -> Path:
        """The checkpoint of a fold."""
        return self.folder / f"fold_{fold}" / self.checkpoint

    def facts(self, fold: Fold) -> FoldFacts:
        """Raises NotFoundError, CorruptError, MismatchError for a checkpoint of another configuration."""
        if fold not in self._facts:
            self.digest(fold)
        return self._facts[fold]

    def digest(self, fold: Fold) -> str:
        """`weights_digest` of a fold. Raises as `facts` does."""
        if fold not in self._digests:
            weights = self._kept.get(fold) or self._read(fold)
            self._digests[fold] = weights_digest(weights)
            if fold in self._keep:
                self._kept[fold] = weights
        return self._digests[fold]

    def take_weights(self, fold: Fold) -> Weights:
        """Weights of a fold; nothing here holds them from now on. Raises as `facts` does."""
        return self._kept.pop(fold) if fold in self._kept else self._read(fold)

    def _read(self, fold: Fold) -> Weights:
        path = self.path(fold)
        checkpoint = load_checkpoint(path)
        trained_for = checkpoint["init_args"].get("configuration")
        if trained_for != self.configuration:
            raise MismatchError(f"{path} was trained for {trained_for!r}, expected {self.configuration!r}")
        axes = checkpoint.get("inference_allowed_mirroring_axes") or ()
        trained_by = checkpoint["trainer_name"]
        self._facts[fold] = FoldFacts(
            trained_by=trained_by, trainer=builder_of(trained_by), mirror_axes=tuple(map(int, axes))
        )
        return strip_prefix(checkpoint["network_weights"])


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model that was planned and never trained: what of a ModelFolder a student is made from."""

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    trainer: str

    def facts(self, _fold: Fold) -> FoldFacts:
        """What its checkpoints would say."""
        return FoldFacts(trained_by=self.trainer, trainer=builder_of(self.trainer), mirror_axes=())


def model_folder_of(spec: TeacherSpec, keep: Collection[Fold] = ()) -> ModelFolder:
    """The folder of a teacher by its names. Raises NotFoundError."""
    return ModelFolder(teacher_folder(spec), spec.configuration, spec.checkpoint, keep)
