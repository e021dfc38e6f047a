"""Plots of a report on students of unlabelled scans."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastnnunet.bench.report.images.facts import ImagesFacts, ReportedStudent
from fastnnunet.bench.report.svg import ACCENT, INK, MUTED, OTHER, plotting, svg
from fastnnunet.errors import printable

MOST_STUDENTS = 8  # with marks of their own
_MARKS = tuple(zip((ACCENT, OTHER, INK, MUTED) * 2, "os^Dv<>P", strict=True))  # colour and shape, not colour alone
_MOST_NAMES = 40  # of cases under an axis
_LONGEST_NAME = 24


def case_plot(facts: ImagesFacts) -> str:
    """Fidelity of every case and student, cases sorted by the first student's."""
    from matplotlib.figure import Figure

    of_first = facts.students[0].fidelity.of_cases()
    order = sorted(of_first, key=lambda case: (-(of_first[case] if of_first[case] == of_first[case] else -1), case))
    with plotting():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots()
        many = len(order) > _MOST_NAMES
        for student, (colour, mark) in zip(facts.students, _MARKS, strict=False):
            of_case = student.fidelity.of_cases()
            values = [of_case[case] for case in order]
            axes.plot(range(len(order)), values, mark, color=colour, label=student.tag, markersize=3 if many else 5)
        if not many:
            axes.set_xticks(range(len(order)), [_short(case) for case in order], rotation=60, ha="right", fontsize=8)
        axes.set_xlabel(f"{len(order)} held-out scans, best to worst of {_short(facts.students[0].tag)}")
        axes.set_ylabel("fidelity (Dice, 0 to 1)")
        _finish(axes, facts.students)
        return svg(figure, "cases", "Points: fidelity of every held-out scan and student; the table has the values")


def reliability_plot(students: Sequence[ReportedStudent]) -> str:
    """Confidence of students against what the teacher gives to the same class, everywhere and near labels' borders."""
    from matplotlib.figure import Figure

    with plotting():
        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, what in zip(panels, ("everywhere", "near borders"), strict=True):
            axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle=":")
            for student, (colour, mark) in zip(students, _MARKS, strict=False):
                if (found := student.calibration) is not None:
                    scores = found.teacher if what == "everywhere" else found.teacher_border
                    bins = np.array([b for b in scores.bins if b[0]], np.float64).reshape(-1, 3)
                    axes.plot(bins[:, 1], bins[:, 2], color=colour, marker=mark, markersize=4, label=student.tag)
            axes.set_title(what, fontsize=10, loc="left", color=INK)
            axes.set_xlabel("the student's probability of the class it chooses")
            axes.set_xlim(0, 1.02)
            axes.set_ylim(0, 1.02)
            _finish(axes, students)
        panels[0].set_ylabel("the teacher's probability of that class")
        return svg(
            figure, "reliability", "Lines: mean probability of the teacher against that of each student, in bins"
        )


def curve_plot(students: Sequence[ReportedStudent], names: tuple[str, str]) -> str:
    """Training curves of the students that have one."""
    from matplotlib.figure import Figure

    with plotting():
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.subplots()
        for student, (colour, mark) in zip(students, _MARKS, strict=False):
            if student.curve:
                x, y = zip(*student.curve, strict=True)
                axes.plot(x, y, color=colour, marker=mark if len(x) < _MOST_NAMES else None, markersize=3)
                axes.lines[-1].set_label(student.tag)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        _finish(axes, students)
        return svg(figure, "curve", f"Lines: {names[1]} of each student against {names[0]}")


def _finish(axes: Any, students: Sequence[ReportedStudent]) -> None:
    axes.grid(color=MUTED, linewidth=0.3)
    if len(students) > 1:
        axes.legend(fontsize=8, framealpha=0, labelcolor=INK)


def _short(name: str) -> str:
    name = printable(name)  # no font has what stands for a byte that is no text
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
