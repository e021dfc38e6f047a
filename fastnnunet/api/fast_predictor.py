"""`FastPredictor`: the methods of nnU-Net 2.8's `nnUNetPredictor` on this runtime.

Arguments and return values are nnU-Net's, except that arrays take the place of torch tensors where a tensor was not
given. What needs a torch module of the caller's (`manual_initialization`) is not there.
Axes: C channel, H head, Z Y X space.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastnnunet.api.conversions import (
    RawImage,
    as_float32,
    as_preprocessed,
    device_name,
    is_tensor,
    plan_cases,
    raw_images,
)
from fastnnunet.api.view import View
from fastnnunet.engines.base import Precision
from fastnnunet.errors import DiskSpaceError, FastnnUNetError, SpecError
from fastnnunet.events import Event, Message, Progress
from fastnnunet.export.models import CHECKPOINT, Fold, load_model
from fastnnunet.images.cases import take_part
from fastnnunet.images.output import RunArguments, write_run_files
from fastnnunet.nnunet.files.paths import trained_folds
from fastnnunet.runtime.loaded import Inferred
from fastnnunet.runtime.pipeline import WriteGate, run_pipeline
from fastnnunet.runtime.predict import Predictor
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.runtime.times import StageTimes
from fastnnunet.system.files import check_output_folder

_log = logging.getLogger(__name__)
Array = npt.NDArray[Any]
# a segmentation, with its probabilities if asked for; None: written to a file
Result = Array | tuple[Array, Array] | None
Item = TypeVar("Item")


class FastPredictor:
    """A drop-in for `nnUNetPredictor`: initialise once, then predict any number of images, from any number of threads.

    Every call gives what it would give alone, whatever other threads predict: it has the settings (`tile_step_size`,
    `use_gaussian`, `use_mirroring`, `passes`, `memory_limit`, `locate`) of the moment it began, and what it returns is
    the caller's. See `LoadedBundle` for how threads share the machine, and for forked processes.
    """

    def __init__(
        self,
        tile_step_size: float | None = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: Any = None,
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        backend: str = "auto",
        precision: Precision = "fp32",
        threads: int | None = None,
        passes: int | None = None,
        memory_limit: int | str | None = None,
        locate: bool = True,
    ) -> None:
        """`tile_step_size`: of nnU-Net's window; None for one pass, where the model is a bundle that allows it.
        `passes`, `memory_limit`: of one pass, see `LoadedBundle`.
        `locate`: predict within the box that the locator finds, where the model is a bundle that has one.
        `device`: `cpu`, `cuda`, a torch.device, or None for a GPU where there is one and a backend for it.

        `perform_everything_on_device` changes nothing: sums over tiles are kept where the backend leaves its logits.
        """
        self.tile_step_size = tile_step_size
        self.use_gaussian = use_gaussian
        self.use_mirroring = use_mirroring
        self.perform_everything_on_device = perform_everything_on_device
        self.device = device
        self.verbose = verbose
        self.verbose_preprocessing = verbose_preprocessing
        self.allow_tqdm = allow_tqdm
        self.backend = backend
        self.precision = precision
        self.threads = threads
        self.passes = passes
        self.memory_limit = memory_limit
        self.locate = locate
        self._predictor: Predictor | None = None

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str | Path,
        use_folds: Sequence[Fold] | Fold | None = None,
        checkpoint_name: str = CHECKPOINT,
    ) -> None:
        """Load an nnU-Net model folder, or a bundle (whose folds are all used unless `use_folds` names some).

        Raises NotFoundError, SpecError, BackendError, CorruptError, MismatchError and ParityError.
        """
        folds = (use_folds,) if isinstance(use_folds, str | int) else use_folds
        self._predictor = load_model(
            Path(model_training_output_dir),
            folds,
            None if checkpoint_name == CHECKPOINT else checkpoint_name,
            progress=partial(_to_log, logging.WARNING if self.verbose or self.allow_tqdm else logging.INFO),
            backend=self.backend,
            threads=self.threads,
            precision=self.precision,
            device=device_name(self.device),
            step_size=self.tile_step_size,
            passes=self.passes,
            memory_limit=self.memory_limit,
            locate=self.locate,
        )

    @staticmethod
    def auto_detect_available_folds(
        model_training_output_dir: str | Path, checkpoint_name: str = CHECKPOINT
    ) -> list[int]:
        """The numbered folds of a model folder that have this checkpoint. Raises NotFoundError when none has."""
        return list(trained_folds(Path(model_training_output_dir), checkpoint_name))

    @property
    def dataset_json(self) -> dict[str, Any]:
        """The data set description of the model."""
        return self._loaded().spec.dataset_json

    @property
    def plans(self) -> dict[str, Any]:
        """The plans of the model."""
        return self._loaded().spec.plans

    @property
    def allowed_mirroring_axes(self) -> tuple[int, ...] | None:
        """Axes the model was trained to be mirrored along."""
        return self._loaded().spec.mirror_axes

    def _loaded(self) -> Predictor:
        """The predictor with the settings of this moment, for one call. Raises SpecError before initialisation."""
        predictor = self._predictor
        if predictor is None:
            raise SpecError("no model is loaded: call initialize_from_trained_model_folder first")
        if self.tile_step_size is not None and not 0 < self.tile_step_size <= 1:
            raise SpecError(f"tile_step_size: got {self.tile_step_size}, expected a number in (0, 1]")
        return predictor.with_settings(
            step_size=self.tile_step_size,
            mirroring=self.use_mirroring,
            use_gaussian=self.use_gaussian,
            passes=self.passes,
            memory_limit=self.memory_limit,
            locate=self.locate,
        )

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: str | Path | Sequence[Sequence[str | Path]],
        output_folder_or_list_of_truncated_output_files: str | Path | Sequence[str | Path] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = 3,
        num_processes_segmentation_export: int = 3,
        folder_with_segs_from_prev_stage: str | Path | None = None,
        num_parts: int = 1,
        part_id: int = 0,
    ) -> list[Result]:
        """Predict a folder or lists of channel files; one result a case, None where it was written to a file.

        Counts of processes both 0: one case after another, in this thread; else one thread reads and one writes.
        Cases that fail leave the others alone; they are told together in an error of the first one's class at the end,
        whose `results` are what would have been returned, None for what failed. A full disk ends the run at once.
        """
        predictor = self._loaded()
        previous = None if folder_with_segs_from_prev_stage is None else Path(folder_with_segs_from_prev_stage)
        predictor.check_previous(previous)
        arguments = RunArguments(
            num_processes_preprocessing=num_processes_preprocessing,
            num_processes_segmentation_export=num_processes_segmentation_export,
            num_parts=num_parts,
            part_id=part_id,
        )
        source, output = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
        everything = plan_cases(predictor.spec, source, output, previous, save_probabilities)
        planned = [
            plan
            for plan in take_part(everything, part_id, num_parts)
            if overwrite or plan.output is None or not predictor.is_done(plan.output, save_probabilities)
        ]
        folder = Path(output) if isinstance(output, str | Path) else None
        if folder is None and planned and planned[0].output is not None:
            folder = planned[0].output.parent
        predictor.refuse_overlap(everything, planned, folder)
        write_side_files = None
        if folder is not None:
            check_output_folder(folder)
            described = arguments.describe(source, output, save_probabilities, overwrite, previous)
            # with the first segmentation, so that a folder has both or neither
            write_side_files = partial(write_run_files, predictor.spec, described, folder, predictor.describe())
        results: list[Result] = []
        failed: dict[str, FastnnUNetError] = {}
        with (
            View(bars=self.allow_tqdm) as view,
            closing(
                predictor.predict_planned(
                    planned,
                    threaded=arguments.threaded,
                    before_first=write_side_files,
                    progress=view,
                )
            ) as outcomes,
        ):
            for result in outcomes:
                if result.error is not None:
                    failed[result.case_id] = result.error
                kept = result.prediction
                probabilities = None if kept is None else kept.probabilities_HZYX
                results.append(None if kept is None else _result(kept.segmentation_ZYX, probabilities))
                if isinstance(result.error, DiskSpaceError):
                    break
        _raise_failures(failed, results, len(planned))
        return results

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | Path | Sequence[Sequence[str | Path]],
        output_folder_or_list_of_truncated_output_files: str | Path | Sequence[str | Path] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | Path | None = None,
    ) -> list[Result]:
        """`predict_from_files` in one thread; as nnU-Net's, it returns only what was not written to files."""
        results = self.predict_from_files(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            save_probabilities,
            overwrite,
            0,
            0,
            folder_with_segs_from_prev_stage,
        )
        return [result for result in results if result is not None]

    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: Array | list[Array],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: Array | list[Array] | None,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
    ) -> Generator[dict[str, Any]]:
        """Preprocessed images one by one: `data` (C, Z, Y, X) float32, `data_properties`, `ofile`.

        `num_processes` changes nothing: whoever iterates does the work.
        """
        predictor = self._loaded()
        for raw in raw_images(
            image_or_list_of_images,
            segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties,
            truncated_ofname,
        ):
            case = self._preprocess(predictor, raw)
            yield {"data": case.data_CZYX, "data_properties": case.properties, "ofile": raw.ofile}

    def predict_from_list_of_npy_arrays(
        self,
        image_or_list_of_images: Array | list[Array],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: Array | list[Array] | None,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = 3,
    ) -> list[Result]:
        """Predict images (C, z, y, x) as nnU-Net's reader returns them; `properties` need `spacing` (z, y, x) in mm.

        Previous segmentations, of a cascade, are (1, z, y, x). With `truncated_ofname` results are None, and the
        properties must hold what the writer needs. Images that fail leave the others alone, see `predict_from_files`.
        """
        predictor = self._loaded()
        return self._predict_all(
            predictor,
            raw_images(
                image_or_list_of_images,
                segs_from_prev_stage_or_list_of_segs_from_prev_stage,
                properties_or_list_of_properties,
                truncated_ofname,
            ),
            lambda raw: self._preprocess(predictor, raw),
            lambda raw: raw.ofile,
            save_probabilities,
            num_processes_segmentation_export > 0,
        )

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = 3,
    ) -> list[Result]:
        """Predict preprocessed images: dicts of `data` (array, tensor, or a .npy file, which is deleted),
        `data_properties` and `ofile` (a file name without its ending, or None for a result in memory).

        The iterator is advanced in one thread and results are written in another (0: in the calling thread).
        Cases that fail leave the others alone, see `predict_from_files`; an error of the iterator ends the run once
        the cases before it are done.
        """
        predictor = self._loaded()
        return self._predict_all(
            predictor,
            data_iterator,
            lambda item: as_preprocessed(predictor.spec, item["data"], item["data_properties"]),
            lambda item: item["ofile"],
            save_probabilities,
            num_processes_segmentation_export > 0,
        )

    def _predict_all(
        self,
        predictor: Predictor,
        items: Iterable[Item],
        load: Callable[[Item], Preprocessed],
        ofile_of: Callable[[Item], str | None],
        save_probabilities: bool,
        threaded: bool,
    ) -> list[Result]:
        gate = WriteGate()

        def finish(item: Item, outcome: tuple[Preprocessed, Inferred]) -> Result:
            case, inferred = outcome
            return _finish(predictor, case, inferred, ofile_of(item), save_probabilities, gate)

        outcomes = run_pipeline(
            items,
            load,
            lambda item, case: (case, predictor.infer(case, StageTimes(), keep_logits=save_probabilities)),
            finish,
            gate,
            threaded=threaded,
        )
        results: list[Result] = []
        failed: dict[str, FastnnUNetError] = {}
        with closing(outcomes):
            for number, (item, outcome) in enumerate(outcomes):
                if not isinstance(outcome, FastnnUNetError):
                    results.append(outcome)
                    continue
                failed[ofile_of(item) or f"image {number}"] = outcome
                results.append(None)
                if isinstance(outcome, DiskSpaceError):
                    break
        _raise_failures(failed, results)
        return results

    def predict_single_npy_array(
        self,
        input_image: Array,
        image_properties: dict[str, Any],
        segmentation_previous_stage: Array | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> Result:
        """Predict one image (C, z, y, x): a segmentation in its axes, with probabilities (H, z, y, x) if asked for.

        With `output_file_truncated` these are written to files and None is returned.
        """
        predictor = self._loaded()
        raw = RawImage(input_image, segmentation_previous_stage, image_properties, output_file_truncated)
        case = self._preprocess(predictor, raw)
        inferred = predictor.infer(case, StageTimes(), keep_logits=save_or_return_probabilities)
        return _finish(predictor, case, inferred, raw.ofile, save_or_return_probabilities, WriteGate())

    def predict_logits_from_preprocessed_data(self, data: Any) -> Any:
        """float16 logits (H, Z, Y, X), averaged over folds, of a preprocessed image (C, Z, Y, X): an array for an
        array, a tensor for a tensor.
        """
        return self._logits(data, slice(None))

    def predict_sliding_window_return_logits(self, input_image: Any) -> Any:
        """The same of one network: of an ensemble, its first fold, which nnU-Net has loaded after initialisation."""
        return self._logits(input_image, slice(0, 1))

    def _logits(self, data: Any, folds: slice) -> Any:
        logits_HZYX = np.ascontiguousarray(self._loaded().logits(as_float32(data), folds=folds))
        if not is_tensor(data):
            return logits_HZYX
        import torch

        return torch.from_numpy(logits_HZYX)

    def _preprocess(self, predictor: Predictor, raw: RawImage) -> Preprocessed:
        previous_ZYX = None if raw.previous is None else np.asarray(raw.previous)[0]
        case = predictor.preprocess_array(raw.image, raw.properties, previous_ZYX)
        if self.verbose or self.verbose_preprocessing:
            _log.warning("image %s preprocessed to %s", raw.image.shape, case.data_CZYX.shape)
        return case


def _to_log(level: int, event: Event) -> None:
    if isinstance(event, Message):
        _log.log(level, event.text)
    elif isinstance(event, Progress) and event.logged:
        _log.log(level, event.line)


def _finish(
    predictor: Predictor,
    case: Preprocessed,
    inferred: Inferred,
    ofile: str | None,
    save_probabilities: bool,
    gate: WriteGate,
) -> Result:
    segmentation, probabilities = predictor.postprocess(inferred, case, save_probabilities)
    if ofile is None:
        return _result(segmentation, probabilities)
    with gate.writing():
        predictor.write(segmentation, probabilities, case.properties, Path(f"{ofile}{predictor.spec.file_ending}"))
    return None


def _result(segmentation_ZYX: Array, probabilities_HZYX: Array | None) -> Result:
    return segmentation_ZYX if probabilities_HZYX is None else (segmentation_ZYX, probabilities_HZYX)


def _raise_failures(failed: dict[str, FastnnUNetError], results: list[Result], total: int | None = None) -> None:
    """One error of the first one's class with all of them, and the results of the others."""
    if not failed:
        return
    first = next(iter(failed.values()))
    lines = "\n".join(f"  - {case_id}: {error}" for case_id, error in failed.items())
    raised = type(first)(f"{len(failed)} of {total or len(results)} case(s) failed:\n{lines}")
    raised.results = results
    raise raised from first
