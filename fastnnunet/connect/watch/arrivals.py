"""Images in a watched folder, and whether they still change. Nothing is told by the system: the folder is looked at."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastnnunet.errors import FastnnUNetError
from fastnnunet.images.cases import Case, companions, dicom_cases, single_case
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.canonical import sha256_of
from fastnnunet.specs.checks.listing import examples, passed_over, regular_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """An image with what its files are: another mark says that they are others."""

    case: Case
    mark: str


@dataclass(slots=True)
class Arrivals:
    """The images of a folder that have been left alone for a while."""

    source: Path
    spec: BundleSpec
    settle_s: float
    clock: Callable[[], float] = time.monotonic
    # of the last look: what is no image, where nothing may become one
    left_over: list[str] = field(default_factory=list)
    _since: dict[str, tuple[str, float]] = field(default_factory=dict)  # case -> its mark, and since when it has that

    def look(self) -> tuple[list[Arrival], bool]:
        """The images that are complete, by name, and whether there are others that may become so.

        Complete: no file of it was added, removed, or changed in size or time since it was seen first so, `settle_s`
        before. Raises OSError where the folder cannot be read.
        """
        now = self.clock()
        seen: dict[str, tuple[str, float]] = {}
        complete = []
        cases = all_cases(self.source, self.spec)
        for case in found_cases(cases, self.spec):
            mark = _mark(case)
            if mark is None:  # a file went away while it was looked at
                continue
            before, since = self._since.get(case.case_id, (None, now))
            seen[case.case_id] = mark, since if before == mark else now
            if now - seen[case.case_id][1] >= self.settle_s:
                complete.append(Arrival(case=case, mark=mark))
        self._since = seen
        is_more_to_come = len(complete) < len(seen)
        self.left_over = [] if is_more_to_come else left_over(self.source, cases, self.spec)
        return complete, is_more_to_come


def found_cases(cases: Sequence[Case], spec: BundleSpec) -> list[Case]:
    """Those of `all_cases` that have all channels, sorted by name; two of one name are one case with a problem."""
    found: dict[str, Case] = {}
    for case in cases:
        if _lacks_channels(case, spec):
            continue
        if case.case_id in found:
            problem = f"two images are called {case.case_id}; rename one of them"
            case = replace(found[case.case_id], problem=problem, files=(*found[case.case_id].files, *case.files))
        found[case.case_id] = case
    return [found[name] for name in sorted(found)]


def left_over(source: Path, cases: Sequence[Case], spec: BundleSpec) -> list[str]:
    """What in the folder is none of its `all_cases`, or not whole; a phrase for each kind, without hidden entries."""
    names = regular_files(source, spec.file_ending)
    folders = {series.folder.name for case in cases for series in case.series}
    whole = [case for case in cases if not _lacks_channels(case, spec)]
    of_whole = {place.name for case in whole for place in (*case.files, *(series.folder for series in case.series))}
    partial = sorted({*names, *folders} - of_whole)
    found = passed_over(source, {*names, *companions(names, cases, spec), *folders}, spec.file_ending)
    if partial:
        what = f"of images that lack some of {len(spec.channel_names)} channels, NAME_0000 and on"
        found.append(f"{len(partial)} {what}: {examples(partial)}")
    return found


def all_cases(source: Path, spec: BundleSpec) -> list[Case]:
    """Images of the model's file ending and folders of DICOM files.

    Of several channels those in files or folders named CASE_0000, CASE_0001, ...; one with fewer is not there yet.
    """
    images = [source / name for name in regular_files(source, spec.file_ending)]
    return [*_of_files(images, spec), *dicom_cases(source, len(spec.channel_names))]


def _lacks_channels(case: Case, spec: BundleSpec) -> bool:
    return not case.problem and len(case.channels) < len(spec.channel_names) > 1


def _of_files(images: Sequence[Path], spec: BundleSpec) -> list[Case]:
    cases = []
    for image in images:
        stem = image.name[: len(image.name) - len(spec.file_ending)]
        is_channel = len(stem) > 5 and stem[-5] == "_" and stem[-4:].isascii() and stem[-4:].isdigit()
        if len(spec.channel_names) > 1 and is_channel and stem[-4:] != "0000":
            continue  # of another's case
        try:
            cases.append(single_case(image, spec))
        except FastnnUNetError as e:  # of its name
            cases.append(Case(stem, (image,), str(e)))
    return cases


def _mark(case: Case) -> str | None:
    """Names, sizes and times of all files of a case; None where one is gone."""
    try:
        places = [*case.files, *(series.folder for series in case.series)]
        files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
        stats = [(file, os.stat(file)) for file in files]
    except OSError:
        return None
    # no inodes: some network drives give others each time they are mounted
    return sha256_of([[f"{f.parent.name}/{f.name}", s.st_size, s.st_mtime_ns] for f, s in stats])
