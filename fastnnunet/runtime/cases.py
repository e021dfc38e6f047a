"""Which files belong to which case, and where its prediction goes: nnU-Net's naming."""

import re
from dataclasses import dataclass
from pathlib import Path

from fastnnunet.errors import ImageError, NotFoundError, SpecError
from fastnnunet.specs.bundle import BundleSpec

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Case:
    """One image to predict: its files in channel order, or the reason why they cannot be one image."""

    case_id: str
    files: tuple[Path, ...]
    problem: str | None = None


def find_cases(source: Path, spec: BundleSpec) -> list[Case]:
    """Cases of a folder (`NAME_0000.ending`, `NAME_0001.ending`, ... as nnU-Net wants them), sorted by name.

    Files of the model's ending that are not named so become a case with a problem, as do gaps in the channels; hidden
    files (macOS leaves `._` twins) are passed over.
    Raises NotFoundError when the folder is missing or has no image of the model's file ending.
    """
    if not source.is_dir():
        raise NotFoundError(f"input not found: {source}\nexpected an image file or a folder of images")
    names = sorted(
        p.name
        for p in source.iterdir()
        if p.name.endswith(spec.file_ending) and not p.name.startswith(".") and p.is_file()
    )
    if not names:
        others = sorted(p.name for p in source.iterdir())[:3]
        raise NotFoundError(
            f"no image in {source}: expected files named NAME_0000{spec.file_ending}, "
            f"found {', '.join(others) or 'nothing'}"
        )
    channels: dict[str, dict[int, Path]] = {}
    cases = []
    for name in names:
        match = _CHANNEL.fullmatch(name[: -len(spec.file_ending)])
        if match is None:
            stem = name[: -len(spec.file_ending)]
            expected = f"expected a name such as {stem}_0000{spec.file_ending}"
            cases.append(Case(stem, (source / name,), f"{source / name} has no channel number; {expected}"))
        else:
            channels.setdefault(match["case"], {})[int(match["channel"])] = source / name
    for case_id, files in channels.items():
        gap = next((i for i, channel in enumerate(sorted(files)) if channel != i), None)
        problem = None
        if gap is not None:
            problem = f"{case_id} has no file {case_id}_{gap:04d}{spec.file_ending} in {source} but later channels"
        cases.append(Case(case_id, tuple(files[channel] for channel in sorted(files)), problem))
    return sorted(cases, key=lambda case: case.case_id)


def single_case(file: Path, spec: BundleSpec) -> Case:
    """The case of one image file; for a model of several channels its siblings `_0001`, `_0002`, ... belong to it."""
    ending = next((e for e in (spec.file_ending, *_IMAGE_ENDINGS) if file.name.endswith(e)), file.suffix)
    stem = file.name[: len(file.name) - len(ending)]
    match = _CHANNEL.fullmatch(stem)
    if match is None:
        return Case(stem, (file,))
    if int(match["channel"]) != 0 and len(spec.channel_names) > 1:
        raise ImageError(
            f"{file} is channel {int(match['channel'])} of an image; give the file ending in _0000{ending}"
        )
    siblings = [
        file.with_name(f"{match['case']}_{channel:04d}{ending}") for channel in range(1, len(spec.channel_names))
    ]
    return Case(match["case"], (file, *(s for s in siblings if s.is_file())))


def output_file(source: Path, output: Path, case: Case, spec: BundleSpec) -> Path:
    """Where the segmentation of a case goes: into the folder `output`, or to that very file for a single image.

    Raises SpecError when one file is asked for a folder of images, or one with an ending other than the model's.
    """
    if output.is_dir() or not output.name.endswith(_IMAGE_ENDINGS):
        return output / f"{case.case_id}{spec.file_ending}"
    if not source.is_file():
        raise SpecError(f"output {output} is a file name but the input {source} is a folder; give a folder with -o")
    if not output.name.endswith(spec.file_ending):
        raise SpecError(f"output {output}: this model writes {spec.file_ending} files; name it so, or give a folder")
    return output
