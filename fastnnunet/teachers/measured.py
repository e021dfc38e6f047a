"""Reading scans to measure their intensities, and what was measured before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastnnunet.cache.store.durable import write_atomically, write_error
from fastnnunet.errors import CorruptError, ImageError, NotFoundError, SpecError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.nnunet.files.model import Model
from fastnnunet.nnunet.unlabelled.image_case import ImageTask, read_channels, reason_of
from fastnnunet.nnunet.unlabelled.parallel import each
from fastnnunet.specs.canonical import canonical_json
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.load import build_spec
from fastnnunet.teachers.intensities import Intensities, intensities_of

_VERSION = 1
_SAVE_EVERY = 32

Stamp = list[list[Any]]  # name, size in bytes and time of last change in ns of each file


def measure_scans(
    cases: Mapping[str, tuple[Path, ...]],
    model: Model,
    *,
    record: Path | None = None,
    processes: int = 0,
    progress: Listener = ignore,
) -> dict[str, tuple[Intensities, ...]]:
    """Read the files of every case and measure each channel, in `processes` processes.

    `record`: a JSON file of what was measured before, which is kept up to date; files of the same size and time are not
    read again, and a record that cannot be read is made anew. Raises ImageError naming all scans that cannot be read,
    DiskSpaceError, BuildError.
    """
    known = {} if record is None else _read_record(record)
    stamps = {case: [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files] for case, files in cases.items()}
    measured = {case: known[case][1] for case in cases if case in known and known[case][0] == stamps[case]}
    tasks = {
        case: ImageTask(
            case_id=case,
            files=files,
            folder=Path(),
            plans=model.plans,
            configuration=model.configuration,
            dataset_json=model.dataset_json,
        )
        for case, files in cases.items()
        if case not in measured
    }
    problems: dict[str, str] = {}

    def save() -> None:
        if record is not None:
            _write_record(record, {case: (stamps[case], channels) for case, channels in measured.items()})

    try:
        for done, (case, outcome) in enumerate(each(_measure, tasks, processes), start=1):
            if isinstance(outcome, Exception):
                problems[case] = reason_of(outcome)
            else:
                measured[case] = outcome
            if done % _SAVE_EVERY == 0:
                save()
            progress(Progress(what="measuring intensities", done=done, total=len(tasks), unit="cases"))
    finally:
        if tasks:
            save()
    if problems:
        raise ImageError(
            f"{len(problems)} scan(s) cannot be read\n"
            + "\n".join(f"  {case}: {reason}" for case, reason in sorted(problems.items()))
            + "\nmend or remove them and run the same command again"
        )
    return {case: measured[case] for case in cases}


def _measure(task: ImageTask) -> tuple[Intensities, ...]:
    return tuple(intensities_of(channel) for channel in read_channels(task))


def _read_record(file: Path) -> dict[str, tuple[Stamp, tuple[Intensities, ...]]]:
    try:
        raw = read_json_object(file, finite=True)
        if raw["format_version"] != _VERSION:
            return {}
        return {
            case: (known["files"], tuple(build_spec(Intensities, channel) for channel in known["channels"]))
            for case, known in raw["cases"].items()
        }
    except NotFoundError:
        return {}
    except (CorruptError, SpecError, KeyError, TypeError, AttributeError):  # it can be measured again
        return {}


def _write_record(file: Path, cases: Mapping[str, tuple[Stamp, tuple[Intensities, ...]]]) -> None:
    plain = {case: {"files": stamp, "channels": channels} for case, (stamp, channels) in cases.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, canonical_json({"format_version": _VERSION, "cases": plain}).encode())
    except OSError as e:
        raise write_error(e, file) from e
