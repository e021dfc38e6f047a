"""A trainer, made as nnU-Net makes its own."""

from typing import Any

import torch

from fastnnunet.nnunet.quiet import nnunet_quiet
from fastnnunet.nnunet.trainer.distributed import local_device
from fastnnunet.nnunet.trainer.trainer import StudentTrainer


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
    from fastnnunet.nnunet.files.plans import architecture_of
    from fastnnunet.nnunet.student.primus import primus_trainer

    kind = primus_trainer(StudentTrainer, architecture_of(plans, configuration)) or StudentTrainer
    with nnunet_quiet():
        trainer = kind(
            {**plans, "continue_training": resuming}, configuration, fold, dataset_json, torch.device(device)
        )
    trainer.device = local_device(device)  # nnU-Net takes a GPU for granted where there are several processes
    if trainer.device.type != "cuda":
        trainer.grad_scaler = None
    return trainer
