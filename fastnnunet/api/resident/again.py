"""Further outputs of an image that was predicted: of its label map, without a network."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastnnunet.api.resident.model import CASE, PredictedImage, image_case, written_files
from fastnnunet.errors import ImageError, MismatchError
from fastnnunet.images.cases import Case
from fastnnunet.images.io import image_io
from fastnnunet.images.output import files_of_case
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.outputs.write import output_writer
from fastnnunet.runtime.times import StageTimes
from fastnnunet.specs.bundle import BundleSpec


def keep_label_map(label_map: Path, spec: BundleSpec, folder: Path) -> Path:
    """Copy a label map in the model's own format, and what belongs to it, into a new folder. Raises OSError."""
    folder.mkdir()
    for file in files_of_case(label_map, spec.file_ending):
        shutil.copyfile(file, folder / file.name)
    return folder / label_map.name


def write_again(
    spec: BundleSpec,
    bundle: Path,
    label_map: Path,
    channels: Sequence[Path],
    output: Path,
    outputs: OutputSpec,
    *,
    series_uid: str | None = None,
) -> PredictedImage:
    """Write of a label map what `ResidentModel.predict` would have written beside it: the same files.

    `label_map`: of the model `spec` in its own format. `channels`, `output` and `series_uid`: those of that prediction;
    `channels` may be empty unless `outputs` are made of the image too.
    Raises ImageError, MismatchError where image and label map are not of one grid, FastnnUNetError where a file cannot
    be written, ModuleNotFoundError without the extra that `outputs` takes.
    """
    io, times = image_io(spec.reader_writer), StageTimes()
    writer = output_writer(
        outputs,
        labels=spec.labels,
        file_ending=spec.file_ending,
        channel_names=spec.channel_names,
        model=spec.name,
        bundle=bundle,
    )
    case = image_case(spec, channels, series_uid) if channels else Case(CASE, ())
    if not channels and outputs.needs_image:
        raise ImageError("the image is not there any more, of which this is made too")
    series = next(iter(case.series), None)
    writer.check(case.case_id, series)
    image_CZYX = None
    with times.stage("read"):
        labels_CZYX, properties = io.read_segmentation(label_map)
        if channels:  # for places to the last bit, which not every format of label maps holds
            image_CZYX, properties = io.read(case.channels)
    labels_ZYX = labels_CZYX[0].astype(np.uint16)
    if image_CZYX is not None and image_CZYX.shape[1:] != labels_ZYX.shape:
        raise MismatchError(f"the image is {image_CZYX.shape[1:]} (z, y, x), its label map {labels_ZYX.shape}")
    seen_CZYX = image_CZYX if outputs.needs_image else None
    labelled = writer.labelled(case.case_id, labels_ZYX, properties, image_CZYX=seen_CZYX, series=series)
    file = output.with_name(f"{output.name}{writer.ending}")
    with times.stage("write"):
        writer.write(labelled, file, io, properties)
    return PredictedImage(files=written_files(writer, file), times=times)
