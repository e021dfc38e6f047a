"""nnU-Net's own trainer with soft labels beside the labels.

Choice of samples, augmentation, deep supervision, optimiser, schedule, logging and validation are nnU-Net's.
`batches.py` makes batches, with soft labels where there are some, which the training step hands to the objective.
Shapes: N batch, C channels, S stored soft-label channels, ZYX space.
"""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnnunet.errors import BuildError, FastnnUNetError
from fastnnunet.nnunet.augment.batches import AugmentedBatches, DrawnSamples
from fastnnunet.nnunet.augment.device import DeviceAugmentation, device_augmentation
from fastnnunet.nnunet.augment.last_patch import LastPatch, patches_of
from fastnnunet.nnunet.augment.soft_samples import SampleTransforms, SoftLabels
from fastnnunet.nnunet.files.advice import preprocess_command
from fastnnunet.nnunet.files.cases import made_by
from fastnnunet.nnunet.files.checkpoint import check_same_run, load_checkpoint, load_weights, strip_prefix
from fastnnunet.nnunet.files.checkpoint_digest import require_undamaged, write_checkpoint
from fastnnunet.nnunet.quiet import nnunet_quiet
from fastnnunet.nnunet.trainer.batches import SampledBatches, Samples
from fastnnunet.nnunet.trainer.cases import JoinedDataset, SoftLabelDataset, WritableCases
from fastnnunet.nnunet.trainer.distributed import (
    LossOverValidVoxels,
    average_gradients,
    is_first,
    loss_weight,
    mean_over_processes,
    prepare_loss,
    share,
    valid_share,
)
from fastnnunet.nnunet.trainer.loaders.ordered import ordered_batches
from fastnnunet.nnunet.trainer.loading_errors import Repairs, reading
from fastnnunet.nnunet.trainer.mixing import Unlabelled
from fastnnunet.nnunet.trainer.norms import freeze, is_frozen, synchronise
from fastnnunet.nnunet.trainer.online import LastEpochs
from fastnnunet.nnunet.trainer.seeds import STATISTICS, STEP, TRAINING, VALIDATION, seed_generators
from fastnnunet.nnunet.trainer.step_losses import Objective, labelled, valid_mask
from fastnnunet.nnunet.trainer.tensorboard import TensorBoardLogger
from fastnnunet.nnunet.v2 import (
    DeepSupervisionWrapper,
    PolyLRScheduler,
    get_allowed_n_proc_DA,
    nnUNetDataLoader,
    nnUNetTrainer,
    nnUNetTrainerDA5,
)
from fastnnunet.system.children import others_children

PLANNED = "planned_epochs"  # in the provenance of a training for some hours
FINGERPRINT = "dataset_fingerprint.json"
log = logging.getLogger(__name__)


class StudentTrainer(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's trainer for a student. Set the attributes below before `initialize`; make one with `make_trainer`."""

    soft_labels: SoftLabels | None = None
    unlabelled: Unlabelled | None = None
    objective: Objective | None = None
    soft_on_ignored = True
    store_mirroring = False
    mirror_augmentation = True
    augmentation = "default"  # or "da5"
    augment_on_device = False  # rather than in the loader processes
    device_augmentation: DeviceAugmentation | None = None  # set by `initialize`; None: in the loader processes
    optimizer_name = "sgd"
    bf16 = False
    seed = 0
    is_ddp: bool
    network: Any
    loss: Any
    dataset_class: Any
    _loss_weight = 1.0
    _output_weights: tuple[float, ...] = (1.0,)  # of the network's outputs in nnU-Net's loss, finest first
    network_lr: float | None = None  # what the network is trained with unless another rate is asked for
    gradient_clip = 12.0
    last_patch: LastPatch | None = None
    online: LastEpochs | None = None  # with a teacher beside it
    _loaded_patch: tuple[int, ...] = ()  # that training batches have
    norm_statistics = "running"  # of batch norms: running, frozen or precise
    knows_statistics = False  # whether the first weights came with them
    hours: float | None = None  # to train for; `num_epochs` follows from the first epoch
    provenance: dict[str, Any]  # what made this student; stored in its checkpoints and compared on resume

    def initialize(self) -> None:
        distributed, self.is_ddp = self.is_ddp, False  # nnU-Net would need GPUs and make other losses of it
        super().initialize()
        self.is_ddp = distributed
        if self.bf16:
            # measured on AVX512-BF16: up to 1.5 times faster for narrow students, equal for wide ones
            self.network.to(memory_format=torch.channels_last_3d if self._is_3d else torch.channels_last)
            self.network.register_forward_hook(_outputs_to_float32)
        if isinstance(self.loss, DeepSupervisionWrapper):
            self._output_weights = tuple(map(float, self.loss.weight_factors))
        if self.is_ddp:
            prepare_loss(self.loss, self.batch_size, self.configuration_manager.batch_dice)
            synchronise(self.network)
            if self.label_manager.has_ignore_label:
                self.loss = LossOverValidVoxels(self.loss, partial(labelled, labels=self.label_manager))
        self._loss_weight = loss_weight(self.batch_size)
        if self.augment_on_device:
            self.device_augmentation = device_augmentation(self._training_transforms().transforms)

    def configure_optimizers(self) -> tuple[Any, Any]:
        """nnU-Net's SGD, or AdamW under the same polynomial schedule."""
        if self.optimizer_name == "sgd":
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As nnU-Net does, which takes for granted that networks of several processes are wrapped."""
        if hasattr(self.network, "decoder"):  # networks without one have no deep supervision
            self.network.decoder.deep_supervision = enabled

    @property
    def plain_network(self) -> Any:
        """The network the plans describe; on GPUs nnU-Net compiles it, which puts a prefix to the names of weights."""
        return getattr(self.network, "_orig_mod", self.network)

    @property
    def _is_3d(self) -> bool:
        return len(self.configuration_manager.patch_size) == 3

    @property
    def stacked_channels(self) -> int:
        """Soft label and coverage under an image that is augmented on the device."""
        return 0 if self.soft_labels is None else self.soft_labels.num_channels + 1

    @property
    def _augmenter(self) -> Any:
        """The nnU-Net trainer whose augmentation is used."""
        return nnUNetTrainerDA5 if self.augmentation == "da5" else nnUNetTrainer

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:  # nnU-Net's spelling
        out = self._augmenter.configure_rotation_dummyDA_mirroring_and_inital_patch_size(self)
        if not self.store_mirroring:
            self.inference_allowed_mirroring_axes = None  # training still mirrors; prediction does not
        return out if self.mirror_augmentation else (*out[:3], None)

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        training: Any
        validation: Any
        training, validation = (WritableCases(d) for d in super().get_tr_and_val_datasets())
        unlabelled: Any = self.unlabelled
        if self.soft_labels is not None:
            training, validation = (SoftLabelDataset(d, self.soft_labels) for d in (training, validation))
            unlabelled = unlabelled and SoftLabelDataset(unlabelled, unlabelled.soft_labels)
        return training if unlabelled is None else JoinedDataset(training, unlabelled), validation

    @property
    def training_patch(self) -> tuple[int, ...]:
        """Of this epoch."""
        if self.last_patch is not None and self.last_patch.is_due(self.current_epoch, self.num_epochs):
            return self.last_patch.size
        return tuple(self.configuration_manager.patch_size)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Seeded, numbered batches in the place of nnU-Net's loaders, from the first of `current_epoch` on."""
        num_processes = get_allowed_n_proc_DA()
        training_cases, validation_cases = self.get_tr_and_val_datasets()
        self._loaded_patch = self.training_patch
        training = self._training_batches(TRAINING, training_cases, num_processes)
        samples, patch = SampleTransforms(self._validation_transforms()), self.configuration_manager.patch_size
        iterations, some = self.num_val_iterations_per_epoch, min(num_processes, max(1, num_processes // 2))
        validation = self._batches(VALIDATION, validation_cases, patch, samples, iterations, some)
        return training, validation

    def _training_batches(self, stream: int, cases: Any, num_processes: int) -> Any:
        with patches_of(self.configuration_manager, self.training_patch):
            _, _, loaded, _ = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            if self.device_augmentation is not None:
                self.device_augmentation = device_augmentation(self._training_transforms().transforms)
            samples, iterations = self._training_samples(), self.num_iterations_per_epoch
            batches = self._batches(stream, cases, loaded, samples, iterations, num_processes)
        if self.device_augmentation is None:
            return batches
        return AugmentedBatches(batches, self.device_augmentation, self.device, self.stacked_channels)

    def batches_to_measure(self) -> Iterator[Any]:
        """Batches like those of training, which are not trained on."""
        yield from self._training_batches(STATISTICS, self.get_tr_and_val_datasets()[0], num_processes=0)

    def renew_loaders(self) -> None:
        """Load patches of another size from this epoch on, if it is the first to have them."""
        if self.training_patch != self._loaded_patch:
            self.stop_loaders()
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()

    def stop_loaders(self) -> None:
        """End the loaders' processes; a loader in this one has none."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "_finish"):
                loader._finish()

    def _batches(
        self, stream: int, cases: Any, loaded: Any, samples: Samples, batches_per_epoch: int, num_processes: int
    ) -> Any:
        loader = nnUNetDataLoader(
            cases,
            self.batch_size,
            loaded,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            probabilistic_oversampling=self.probabilistic_oversampling,
        )
        maker = SampledBatches(
            loader=loader,
            cases=cases,
            samples=samples,
            soft=self.soft_labels is not None,
            share=share(),
            unlabelled=self.unlabelled if stream == TRAINING else None,
        )
        return ordered_batches(
            maker,
            seed=self.seed,
            stream=stream,
            start=self.current_epoch * batches_per_epoch,
            num_processes=num_processes,
            pin_memory=self.device.type == "cuda",
            repair=self.repair,
        )

    @property
    def repair(self) -> Repairs:
        """The commands that make the preprocessed files of a case again."""
        configuration, data = self.configuration_name, str(self.configuration_manager.data_identifier)
        plans = made_by(self.plans_manager.plans, configuration, data)
        command = preprocess_command(self.plans_manager.dataset_name, plans, configuration)
        if self.is_cascaded:
            command += (
                f"\nor, if it is the one in {self.folder_with_segs_from_previous_stage}, predict that stage again"
            )
        return Repairs(command, self.unlabelled)

    @property
    def _about_labels(self) -> dict[str, Any]:
        """What nnU-Net's transforms are told of the labels."""
        labels = self.label_manager
        return {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": labels.foreground_labels,
            "regions": labels.foreground_regions if labels.has_regions else None,
            "ignore_label": labels.ignore_label,
        }

    def _training_transforms(self) -> Any:
        rotation, dummy_2d, _, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return self._augmenter.get_training_transforms(
            self.configuration_manager.patch_size,
            rotation,
            self._get_deep_supervision_scales(),
            mirror_axes,
            dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            **self._about_labels,
        )

    def _validation_transforms(self) -> Any:
        return self.get_validation_transforms(self._get_deep_supervision_scales(), **self._about_labels)

    def _training_samples(self) -> Samples:
        if self.device_augmentation is not None:
            return DrawnSamples(self.device_augmentation, self.num_input_channels)
        return SampleTransforms(self._training_transforms())

    def _autocast(self) -> Any:
        if self.device.type == "cuda":
            return torch.autocast("cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _to_device(self, tensor: Any) -> Any:
        if isinstance(tensor, list):
            return [self._to_device(t) for t in tensor]
        return tensor.to(self.device, non_blocking=True)

    def _split_targets(self, target: Any) -> tuple[Any, torch.Tensor | None]:
        """What nnU-Net's loss takes (a list with deep supervision, else a tensor), and the soft label."""
        if self.soft_labels is None:
            return self._to_device(target), None
        *hard, soft_NSZYX = self._to_device(target)
        return hard if self.enable_deep_supervision else hard[0], soft_NSZYX

    @property
    def is_planned(self) -> bool:
        """Whether `num_epochs` is what it will be."""
        return self.hours is None or PLANNED in self.provenance

    def plan(self, num_epochs: int) -> None:
        """Train this many epochs, of which one may be done; kept in the checkpoints."""
        self.num_epochs = self.lr_scheduler.max_steps = num_epochs
        self.provenance[PLANNED] = num_epochs

    def train_step(self, batch: dict[str, Any], iteration: int = 0) -> dict[str, float]:
        """One optimiser step, the `iteration`-th of its epoch.

        Returns `loss`, `hard`, `soft` and `gradient` (norm before clipping) as floats.

        A loss or a gradient that is not finite leaves the weights as they are. With a gradient scaler the scaler skips
        such gradients and lowers its scale, so `gradient` is 0 there.
        """
        target, soft_NSZYX = self._split_targets(batch["target"])
        number = self.current_epoch * self.num_iterations_per_epoch + iteration
        # networks with dropout draw: seeded for each step, a checkpoint needs no generator states
        seed_generators(self.seed, STEP, number, device_type=self.device.type)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = self.network(self._to_device(batch["data"]))
            if self.unlabelled is None:
                hard = self.loss(outputs, target)
            else:
                keys = batch["keys"]
                hard = self.unlabelled.hard_loss(self.loss, outputs, target, keys, number, self.batch_size)
            loss, soft = hard, hard.new_zeros(())
            if soft_NSZYX is not None and self.objective is not None:
                mask = valid_mask(target, soft_NSZYX, self.label_manager, on_ignored=self.soft_on_ignored)
                progress = number / (self.num_epochs * self.num_iterations_per_epoch)
                if self.hours is not None and self.current_epoch == 0:
                    progress = 0.0  # of how many steps is not known yet, nor would a repetition know the same
                listed = outputs if self.enable_deep_supervision else [outputs]
                loss, soft = self.objective(
                    hard,
                    [o.float() for o in listed],
                    soft_NSZYX,
                    mask,
                    progress,
                    output_weights=self._output_weights,
                    shares=valid_share,
                )
            loss = loss * self._loss_weight
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            average_gradients(self.network)
            self.grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            gradient = 0.0
        else:
            loss.backward()
            average_gradients(self.network)
            gradient = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip).item()
            if np.isfinite(mean_over_processes(loss).item()) and np.isfinite(gradient):
                self.optimizer.step()
        losses = {"loss": loss, "hard": hard * self._loss_weight, "soft": soft * self._loss_weight}
        return {name: mean_over_processes(value).item() for name, value in losses.items()} | {"gradient": gradient}

    def look_at(self, batch: dict[str, Any]) -> None:
        """Pass a batch through the network, for what its norms see of it."""
        seed_generators(self.seed, STATISTICS, device_type=self.device.type)  # of dropout
        with self._autocast():
            self.plain_network(self._to_device(batch["data"]))

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.norm_statistics == "frozen" and is_frozen(self.current_epoch, self.num_epochs):
            freeze(self.plain_network)

    def on_train_start(self) -> None:
        """As nnU-Net's, which stops where there is no fingerprint to copy; all it does after that is done here."""
        try:
            super().on_train_start()
        except FileNotFoundError as e:
            if Path(str(e.filename)).name != FINGERPRINT:
                raise
            log.warning(
                "%s is missing; nnU-Net would copy it beside the model, nothing of a training reads it", e.filename
            )
            self._save_debug_information()

    def start(self, *, load: bool) -> None:
        """What nnU-Net does before the first epoch; without `load` another trainer's loaders are used."""
        with nnunet_quiet():
            if not load:
                self.get_dataloaders = lambda: (None, None)  # type: ignore[method-assign]
            self.on_train_start()
        if is_first():
            events = TensorBoardLogger(Path(self.output_folder) / "tensorboard", self.current_epoch)
            self.logger.loggers.append(events)

    def close(self) -> None:
        """End the log."""
        for logger in self.logger.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.close()

    def finish(self) -> None:
        """What nnU-Net does after the last epoch: writes checkpoint_final.pth."""
        with nnunet_quiet():
            self.on_train_end()

    def batch_description(self) -> dict[str, Any]:
        """What decides what a batch looks like; the same for trainers that can share their batches."""
        return {
            "patch size": (list(self.configuration_manager.patch_size), self.last_patch),
            "batch size": self.batch_size,
            "deep supervision": self._get_deep_supervision_scales(),
            "fold": self.fold,
            "seed": self.seed,
            "iterations per epoch": (self.num_iterations_per_epoch, self.num_val_iterations_per_epoch),
            "augmentation": (self.augmentation, self.mirror_augmentation),
            "augmented on the device": self.device_augmentation is not None,
            "soft labels": self.soft_labels is not None,
            "unlabelled": self.unlabelled
            and (self.unlabelled.key, self.unlabelled.share, self.unlabelled.pseudo_labels),
        }

    def validation_step(self, batch: dict[str, Any]) -> Any:
        target, _ = self._split_targets(batch["target"])
        if self.label_manager.has_ignore_label:  # nnU-Net overwrites ignored voxels; other students see this batch too
            target = [t.clone() for t in target] if isinstance(target, list) else target.clone()
        with self._autocast():
            return super().validation_step({**batch, "target": target})

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnU-Net does; raises what is named in `loading_error`, and BuildError when a process that writes ends."""
        plain, self.dataset_class = self.dataset_class, reading(self.dataset_class, self.repair)
        try:
            with others_children():
                super().perform_actual_validation(save_probabilities)
        except RuntimeError as e:
            if isinstance(e, FastnnUNetError) or "workers" not in str(e):
                raise
            raise BuildError(
                "a process that writes predictions of validation cases has ended, usually because memory is short\n"
                "use fewer of them (the environment variable nnUNet_def_n_proc) and go on with --continue"
            ) from e
        finally:
            self.dataset_class = plain

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        means = {name: float(np.mean([o[name] for o in train_outputs])) for name in ("loss", "hard", "soft")}
        self.logger.log("train_losses", means["loss"], self.current_epoch)
        for logger in self.logger.loggers:  # nnU-Net's own, which makes the plot, knows a fixed set of names
            for name in ("hard", "soft"):
                logger.log(f"train_losses_{name}", means[name], self.current_epoch)

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        super().print_to_log_file(*args, also_print_to_console=False, add_timestamp=add_timestamp)

    def plot_network_architecture(self) -> None:
        """Left out: nnU-Net's plot needs a library that no longer works."""

    def save_checkpoint(self, filename: str) -> None:
        """Write an nnU-Net checkpoint plus `fastnnunet` provenance and a digest, atomically."""
        if not is_first():
            return
        checkpoint = {
            "network_weights": self.plain_network.state_dict(),
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
        write_checkpoint(checkpoint, Path(filename))

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint. Raises MismatchError naming the hyper-parameters that differ, CorruptError."""
        checkpoint = load_checkpoint(path)
        require_undamaged(checkpoint, path)
        there = checkpoint.get("fastnnunet", {})
        if self.hours is not None and PLANNED in there:
            self.plan(there[PLANNED])
        check_same_run(path, there, self.provenance)
        load_weights(self.plain_network, strip_prefix(checkpoint["network_weights"]), path)
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
