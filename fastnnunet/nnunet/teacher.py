"""The teacher ensemble: trained folds run over preprocessed cases with nnU-Net's own sliding window."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.checkpoint import Weights, load_checkpoint, load_weights, strip_prefix, weights_digest
from fastnnunet.nnunet.plans import build_network, configuration_of, label_manager_of, num_input_channels, read_json
from fastnnunet.specs.teacher import TeacherSpec

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

Precision = Literal["fp32", "bf16"]
Fold = int | str


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX); emulated bf16 would be slower than fp32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(requested: str) -> Precision:
    """`auto` -> bf16 where the CPU has it or a CUDA device is there, else fp32."""
    import torch

    if requested in ("fp32", "bf16"):
        return cast(Precision, requested)
    return "bf16" if torch.cuda.is_available() or cpu_has_bf16() else "fp32"


@dataclass(frozen=True)
class NnUNetTeacher:
    """A recipe for loading the ensemble. Cheap and picklable; dask workers call `load` once each."""

    folder: Path
    configuration: str
    folds: tuple[Fold, ...]
    checkpoint: str
    mirroring: bool
    step_size: float
    precision: Precision
    unseen: dict[str, tuple[Fold, ...]]  # case -> folds whose training set did not contain it

    @property
    def plans(self) -> dict[str, Any]:
        """The teacher's plans.json."""
        return read_json(self.folder / "plans.json")

    @property
    def dataset_json(self) -> dict[str, Any]:
        """The teacher's dataset.json."""
        return read_json(self.folder / "dataset.json")

    @property
    def num_heads(self) -> int:
        """Number of output channels of the networks."""
        return int(
            label_manager_of(
                configuration_of(self.plans, self.configuration)[0], self.dataset_json
            ).num_segmentation_heads
        )

    @property
    def has_regions(self) -> bool:
        """Whether the model is region-based (sigmoid heads)."""
        return bool(
            label_manager_of(configuration_of(self.plans, self.configuration)[0], self.dataset_json).has_regions
        )

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Patch size in voxels, zyx (two entries for 2d)."""
        return tuple(int(p) for p in configuration_of(self.plans, self.configuration)[1].patch_size)

    def unseen_folds(self, case_id: str) -> tuple[Fold, ...]:
        """Folds of this ensemble that did not train on the case (all of them for a case in no split)."""
        return self.unseen.get(case_id, self.folds)

    def identity(self) -> dict[str, Any]:
        """What of the teacher changes a logit: architecture, patch, labels, weights, mirrors, step, precision."""
        plans, config = configuration_of(self.plans, self.configuration)
        checkpoints = {str(f): self._read_fold(f) for f in self.folds}
        return {
            "dataset": plans.dataset_name,
            "plans": plans.plans_name,
            "configuration": self.configuration,
            "patch_size": list(self.patch_size),
            "architecture": {
                "class": config.network_arch_class_name,
                "kwargs": config.configuration["architecture"]["arch_kwargs"],
            },
            "labels": self.dataset_json["labels"],
            "folds": [str(f) for f in self.folds],
            "checkpoints": {f: weights_digest(w) for f, (w, _) in checkpoints.items()},
            "mirror_axes": next(list(axes) if self.mirroring and axes else [] for _, axes in checkpoints.values()),
            "step_size": self.step_size,
            "precision": self.precision,
        }

    def _read_fold(self, fold: Fold) -> tuple[Weights, tuple[int, ...] | None]:
        path = self.folder / f"fold_{fold}" / self.checkpoint
        checkpoint = load_checkpoint(path)
        trained_for = checkpoint["init_args"].get("configuration")
        if trained_for != self.configuration:
            raise MismatchError(f"{path} was trained for {trained_for!r}, expected {self.configuration!r}")
        return strip_prefix(checkpoint["network_weights"]), checkpoint.get("inference_allowed_mirroring_axes")

    def load(self, threads: int) -> "LoadedTeacher":
        """Read all folds and build the network. Raises CorruptError, MismatchError."""
        import torch

        torch.set_num_threads(threads)
        plans, dataset_json = self.plans, self.dataset_json
        network = build_network(plans, self.configuration, dataset_json)
        weights: dict[Fold, Weights] = {}
        mirror_axes: tuple[int, ...] | None = None
        for fold in self.folds:
            weights[fold], mirror_axes = self._read_fold(fold)
            load_weights(network, weights[fold], self.folder / f"fold_{fold}" / self.checkpoint)
        predictor = _make_predictor(self.step_size, self.mirroring, self.precision)
        # statistics stay fp32 and so do the sums over mirrors: bf16 only lives inside the network
        network.register_forward_hook(lambda _module, _inputs, output: output.float())
        plans_manager, config = configuration_of(plans, self.configuration)
        axes = tuple(mirror_axes) if mirror_axes else None
        predictor.manual_initialization(network, plans_manager, config, None, dataset_json, "nnUNetTrainer", axes)
        channels = num_input_channels(plans_manager, config, dataset_json)
        return LoadedTeacher(predictor, weights, self.patch_size, channels)


@dataclass
class LoadedTeacher:
    """The ensemble in memory."""

    predictor: "nnUNetPredictor"
    weights: dict[Fold, Weights]
    patch_size: tuple[int, ...]
    channels: int

    def logits(self, image_CZYX: np.ndarray, folds: Sequence[Fold]) -> np.ndarray:
        """Mean logits over mirrors, tiles and folds as nnU-Net computes them: float32 (heads, Z, Y, X)."""
        import torch

        self.predictor.list_of_parameters = [self.weights[f] for f in folds]
        logits = self.predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image_CZYX))
        return logits.float().numpy()

    def seconds_per_patch(self) -> float:
        """Seconds for one patch through all folds and mirrors (one timed fold after a warm-up, times the folds)."""
        shape = self.patch_size if len(self.patch_size) == 3 else (1, *self.patch_size)
        image_CZYX = np.zeros((self.channels, *shape), np.float32)
        first = tuple(self.weights)[:1]
        self.logits(image_CZYX, first)
        start = time.perf_counter()
        self.logits(image_CZYX, first)
        return (time.perf_counter() - start) * len(self.weights)


def _make_predictor(step_size: float, mirroring: bool, precision: Precision) -> "nnUNetPredictor":
    import contextlib
    import io

    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    class Predictor(nnUNetPredictor):  # type: ignore[misc]
        def _internal_maybe_mirror_and_predict(self, x: "torch.Tensor") -> "torch.Tensor":
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                return super()._internal_maybe_mirror_and_predict(x)

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints a note about the device on every construction
        return Predictor(
            tile_step_size=step_size, use_mirroring=mirroring, device=device, verbose=False, allow_tqdm=False
        )


def make_teacher(
    spec: TeacherSpec,
    folder: Path,
    mirroring: bool,
    step_size: float,
    precision: str,
    splits: list[dict[str, list[str]]],
) -> NnUNetTeacher:
    """A teacher for `spec` whose model folder was found. `splits` decide which folds saw which case."""
    unseen: dict[str, tuple[Fold, ...]] = {}
    for case in sorted({c for s in splits for part in s.values() for c in part}):
        unseen[case] = tuple(
            f for f in spec.folds if isinstance(f, int) and f < len(splits) and case not in splits[f]["train"]
        )
    return NnUNetTeacher(
        folder,
        spec.configuration,
        spec.folds,
        spec.checkpoint,
        mirroring,
        step_size,
        resolve_precision(precision),
        unseen,
    )
