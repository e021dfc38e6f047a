"""An image sent to the service, waited for, and its result written: whole, or not at all."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fastnnunet.connect.remote.archive import zip_series
from fastnnunet.connect.remote.client import RemoteModel, RemoteService
from fastnnunet.errors import NotFoundError, ServerError, SpecError
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.system.files import atomic_output, check_output_folder, make_folder

LARGEST_BYTES = 1 << 33  # of a result
_ENDINGS = {
    "nifti": ".nii.gz",
    **dict.fromkeys(("dicom-seg", "dicom-seg-labelmap", "rtstruct"), ".dcm"),
    **{"mesh": ".glb", "stl": ".zip", "statistics": ".json", "preview": ".png"},
}


def predict_remotely(
    service: RemoteService,
    model: str,
    images: Sequence[Path],
    output: Path,
    *,
    answers: Sequence[str] = ("labels",),
    series: str | None = None,
    overwrite: bool = False,
    progress: Listener = ignore,
) -> Path:
    """Predict an image, given as a file or folder of DICOM slices for each channel, and return the file written.

    `output`: a folder, or a file; to a name without the ending of the result it is added. `answers`: the formats
    asked for, a zip where there are several. `series`: SeriesInstanceUID, where a folder holds several.
    Interrupted, it cancels the job. Raises NotFoundError for an image or model that is not there, SpecError for what
    does not fit the model, ServerError.
    """
    for image in images:
        if not image.exists():
            raise NotFoundError(f"no image at {image}")
    is_folder = output.is_dir() or not output.suffix
    folder = output if is_folder else output.parent
    check_output_folder(folder)
    if not is_folder:
        _refuse_present(output, overwrite)
    found = service.model(model)
    _check(found, images, answers, None if is_folder else output)
    if service.server.is_open_to_others:
        progress(
            Message(
                text=f"{service.server.url} is not encrypted: others on the network can read along", level="warning"
            )
        )
    with TemporaryDirectory(prefix="fastnnunet-remote-") as temporary:
        sent = []
        for number, image in enumerate(images):
            if image.is_dir():
                sent.append(Path(temporary) / f"{number}.zip")
                zip_series(image, sent[-1])
            else:
                sent.append(image)
        job = service.submit(model, sent, answers, series)
    try:
        service.follow(job, progress)
        make_folder(folder)
        name = output.name if not is_folder else re.sub(r"(_0000)?(\.nii)?\.[^.]+$", "", images[0].name)
        with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            received = Path(partial) / "result"
            ending = service.fetch(job, received, LARGEST_BYTES)
            file = folder / (name if name.endswith(ending) else f"{name}{ending}")
            _refuse_present(file, overwrite)
            with atomic_output(file) as whole:
                received.rename(whole)
    finally:
        with contextlib.suppress(ServerError):  # the service forgets it by itself in time
            service.forget(job)
    return file


def _refuse_present(file: Path, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise SpecError(f"{file} is there already; give --overwrite, or another -o")


def _check(model: RemoteModel, images: Sequence[Path], answers: Sequence[str], file: Path | None) -> None:
    """Raises SpecError with all that does not fit."""
    problems = []
    if len(images) != len(model.channels):
        channels = ", ".join(model.channels)
        problems.append(f"got {len(images)} image(s), expected one for each channel of {model.id}: {channels}")
    if unknown := [answer for answer in answers if answer not in model.answers]:
        problems.append(f"--answer: got {', '.join(unknown)}, expected some of {', '.join(model.answers)}")
    for image in images:
        is_taken = any(image.name.lower().endswith(ending) for ending in model.accepts) and image.is_file()
        if not is_taken and not (image.is_dir() and ".zip" in model.accepts):
            problems.append(f"{image.name} is none of what {model.id} takes: {', '.join(model.accepts)}")
    if file is not None and not problems:
        of_images = tuple(ending for ending in model.accepts if ending not in (".zip", ".dcm"))
        single = of_images if answers[0] == "labels" else (_ENDINGS.get(answers[0], ""),)
        expected = single if len(answers) == 1 else (".zip",)
        is_other = file.name.lower().endswith((*of_images, *_ENDINGS.values())) and not file.name.endswith(expected)
        if is_other:
            asked = ", ".join(answers)
            problems.append(
                f"-o: got {file.name}, expected a name ending in {' or '.join(expected)} for --answer {asked}"
            )
    if problems:
        raise SpecError("\n".join(problems))
