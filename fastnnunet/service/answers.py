"""The formats that a prediction is given out in: names, what is written, media types. More are added here alone."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastnnunet.service.refusals import RefusedError

if TYPE_CHECKING:
    from fastnnunet.api import OutputSpec

USUAL = "labels"
ZIP = "application/zip"
_ANY_BYTES = "application/octet-stream"
_MEDIA_TYPES = {
    **{".nii.gz": "application/gzip", ".png": "image/png", ".tif": "image/tiff", ".bmp": "image/bmp"},
    **{".dcm": "application/dicom", ".json": "application/json", ".glb": "model/gltf-binary"},
}
_SWITCHES = ("statistics", "preview", "scan")
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can tell: the same answers are the same bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One format: what an `OutputSpec` calls it, a format or a switch of its own."""

    output: str
    file: str | None = None  # what a `PredictedImage` calls it, where that is another name; may be a folder
    segmentation_type: Literal["binary", "labelmap"] | None = None
    needs: str | None = None  # a package that the base install leaves out


ANSWERS: Mapping[str, Answer] = {
    USUAL: Answer(output="image"),  # in the model's file ending
    "nifti": Answer(output="nifti"),
    "dicom-seg": Answer(output="dicom-seg", segmentation_type="binary", needs="highdicom"),
    "dicom-seg-labelmap": Answer(output="dicom-seg", segmentation_type="labelmap", needs="highdicom"),
    "rtstruct": Answer(output="rtstruct", needs="highdicom"),
    "mesh": Answer(output="mesh"),  # glTF, one file
    "stl": Answer(output="mesh", file="stl"),  # a file of each structure
    "image": Answer(output="scan"),
    "statistics": Answer(output="statistics"),
    "preview": Answer(output="preview"),
}


def available() -> tuple[str, ...]:
    """Names of the formats that can be written with what is installed."""
    return tuple(name for name, answer in ANSWERS.items() if answer.needs is None or find_spec(answer.needs))


def of_kinds(names: Sequence[str], kinds: Sequence[str]) -> tuple[str, ...]:
    """Those that can be made of files of these kinds: what refers to a DICOM series needs one."""
    return tuple(name for name in names if "zip" in kinds or not output_spec([name], "").of_series)


def check_answers(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Each once. Raises RefusedError for none, for unknown ones, and for two that exclude each other."""
    chosen = tuple(dict.fromkeys(names))
    if not chosen or (unknown := [name for name in chosen if name not in known]):
        got = f"got {', '.join(map(repr, unknown))[:200]}" if chosen else "got none"
        raise RefusedError(422, f"answer: {got}, expected some of {', '.join(known)}")
    if len(typed := [name for name in chosen if ANSWERS[name].segmentation_type is not None]) > 1:
        raise RefusedError(422, f"answer: {' and '.join(typed)} exclude each other, ask for them one by one")
    return chosen


def refuse_without_series(names: Sequence[str], kinds: Sequence[str]) -> None:
    """Raises RefusedError where an answer refers to a DICOM series and an image of files of these kinds is none."""
    of_series = output_spec(names, "").of_series
    needing = [name for name in names if ANSWERS[name].output in of_series]
    if needing and not set(kinds) <= {"zip", "dicom"}:
        raise RefusedError(
            422,
            f"answer: {' and '.join(needing)} refers to a DICOM series, which this image is not; send a zip of one, or "
            "ask for another answer",
        )


def made_of_image(names: Sequence[str]) -> list[str]:
    """The answers among `names` that are made of the image too, not of its label map alone."""
    specs = {name: output_spec([name], "") for name in names}
    return [name for name, spec in specs.items() if spec.needs_image or spec.of_series]


def output_spec(names: Sequence[str], file_ending: str, *, keep_labels: bool = False) -> "OutputSpec":
    """What is to be written. A format that nobody asked for may be among it, since there has to be one.

    `file_ending`: the model's. Where it is .nii.gz, `labels` and `nifti` are one file. `keep_labels`: the label map in
    the model's own format is among it.
    """
    from fastnnunet.api import OutputSpec

    outputs = [*(["image"] if keep_labels else []), *(ANSWERS[name].output for name in names)]
    if "image" in outputs and file_ending == ".nii.gz":
        outputs = [output for output in outputs if output != "nifti"]
    formats = tuple(dict.fromkeys(output for output in outputs if output not in _SWITCHES))
    types = [kind for name in names if (kind := ANSWERS[name].segmentation_type) is not None]
    return OutputSpec(
        formats=formats or ("image",),  # type: ignore[arg-type]  # which it checks itself
        statistics="statistics" in outputs,
        preview="preview" in outputs,
        scan="scan" in outputs,
        segmentation_type=types[0] if types else "binary",
    )


def put_answers(names: Sequence[str], files: Mapping[str, Path], folder: Path) -> tuple[Path, str]:
    """Of the `files` that were written, those asked for: one as it is, several in a zip. Returns it and its media type.

    It lies in `folder`, and is called by the names of the answers.
    """
    written = {"nifti": files["image"], **files} if "image" in files else files
    found = {name: written[ANSWERS[name].file or ANSWERS[name].output] for name in names}
    named = {name: f"{name}{_ending(file)}" for name, file in found.items()}
    folder.mkdir()
    if len(names) == 1 and found[names[0]].is_file():
        into = folder / named[names[0]]
        found[names[0]].rename(into)
        return into, _MEDIA_TYPES.get(_ending(into).lower(), _ANY_BYTES)
    into = folder / "answers.zip"
    with zipfile.ZipFile(into, "w", zipfile.ZIP_STORED) as archive:
        for name, place in found.items():
            inside = {named[name]: place}
            if not place.is_file():  # a folder, which is not there where it would be empty
                inside = {f"{name}/{file.name}": file for file in sorted(place.glob("*"))}
            for called, file in inside.items():
                with file.open("rb") as source, archive.open(zipfile.ZipInfo(called, _FIRST_DAY), "w") as target:
                    while piece := source.read(1 << 20):
                        target.write(piece)
    return into, ZIP


def _ending(file: Path) -> str:
    return ".nii.gz" if file.name.lower().endswith(".nii.gz") else file.suffix
