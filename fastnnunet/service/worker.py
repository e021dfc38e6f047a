"""The child process that has the models: it opens what clients sent, predicts, and writes the answers.

It is handed one task at a time through a pipe and says through it how the task goes. Nothing it prints is seen, since
libraries print values of DICOM headers.
"""

import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.errors import BackendError, CorruptError, FastnnUNetError
from fastnnunet.events import Event, Message, Progress
from fastnnunet.service.refusals import RefusedError, refusal_of
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.run.precision import Precision

if TYPE_CHECKING:
    from fastnnunet.api.resident import PredictedImage, ResidentModel

_TOLD_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How models are loaded; see `ResidentModel`."""

    backend: str
    precision: Precision
    threads: int | None
    device: str | None
    most_voxels: int
    most_bytes: int  # of an unpacked zip


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLabels:
    """A label map of an earlier task, and the bundle's own description."""

    label_map: Path
    spec: BundleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One image to predict, or to write further answers of."""

    bundle: Path
    inputs: tuple[tuple[Path, str], ...]  # file and kind of each channel; there may be none of one that was predicted
    series_uid: str | None
    answers: tuple[str, ...]
    folder: Path  # of the job
    keep_labels: bool = False
    predicted: KeptLabels | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """`result` is whole, and so is the label map in the model's own format, where it was to be kept."""

    result: Path
    media_type: str
    times_s: dict[str, float]
    label_map: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Why there is no result: what the client is told, and what the log is."""

    status: int
    sentence: str
    logged: str = ""
    series: Mapping[str, str] = field(default_factory=dict)  # of which one has to be chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Forget models; those of these bundles."""

    bundles: tuple[Path, ...]


class _Cancelled(BaseException):
    """Nobody wants the result any more. No Exception, so that nothing on the way takes it for one of an image's."""


def work(connection: Connection, loading: Loading) -> None:
    """Serve tasks until the other end of the pipe is closed."""
    _be_silent()
    import fastnnunet.api.resident  # noqa: F401  # before the first image comes

    models: dict[Path, ResidentModel] = {}
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return
        if isinstance(message, Unload):
            for bundle in message.bundles:
                models.pop(bundle, None)
            gc.collect()
        elif isinstance(message, Task):
            connection.send(_outcome(message, models, loading, connection))


def _be_silent() -> None:
    logging.getLogger().addHandler(logging.NullHandler())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _outcome(
    task: Task, models: "dict[Path, ResidentModel]", loading: Loading, connection: Connection
) -> Done | Failed:
    try:
        return _answered(task, models, loading, connection)
    except _Cancelled:
        return Failed(status=499, sentence="the job was cancelled")
    except RefusedError as e:
        return Failed(status=e.status, sentence=e.sentence)
    except FastnnUNetError as e:
        of_label_map = None if task.predicted is None else task.predicted.label_map.parent.parent
        refusal = refusal_of(e, of_label_map or task.folder / "input")
        logged = _frames(e) if refusal.status == 500 else ""
        if isinstance(e, BackendError | CorruptError):  # of the model or the machine, not of an image
            logged = f"{e}\n{logged}"
        return Failed(status=refusal.status, sentence=refusal.sentence, logged=logged, series=refusal.series)
    except Exception as e:  # said without its message, which may hold what the image says of a patient
        return Failed(status=500, sentence="the prediction failed; the log of the service says more", logged=_frames(e))


def _frames(error: BaseException) -> str:
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"


def _answered(task: Task, models: "dict[Path, ResidentModel]", loading: Loading, connection: Connection) -> Done:
    from fastnnunet.api.resident import keep_label_map
    from fastnnunet.service.answers import put_answers

    begin = time.perf_counter()
    model = None if task.predicted is not None else _loaded(task.bundle, models, loading, connection)
    loaded = time.perf_counter()
    partial = task.folder / "partial"
    partial.mkdir()
    channels = [_opened(file, kind, loading.most_bytes) for file, kind in task.inputs]
    opened = time.perf_counter()
    image = _written(task, model, channels, partial / "image", connection)
    written = time.perf_counter()
    label_map = None
    if task.keep_labels and model is not None:
        label_map = keep_label_map(image.files["image"], model.spec, task.folder / "labels")
    file, media_type = put_answers(task.answers, image.files, partial / "result")
    result = task.folder / "result"
    (partial / "result").rename(result)
    end = time.perf_counter()
    stages = {name.removesuffix("_s"): value for name, value in asdict(image.times).items()}
    stages |= {"read": stages["read"] + opened - loaded, "write": stages["write"] + end - written}
    if task.predicted is not None:
        stages = {name: stages[name] for name in ("read", "write")}  # nothing else was done
    times_s = {**({"load": loaded - begin} if model is not None else {}), **stages, "total": end - begin}
    return Done(result=result / file.name, media_type=media_type, times_s=times_s, label_map=label_map)


def _loaded(
    bundle: Path, models: "dict[Path, ResidentModel]", loading: Loading, connection: Connection
) -> "ResidentModel":
    from fastnnunet.api.resident import ResidentModel

    if bundle not in models:
        connection.send(Message(text="loading the model"))
        models[bundle] = ResidentModel(
            bundle,
            backend=loading.backend,
            precision=loading.precision,
            threads=loading.threads,
            device=loading.device,
            most_voxels=loading.most_voxels,
        )
    return models[bundle]


def _written(
    task: Task, model: "ResidentModel | None", channels: list[Path], output: Path, connection: Connection
) -> "PredictedImage":
    """Everything that is asked for, by prediction or, without a model, of the label map that there is."""
    from fastnnunet.api.resident import write_again
    from fastnnunet.service.answers import output_spec

    last_told = 0.0

    def listen(event: Event) -> None:
        nonlocal last_told
        if connection.poll():
            connection.recv()  # there is one word to say while a task goes on
            raise _Cancelled
        now = time.perf_counter()
        is_worth_it = isinstance(event, Progress) and (event.done == event.total or now - last_told >= _TOLD_EVERY_S)
        if is_worth_it or isinstance(event, Message):
            last_told = now
            connection.send(event)

    if model is None:
        assert task.predicted is not None
        spec = task.predicted.spec
        return write_again(
            spec,
            task.bundle,
            task.predicted.label_map,
            channels,
            output,
            output_spec(task.answers, spec.file_ending),
            series_uid=task.series_uid,
        )
    outputs = output_spec(task.answers, model.spec.file_ending, keep_labels=task.keep_labels)
    return model.predict(channels, output, outputs, series_uid=task.series_uid, progress=listen)


def _opened(file: Path, kind: str, most_bytes: int) -> Path:
    """What a reader is given: the file itself, or a folder of slices, of which the upload becomes one.

    Raises RefusedError.
    """
    from fastnnunet.service.uploads.archives import unpack

    if kind not in ("zip", "dicom"):
        return file
    folder = file.parent / f"series-{file.stem}"
    if folder.is_dir():  # made when the image was predicted
        return folder
    if kind == "zip":
        unpack(file, folder, most_bytes=most_bytes)
        file.unlink()
    else:
        folder.mkdir()
        file.rename(folder / "slice-00001.dcm")
    return folder
