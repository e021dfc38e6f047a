"""nnU-Net's own trainer with soft labels beside the labels.

Sampling, augmentation, deep supervision, optimiser, schedule, logging and validation are nnU-Net's. Three hooks add
the soft label: the data set stacks it under the image, so that nnU-Net's loader crops and pads both alike; the
transforms split it off again and move it through the same spatial transform as a `regression_target`; the training
step hands it to the objective. Shapes: N batch, C channels, S stored soft-label channels, ZYX space.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from fastnnunet.errors import BuildError, MismatchError
from fastnnunet.nnunet.checkpoint import load_checkpoint, load_weights, strip_prefix
from fastnnunet.nnunet.loading import (
    EPOCH,
    TRAINING,
    VALIDATION,
    loading_in_this_process,
    ordered_batches,
    seed_generators,
)
from fastnnunet.specs.canonical import differences

StepReport = Callable[[int, dict[str, float], list[float]], None]


class SoftLabels(Protocol):
    """Random access to soft labels of preprocessed cases; opened lazily in each loader process."""

    num_channels: int

    def read(self, case_id: str, lower_zyx: tuple[int, ...], upper_zyx: tuple[int, ...]) -> np.ndarray:
        """Float32 (S, z, y, x) probabilities inside the volume."""


class Objective(Protocol):
    """Combines nnU-Net's loss with the soft loss."""

    def __call__(
        self, hard: torch.Tensor, logits_NCZYX: torch.Tensor, soft_NSZYX: torch.Tensor, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (total loss, soft loss), both scalars."""


class _StackedCase:
    """Image and soft label of one case as one array-like (C + S, Z, Y, X), read only where it is sliced."""

    dtype = np.dtype(np.float32)

    def __init__(self, image: Any, soft: SoftLabels, case_id: str) -> None:
        self._image, self._soft, self._case_id = image, soft, case_id
        self.shape = (image.shape[0] + soft.num_channels, *image.shape[1:])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        lower, upper = zip(
            *((s.indices(n)[0], s.indices(n)[1]) for s, n in zip(index[1:], self.shape[1:], strict=True)), strict=True
        )
        return np.concatenate([self._image[index], self._soft.read(self._case_id, lower, upper)])


class _SoftLabelDataset:
    """An nnU-Net data set whose images carry their soft label as extra channels."""

    def __init__(self, base: Any, soft: SoftLabels) -> None:
        self._base, self._soft = base, soft
        self.identifiers = base.identifiers

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        image, *rest = self._base.load_case(identifier)
        return (_StackedCase(image, self._soft, identifier), *rest)


class _SplitSoftLabels:
    """Transforms image and soft label together, then appends the soft label to the list of targets."""

    def __init__(self, transforms: Any, soft_channels: int) -> None:
        self._transforms, self._soft_channels = transforms, soft_channels

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, Any]:
        out = self._transforms(
            image=image[: -self._soft_channels],
            segmentation=segmentation,
            regression_target=image[-self._soft_channels :].contiguous(),
        )
        targets = out["segmentation"] if isinstance(out["segmentation"], list) else [out["segmentation"]]
        return {"image": out["image"], "segmentation": [*targets, out["regression_target"]]}


class StudentTrainer(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's trainer for a student. Set the attributes below before `initialize`; make one with `make_trainer`."""

    soft_labels: SoftLabels | None = None
    objective: Objective | None = None
    store_mirroring = False
    optimizer_name = "sgd"
    bf16 = False
    seed = 0
    network_lr: float | None = None  # what the network is trained with unless another rate is asked for
    gradient_clip = 12.0
    provenance: dict[str, Any]  # what made this student; stored in its checkpoints and compared on resume

    def initialize(self) -> None:
        super().initialize()
        if self.bf16:
            # measured on AVX512-BF16: up to 1.5 times faster for narrow students, equal for wide ones
            self.network.to(memory_format=torch.channels_last_3d if self._is_3d else torch.channels_last)
            self.network.register_forward_hook(_outputs_to_float32)

    def configure_optimizers(self) -> tuple[Any, Any]:
        """nnU-Net's SGD, or AdamW under the same polynomial schedule."""
        if self.optimizer_name == "sgd":
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    @property
    def _is_3d(self) -> bool:
        return len(self.configuration_manager.patch_size) == 3

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:  # nnU-Net's spelling
        out = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self.store_mirroring:
            self.inference_allowed_mirroring_axes = None  # training still mirrors; prediction does not
        return out

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        datasets = super().get_tr_and_val_datasets()
        if self.soft_labels is None:
            return datasets
        training, validation = (_SoftLabelDataset(d, self.soft_labels) for d in datasets)
        return training, validation

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders with seeded, numbered batches, from the first batch of `current_epoch` on."""
        num_processes = get_allowed_n_proc_DA()
        with loading_in_this_process():
            plain = super().get_dataloaders()
        streams = (
            (TRAINING, self.num_iterations_per_epoch, num_processes),
            (VALIDATION, self.num_val_iterations_per_epoch, min(num_processes, max(1, num_processes // 2))),
        )
        training, validation = (
            ordered_batches(
                augmenter.data_loader,
                seed=self.seed,
                stream=stream,
                start=self.current_epoch * batches_per_epoch,
                num_processes=processes,
                pin_memory=self.device.type == "cuda",
            )
            for augmenter, (stream, batches_per_epoch, processes) in zip(plain, streams, strict=True)
        )
        return training, validation

    def on_train_epoch_start(self) -> None:
        seed_generators(self.seed, EPOCH, self.current_epoch)  # so that a checkpoint needs no generator states
        super().on_train_epoch_start()

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_soft_labels(super().get_training_transforms(*args, **kwargs))

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_soft_labels(super().get_validation_transforms(*args, **kwargs))

    def _with_soft_labels(self, transforms: Any) -> Any:
        return transforms if self.soft_labels is None else _SplitSoftLabels(transforms, self.soft_labels.num_channels)

    def _autocast(self) -> Any:
        if self.device.type == "cuda":
            return torch.autocast("cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimiser step. Returns `loss`, `hard`, `soft` and `gradient` (norm before clipping) as floats.

        A loss or a gradient that is not finite leaves the weights as they are. With a gradient scaler the scaler skips
        such gradients and lowers its scale, so `gradient` is 0 there.
        """
        given = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        targets = [self._to_device(t) for t in given]
        soft_NSZYX = targets.pop() if self.soft_labels is not None else None
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = self.network(self._to_device(batch["data"]))
            hard = self.loss(outputs, targets if self.enable_deep_supervision else targets[0])
            loss, soft = hard, hard.new_zeros(())
            if soft_NSZYX is not None and self.objective is not None:
                full = outputs[0] if isinstance(outputs, list | tuple) else outputs
                loss, soft = self.objective(hard, full.float(), soft_NSZYX)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            gradient = 0.0
        else:
            loss.backward()
            gradient = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip).item()
            if np.isfinite(loss.item()) and np.isfinite(gradient):
                self.optimizer.step()
        return {"loss": loss.item(), "hard": hard.item(), "soft": soft.item(), "gradient": gradient}

    def run_epochs(self, report: StepReport | None = None) -> None:
        """Train from `current_epoch` to `num_epochs` and write checkpoint_final.pth.

        `report` gets (iteration in this epoch, losses, pseudo Dice of the last epoch) after every step. Raises
        BuildError when loss, gradient or weights are no longer finite; the checkpoints of earlier epochs stay.
        """
        pseudo_dice: list[float] = []
        with nnunet_quiet():
            self.on_train_start()
        try:
            for _ in range(self.current_epoch, self.num_epochs):
                self.on_epoch_start()
                self.on_train_epoch_start()
                losses = []
                for iteration in range(self.num_iterations_per_epoch):
                    batch = next(self.dataloader_train)
                    losses.append(step := self.train_step(batch))
                    for name in ("loss", "gradient"):
                        if not np.isfinite(step[name]):
                            cases = ", ".join(map(str, batch["keys"]))
                            raise self._diverged(f"the {name} became {step[name]}", f"{iteration} (cases {cases})")
                    if report is not None:
                        report(iteration + 1, step, pseudo_dice)
                if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
                    raise self._diverged("weights became nan or inf", str(iteration))
                self.on_train_epoch_end(losses)
                with torch.no_grad():
                    self.on_validation_epoch_start()
                    steps = range(self.num_val_iterations_per_epoch)
                    self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val)) for _ in steps])
                pseudo_dice = [float(d) for d in self.logger.get_value("dice_per_class_or_region", step=-1)]
                self.on_epoch_end()
            with nnunet_quiet():
                self.on_train_end()
        finally:
            for loader in (self.dataloader_train, self.dataloader_val):
                if hasattr(loader, "_finish"):  # stops the loader's processes; a single-threaded loader has none
                    loader._finish()

    def _diverged(self, what: str, iteration: str) -> BuildError:
        kept = [n for n in ("checkpoint_latest.pth", "checkpoint_best.pth") if (Path(self.output_folder) / n).is_file()]
        state = f"the last good checkpoint is {Path(self.output_folder) / kept[0]}" if kept else "no checkpoint yet"
        return BuildError(
            f"{what} in epoch {self.current_epoch}, iteration {iteration}\n{state}; "
            "start over with a lower learning rate (--lr) or --precision fp32"
        )

    def validation_step(self, batch: dict[str, Any]) -> Any:
        if self.soft_labels is not None:
            labels = batch["target"][:-1]
            batch = {**batch, "target": labels if self.enable_deep_supervision else labels[0]}
        with self._autocast():
            return super().validation_step(batch)

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        self.logger.log("train_losses", float(np.mean([o["loss"] for o in train_outputs])), self.current_epoch)

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        super().print_to_log_file(*args, also_print_to_console=False, add_timestamp=add_timestamp)

    def plot_network_architecture(self) -> None:
        """Left out: nnU-Net's plot needs a library that no longer works."""

    def save_checkpoint(self, filename: str) -> None:
        """Write an nnU-Net checkpoint plus `fastnnunet` provenance, atomically."""
        checkpoint = {
            "network_weights": self.network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": {k: v for k, v in self.my_init_kwargs.items() if k != "device"},
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "fastnnunet": self.provenance,
        }
        temporary = Path(f"{filename}.tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, filename)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint. Raises MismatchError naming the hyper-parameters that differ, CorruptError."""
        checkpoint = load_checkpoint(path)
        changed = differences(checkpoint.get("fastnnunet", {}), self.provenance)
        if changed:
            raise MismatchError(
                f"--continue: {path} was trained differently (there -> now):\n"
                + "\n".join(f"  - {c}" for c in changed)
                + "\ngive the same options, or start over with --overwrite"
            )
        load_weights(self.network, strip_prefix(checkpoint["network_weights"]), path)
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        # nnU-Net writes the latest checkpoint before it compares that epoch with the best one: compare here
        self._best_ema = None
        for ema in self.logger.get_value("ema_fg_dice", step=None):
            if self._best_ema is None or ema > self._best_ema:
                self._best_ema = ema
        self.current_epoch = checkpoint["current_epoch"]


# nnU-Net writes the class name into folders and checkpoints; with the stock name its own tools load a student.
StudentTrainer.__name__ = "nnUNetTrainer"


def _outputs_to_float32(_module: Any, _inputs: Any, outputs: Any) -> Any:
    return [o.float() for o in outputs] if isinstance(outputs, list | tuple) else outputs.float()


@contextlib.contextmanager
def nnunet_quiet() -> Iterator[None]:
    """nnU-Net prints to standard output from everywhere; its log file keeps what matters."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def make_trainer(
    plans: dict[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: dict[str, Any],
    device: str,
    resuming: bool,
) -> StudentTrainer:
    """A trainer whose folder is `$nnUNet_results/<dataset>/<trainer>__<plans>__<configuration>/fold_<fold>`.

    The trainer is nnU-Net's own name for it: `nnUNetTrainer`, or that of a stock Primus.
    """
    from fastnnunet.nnunet.primus import primus_trainer

    kind = primus_trainer(StudentTrainer, plans["configurations"][configuration]["architecture"]) or StudentTrainer
    with nnunet_quiet():
        return kind({**plans, "continue_training": resuming}, configuration, fold, dataset_json, torch.device(device))
