"""No file that a run writes may be one that it reads, or another one that it writes."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastnnunet.errors import SpecError, printable
from fastnnunet.images.cases import Case
from fastnnunet.specs.checks.listing import regular_files


def inputs_of(cases: Iterable[Case]) -> Iterator[Path]:
    """The files of cases, the spacing of TIFF images and strangers among DICOM slices included."""
    for case in cases:
        yield from case.files
        for file in case.files[:1]:
            yield file.with_name(f"{case.case_id}.json")
        for series in case.series:
            if series.folder.is_dir():
                yield from (series.folder / name for name in regular_files(series.folder))


def refuse_overlap(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raises SpecError naming an output that is an input, or two outputs that are one file.

    Files are compared as the system knows them: by links, hard links and, where it matters not, in any letter case.
    """
    outputs = list(outputs)
    written: dict[tuple[str, str], Path] = {}
    ignoring_case: dict[str, bool] = {}
    for output in outputs:
        folder = os.path.realpath(output.parent)
        if folder not in ignoring_case:
            ignoring_case[folder] = _ignores_case(Path(folder))
        name = unicodedata.normalize("NFC", output.name).casefold() if ignoring_case[folder] else output.name
        other = written.setdefault((folder, name), output)
        if other is not output:
            raise SpecError(
                f"two outputs of this run are one file: {printable(other)} and {printable(output)}\n"
                "rename one of the images, or predict them into folders of their own"
            )
    there = {identity: output for output in outputs if (identity := _identity(output)) is not None}
    if not there:
        return
    for file in inputs:
        identity = _identity(file)
        if identity is not None and identity in there:
            output = there[identity]
            same = "" if os.path.abspath(output) == os.path.abspath(file) else f", which is {printable(output)},"
            raise SpecError(
                f"{printable(file)}{same} is an input of this run and would be replaced by its segmentation or by a "
                "file beside it; give another -o"
            )


def refuse_model_folder(folder: Path) -> None:
    """Raises SpecError where the side files of a run would replace the plans.json and dataset.json of a model."""
    if (folder / "bundle.json").is_file() or any(folder.glob("fold_*/checkpoint_*.pth")):
        raise SpecError(
            f"{printable(folder)} is the folder of a model, whose plans.json and dataset.json would be replaced; give "
            "another -o"
        )


def _identity(file: Path) -> tuple[int, int] | None:
    """What the system knows an existing file by, whatever it is called; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:  # a file that is not there, or cannot be reached
        return None
    return status.st_dev, status.st_ino


def _ignores_case(folder: Path) -> bool:
    """Whether names in a folder, which need not exist yet, are the same in capitals: found out on its own name."""
    place = next(p for p in (folder, *folder.parents) if os.path.isdir(p))
    while place.name.swapcase() == place.name and place != place.parent:
        place = place.parent
    swapped = place.with_name(place.name.swapcase()) if place.name else place
    return swapped != place and os.path.exists(swapped) and os.path.samefile(place, swapped)
