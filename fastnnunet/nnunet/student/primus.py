"""Primus students: reduced in width with a constant head dimension, or one of nnU-Net's stock sizes.

Stock nnU-Net builds a Primus in a trainer, never from plans. A stock size (S, B, M, L) therefore carries that trainer's
name and loads in stock nnU-Net with nothing of ours installed. Any other size needs `PrimusStudent` below, which stock
nnU-Net finds through the plans where fastnnunet is installed, and only there.
"""

from typing import Any

import torch

from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.nnunet.v2 import PolyLRScheduler, Primus
from fastnnunet.specs.student import StudentSpec

PRIMUS = "dynamic_network_architectures.architectures.primus.Primus"
OURS = "fastnnunet.nnunet.student.primus.PrimusStudent"
PATCH_EMBED = 8  # voxels of a token along each axis
STOCK_INIT_VALUES = 0.1  # of nnU-Net's Primus trainers; a network built without data does not tell


class PrimusStudent(Primus):  # type: ignore[misc]
    """Primus as plans can describe it: takes the `deep_supervision` nnU-Net hands to every network, and has none."""

    def __init__(self, input_channels: int, num_classes: int, *, deep_supervision: bool = False, **kwargs: Any) -> None:
        super().__init__(input_channels=input_channels, num_classes=num_classes, **kwargs)


def stock_trainer(size: str) -> str:
    """nnU-Net's trainer of a stock size."""
    return f"nnUNet_Primus_{size}_Trainer"


def stock_trainer_of(architecture: dict[str, Any]) -> str | None:
    """The stock trainer a student's plans name, None for students any trainer builds from the plans."""
    return architecture.get("stock_trainer")


def is_primus(architecture: dict[str, Any]) -> bool:
    """Whether plans describe a Primus student."""
    return architecture["network_class_name"] in (PRIMUS, OURS)


def stock_architecture(architecture: dict[str, Any]) -> dict[str, Any]:
    """The architecture under a name that exists where fastnnunet's training parts do not."""
    return (
        {**architecture, "network_class_name": PRIMUS} if architecture["network_class_name"] == OURS else architecture
    )


def primus_kwargs(network: torch.nn.Module, patch_size: list[int]) -> dict[str, Any]:
    """Constructor arguments of a teacher's Primus, read off the network. Raises MismatchError for Primus V2 and V3."""
    if type(network) not in (Primus, PrimusStudent):
        raise MismatchError(
            f"the teacher's network is {type(network).__name__}, of which no narrower student is known\n"
            "use --architecture plain or residual, or write the student out: --student FILE.yaml"
        )
    first, last = network.eva.blocks[0], network.eva.blocks[-1]
    gamma = first.gamma_1
    return {
        "embed_dim": int(network.embed_dim),
        "patch_embed_size": [int(n) for n in network.down_projection.proj.kernel_size],
        "eva_depth": len(network.eva.blocks),
        "eva_numheads": int(first.attn.num_heads),
        "input_shape": list(patch_size),
        "drop_path_rate": float(getattr(last.drop_path1, "drop_prob", 0.0) or 0.0),
        "scale_attn_inner": not isinstance(first.attn.norm, torch.nn.Identity),
        "init_values": None if gamma is None else _first_value(gamma),
    }


def _first_value(gamma: torch.Tensor) -> float:
    return STOCK_INIT_VALUES if gamma.is_meta else round(float(gamma.detach().flatten()[0]), 6)


def narrower_primus(teacher: dict[str, Any], student: StudentSpec) -> dict[str, Any]:
    """heads // r with the teacher's width of a head; depth as `blocks` says (auto: kept). Raises SpecError."""
    heads, width = teacher["eva_numheads"], teacher["embed_dim"]
    if heads // student.r < 1:
        raise SpecError(f"-r {student.r} leaves no attention head: the teacher has {heads}\nexpected at most {heads}")
    if student.family == "lite" or student.round_to > 1:
        raise SpecError("a Primus student has neither a lite family nor rounded widths\nleave out --family, --round-to")
    if student.norm != "same":
        raise SpecError(
            f"--norm {student.norm}: a Primus normalises each token (LayerNorm), which nothing replaces; leave it out"
        )
    kept = heads // student.r
    embed_dim = kept * (width // heads)
    depth = teacher["eva_depth"]
    if student.blocks != "auto":
        depth = student.fewer_blocks([depth], [width], [embed_dim])[0]
    return {**teacher, "embed_dim": embed_dim, "eva_numheads": kept, "eva_depth": depth}


class _WarmUp(PolyLRScheduler):  # type: ignore[misc]
    """Linear over the first twentieth of the epochs, nnU-Net's polynomial after it: Primus' 50 of 1000 epochs."""

    def step(self, current_step: int | None = None) -> None:
        super().step(current_step)
        epoch = self.ctr - 1 if current_step is None or current_step == -1 else current_step
        warm = self.max_steps // 20
        if epoch < warm:
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr * (epoch + 1) / warm


def primus_trainer(base: Any, architecture: dict[str, Any]) -> Any | None:
    """A subclass of `base` that trains a Primus as nnU-Net's Primus trainers do; None for other architectures.

    AdamW at 3e-4 with weight decay 0.05 and warm-up, gradients clipped at norm 1, no deep supervision
    (nnunetv2/training/nnUNetTrainer/primus/primus_trainers.py).
    """
    if not is_primus(architecture):
        return None
    stock = stock_trainer_of(architecture)

    class PrimusTrainer(base):  # type: ignore[misc]
        network_lr = 3e-4
        gradient_clip = 1.0

        def __init__(
            self, plans: Any, configuration: str, fold: Any, dataset_json: Any, device: Any = torch.device("cuda")
        ) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.enable_deep_supervision = False
            self.weight_decay = 5e-2

        @staticmethod
        def build_network_architecture(
            plans_manager: Any,
            configuration_manager: Any,
            num_input_channels: int,
            num_output_channels: int,
            enable_deep_supervision: bool = True,
        ) -> Any:
            from fastnnunet.nnunet.files.plans import trainer_class

            return trainer_class(stock or "nnUNetTrainer").build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, False
            )

        def configure_optimizers(self) -> tuple[Any, Any]:
            optimizer = torch.optim.AdamW(
                self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay, betas=(0.9, 0.98)
            )
            return optimizer, _WarmUp(optimizer, self.initial_lr, self.num_epochs)

    PrimusTrainer.__name__ = stock or "nnUNetTrainer"
    return PrimusTrainer
