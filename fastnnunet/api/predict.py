"""`predict`: images to label maps, by a bundle or an nnU-Net model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.errors import LINES, DiskSpaceError, printable
from fastnnunet.events import Event, Listener, Message, Result, ignore
from fastnnunet.outputs.spec import OutputSpec

if TYPE_CHECKING:
    from fastnnunet.engines.base import Precision
    from fastnnunet.images.output import RunArguments
    from fastnnunet.runtime.predict import CaseResult

IMAGE = OutputSpec()


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What became of every case, and how long it took."""

    cases: tuple["CaseResult", ...]
    engine: str
    described: dict[str, Any]  # of the predictor, for records
    load_s: float
    wall_s: float  # from when the model was loaded

    @property
    def done(self) -> "list[CaseResult]":
        """The cases that did not fail."""
        return [case for case in self.cases if case.error is None]


def predict(
    model: Path,
    source: Path,
    output: Path,
    *,
    folds: Sequence[int | str] | None = None,
    checkpoint: str | None = None,
    backend: str = "auto",
    precision: "Precision" = "fp32",
    threads: int | None = None,
    device: str | None = None,
    step_size: float | None = None,
    mirroring: bool = True,
    passes: int | None = None,
    memory_limit: int | str | None = None,
    locate: bool = True,
    arguments: "RunArguments | None" = None,
    save_probabilities: bool = False,
    overwrite: bool = True,
    previous: Path | None = None,
    keep_largest: Sequence[str] = (),
    min_size: str | None = None,
    fill_holes: Sequence[str] = (),
    postprocessing_file: Path | None = None,
    dicom_series: str | None = None,
    outputs: OutputSpec = IMAGE,
    progress: Listener = ignore,
) -> Predicted:
    """Predict an image or a folder of images into `output`, with nnU-Net's names and side files.

    `model`: a bundle, or an nnU-Net model folder, which is exported on first use (that needs torch; a bundle needs
    neither torch nor nnunetv2). In a folder a case that fails is told and recorded, and the others go on; a single
    image raises, and so does a full disk. `progress` gets a `Result` with the `CaseResult` of every case.
    `outputs`: the formats of the label map and what goes beside it.
    The other arguments are those of `Predictor.load`, `Predictor.predict_files` and `cleanup_from_words`.
    """
    from fastnnunet.api.conversions import device_name
    from fastnnunet.export.models import check_reader, load_model
    from fastnnunet.images.cases import is_single_image
    from fastnnunet.images.tidy.rules import cleanup_from_words

    begin = time.perf_counter()
    check_reader(model)
    predictor = load_model(
        model,
        folds,
        checkpoint,
        progress=progress,
        backend=backend,
        threads=threads,
        precision=precision,
        device=device_name(device),
        step_size=step_size,
        mirroring=mirroring,
        passes=passes,
        memory_limit=memory_limit,
        locate=locate,
        wait=False,  # the first image is read meanwhile
    )
    cleanup = cleanup_from_words(
        predictor.spec.labels,
        keep_largest=keep_largest,
        min_size=min_size,
        fill_holes=fill_holes,
        postprocessing_file=postprocessing_file,
    )

    writer = predictor.writer(outputs, model)

    def told(event: Event) -> None:
        if (
            isinstance(event, Result)
            and not isinstance(event.value.error, DiskSpaceError | None)
            and not is_single_image(source, predictor.spec)
        ):  # else there is none, or it is raised
            text = f"failed: {printable(event.what)}: {printable(event.value.error, keep=LINES)}"
            progress(Message(text=text, level="error"))
        progress(event)

    results = predictor.predict_files(
        source,
        output,
        arguments=arguments,
        save_probabilities=save_probabilities,
        overwrite=overwrite,
        previous=previous,
        cleanup=cleanup,
        dicom_series=dicom_series,
        writer=writer,
        progress=told,
    )
    end = time.perf_counter()
    if predictor.backend.precision == "bf16" and predictor.spec.measured("bf16", predictor.backend.name) is None:
        unmeasured = (
            "note: what bf16 loses was not measured for this model; to do so: fastnnunet export quantize BUNDLE "
            "--precision bf16"
        )
        progress(Message(text=unmeasured))
    return Predicted(
        cases=tuple(results),
        engine=predictor.backend.name,
        described=predictor.describe(),
        load_s=predictor.loaded_at - begin,
        wall_s=end - predictor.loaded_at,
    )
