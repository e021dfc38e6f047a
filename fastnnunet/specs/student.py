"""How a student is made smaller than its teacher."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastnnunet.errors import SpecError
from fastnnunet.specs.option import Option

if TYPE_CHECKING:
    from fastnnunet.specs.distill import DistillSpec

Blocks = Literal["auto", "reduce", "keep", "increase", "adaptive"]
Architecture = Literal["same", "plain", "residual"]
Family = Literal["auto", "width", "lite"]
Norm = Literal["same", "batch"]
Size = Literal["S", "B", "M", "L"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSpec:
    """A student derived from the teacher's network, or written out (`network_class_name` and `arch_kwargs`).

    Derived: every stage is `r` times narrower (`narrower`), `blocks` says how deep its stages are (`fewer_blocks`),
    `architecture` turns a residual encoder into a plain one and back, `family: lite` thins the full-resolution stage
    (auto does so for U-Nets narrower than the teacher, `width` does not), `norm: batch` normalises with what training
    has seen rather than with each patch, so that it is a constant at prediction and folds into the convolutions,
    `size` takes the Primus that stock nnU-Net has under this name and leaves `r` unused.
    """

    r: Annotated[int, Option("-r --reduction", "Student size: width divided by r; may repeat.", first=True)] = 1
    min_features: Annotated[int, Option("", "Smallest width of a stage.")] = 8
    round_to: Annotated[int, Option("--round-to", "Widths in multiples of this.")] = 1
    blocks: Annotated[  # auto: adaptive for residual encoders, keep for Primus; plain encoders have none
        Blocks, Option("-bs --blocks", "reduce, keep, increase or adaptive depth.")
    ] = "auto"
    architecture: Annotated[Architecture, Option("--architecture", "same, plain or residual.")] = "same"
    family: Annotated[
        Family, Option("--family", "lite (thin full-resolution stage), width, or auto: lite where r > 1.")
    ] = "auto"
    norm: Annotated[
        Norm, Option("--norm", "same as the teacher's, or batch: constant at prediction, folded away at export.")
    ] = "same"
    size: Annotated[Size | None, Option("-ts --size", "A stock Primus: S, B, M or L.")] = None
    network_class_name: str | None = None
    arch_kwargs: dict[str, Any] | None = None
    name: str | None = None  # of a student that is written out; becomes part of its plans' name
    plans_name: Annotated[
        str | None, Option("-spl", "Name of the student's plans (default: made from the settings).")
    ] = None

    def __post_init__(self) -> None:
        problems = [
            f"{field}: got {getattr(self, field)}, expected a whole number of at least 1"
            for field in ("r", "min_features", "round_to")
            if getattr(self, field) < 1
        ]
        if (self.network_class_name is None) != (self.arch_kwargs is None):
            given, missing = ("network_class_name", "arch_kwargs")[:: 1 if self.arch_kwargs is None else -1]
            problems.append(f"{given}: given without {missing}, expected both or neither")
        if self.network_class_name is not None or self.arch_kwargs is not None:
            problems += [
                f"{field}: got {getattr(self, field)!r}, which a network written out in arch_kwargs cannot have"
                for field in ("r", "round_to", "blocks", "architecture", "family", "norm", "size")
                if getattr(self, field) != _DEFAULTS[field]
            ]
        elif self.name is not None:
            problems.append(f"name: got {self.name!r}, expected only with network_class_name and arch_kwargs")
        if self.size is not None and any(
            getattr(self, field) != _DEFAULTS[field] for field in ("architecture", "family", "blocks", "norm")
        ):
            problems.append(f"size: got {self.size!r} with architecture, family, blocks or norm, expected size alone")
        for field in ("name", "plans_name"):
            value = getattr(self, field)
            if value is not None and (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or "__" in value):
                problems.append(f"{field}: got {value!r}, expected letters, digits, '.', '-' and single '_'")
        if problems:
            raise SpecError("; ".join(problems))

    @property
    def is_explicit(self) -> bool:
        """Whether the network is written out rather than derived from the teacher's."""
        return self.network_class_name is not None

    @property
    def tag(self) -> str:
        """The part of a run's name that says which student it is: `r4`, then whatever is not the default.

        `r4_width`, `r4_bn` (batch norm), `r4_m8` (widths in multiples of 8), `r4_keep`, `r4_plain`, `r4_f16` (at least
        16 features), `primusS`, or the `name` of a student that is written out.
        """
        if self.is_explicit:
            return self.name or "custom"
        if self.size is not None:
            return f"primus{self.size}"
        words = [f"r{self.r}"]
        if self.architecture != "same":
            words.append(self.architecture)
        if self.family != "auto":
            words.append(self.family)
        if self.norm == "batch":
            words.append("bn")
        if self.round_to > 1:
            words.append(f"m{self.round_to}")
        if self.min_features != _DEFAULTS["min_features"]:
            words.append(f"f{self.min_features}")
        if self.blocks != "auto":
            words.append(self.blocks)
        return "_".join(words)

    @property
    def is_lite(self) -> bool:
        """Whether a U-Net's full-resolution stage is thinned."""
        return self.family == "lite" or (self.family == "auto" and self.r > 1)

    def narrower(self, features: int) -> int:
        """Width of a stage that has `features` in the teacher.

        f // r, then down to a multiple of `round_to`, but at least `min_features` (rounded up to that multiple) and
        never wider than the teacher.
        """
        floor = math.ceil(self.min_features / self.round_to) * self.round_to
        return min(features, max(floor, features // self.r // self.round_to * self.round_to))

    def fewer_blocks(self, blocks: Sequence[int], teacher: Sequence[float], student: Sequence[float]) -> list[int]:
        """Blocks of every stage, given the teacher's blocks and the widths of both.

        reduce: half, rounded up. keep: as many. increase: half as many again, rounded up. adaptive: what the stage's
        budget affords. A block of width f costs in proportion to f^2; the budget of a stage is the teacher's cost n f^2
        over r^2 for the width, as asked for, and over sqrt(r) for depth, hence n (f / (r g))^2 / sqrt(r) blocks of the
        width g the stage really has, rounded to the nearest, from 1 to n: stages held wide by the floor get fewer.
        """
        if self.blocks == "keep":
            return list(blocks)
        if self.blocks == "reduce":
            return [math.ceil(n / 2) for n in blocks]
        if self.blocks == "increase":
            return [n + math.ceil(n / 2) for n in blocks]
        return [
            min(n, max(1, math.floor(n * (f / self.r / g) ** 2 / math.sqrt(self.r) + 0.5)))
            for n, f, g in zip(blocks, teacher, student, strict=True)
        ]


_DEFAULTS: dict[str, Any] = {
    "r": 1,
    "min_features": 8,
    "round_to": 1,
    "blocks": "auto",
    "architecture": "same",
    "family": "auto",
    "norm": "same",
    "size": None,
}


def student_plans_name(teacher_plans: str, student: StudentSpec, distill: "DistillSpec") -> str:
    """Name of the student's plans, e.g. `nnUNetPlans_r4_a0.5_T1`; what `nnUNetv2_predict -p` takes."""
    return student.plans_name or f"{teacher_plans}_{student.tag}_{distill.tag}"
