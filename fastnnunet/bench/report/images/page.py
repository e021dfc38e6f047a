"""The report of `distill images` as one HTML file: how faithful, fast and small the students are, and what they get
wrong."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastnnunet.bench.report.images.facts import ImagesFacts, LeftOutScan, ReportedStudent
from fastnnunet.bench.report.images.pictures import OTHER_LABEL, STUDENT_ONLY, TEACHER_ONLY, JudgedCase
from fastnnunet.bench.report.images.plots import MOST_STUDENTS, case_plot, curve_plot, reliability_plot
from fastnnunet.bench.report.numbers import NONE, dice, seconds, size, times
from fastnnunet.bench.report.slices import legend
from fastnnunet.evaluate.bootstrap import CONFIDENCE, Interval
from fastnnunet.evaluate.calibration import CalibrationScores
from fastnnunet.evaluate.temperature import HIGHEST, LOWEST
from fastnnunet.outputs.page.html import (
    box,
    document,
    entries,
    figure,
    legend_list,
    note,
    plot_box,
    section,
    write_document,
)

MOST_LABELS = 12  # columns of a table, entries of a legend
MOST_OPEN_ROWS = 20  # a longer table of cases is folded
MOST_LEFT_OUT_PICTURES = 24
_LONG_NAME = 40  # breaks into lines
_FEW_SCANS = 10  # with fewer held out an interval says little

Row = tuple[str, Sequence[str]]


def write_images_report(facts: ImagesFacts, file: Path) -> None:
    """Write the page, whole or not at all. Raises FastnnUNetError when it cannot be written."""
    write_document(images_page(facts), file)


def images_page(facts: ImagesFacts) -> str:
    """The HTML text; everything that is a name of somebody is escaped."""
    title = f"{facts.model}: a fast student from scans without labels"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="when">{escape(_when(facts))}</p>',
        f'<p class="lead">{escape(headline(facts))}</p>',
        section("Teacher and students", box(_student_table(facts)), note(_what_fidelity_is(facts))),
        section("Fidelity per label", box(_label_table(facts)), *_gaps(facts), *_rare(facts)),
    ]
    if facts.pictures:
        heading = "Best, median and worst scan" if len(facts.pictures) > 2 else "Held-out scans"
        parts.append(section(heading, *(_case(facts, case) for case in facts.pictures)))
    plot = [plot_box(case_plot(facts))] if len(facts.held_out) > 1 else []  # one point says nothing
    parts.append(section("Every held-out scan", *plot, _case_table(facts)))
    if any(student.calibration for student in facts.students):
        parts.append(_calibration(facts.students))
    if any(len(student.curve) > 1 for student in facts.students):
        parts.append(section("Training", plot_box(curve_plot(facts.students, facts.curve_axes))))
    if facts.left_out:
        parts.append(_left_out(facts))
    parts.append(section("How it was made", entries(_made(facts))))
    if facts.hardware or facts.versions:
        parts.append(section("Machine and versions", entries(_machine(facts))))
    if facts.command:
        parts.append(section("Command", f"<pre>{escape(facts.command)}</pre>"))
    return document(title, *parts)


def headline(facts: ImagesFacts) -> str:
    """What the first student reaches, in two sentences."""
    first = facts.students[0]
    many = len(facts.held_out)
    reached = f"{first.tag} agrees with its teacher with a mean Dice of {_interval(first.fidelity.mean)}"
    words = [f"{reached} on {_scans(many)} held out of training."]
    faster = _faster(facts, first)
    if first.seconds_per_case is not None:
        than = f", {faster} faster than its teacher" if faster != NONE else ""
        words.append(
            f"It takes {seconds(first.seconds_per_case)} a scan{than}, and its bundle has {size(first.bundle_bytes)}."
        )
    return " ".join(words)


def _when(facts: ImagesFacts) -> str:
    machine = [str(facts.hardware["cpu"])] if "cpu" in facts.hardware else []
    threads = [] if facts.threads is None else [f"{facts.threads} threads"]
    return ", ".join([facts.created, *machine, *threads])


def _what_fidelity_is(facts: ImagesFacts) -> str:
    if len(facts.held_out) == 1:
        brackets = " With one scan held out there is no interval."
    else:
        few = f" With {len(facts.held_out)} held out it says little." if len(facts.held_out) < _FEW_SCANS else ""
        brackets = f" In brackets the {CONFIDENCE:.0%} interval of a bootstrap over scans.{few}"
    return (
        "Fidelity is the Dice of a student's labels against its teacher's own, on scans that the student was not "
        "trained on. It is agreement, not truth: where the teacher is wrong, a faithful student is wrong too."
        + brackets
    )


def _student_table(facts: ImagesFacts) -> str:
    folds = len(facts.folds)
    kind = f"teacher, {folds} fold{'s' * (folds != 1)}{', mirrored' * facts.mirrored}"
    rows: list[Row] = [
        (
            kind,
            [NONE, seconds(facts.teacher_seconds_per_case), NONE, _millions(facts.teacher_parameters),
             size(facts.teacher_bytes)],
        )
    ]  # fmt: skip
    rows += [
        (
            s.tag,
            [_interval(s.fidelity.mean), seconds(s.seconds_per_case), _faster(facts, s), _millions(s.parameters),
             size(s.bundle_bytes)],
        )
        for s in facts.students
    ]  # fmt: skip
    return _table(["", "fidelity (Dice, 0 to 1)", "per scan", "faster", "parameters", "size"], rows, marked=1)


def _label_table(facts: ImagesFacts) -> str:
    fidelity = facts.students[0].fidelity
    headings = ["", "scans with it", *(f"{s.tag}, Dice (0 to 1)" for s in facts.students)]
    rows: list[Row] = [
        (name, [str(fidelity.label_cases[name]), *(_interval(s.fidelity.labels[name]) for s in facts.students)])
        for name in fidelity.labels
    ]
    rows.append(("mean of the labels", ["", *(_interval(s.fidelity.mean) for s in facts.students)]))
    return _table(headings, rows)


def _gaps(facts: ImagesFacts) -> list[str]:
    return [
        note(
            f"{gap.first} less {gap.second} on the same scans: {gap.mean.mean:+.2f} points of Dice "
            f"({gap.mean.low:+.2f} to {gap.mean.high:+.2f})."
        )
        for gap in facts.gaps
    ]


def _rare(facts: ImagesFacts) -> list[str]:
    if not facts.rare_labels:
        return []
    told = ", ".join(f"{name} ({many})" for name, many in facts.rare_labels.items())
    return [note(f"Labels that the teacher sees in few scans, so that a student can hardly learn them: {told}.")]


def _case(facts: ImagesFacts, case: JudgedCase) -> str:
    figures = "".join(figure(p.png, p.caption, p.alt) for p in case.pictures)
    seen = legend(case.values, dict(facts.label_values))
    more = [("transparent", f"and {len(seen) - MOST_LABELS} more")] if len(seen) > MOST_LABELS else []
    first = facts.students[0].tag
    differences = [
        ("transparent", "where they differ:"),
        (TEACHER_ONLY, "teacher alone"),
        (STUDENT_ONLY, f"{first} alone"),
        (OTHER_LABEL, "both, but another label"),
    ]
    return (
        f"<h3>{escape(case.place)}: {escape(case.case)}</h3>\n"
        f"<p>Dice {dice(case.dice)}, {escape(case.where)}</p>\n"
        f'<div class="slices">{figures}</div>\n' + legend_list([*seen[:MOST_LABELS], *more]) + legend_list(differences)
    )


def _case_table(facts: ImagesFacts) -> str:
    first = facts.students[0].fidelity
    names = list(first.labels)[:MOST_LABELS]
    of_cases = {s.tag: s.fidelity.of_cases() for s in facts.students}
    headings = ["", *(f"{s.tag}, mean" for s in facts.students), *(f"{facts.students[0].tag}, {n}" for n in names)]
    rows: list[Row] = [
        (case, [*(dice(of_cases[s.tag][case]) for s in facts.students), *(dice(first.dice[case][n]) for n in names)])
        for case in facts.held_out
    ]
    left = len(first.labels) - len(names)
    rest = [note(f"{left} more labels are in the record.")] if left > 0 else []
    table = "\n".join([box(_table(headings, rows)), *rest])
    if len(facts.students) > MOST_STUDENTS:
        table += note(f"The plot shows the first {MOST_STUDENTS} students.")
    if len(rows) <= MOST_OPEN_ROWS:
        return table
    return f"<details><summary>All {len(rows)} scans as a table</summary>{table}</details>"


def _calibration(students: Sequence[ReportedStudent]) -> str:
    headings = ["", "against", "voxels", "Brier score (0 to 2)", "NLL (nats)", "least NLL", "KL (nats)", "ECE (0 to 1)"]
    rows: list[Row] = []
    border_mm = 0.0
    for student in students:
        if (found := student.calibration) is None:
            continue
        border_mm = found.border_mm
        places = {
            "teacher, everywhere": found.teacher,
            "teacher, near borders": found.teacher_border,
            "labels, everywhere": found.labels,
            "labels, near borders": found.labels_border,
        }
        rows += [(student.tag, [where, *_scores(s)]) for where, s in places.items() if s is not None]
    text = (
        "How well a student's probabilities are those of its teacher; smaller is better in every column. Least NLL is "
        "the teacher's own uncertainty, ECE the expected calibration error: the mean distance of a student's "
        "confidence to the probability that its teacher gives to the same class. Near borders: at most "
        f"{border_mm:g} mm (of pictures: pixels) from a border of the teacher's labels."
    )
    folded = ", ".join(f"{s.tag} by {s.temperature:.3g}" for s in students if s.temperature != 1)
    if folded:
        text += f" Logits were divided ({folded}), fitted on scans that were learnt from; it changes no label."
    at_end = [s.tag for s in students if not LOWEST * 1.01 < s.temperature < HIGHEST * 0.99]
    if at_end:
        text += (
            f" Of {', '.join(at_end)} that is the end of the range that is looked at, {LOWEST:g} to {HIGHEST:g}: "
            "look at the training before these probabilities are used."
        )
    plot = plot_box(reliability_plot(students))
    return section("Calibration", box(_table(headings, rows)), plot, note(text))


def _scores(s: CalibrationScores) -> list[str]:
    return [f"{s.voxels:,}", *(_small(v) for v in (s.brier, s.nll, s.target_entropy, s.kl, s.ece))]


def _left_out(facts: ImagesFacts) -> str:
    kept = "They were kept nevertheless. Without --keep-all " if facts.kept_all else ""
    many = len(facts.left_out)
    rows: list[Row] = [(scan.case, [scan.reason, _numbers(scan)]) for scan in facts.left_out]
    rule = facts.left_out_rule if facts.kept_all else facts.left_out_rule[:1].upper() + facts.left_out_rule[1:]
    shown = [scan for scan in facts.left_out if scan.picture is not None]
    figures = "".join(
        figure(scan.picture, f"{scan.case}: {scan.reason}", f"a slice of {scan.case}, {scan.reason}")
        for scan in shown[:MOST_LEFT_OUT_PICTURES]
        if scan.picture is not None
    )
    more = len(shown) - MOST_LEFT_OUT_PICTURES
    return section(
        "Scans that would do harm" if facts.kept_all else "Scans left out",
        f"<p>{escape(_scans(many))}. {escape(kept + rule)}</p>",
        box(f'<div class="words">{_table(["", "why", "numbers"], rows)}</div>'),
        f'<div class="slices">{figures}</div>' if figures else "",
        note(f"Pictures of {more} more are not shown.") if more > 0 else "",
    )


def _scans(many: int) -> str:
    return f"{many} scan{'s' * (many != 1)}"


def _numbers(scan: LeftOutScan) -> str:
    def told(value: float | int | str | None) -> str:
        return NONE if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {told(value)}" for name, value in scan.numbers.items()) or NONE


def _made(facts: ImagesFacts) -> dict[str, str]:
    learnt = "labels" if facts.alpha == 0 else "soft labels" if facts.alpha == 1 else "labels and soft labels"
    made = {
        "model": facts.model,
        "configuration": facts.configuration,
        "folds": f"{', '.join(facts.folds)}{', mirrored' if facts.mirrored else ', not mirrored'}",
        "trained on": f"{_scans(facts.trained_scans)} with the teacher's {learnt}, none by hand",
        **({"training": facts.training} if facts.training else {}),
        "judged on": f"{_scans(len(facts.held_out))} held out",
        "left out": _scans(0 if facts.kept_all else len(facts.left_out)),
    }
    return made | {f"note {number}": text for number, text in enumerate(facts.notes, start=1)}


def _machine(facts: ImagesFacts) -> dict[str, str]:
    told = {**facts.hardware, **facts.versions}
    if isinstance(told.get("memory_bytes"), int):
        told = {"memory": size(told["memory_bytes"]), **told}
        del told["memory_bytes"]
    return {name.replace("_", " "): str(value) for name, value in told.items() if value is not None}


def _table(headings: Sequence[str], rows: Sequence[Row], marked: int | None = None) -> str:
    """Rows of a name and cells; the row of number `marked` is the student of the headline."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headings)
    body = []
    for number, (name, cells) in enumerate(rows):
        mark = ' class="student"' if number == marked else ""
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{row}</tr>')
    long = ' class="long"' if any(len(name) > _LONG_NAME for name, _ in rows) else ""
    return f"<table{long}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _interval(interval: Interval) -> str:
    if interval.mean != interval.mean:
        return NONE
    if interval.low == interval.high:  # of one scan
        return dice(interval.mean)
    return f"{dice(interval.mean)} ({dice(interval.low)} to {dice(interval.high)})"


def _faster(facts: ImagesFacts, student: ReportedStudent) -> str:
    if not facts.teacher_seconds_per_case or not student.seconds_per_case:
        return NONE
    return times(facts.teacher_seconds_per_case / student.seconds_per_case)


def _millions(parameters: int | None) -> str:
    return NONE if parameters is None else f"{parameters / 1e6:.2f} million"


def _small(value: float) -> str:
    return NONE if value != value else f"{value:.4f}"
