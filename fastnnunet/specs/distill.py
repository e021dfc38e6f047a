"""How a student is trained."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastnnunet.errors import SpecError
from fastnnunet.specs.option import Option

EPOCHS, ITERATIONS, VAL_ITERATIONS = 1000, 250, 50  # nnU-Net's
DEFAULT_LR = {"sgd": 1e-2, "adamw": 3e-3}
# how long `distill images` and `train -m` train unless told otherwise; measured, see docs/measured.md
SCANS_TRAINING: dict[str, Any] = {
    "optimizer": "adamw",
    "batch_size": 2,
    "epochs": 40,
    "iterations_per_epoch": 100,
    "val_iterations_per_epoch": 5,
}
# what trainings did before these fields were there, where it is not the default of today
BEFORE_THERE_WAS_A_CHOICE: dict[str, Any] = {"loss": "kl", "soft_deep_supervision": False, "start": "random"}
OF_THE_SOFT_LOSS = (
    "temperature", "loss", "soft_deep_supervision", "soft_voxels", "sharpen_above", "sharpen_power", "soft_on_ignored",
)  # fmt: skip
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a set of unlabelled images; becomes part of a run's name


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSpec:
    """Hyper-parameters of one training. `alpha` = 0 trains the control: same student, hard labels only.

    The soft loss by default (alpha, T, loss, soft_deep_supervision) is what helped with a strong teacher, see
    docs/measured.md.
    """

    alpha: Annotated[float, Option("-a --alpha", "Weight of the soft loss; 0 trains the control.", first=True)] = 0.5
    # first the teacher, in the end the labels
    anneal: Annotated[
        bool, Option("--anneal", "Let the weight of the soft loss fall linearly to 0 during the training.")
    ] = False
    temperature: Annotated[float, Option("-temp --temperature", "T of cache and loss.", first=True)] = 1.0
    epochs: Annotated[int, Option("-e --epochs", "Epochs.")] = EPOCHS
    iterations_per_epoch: Annotated[int, Option("--iterations", "Iterations per epoch.")] = ITERATIONS
    val_iterations_per_epoch: Annotated[int, Option("--val-iterations", "Validation iterations per epoch.")] = (
        VAL_ITERATIONS
    )
    # what is written down is the epochs and iterations that they come to
    steps: Annotated[
        int | None, Option("--steps", "Steps, in the place of epochs and iterations: up to 100 epochs.")
    ] = None
    hours: Annotated[
        float | None, Option("--hours", "Hours, in the place of epochs: as many as fit, by the time of the first.")
    ] = None
    # a small one makes more of a short run's samples
    batch_size: Annotated[int | None, Option("--batch-size", "Samples a step (default: the plans').")] = None
    # adamw converges in far fewer iterations
    optimizer: Annotated[
        Literal["sgd", "adamw"],
        Option("--optimizer", "sgd (nnU-Net's), or adamw for short runs; Primus always takes AdamW."),
    ] = "sgd"
    initial_lr: Annotated[float | None, Option("--lr", "Initial learning rate (sgd 0.01, adamw 0.003).")] = None
    seed: Annotated[int, Option("--seed", "Of batches and first weights.")] = 0
    precision: Annotated[Literal["auto", "fp32", "bf16"], Option("--precision", "auto, fp32 or bf16 (CPU).")] = "auto"
    # stored in the student's checkpoint
    mirroring: Annotated[bool, Option("--mirroring", "Let the student mirror at prediction (8x slower).")] = False
    start: Annotated[
        Literal["teacher", "random"],
        Option("--start", "First weights: teacher (its most important channels) or random."),
    ] = "teacher"
    loss: Annotated[
        Literal["kl", "kl_dice"], Option("--loss", "Soft loss: kl, or kl_dice (KL and Dice semimetric).")
    ] = "kl_dice"
    # as the hard loss has it, with nnU-Net's weights
    soft_deep_supervision: Annotated[
        bool,
        Option(
            "--soft-deep-supervision/--no-soft-deep-supervision", "Soft loss at every resolution of deep supervision."
        ),
    ] = True
    soft_voxels: Annotated[
        Literal["all", "uncertain", "entropy", "boundary"],
        Option("--soft-voxels", "Voxels of the KL: all, uncertain, boundary; or weighted by entropy."),
    ] = "all"
    sharpen_above: Annotated[
        float, Option("--sharpen-above", "Sharpen soft labels where their largest probability exceeds this.")
    ] = 1.0
    sharpen_power: Annotated[
        float, Option("--sharpen-power", "Power of the probabilities there; inf: the hard label.")
    ] = 2.0
    augmentation: Annotated[Literal["default", "da5"], Option("--augmentation", "nnU-Net's default, or its da5.")] = (
        "default"
    )
    # without them nothing may mirror at prediction
    mirror_augmentation: Annotated[
        bool, Option("--mirror-augmentation/--no-mirror-augmentation", "Train on mirrored patches too.")
    ] = True
    # for students that are to see whole images at once
    last_patch: Annotated[
        tuple[int, ...] | None, Option("--last-patch", "Larger patches for the last part of the training, z y x.")
    ] = None
    last_share: Annotated[float, Option("--last-share", "That part, as a share of the epochs.")] = 0.2
    # all its folds are in memory then, beside the student
    online_teacher: Annotated[
        float,
        Option("--online-teacher", "Share of the epochs, the last, with the teacher's own answers on their patches."),
    ] = 0.0
    # of students with --norm batch; a batch of two patches says little
    norm_statistics: Annotated[
        Literal["frozen", "running", "precise"],
        Option(
            "--norm-statistics",
            "Batch norms end with: frozen, for the last fifth; running means; precise, measured anew.",
        ),
    ] = "frozen"
    # the teacher has an opinion there
    soft_on_ignored: Annotated[
        bool, Option("--soft-on-ignored/--no-soft-on-ignored", "Soft loss where the label says ignore too.")
    ] = True
    # the name of their set, once it is known; without pseudo_labels they have a soft loss only
    unlabelled: Annotated[
        str | None,
        Option("--unlabelled", "Learn from images without labels too: their folder, or name of the set."),
    ] = None
    unlabelled_share: Annotated[
        float, Option("--unlabelled-share", "Share of the samples that are unlabelled, from 0 to 1.")
    ] = 0.5
    pseudo_labels: Annotated[
        bool,
        Option("--pseudo-labels/--no-pseudo-labels", "Hard loss on the teacher's label of unlabelled samples too."),
    ] = False

    def __post_init__(self) -> None:
        problems = self._schedule_problems()
        if self.steps is not None and not problems:
            self._divide_steps(self.steps)
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
        if self.anneal and self.alpha == 0:
            problems.append("anneal: at alpha 0 there is no soft loss to anneal, expected alpha above 0")
        if self.seed < 0:
            problems.append(f"seed: got {self.seed}, expected at least 0")
        if self.initial_lr is not None and not 0 < self.initial_lr < math.inf:
            problems.append(f"initial_lr: got {self.initial_lr}, expected a positive number")
        if not 0 < self.sharpen_above <= 1:
            problems.append(f"sharpen_above: got {self.sharpen_above}, expected a number above 0, at most 1 (nowhere)")
        if not self.sharpen_power > 1:
            problems.append(f"sharpen_power: got {self.sharpen_power}, expected a number above 1, or inf")
        elif self.sharpen_power != 2.0 and self.sharpen_above == 1:
            problems.append("sharpen_power: without sharpen_above nothing is sharpened, expected sharpen_above below 1")
        problems += self._unlabelled_problems() + self._last_problems() + self._online_problems()
        if problems:
            raise SpecError("; ".join(problems))

    def _last_problems(self) -> list[str]:
        problems = []
        if self.last_patch is not None and min(self.last_patch, default=0) < 1:
            problems.append(f"last_patch: got {self.last_patch}, expected whole numbers of at least 1")
        if not 0 < self.last_share <= 1:
            problems.append(f"last_share: got {self.last_share}, expected a number above 0, at most 1")
        elif self.last_share != 0.2 and self.last_patch is None:
            problems.append(f"last_share: got {self.last_share} without last_patch, expected both")
        return problems

    def _online_problems(self) -> list[str]:
        if not 0 <= self.online_teacher <= 1:
            return [f"online_teacher: got {self.online_teacher}, expected a number from 0 (never) to 1"]
        if self.online_teacher == 0:
            return []
        problems = []
        if self.alpha == 0:
            problems.append("online_teacher: at alpha 0 nobody listens to it, expected alpha above 0")
        if self.hours is not None:  # the first epoch, which they are planned by, would take a fraction of the last
            problems.append("online_teacher: got it beside hours, expected epochs or steps")
        if self.last_patch is not None:
            problems.append("online_teacher: got it beside last_patch, expected patches of the teacher's size")
        return problems

    def _schedule_problems(self) -> list[str]:
        others = {"epochs": self.epochs != EPOCHS, "iterations_per_epoch": self.iterations_per_epoch != ITERATIONS}
        beside = {"hours": ["epochs"], "steps": ["epochs", "iterations_per_epoch"]}
        problems = [
            f"{name}: got it beside {other}, expected one of the two"
            for name, excluded in beside.items()
            if getattr(self, name) is not None
            for other in excluded
            if others[other]
        ]
        if self.steps is not None and self.hours is not None:
            problems.append("hours: got it beside steps, expected one of the two")
        if self.steps is not None and self.steps < 1:
            problems.append(f"steps: got {self.steps}, expected at least 1")
        if self.hours is not None and not 0 < self.hours < math.inf:
            problems.append(f"hours: got {self.hours}, expected a positive number")
        return problems

    def _divide_steps(self, steps: int) -> None:
        """Epochs of 50 to 250 iterations, 100 of them where that can be, and nnU-Net's fifth of validation."""
        wanted = min(max(round(steps / 100), 50), ITERATIONS)
        epochs = math.ceil(steps / wanted)
        iterations = math.ceil(steps / epochs)  # rounded up to whole epochs
        values = {"epochs": epochs, "iterations_per_epoch": iterations, "steps": None}
        if self.val_iterations_per_epoch == VAL_ITERATIONS:
            values["val_iterations_per_epoch"] = max(1, iterations * VAL_ITERATIONS // ITERATIONS)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _unlabelled_problems(self) -> list[str]:
        share = self.unlabelled_share
        problems = []
        if self.unlabelled is None:
            if share != 0.5:
                problems.append(f"unlabelled_share: got {share} without unlabelled, expected both")
            if self.pseudo_labels:
                problems.append("pseudo_labels: got them without unlabelled, expected both")
            return problems
        if not SET_NAME.fullmatch(self.unlabelled) or "__" in self.unlabelled:
            problems.append(f"unlabelled: got {self.unlabelled!r}, expected letters, digits, '.', '-' and single '_'")
        if self.alpha == 0 and not self.pseudo_labels:
            problems.append(
                "unlabelled: at alpha 0 there is nothing to learn from them, expected alpha above 0, or pseudo_labels"
            )
        if not 0 <= share <= 1:
            problems.append(f"unlabelled_share: got {share}, expected a number from 0 to 1")
        return problems

    @property
    def lr(self) -> float:
        """The initial learning rate in effect."""
        return self.initial_lr if self.initial_lr is not None else DEFAULT_LR[self.optimizer]

    @property
    def soft_tag(self) -> str:
        """How much the soft labels count: `a0.5_T1`, or `a0` for the control."""
        return f"a{self.alpha:g}_T{self.temperature:g}" if self.alpha > 0 else "a0"

    def _soft_loss_words(self, default: "DistillSpec") -> list[str]:
        if self.alpha == 0:
            return []
        words = [] if self.loss == default.loss else [self.loss.replace("_", "")]
        if not self.soft_deep_supervision:
            words.append("nosoftds")
        if self.soft_voxels != default.soft_voxels:
            words.append(self.soft_voxels)
        if (self.sharpen_above, self.sharpen_power) != (default.sharpen_above, default.sharpen_power):
            power = "hard" if math.isinf(self.sharpen_power) else f"p{self.sharpen_power:g}"
            words.append(f"sharp{self.sharpen_above:g}{power}")
        return words

    @property
    def tag(self) -> str:
        """The part of a run's name that says how it was trained: `a0.5_T1`, then whatever is not the default."""
        default = DistillSpec()
        words = [self.soft_tag]
        if self.optimizer != default.optimizer:
            words.append(self.optimizer)
        if self.lr != DEFAULT_LR[self.optimizer]:
            words.append(f"lr{self.lr:g}")
        for letter, name in (("e", "epochs"), ("i", "iterations_per_epoch"), ("b", "batch_size"), ("s", "seed")):
            if getattr(self, name) != getattr(default, name):
                words.append(f"{letter}{getattr(self, name)}")
        if self.hours is not None:
            words.append(f"h{self.hours:g}")
        if self.start != default.start:
            words.append("fromscratch")
        if self.anneal:
            words.append("annealed")
        words += self._soft_loss_words(default)
        if self.augmentation != default.augmentation:
            words.append(self.augmentation)
        if not self.mirror_augmentation:
            words.append("unmirrored")
        if self.alpha > 0 and not self.soft_on_ignored:
            words.append("unignored")
        if self.last_patch is not None:
            words.append(f"last{'x'.join(map(str, self.last_patch))}")
        if self.last_share != default.last_share:
            words.append(f"share{self.last_share:g}")
        if self.online_teacher:
            words.append(f"online{self.online_teacher:g}")
        if self.norm_statistics != default.norm_statistics:
            words.append(self.norm_statistics)
        if self.mirroring:
            words.append("mirrored")
        if self.pseudo_labels:
            words.append("pseudo")
        if self.unlabelled is not None:
            words.append(f"u{self.unlabelled_share:g}_{self.unlabelled}")
        return "_".join(words)
