"""A benchmark record as one HTML file that needs nothing else: style, plots and pictures are inside."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastnnunet.bench.benchmark import prediction_folder
from fastnnunet.bench.job import ENSEMBLE, SINGLE
from fastnnunet.bench.report.headline import Record, fastest, headline, students
from fastnnunet.bench.report.numbers import NONE, dice, percent, seconds, size, times
from fastnnunet.bench.report.page_plots import dice_plot, stage_plot, total_plot
from fastnnunet.bench.report.slices import CasePictures, case_pictures, legend
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
from fastnnunet.runtime.times import STAGES

MOST_LABELS = 12  # columns of the table of labels, entries of a legend


def pictures_of(record: Record, images: Path, labels: Path | None, output: Path, cases: int = 3) -> list[CasePictures]:
    """Slices of the first cases that every arm predicted: true labels, teacher and fastest student.

    The teacher is the ensemble or, where that was not run, the one fold. Raises ImageError.
    """
    teacher = SINGLE if "extrapolated" in record["arms"][ENSEMBLE] else ENSEMBLE
    ending = record["file_ending"]
    found = []
    for case in record["cases"][: min(cases, record["baseline_cases"])]:
        maps = {} if labels is None else {"true labels": labels / f"{case}{ending}"}
        maps |= {arm: prediction_folder(output, arm) / f"{case}{ending}" for arm in (teacher, fastest(record))}
        found.append(case_pictures(case, images / f"{case}_0000{ending}", maps))
    return found


def write_page(record: Record, pictures: Sequence[CasePictures], path: Path) -> None:
    """Write the page, whole or not at all. Raises FastnnUNetError when it cannot be written."""
    write_document(page(record, pictures), path)


def page(record: Record, pictures: Sequence[CasePictures]) -> str:
    """The HTML text."""
    title = f"{record['dataset']} {record['teacher']['configuration']}: students and their teacher"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="when">{escape(record["created"])}, {escape(record["hardware"]["cpu"])}, '
        f"{record['threads']} threads</p>",
        f'<p class="lead">{escape(headline(record))}</p>',
        section("Seconds per case", box(_speed_table(record)), _notes(record), plot_box(total_plot(record))),
        section("Accuracy and memory", box(_quality_table(record))),
        section("Stages", box(_stage_table(record)), plot_box(stage_plot(record))),
    ]
    if any("metrics" in arm for arm in record["arms"].values()):
        over = note(f"Over the {record['baseline_cases']} case(s) that every arm predicted.")
        parts.append(section("Dice against time", plot_box(dice_plot(record)), over))
        parts.append(section("Dice per label", box(_label_table(record)), _label_note(record)))
    if pictures:
        parts.append(section("Slices", *(_slices(record, case) for case in pictures)))
    parts.append(section("How it was measured", _method(record)))
    parts.append(section("Machine and versions", _machine(record)))
    if record.get("command"):
        parts.append(section("Command", f"<pre>{escape(record['command'])}</pre>"))
    return document(title, *parts)


def _table(record: Record, headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A row for each arm; students are marked."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headings)
    body = []
    for name, cells in rows.items():
        mark = ' class="student"' if name in students(record) else ""
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{row}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _speed_table(record: Record) -> str:
    columns: dict[str, Callable[[Any], str]] = {
        "warm, median": lambda a: seconds(a["median_s"]),
        "warm, 90th percentile": lambda a: seconds(a["p90_s"]),
        "faster than the ensemble": lambda a: times(a["times_faster_than_ensemble"]),
        "faster than one fold": lambda a: times(a["times_faster_than_single_fold"]),
        "cold start to file": lambda a: seconds(a.get("cold", {}).get("median_s")),
        "cold, faster than the ensemble": lambda a: times(a.get("cold", {}).get("times_faster_than_ensemble")),
        "cold, faster than one fold": lambda a: times(a.get("cold", {}).get("times_faster_than_single_fold")),
    }
    return _arm_table(record, columns)


def _quality_table(record: Record) -> str:
    columns: dict[str, Callable[[Any], str]] = {
        "mean Dice (0 to 1)": lambda a: dice(a.get("dice_on_common_cases")),
        "voxels as nnunetv2, same network": lambda a: percent((a.get("same_network") or {}).get("share")),
        "voxels as the ensemble": lambda a: percent(a["agreement_with_ensemble"]),
        "peak memory": lambda a: size(a["peak_memory_bytes"]),
        "peak GPU memory": lambda a: size(a["peak_gpu_memory_bytes"]),
        "parameters": lambda a: NONE if a["parameters"] is None else f"{a['parameters'] / 1e6:.2f} million",
        "weights": lambda a: size(a["size_bytes"]),
    }
    return _arm_table(record, columns)


def _arm_table(record: Record, columns: Mapping[str, Callable[[Any], str]]) -> str:
    rows = {name: [cell(arm) for cell in columns.values()] for name, arm in record["arms"].items()}
    return _table(record, ["", *columns], rows)


def _stage_table(record: Record) -> str:
    headings = [f"{stage}, {what}" for stage in STAGES for what in ("median", "90th percentile")]
    rows = {
        name: [seconds(arm["stages"].get(stage, {}).get(key)) for stage in STAGES for key in ("p50_s", "p90_s")]
        for name, arm in record["arms"].items()
    }
    return _table(record, ["", *headings], rows)


def _label_table(record: Record) -> str:
    labels = record["labels"][:MOST_LABELS]
    rows = {
        name: [*(dice(arm["metrics"][label]["dice"]) for label in labels), str(arm["cases"])]
        for name, arm in record["arms"].items()
        if "metrics" in arm
    }
    return _table(record, ["", *(f"{label}, Dice (0 to 1)" for label in labels), "cases"], rows)


def _label_note(record: Record) -> str:
    more = len(record["labels"]) - MOST_LABELS
    rest = f" {more} more labels are in the record." if more > 0 else ""
    return note(f"Each arm over all cases it predicted.{rest}")


def _notes(record: Record) -> str:
    ensemble = record["arms"][ENSEMBLE]
    notes = []
    if "extrapolated" in ensemble:
        notes.append(f"{ENSEMBLE} was not run. Its times are extrapolated: {ensemble['extrapolated']['how']}.")
    if all(arm["peak_gpu_memory_bytes"] is None for arm in record["arms"].values()):
        notes.append("No arm was measured on a GPU, so there is no GPU memory to tell.")
    notes += [f"Left out: {what}." for what in record["left_out"]]
    return "".join(note(text) for text in notes)


def _slices(record: Record, case: CasePictures) -> str:
    figures = "".join(figure(p.png, p.caption, p.alt) for p in case.pictures)
    return f'<p>{escape(case.case)}, {escape(case.where)}</p>\n<div class="slices">{figures}</div>\n' + legend_list(
        legend(case.values, record["label_values"])[:MOST_LABELS]
    )


def _method(record: Record) -> str:
    cold = f"{record['cold']}; {record['cold_rounds']} round(s), median" if record["cold_rounds"] else "not measured"
    pairs = {
        "warm": f"{record['timed']}; students {record['repeat']} time(s) on {len(record['cases'])} case(s), nnunetv2 "
        f"{record['baseline_repeat']} time(s) on {record['baseline_cases']}; median per case, then over cases",
        "cold": cold,
        "ratios": "median over the cases both arms predicted of seconds / seconds",
        "memory": record["memory"],
        "GPU memory": record["gpu_memory"],
        "same network": "voxels with the label nnunetv2 gives them when it runs the network of the same bundle",
    }
    return entries(pairs)


def _machine(record: Record) -> str:
    machine = record["hardware"]
    load = f"{machine['load_average_1min_before']} before, {machine['load_average_1min']} after (1 minute average)"
    pairs = {
        "processor": f"{machine['cpu']}, {machine['cores']} cores",
        "memory": size(machine["memory_bytes"]),
        "system": machine["system"],
        "load": load,
        **record["versions"],
    }
    return entries(pairs)
