"""How a student is trained."""

from dataclasses import dataclass
from typing import Literal

from fastnnunet.errors import SpecError

DEFAULT_LR = {"sgd": 1e-2, "adamw": 3e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSpec:
    """Hyper-parameters of one training. `alpha` = 0 trains the control: same student, hard labels only."""

    alpha: float = 0.3
    temperature: float = 3.0
    epochs: int = 1000
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 50
    batch_size: int | None = None  # None: the plans'; a small one makes more of a short run's samples
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd as nnU-Net trains; adamw converges in far fewer iterations
    initial_lr: float | None = None  # None: 1e-2 for sgd (nnU-Net's), 3e-3 for adamw
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    mirroring: bool = False  # test-time mirroring stored in the student's checkpoint
    loss: Literal["kl", "kl_dice"] = "kl"  # soft loss: KL, or KL plus the Dice semimetric loss
    augmentation: Literal["default", "da5"] = "default"  # nnU-Net's own, or that of its nnUNetTrainerDA5
    mirror_augmentation: bool = True  # mirrored patches in training; without them nothing may mirror at test time
    soft_on_ignored: bool = True  # the soft loss counts where the label says ignore: the teacher has an opinion there

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha: got {self.alpha}, expected a number from 0 to 1")
        if not 0.1 <= self.temperature <= 100:
            problems.append(f"temperature: got {self.temperature}, expected a number from 0.1 to 100")
        for name in ("epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            problems.append(f"batch_size: got {self.batch_size}, expected at least 1")
        if self.mirroring and not self.mirror_augmentation:
            problems.append("mirroring: test-time mirroring needs a student that was trained on mirrored patches")
        if self.seed < 0:
            problems.append(f"seed: got {self.seed}, expected at least 0")
        if self.initial_lr is not None and self.initial_lr <= 0:
            problems.append(f"initial_lr: got {self.initial_lr}, expected a positive number")
        if problems:
            raise SpecError("; ".join(problems))

    @property
    def lr(self) -> float:
        """The initial learning rate in effect."""
        return self.initial_lr if self.initial_lr is not None else DEFAULT_LR[self.optimizer]

    @property
    def soft_tag(self) -> str:
        """How much the soft labels count: `a0.3_T3`, or `a0` for the control."""
        return f"a{self.alpha:g}_T{self.temperature:g}" if self.alpha > 0 else "a0"

    @property
    def tag(self) -> str:
        """The part of a run's name that says how it was trained: `a0.3_T3`, then whatever is not the default."""
        default = DistillSpec()
        words = [self.soft_tag]
        if self.optimizer != default.optimizer:
            words.append(self.optimizer)
        if self.lr != DEFAULT_LR[self.optimizer]:
            words.append(f"lr{self.lr:g}")
        for letter, name in (("e", "epochs"), ("i", "iterations_per_epoch"), ("b", "batch_size"), ("s", "seed")):
            if getattr(self, name) != getattr(default, name):
                words.append(f"{letter}{getattr(self, name)}")
        if self.loss != default.loss:
            words.append(self.loss.replace("_", ""))
        if self.augmentation != default.augmentation:
            words.append(self.augmentation)
        if not self.mirror_augmentation:
            words.append("unmirrored")
        if not self.soft_on_ignored:
            words.append("unignored")
        if self.mirroring:
            words.append("mirrored")
        return "_".join(words)
