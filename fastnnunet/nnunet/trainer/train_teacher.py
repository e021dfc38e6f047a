"""A short teacher: one fold trained by nnU-Net's own trainer, used by the demo."""

from collections.abc import Callable
from pathlib import Path

from fastnnunet.nnunet.files.paths import model_folder, nnunet_folder, resolve_dataset
from fastnnunet.nnunet.files.plans import read_json
from fastnnunet.specs.distill import DEFAULT_LR

FINAL = "checkpoint_final.pth"


def train_teacher(
    dataset: str,
    configuration: str,
    plans_name: str,
    fold: int,
    *,
    epochs: int,
    iterations_per_epoch: int,
    val_iterations_per_epoch: int = 2,
    optimizer: str = "adamw",
    initial_lr: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train one fold with hard labels at full width and write checkpoint_final.pth; returns the fold folder.

    AdamW because nnU-Net's SGD needs about a thousand iterations before small structures appear.
    Resumes from checkpoint_latest.pth, does nothing when checkpoint_final.pth is there. `progress` gets (iterations
    done, iterations in all). Mirroring at prediction stays on, as in any nnU-Net teacher.
    Raises NotFoundError when the data set is not planned and preprocessed.
    """
    import numpy as np
    import torch

    from fastnnunet.engines.labelling import resolve_precision
    from fastnnunet.nnunet.quiet import nnunet_quiet
    from fastnnunet.nnunet.trainer.epochs import run_epochs
    from fastnnunet.nnunet.trainer.make import make_trainer

    dataset_name = resolve_dataset(dataset)
    base = nnunet_folder("nnUNet_preprocessed") / dataset_name
    plans, dataset_json = read_json(base / f"{plans_name}.json"), read_json(base / "dataset.json")
    folder = model_folder(dataset_name, "nnUNetTrainer", plans_name, configuration) / f"fold_{fold}"
    if (folder / FINAL).is_file():
        return folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    latest = folder / "checkpoint_latest.pth"
    np.random.seed(seed)
    torch.manual_seed(seed)
    trainer = make_trainer(plans, configuration, fold, dataset_json, device, resuming=latest.is_file())
    trainer.num_epochs, trainer.num_iterations_per_epoch = epochs, iterations_per_epoch
    trainer.num_val_iterations_per_epoch = val_iterations_per_epoch
    trainer.optimizer_name = optimizer
    trainer.seed = seed
    trainer.initial_lr = initial_lr if initial_lr is not None else DEFAULT_LR[optimizer]
    trainer.save_every = 1
    trainer.store_mirroring = True
    trainer.bf16 = device == "cpu" and resolve_precision("auto") == "bf16"
    trainer.provenance = {"epochs": epochs, "iterations_per_epoch": iterations_per_epoch, "seed": seed}
    with nnunet_quiet():
        trainer.initialize()
    if latest.is_file():
        trainer.resume(latest)

    def report(_number: int, iteration: int, _step: dict[str, float], _pseudo_dice: list[float]) -> None:
        if progress is not None:
            progress(trainer.current_epoch * iterations_per_epoch + iteration, epochs * iterations_per_epoch)

    run_epochs([trainer], report)
    return folder
