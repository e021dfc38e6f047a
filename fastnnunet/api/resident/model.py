"""`ResidentModel`: one loaded bundle, images given as files or folders of DICOM slices, results as files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastnnunet.api.predict import IMAGE
from fastnnunet.errors import ImageError
from fastnnunet.events import Listener, ignore
from fastnnunet.geometry.resample import resampled_shape
from fastnnunet.images.cases import Case
from fastnnunet.images.claims import claimed_voxels
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.outputs.mesh.files import stl_folder
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.outputs.write import OutputWriter
from fastnnunet.runtime.predict import Planned, Predictor
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.runtime.times import StageTimes
from fastnnunet.specs.bundle import BundleSpec

if TYPE_CHECKING:
    from fastnnunet.engines.base import Precision

CASE = "image"  # as statistics and DICOM objects name it
_HAVE_HEADERS = (".nii", ".nii.gz", ".nrrd", ".mha")  # which say how many voxels there are


def check_model(spec: BundleSpec, bundle: Path, backend: str, precision: "Precision", device: str | None) -> None:
    """Find out before a bundle is loaded that it cannot be: no such backend, device or precision.

    Raises SpecError and BackendError.
    """
    from fastnnunet.api.conversions import device_name
    from fastnnunet.engines.model_files import INT8_ENDINGS, model_path
    from fastnnunet.engines.registry import check_engine

    chosen = check_engine(backend, precision, device_name(device))
    if chosen in INT8_ENDINGS:
        model_path(bundle, spec, precision, chosen)


class _BoundedPredictor(Predictor):
    """A predictor that refuses an image of too many voxels on the model's grid before it makes them."""

    most_voxels: int | None = None

    def prepare(
        self,
        image_CZYX: npt.NDArray[np.float32],
        properties: dict[str, Any],
        previous_ZYX: npt.NDArray[Any] | None = None,
    ) -> Preprocessed:
        _refuse_large(math.prod(image_CZYX.shape[1:]), self.most_voxels, "it")
        if image_CZYX.ndim == 4:
            forward = self.spec.transpose_forward
            shape = tuple(image_CZYX.shape[1 + axis] for axis in forward)
            spacing = tuple(properties["spacing"][axis] for axis in forward)
            target = (*spacing[: len(spacing) - len(self.spec.spacing_mm)], *self.spec.spacing_mm)
            on_grid = math.prod(map(int, resampled_shape(shape, spacing, target)))
            _refuse_large(on_grid, self.most_voxels, "resampled to the model's spacing it")
        return super().prepare(image_CZYX, properties, previous_ZYX)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedImage:
    """What was written of one image: `image`, `dicom-seg`, `statistics`, ... -> its file; `stl`: a folder."""

    files: Mapping[str, Path]
    times: StageTimes


def image_case(spec: BundleSpec, channels: Sequence[Path], series_uid: str | None) -> Case:
    """One image of a file, or folder of the slices of a DICOM series, for each channel; of pictures for several.

    Raises ImageError.
    """
    expected = len(spec.channel_names)
    may_hold_several = spec.reader_writer == "NaturalImage2DIO" and 0 < len(channels) < expected  # colours, in one file
    if len(channels) != expected and not may_hold_several:
        raise ImageError(
            f"got {len(channels)} image(s), expected one for each of the model's {expected} channel(s): "
            f"{', '.join(spec.channel_names)}"
        )
    series = tuple(DicomSeries(folder=place, uid=series_uid) for place in channels if place.is_dir())
    if series and len(series) < expected:
        raise ImageError("some channels are DICOM series and others are files, expected all of one kind")
    return Case(CASE, () if series else tuple(channels), series=series)


def written_files(writer: OutputWriter, file: Path) -> dict[str, Path]:
    """What a writer wrote beside `file`, that included, as a `PredictedImage` calls it."""
    files = {str(writer.spec.formats[0]): file, **writer.beside(file)}
    if "mesh" in files:
        files["stl"] = stl_folder(files["mesh"])
    return files


class ResidentModel:
    """A loaded bundle for many images, one at a time. Labels are those of `predict` with the same settings."""

    def __init__(
        self,
        bundle: Path,
        *,
        backend: str = "auto",
        precision: "Precision" = "fp32",
        threads: int | None = None,
        device: str | None = None,
        most_voxels: int | None = None,
    ) -> None:
        """`most_voxels`: of a channel of an image, as it is stored and as the model sees it.

        Raises what `Predictor.load` raises.
        """
        from fastnnunet.api.conversions import device_name

        self._predictor = _BoundedPredictor.load(
            bundle, backend, precision=precision, threads=threads, device=device_name(device)
        )
        self._bundle = bundle
        self._predictor.most_voxels = self.most_voxels = most_voxels

    @property
    def spec(self) -> BundleSpec:
        """What the bundle says of itself."""
        return self._predictor.spec

    def predict(
        self,
        channels: Sequence[Path],
        output: Path,
        outputs: OutputSpec = IMAGE,
        *,
        series_uid: str | None = None,
        progress: Listener = ignore,
    ) -> PredictedImage:
        """Predict an image of one file, or folder of the slices of a DICOM series, for each channel.

        `output`: the label map, a name without an ending; what else `outputs` asks for is written beside it.
        `series_uid` chooses where a folder holds several series. `progress` hears of tiles; what it raises ends the
        prediction where it is no Exception.
        Raises ImageError, before voxels are read where a header claims more of them than `most_voxels`, and the errors
        of the stages; ModuleNotFoundError without the extra that `outputs` takes.
        """
        case = image_case(self.spec, channels, series_uid)
        for channel in case.channels:
            if isinstance(channel, DicomSeries) or channel.name.endswith(_HAVE_HEADERS):
                _refuse_large(claimed_voxels(channel), self.most_voxels, "it")
        writer = self._predictor.writer(outputs, self._bundle)
        file = output.with_name(f"{output.name}{writer.ending}")
        planned = [Planned(case=case, output=file, writer=writer)]
        (result,) = self._predictor.predict_planned(planned, threaded=False, progress=progress)
        if result.error is not None:
            raise result.error
        return PredictedImage(files=written_files(writer, file), times=result.times)


def _refuse_large(voxels: int, most: int | None, what: str) -> None:
    if most is not None and voxels > most:
        raise ImageError(f"the image is too large: {what} has {voxels} voxels, expected at most {most}")
