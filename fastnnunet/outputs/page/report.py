"""A folder of predictions as one page that needs no other file: volumes, pictures, and what stands out.

What `predict --statistics --preview` left is taken as it is; of other cases both are made of their label maps.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from types import MappingProxyType

from fastnnunet.errors import CorruptError, FastnnUNetError, NotFoundError, SpecError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.images.tidy.folder import LabelSource, read_label_source
from fastnnunet.outputs.labelled import LabelledImage, read_labelled
from fastnnunet.outputs.page.html import box, document, figure, note, section, write_document
from fastnnunet.outputs.preview import preview
from fastnnunet.outputs.statistics import ENDING, CaseStatistics, StructureStatistics, read_statistics, statistics
from fastnnunet.outputs.write import PREVIEW_ENDING
from fastnnunet.specs.checks.listing import regular_files
from fastnnunet.system.files import check_output_folder

PAGE_FILE = "report.html"
_LEAST_CASES, _LEAST_WITH_LABEL = 5, 0.75  # from how many cases on volumes are compared; who has a label usually
# Iglewicz and Hoaglin (1993): 0.6745 deviations from the median, of the median deviation, or of the mean one where
# that is 0; what is above 3.5 is taken for an outlier
_OF_MEDIAN, _OF_MEAN, _MOST = 0.6745, 1 / 1.253314, 3.5
_JPEG_QUALITY = 85


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedCase:
    """What the page shows of a case."""

    found: CaseStatistics
    picture: bytes  # PNG or JPEG


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a page was made of."""

    page: Path
    cases: int
    outliers: dict[tuple[str, str], str]  # case and label -> what stands out
    failed: dict[str, str]  # case -> why it cannot be read


def write_report(
    folder: Path, output: Path | None = None, *, images: Path | None = None, progress: Listener = ignore
) -> Reported:
    """Write the page of a folder of predictions, by default into it.

    `images`: the folder that was predicted, for pictures and intensities of cases that have none yet.
    Cases that cannot be read are named on the page. Raises NotFoundError where there is nothing to show, the first
    case's error where none can be read, SpecError for an `output` that is no page.
    """
    page = output or folder / PAGE_FILE
    if page.suffix.lower() not in (".html", ".htm") or page.is_dir():
        raise SpecError(f"-o: got {page}, expected the name of a page, ending in .html")
    if not os.path.isdir(folder):
        what = "a file" if os.path.isfile(folder) else "no folder"
        raise NotFoundError(f"{folder} is {what}, expected a folder of predictions")
    check_output_folder(page.parent)
    if images is not None and not images.is_dir():
        raise NotFoundError(f"--images: {images} is no folder; give the folder that was predicted")
    cases, failed = read_cases(folder, images, progress)
    if not cases:
        raise next(iter(failed.values()))
    found, reasons = outliers([case.found for case in cases]), {case: str(e) for case, e in failed.items()}
    write_document(report(folder.resolve().name, cases, found, reasons), page)
    return Reported(page=page, cases=len(cases), outliers=found, failed=reasons)


def read_cases(
    folder: Path, images: Path | None = None, progress: Listener = ignore
) -> tuple[list[ReportedCase], dict[str, FastnnUNetError]]:
    """All cases of a folder by name, and those that cannot be read with the reason; see `write_report`."""
    known = {name.removesuffix(ENDING): folder / name for name in regular_files(folder, ENDING)}
    source = None
    files_of_run = [folder / "dataset.json", folder / "plans.json"]
    if all(file.is_file() for file in files_of_run):
        source = read_label_source(folder)
    elif not known:
        missing = " and ".join(file.name for file in files_of_run if not file.is_file())
        raise NotFoundError(
            f"no prediction in {folder}: {missing} is missing, which predict writes beside its label maps\n"
            "expected a folder that predict wrote, or the files of predict --statistics"
        )
    maps = {}
    if source is not None:
        files = regular_files(folder, source.file_ending)
        maps = {file.removesuffix(source.file_ending): folder / file for file in files}
    names = sorted({*known, *maps})
    if not names:
        raise NotFoundError(f"no prediction in {folder}\nexpected label maps, or the files of predict --statistics")
    found: list[ReportedCase] = []
    failed: dict[str, FastnnUNetError] = {}
    for number, name in enumerate(names):
        progress(Progress(what="cases", done=number, total=len(names), unit="cases", note=name))
        picture = folder / f"{name}{PREVIEW_ENDING}"
        try:
            found.append(_read_case(name, known.get(name), picture, maps.get(name), source, images))
        except FastnnUNetError as e:
            failed[name] = e
    progress(Progress(what="cases", done=len(names), total=len(names), unit="cases"))
    return found, failed


def _read_case(
    name: str,
    known: Path | None,
    picture: Path,
    label_map: Path | None,
    source: LabelSource | None,
    images: Path | None,
) -> ReportedCase:
    """`known`: its statistics, if there are some; `label_map`: where there is one, of `source`."""
    labelled = None
    if source is not None and label_map is not None and not (known is not None and picture.is_file()):
        labelled = _labelled(label_map, name, source, images)
    if known is not None:
        stored = read_statistics(known)
    else:
        assert labelled is not None, "a case has statistics or a label map"
        stored = statistics(labelled)
    png = picture.read_bytes() if picture.is_file() else b"" if labelled is None else preview(labelled)
    return ReportedCase(found=stored, picture=_smaller(png, picture) if png else b"")


def _labelled(label_map: Path, name: str, source: LabelSource, images: Path | None) -> LabelledImage:
    channels: tuple[Path, ...] = ()
    if images is not None:
        files = (images / f"{name}_{channel:04d}{source.file_ending}" for channel in range(len(source.channel_names)))
        channels = tuple(file for file in files if file.is_file())
    return read_labelled(
        label_map,
        source.labels,
        image=channels if channels and len(channels) == len(source.channel_names) else None,
        reader_writer=source.reader_writer,
        channel_names=source.channel_names,
        case=name,
    )


def _smaller(png: bytes, stored: Path) -> bytes:
    """As JPEG, of a third of the bytes. Raises CorruptError for what is no PNG; `stored`: where it lies."""
    from PIL import Image

    file = io.BytesIO()
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            image.convert("RGB").save(file, format="JPEG", quality=_JPEG_QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise CorruptError(f"{stored} is damaged, expected a PNG: {e}\nremove it, or predict its case again") from e
    return file.getvalue()


def outliers(cases: Sequence[CaseStatistics]) -> dict[tuple[str, str], str]:
    """Case and label -> what stands out: a volume far from the others', or a label that is missing.

    Volumes are compared by their logarithms, as a factor up or down is what surprises; from five cases on.
    """
    found: dict[tuple[str, str], str] = {}
    for label, entries in _by_label(cases).items():
        sizes = {case: _size(entry) for case, entry in entries.items()}
        there = {case: math.log(size) for case, size in sizes.items() if size > 0}
        if len(entries) < _LEAST_CASES:
            continue
        if len(there) >= _LEAST_WITH_LABEL * len(entries):
            found |= {(case, label): "missing here, present in most cases" for case in entries if case not in there}
        if len(there) < _LEAST_CASES:
            continue
        middle = median(there.values())
        deviations = [abs(value - middle) for value in there.values()]
        unit = median(deviations) / _OF_MEDIAN or sum(deviations) / len(deviations) / _OF_MEAN
        for case, value in there.items():
            if unit and abs(value - middle) / unit > _MOST:
                times = math.exp(abs(value - middle))
                found[case, label] = f"{times:.3g} times {'larger' if value > middle else 'smaller'} than the median"
    return found


def _by_label(cases: Sequence[CaseStatistics]) -> dict[str, dict[str, StructureStatistics]]:
    labels = dict.fromkeys(entry.label for case in cases for entry in case.structures)
    return {
        label: {case.case: entry for case in cases for entry in case.structures if entry.label == label}
        for label in labels
    }


def _size(entry: StructureStatistics) -> float:
    return entry.voxels if entry.volume_ml is None else entry.volume_ml


def report(
    title: str,
    cases: Sequence[ReportedCase],
    found: Mapping[tuple[str, str], str],
    failed: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The HTML text; names are text, whatever is in them. `failed`: cases that cannot be read, and why."""
    anchors = {case.found.case: f"case-{number}" for number, case in enumerate(cases)}
    labels = _by_label([case.found for case in cases])
    unit = "ml" if all(e.volume_ml is not None for case in cases for e in case.found.structures) else "voxels"
    lead = f"{len(cases)} case(s), {len(labels)} label(s). "
    lead += f"{len(found)} of their volumes stand out." if found else "No volume stands out."
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    if failed:
        reasons = (f"<li>{escape(case)}: {escape(reason)}</li>" for case, reason in sorted(failed.items()))
        parts.append(section("Cannot be read", f'<ul class="odd">{"".join(reasons)}</ul>'))
    if found:
        items = (
            f'<li><a href="#{anchors[case]}">{escape(case)}</a>: {escape(label)} is {escape(what)}</li>'
            for (case, label), what in sorted(found.items())
        )
        parts.append(section("What stands out", f"<ul>{''.join(items)}</ul>"))
    compared = (
        f"Volumes are compared from {_LEAST_CASES} cases on: one stands out when its logarithm is more than {_MOST} "
        f"robust deviations (of the median) from the median of its label. It may be right all the same."
    )
    parts.append(section(f"Volumes in {unit}", box(_table(cases, labels, found, anchors, unit)), note(compared)))
    parts.append(note("(b): touches the border of the image, so that part of it may lie outside."))
    pictures = [_pictured(case, anchors[case.found.case], found) for case in cases]
    parts.append(section("Cases", *pictures))
    return document(f"Predictions: {title}", *parts)


def _table(
    cases: Sequence[ReportedCase],
    labels: Mapping[str, Mapping[str, StructureStatistics]],
    found: Mapping[tuple[str, str], str],
    anchors: Mapping[str, str],
    unit: str,
) -> str:
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
    rows = []
    for case in cases:
        name = case.found.case
        cells = "".join(_cell(entries.get(name), found.get((name, label)), unit) for label, entries in labels.items())
        rows.append(f'<tr><th scope="row"><a href="#{anchors[name]}">{escape(name)}</a></th>{cells}</tr>')
    if len(cases) > 1:
        for what, of in (("median", median), ("least", min), ("most", max)):
            values = (of([_number(e, unit) for e in entries.values()]) for entries in labels.values())
            rows.append(f'<tr><th scope="row">{what}</th>{"".join(f"<td>{_shown(v, unit)}</td>" for v in values)}</tr>')
    return f'<table><thead><tr><th scope="col">case</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(entry: StructureStatistics | None, what: str | None, unit: str) -> str:
    if entry is None:
        return "<td></td>"
    text = _shown(_number(entry, unit), unit) + (" (b)" if entry.touches_border else "")
    return f"<td>{text}</td>" if what is None else f'<td class="odd" title="{escape(what)}">{text} !</td>'


def _number(entry: StructureStatistics, unit: str) -> float:
    return entry.voxels if unit == "voxels" or entry.volume_ml is None else entry.volume_ml


def _shown(value: float, unit: str) -> str:
    if unit == "voxels" or value == 0:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _pictured(case: ReportedCase, anchor: str, found: Mapping[tuple[str, str], str]) -> str:
    name = case.found.case
    said = [f"{label}: {what}" for (of, label), what in found.items() if of == name]
    told = f'<p class="odd">{escape("; ".join(said))}</p>' if said else ""
    shape = " x ".join(map(str, case.found.shape_zyx))
    where = f"{shape} voxels (z, y, x) of {' x '.join(f'{s:.3g}' for s in case.found.spacing_mm_zyx)} mm"
    shown = note("no picture: predict with --preview, or leave the label map in the folder")
    if case.picture:
        shown = figure(case.picture, where, f"Three planes of {name} with its labels in colour")
    return f'<article id="{anchor}"><h3>{escape(name)}</h3>{told}{shown}</article>'
