"""What a report on students of unlabelled scans tells: plain values and pictures, no files to be read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastnnunet.bench.report.images.pictures import JudgedCase
from fastnnunet.errors import SpecError
from fastnnunet.evaluate.calibration import CalibrationSummary
from fastnnunet.evaluate.fidelity import Fidelity, FidelityGap


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedStudent:
    """A student that was trained and judged. What is None or empty is not known, and said to be so or left out."""

    tag: str
    parameters: int
    bundle_bytes: int
    fidelity: Fidelity
    seconds_per_case: float | None = None  # median, from image file to label file
    calibration: CalibrationSummary | None = None
    temperature: float = 1.0  # folded into its last layer
    curve: tuple[tuple[float, float], ...] = ()  # of the training: (epoch or step, value), see `ImagesFacts.curve_axes`


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOutScan:
    """A scan that was not trained on, or would not have been: the reason in words and the numbers it rests on."""

    case: str
    reason: str
    numbers: Mapping[str, float | int | str | None] = field(default_factory=dict)
    picture: bytes | None = None  # PNG


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesFacts:
    """Everything on the page. All students are judged on the same cases; the first one decides what is shown.

    Raises SpecError when there is no student, or they were judged on other cases than each other.
    """

    model: str
    configuration: str
    folds: tuple[str, ...]
    mirrored: bool
    created: str  # as `provenance.now_utc` writes it
    trained_scans: int
    alpha: float  # weight of the soft labels, from 0 to 1
    students: tuple[ReportedStudent, ...]
    training: str = ""  # how long and from what loss, in words
    teacher_seconds_per_case: float | None = None
    teacher_parameters: int | None = None  # of all folds together
    teacher_bytes: int | None = None  # of its networks as float32
    label_values: Mapping[str, int] = field(default_factory=dict)  # name -> value in label maps, for the legend
    gaps: tuple[FidelityGap, ...] = ()
    pictures: tuple[JudgedCase, ...] = ()
    left_out: tuple[LeftOutScan, ...] = ()
    left_out_rule: str = ""
    kept_all: bool = False  # the scans of `left_out` were trained on nevertheless
    rare_labels: Mapping[str, int] = field(default_factory=dict)  # name -> in how many scans the teacher sees it
    curve_axes: tuple[str, str] = ("epoch", "pseudo Dice")
    notes: tuple[str, ...] = ()  # on how it was measured
    threads: int | None = None
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        if not self.students:
            raise SpecError("there is no student to report on; expected at least one")
        first = self.students[0].fidelity
        for student in self.students[1:]:
            judged = student.fidelity
            if judged.dice.keys() != first.dice.keys() or judged.labels.keys() != first.labels.keys():
                raise SpecError(f"{student.tag} was judged on other cases or labels than {self.students[0].tag}")

    @property
    def held_out(self) -> tuple[str, ...]:
        """Cases that students are judged on."""
        return tuple(self.students[0].fidelity.dice)


def value_names(labels: Mapping[str, Any], regions_class_order: tuple[int, ...] | None = None) -> dict[str, int]:
    """Name -> the value that marks it in a label map, for labels or regions as in dataset.json, without background.

    A region is marked by its entry of `regions_class_order` where no later region covers it.
    """
    names = [name for name, value in labels.items() if name != "ignore" and value not in (0, [0], (0,))]
    if regions_class_order is None:
        return {name: int(labels[name]) for name in names if isinstance(labels[name], int)}
    return dict(zip(names, map(int, regions_class_order), strict=False))
