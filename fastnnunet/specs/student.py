"""How a student is made smaller than its teacher."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastnnunet.errors import SpecError

if TYPE_CHECKING:
    from fastnnunet.specs.distill import DistillSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSpec:
    """A student is the teacher's architecture with every stage `r` times narrower (f // r, at least `min_features`)."""

    r: int
    min_features: int = 8

    def __post_init__(self) -> None:
        if self.r < 1:
            raise SpecError(f"r: got {self.r}, expected a whole number of at least 1")

    @property
    def tag(self) -> str:
        """The part of a run's name that says which student it is, e.g. `r4`."""
        return f"r{self.r}"


def student_plans_name(teacher_plans: str, student: StudentSpec, distill: "DistillSpec") -> str:
    """Name of the student's plans, e.g. `nnUNetPlans_r4_a0.3_T3`; what `nnUNetv2_predict -p` takes."""
    return f"{teacher_plans}_{student.tag}_{distill.tag}"
