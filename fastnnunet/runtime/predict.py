"""The predictor: a bundle loaded once, any number of images predicted, each as nnU-Net 2.8 would.

`Predictor.load(bundle)` then `predict_array` (arrays in, arrays out) or `predict_files` (what the command line runs).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.errors import FastnnUNetError, ImageError, NotFoundError, SpecError
from fastnnunet.geometry.resample import ResampleSpec, parse_resample_spec
from fastnnunet.runtime.backends.base import Backend, Precision, create_backend
from fastnnunet.runtime.cases import DICOM_SEG_ENDING, Case, find_cases, is_single_image, output_file, single_case
from fastnnunet.runtime.files import make_folder
from fastnnunet.runtime.image_io import ImageIO, image_io
from fastnnunet.runtime.labels import Cleanup, clean
from fastnnunet.runtime.normalize import check_normalization
from fastnnunet.runtime.output import sibling, write_probabilities, write_run_files
from fastnnunet.runtime.postprocess import label_rule, postprocess
from fastnnunet.runtime.preprocess import preprocess
from fastnnunet.runtime.sliding_window import sliding_window_logits
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec

OnTiles = Callable[[int, int], None]


@dataclass(slots=True)
class StageTimes:
    """Seconds per stage of one case."""

    read_s: float = 0.0
    preprocess_s: float = 0.0
    infer_s: float = 0.0
    postprocess_s: float = 0.0
    write_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.read_s + self.preprocess_s + self.infer_s + self.postprocess_s + self.write_s

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`_s."""
        start = time.perf_counter()
        try:
            yield
        finally:
            field_name = f"{name}_s"
            setattr(self, field_name, getattr(self, field_name) + time.perf_counter() - start)


@dataclass(slots=True)
class Prediction:
    """Segmentation in the axes of the image as read; probabilities (heads, those axes) float32 if asked for."""

    segmentation_ZYX: npt.NDArray[Any]
    probabilities_HZYX: npt.NDArray[np.float32] | None
    properties: dict[str, Any]  # nnU-Net's: what was read plus the crop
    times: StageTimes


@dataclass(slots=True, kw_only=True)
class CaseResult:
    """What became of one case: `error` is None and `output` exists, or the other way round."""

    case_id: str
    output: Path
    error: FastnnUNetError | None = None
    times: StageTimes = field(default_factory=StageTimes)


class Predictor:
    """A loaded bundle. Not for use from several threads at once."""

    def __init__(
        self, spec: BundleSpec, backend: Backend, *, step_size: float | None = None, threads: int | None = None
    ) -> None:
        """`step_size`: largest step between tiles as a fraction of the patch; None: the bundle's.

        `threads`: of what is done before and after the network; None: all cores.

        Raises SpecError when the bundle needs something this runtime cannot reproduce, naming it.
        """
        self.spec = spec
        self.backend = backend
        self.threads = threads
        self.step_size = spec.step_size if step_size is None else step_size
        if not 0 < self.step_size <= 1:
            raise SpecError(f"step_size: got {self.step_size}, expected a number in (0, 1]")
        check_normalization(spec.normalization_schemes, spec.intensity_properties)
        self._resample_data = parse_resample_spec(spec.resampling["data"], "the image")
        self._resample_logits = parse_resample_spec(spec.resampling["probabilities"], "the logits")
        self._resample_seg: ResampleSpec | None = None
        if spec.previous_labels:
            kwargs = {**spec.resampling["seg"].get("kwargs", {}), "is_seg": False}
            self._resample_seg = parse_resample_spec(
                {**spec.resampling["seg"], "kwargs": kwargs}, "the previous segmentation"
            )
            if self._resample_seg.convention == "torch" or self._resample_seg.order_z != 0:
                raise SpecError(
                    "the bundle resamples segmentations in a way this runtime does not have (torch, or order_z not 0)"
                    "\npredict with nnU-Net itself"
                )
        self._label_rule = label_rule(spec)

    @classmethod
    def load(
        cls,
        bundle: Path,
        backend: str = "auto",
        *,
        threads: int | None = None,
        step_size: float | None = None,
        precision: Precision = "fp32",
    ) -> "Predictor":
        """Check a bundle folder and load its model.

        Raises NotFoundError, CorruptError (see load_bundle_spec), BackendError and SpecError.
        """
        spec = load_bundle_spec(bundle)
        return cls(
            spec,
            create_backend(backend, bundle, spec, threads=threads, precision=precision),
            step_size=step_size,
            threads=threads,
        )

    def predict_array(
        self,
        image_CZYX: npt.NDArray[Any],
        properties: dict[str, Any],
        *,
        previous_ZYX: npt.NDArray[Any] | None = None,
        return_probabilities: bool = False,
        on_tiles: OnTiles | None = None,
    ) -> Prediction:
        """Predict an image (C, z, y, x) as nnU-Net's reader returns it; 2d images have z = 1.

        `properties` needs only `spacing` (z, y, x) in mm. The input is left as it is.
        `previous_ZYX`: of a cascade stage, the previous stage's segmentation in the axes of the image.
        """
        image = np.array(image_CZYX, dtype=np.float32)
        if image.size and not np.isfinite(native.limits(image, threads=self.threads)).all():
            raise ImageError("the image has NaN or infinite voxels, expected numbers")
        return self._predict(image, properties, StageTimes(), return_probabilities, on_tiles, previous_ZYX)

    def _predict(
        self,
        image_CZYX: npt.NDArray[np.float32],
        properties: dict[str, Any],
        times: StageTimes,
        return_probabilities: bool,
        on_tiles: OnTiles | None,
        previous_ZYX: npt.NDArray[Any] | None = None,
    ) -> Prediction:
        """`predict_array` that overwrites its image and adds to `times`."""
        spec = self.spec
        with times.stage("preprocess"):
            case = preprocess(
                image_CZYX, properties, spec, self._resample_data, previous_ZYX, self._resample_seg, self.threads
            )
        with times.stage("infer"):
            logits_HZYX = sliding_window_logits(
                case.data_CZYX,
                self.backend.run,
                num_heads=spec.num_heads,
                patch_size=spec.patch_size,
                step_size=self.step_size,
                mirror_axes=spec.mirror_axes,
                on_tiles=on_tiles,
                threads=self.threads,
            )
        with times.stage("postprocess"):
            segmentation, probabilities = postprocess(
                logits_HZYX, case, spec, self._resample_logits, self._label_rule, return_probabilities, self.threads
            )
        return Prediction(segmentation, probabilities, case.properties, times)

    def predict_case(
        self,
        case: Case,
        output: Path,
        *,
        save_probabilities: bool = False,
        on_tiles: OnTiles | None = None,
        previous: Path | None = None,
        cleanup: Cleanup | None = None,
    ) -> CaseResult:
        """Read, predict and write one case to the file `output`, as DICOM SEG if it ends in .dcm.

        `cleanup` is done to the label map before it is written, not to probabilities.
        Raises ImageError and the other errors of the stages; writes nothing then.
        """
        io = image_io(self.spec.reader_writer)
        if case.problem:
            raise ImageError(case.problem)
        times = StageTimes()
        with times.stage("read"):
            image_CZYX, properties = io.read(case.channels)
            previous_ZYX = None if previous is None else self._read_previous(previous, case)
        prediction = self._predict(image_CZYX, properties, times, save_probabilities, on_tiles, previous_ZYX)
        segmentation_ZYX = prediction.segmentation_ZYX
        if cleanup is not None:
            with times.stage("postprocess"):
                segmentation_ZYX = clean(segmentation_ZYX, cleanup, properties["spacing"])
        with times.stage("write"):
            make_folder(output.parent)
            if prediction.probabilities_HZYX is not None:
                write_probabilities(prediction.probabilities_HZYX, prediction.properties, output, self._ending(output))
            # last: where a segmentation is, its probabilities are
            if output.name.endswith(DICOM_SEG_ENDING):
                self._write_dicom_seg(io, segmentation_ZYX, case, output, prediction.properties)
            else:
                io.write(segmentation_ZYX, output, prediction.properties)
        return CaseResult(case_id=case.case_id, output=output, times=times)

    def _write_dicom_seg(
        self, io: ImageIO, segmentation_ZYX: npt.NDArray[Any], case: Case, output: Path, properties: dict[str, Any]
    ) -> None:
        from fastnnunet.runtime.dicom_seg import write_dicom_seg

        if not case.series:
            raise ImageError(f"{case.case_id} is no DICOM series, which a DICOM SEG has to refer to")
        on_slices_ZYX = io.to_file_axes(segmentation_ZYX, properties)
        write_dicom_seg(on_slices_ZYX, case.series[0], output, labels=self.spec.labels, model=self.spec.name)

    def _read_previous(self, folder: Path, case: Case) -> npt.NDArray[Any]:
        """The previous stage's segmentation of a case, in the axes of its file. Raises ImageError."""
        file = folder / f"{case.case_id}{self.spec.file_ending}"
        if not file.is_file():
            raise ImageError(f"no previous segmentation of {case.case_id}: {file} is missing")
        return image_io(self.spec.reader_writer).read_segmentation(file)[0][0]

    def predict_files(
        self,
        source: Path,
        output: Path,
        *,
        save_probabilities: bool = False,
        overwrite: bool = True,
        previous: Path | None = None,
        cleanup: Cleanup | None = None,
        dicom_series: str | None = None,
        dicom_seg: bool = False,
        on_start: Callable[[Case, int, int], None] | None = None,
        on_tiles: OnTiles | None = None,
        on_done: Callable[[CaseResult], None] | None = None,
    ) -> list[CaseResult]:
        """Predict one image file or every case of a folder, with nnU-Net's names and side files.

        `previous`, which a cascade stage needs, is the folder of the previous segmentations, named as the cases.
        `cleanup` is done to every label map. `dicom_series` is the UID of one series of a DICOM folder; `dicom_seg`
        writes DICOM SEG, which takes DICOM input.
        In a folder a case that fails is recorded in its result and the others go on; a single image raises.
        `on_start(case, index, total)`, `on_tiles(done, total)` and `on_done(result)` report progress.
        """
        if (previous is None) != (not self.spec.previous_labels):
            raise SpecError(
                "this bundle is a cascade stage, it needs the segmentations of the previous stage\n"
                "predict them first and give their folder with -prev_stage_predictions"
                if self.spec.previous_labels
                else "-prev_stage_predictions: this bundle is no cascade stage; leave it out"
            )
        if previous is not None and not previous.is_dir():
            raise NotFoundError(f"-prev_stage_predictions: {previous} is no folder; give the previous stage's output")
        image_io(self.spec.reader_writer)  # an unknown reader is the bundle's fault, not the first case's
        if dicom_seg:
            import_module("highdicom")  # what is not installed is said before anything is predicted
        is_folder = not is_single_image(source, self.spec)
        if is_folder and dicom_series is not None:
            raise SpecError(f"--series chooses one series of one folder of DICOM files, {source} is none")
        cases = find_cases(source, self.spec) if is_folder else [single_case(source, self.spec, dicom_series)]
        ending = DICOM_SEG_ENDING if dicom_seg else self.spec.file_ending
        planned = [(case, output_file(source, output, case, self.spec, ending)) for case in cases]
        if not overwrite:
            planned = [(case, file) for case, file in planned if not self._is_done(file, save_probabilities)]
        results: list[CaseResult] = []
        for index, (case, file) in enumerate(planned):
            if on_start:
                on_start(case, index, len(planned))
            try:
                result = self.predict_case(
                    case,
                    file,
                    save_probabilities=save_probabilities,
                    on_tiles=on_tiles,
                    previous=previous,
                    cleanup=cleanup,
                )
            except FastnnUNetError as error:
                if not is_folder:
                    raise
                result = CaseResult(case_id=case.case_id, output=file, error=error)
            if result.error is None and file != output and all(r.error for r in results):
                # with the first segmentation, so that a folder has both or neither
                write_run_files(
                    self.spec,
                    source,
                    output,
                    save_probabilities=save_probabilities,
                    overwrite=overwrite,
                    run=self._run(),
                )
            results.append(result)
            if on_done:
                on_done(result)
        return results

    def _run(self) -> dict[str, Any]:
        return {
            "bundle": self.spec.name,
            "backend": self.backend.name,
            "precision": self.backend.precision,
            "step_size": self.step_size,
        }

    def _is_done(self, file: Path, save_probabilities: bool) -> bool:
        return file.is_file() and (not save_probabilities or sibling(file, self._ending(file), ".npz").is_file())

    def _ending(self, output: Path) -> str:
        return DICOM_SEG_ENDING if output.name.endswith(DICOM_SEG_ENDING) else self.spec.file_ending
