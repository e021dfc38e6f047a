"""One configuration of a model, and the folder it lies in: every file is read and checked once, and then known."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.files.checkpoint import Weights, load_checkpoint, strip_prefix, weights_digest
from fastnnunet.nnunet.files.paths import teacher_folder
from fastnnunet.nnunet.files.plans import configuration_of, label_manager_of, num_input_channels, read_json
from fastnnunet.specs.teacher import Fold, TeacherSpec

if TYPE_CHECKING:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldFacts:
    """What a checkpoint says besides its weights."""

    trainer: str  # builds the network
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
        self._facts[fold] = FoldFacts(trainer=str(checkpoint["trainer_name"]), mirror_axes=tuple(axes))
        return strip_prefix(checkpoint["network_weights"])


def model_folder_of(spec: TeacherSpec, keep: Collection[Fold] = ()) -> ModelFolder:
    """The folder of a teacher by its names. Raises NotFoundError."""
    return ModelFolder(teacher_folder(spec), spec.configuration, spec.checkpoint, keep)
