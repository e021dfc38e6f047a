"""The predictor: a bundle loaded once, any number of images predicted, each as nnU-Net 2.8 would.

`Predictor.load(bundle)` then `predict_array` (arrays in, arrays out) or `predict_files` (what the command line runs).
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import DiskSpaceError, FastnnUNetError, ImageError, SpecError, printable
from fastnnunet.events import Event, Listener, Progress, Result, ignore
from fastnnunet.images.cases import (
    DICOM_SEG_ENDING,
    Case,
    find_cases,
    is_single_image,
    output_file,
    single_case,
    take_part,
    with_output,
)
from fastnnunet.images.dicom.series import is_dicom_file
from fastnnunet.images.finished import is_archive, is_pickle, is_segmentation
from fastnnunet.images.io import image_io
from fastnnunet.images.output import (
    RunArguments,
    files_of_case,
    files_of_run,
    sibling,
    write_probabilities,
    write_run_files,
)
from fastnnunet.images.overlap import inputs_of, refuse_model_folder, refuse_overlap
from fastnnunet.images.tidy.cleanup import Cleanup, clean
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.outputs.write import OutputWriter, check_series, output_writer
from fastnnunet.runtime.loaded import Inferred, LoadedBundle, Prediction
from fastnnunet.runtime.pipeline import WriteGate, run_pipeline
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.runtime.times import StageTimes
from fastnnunet.system.files import check_output_folder, make_folder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A case to predict and what to do with it."""

    case: Case
    output: Path | None  # None: into the result
    previous: Path | None = None  # the previous stage's segmentation
    save_probabilities: bool = False
    cleanup: Cleanup | None = None  # of the label map, not of probabilities
    writer: OutputWriter | None = None  # None: an image, or a DICOM SEG if it ends in .dcm

    @property
    def needs_image(self) -> bool:
        """The image as it was read is used again when the label map is written."""
        return self.writer is not None and self.writer.needs_image


@dataclass(slots=True, kw_only=True)
class CaseResult:
    """What became of one case: `error` is None and `output` exists, or the other way round."""

    case_id: str
    output: Path | None
    error: FastnnUNetError | None = None
    times: StageTimes = field(default_factory=StageTimes)
    image_shape: tuple[int, ...] = ()  # (channels, axes of the file); empty where it failed
    network_shape: tuple[int, ...] = ()  # (channels, Z, Y, X) as preprocessed
    prediction: Prediction | None = None  # where there is no output file


@dataclass(slots=True)
class _Loaded:
    preprocessed: Preprocessed
    times: StageTimes
    image_CZYX: npt.NDArray[np.float32] | None = None  # where it is used again


def _at_case(case_id: str, done: int, total: int) -> Progress:
    return Progress(what="cases", done=done, total=total, unit="cases", note=case_id)


class Predictor(LoadedBundle):
    """A loaded bundle that reads and writes image files."""

    def predict_case(
        self,
        case: Case,
        output: Path,
        *,
        save_probabilities: bool = False,
        progress: Listener = ignore,
        previous: Path | None = None,
        cleanup: Cleanup | None = None,
    ) -> CaseResult:
        """Read, predict and write one case to the file `output`; see `Planned`.

        Raises ImageError and the other errors of the stages; writes nothing then.
        """
        plan = Planned(
            case=case, output=output, previous=previous, save_probabilities=save_probabilities, cleanup=cleanup
        )
        loaded = self._load(plan)
        return self._finish(plan, loaded, self._infer(plan, loaded, progress), WriteGate())

    def _load(self, plan: Planned) -> _Loaded:
        if plan.case.problem:
            raise ImageError(plan.case.problem)
        if plan.output is not None:
            # before hours of inference, not when writing
            self._writer(plan).check(plan.case.case_id, next(iter(plan.case.series), None))
        io = image_io(self.spec.reader_writer)
        times = StageTimes()
        with times.stage("read"):
            image_CZYX, properties = io.read(plan.case.channels)
            self._check_slices(plan.case, image_CZYX.shape[1])
            previous_ZYX = None
            if plan.previous is not None:
                if not plan.previous.is_file():
                    raise ImageError(f"no previous segmentation of {plan.case.case_id}: {plan.previous} is missing")
                previous_ZYX = io.read_segmentation(plan.previous)[0][0]
        with times.stage("preprocess"):
            as_read = image_CZYX.copy() if plan.needs_image else None  # `prepare` may change it in place
            return _Loaded(self.prepare(image_CZYX, properties, previous_ZYX), times, as_read)

    def _check_slices(self, case: Case, slices: int) -> None:
        """Raises ImageError where one DICOM file was given for a volume; of other formats one slice is nnU-Net's."""
        if slices > 1 or len(self.spec.spacing_mm) < 3 or self.spec.file_ending == DICOM_SEG_ENDING:
            return
        if case.series or is_dicom_file(case.files[0]):
            raise ImageError(
                f"{case.channels[0]} is one DICOM slice, and this model segments volumes\n"
                "give the folder of the whole series with -i FOLDER"
            )

    def _infer(self, plan: Planned, loaded: _Loaded, progress: Listener) -> Inferred:
        def tiles(event: Event) -> None:
            progress(replace(event, what=plan.case.case_id) if isinstance(event, Progress) else event)

        return self.infer(loaded.preprocessed, loaded.times, tiles, keep_logits=plan.save_probabilities)

    def _finish(
        self,
        plan: Planned,
        loaded: _Loaded,
        inferred: Inferred,
        gate: WriteGate,
    ) -> CaseResult:
        times, case = loaded.times, loaded.preprocessed
        with times.stage("postprocess"):
            segmentation, probabilities = self.postprocess(inferred, case, plan.save_probabilities)
            if plan.cleanup is not None:
                segmentation = clean(segmentation, plan.cleanup, case.properties["spacing"])
        prediction = None
        if plan.output is None:
            prediction = Prediction(segmentation, probabilities, case.properties, times)
        else:
            with times.stage("write"), gate.writing():
                self._write(plan, loaded, segmentation, probabilities)
        return CaseResult(
            case_id=plan.case.case_id,
            output=plan.output,
            times=times,
            image_shape=(len(self.spec.channel_names), *segmentation.shape),
            network_shape=case.data_CZYX.shape,
            prediction=prediction,
        )

    def _write(
        self,
        plan: Planned,
        loaded: _Loaded,
        segmentation_ZYX: npt.NDArray[Any],
        probabilities_HZYX: npt.NDArray[np.float32] | None,
    ) -> None:
        output, properties, writer = plan.output, loaded.preprocessed.properties, self._writer(plan)
        assert output is not None
        make_folder(output.parent)
        if probabilities_HZYX is not None:
            write_probabilities(probabilities_HZYX, properties, output, writer.ending)
        series = next(iter(plan.case.series), None)
        labelled = writer.labelled(
            plan.case.case_id, segmentation_ZYX, properties, image_CZYX=loaded.image_CZYX, series=series
        )
        io = image_io(self.spec.reader_writer)
        # the label map last: where it is, all other files of the case are
        writer.write(labelled, output, io, properties)

    def write(
        self,
        segmentation_ZYX: npt.NDArray[Any],
        probabilities_HZYX: npt.NDArray[np.float32] | None,
        properties: dict[str, Any],
        output: Path,
    ) -> None:
        """Write what `postprocess` gave to the file `output` and, with probabilities, `.npz` and `.pkl` beside it."""
        make_folder(output.parent)
        if probabilities_HZYX is not None:
            write_probabilities(probabilities_HZYX, properties, output, self.spec.file_ending)
        # last: where a segmentation is, its probabilities are
        image_io(self.spec.reader_writer).write(segmentation_ZYX, output, properties)

    def writer(self, outputs: OutputSpec, bundle: Path | None = None) -> OutputWriter:
        """What writes `outputs` of this model; `bundle`: its folder, which may have codes of its labels.

        Raises SpecError, and ModuleNotFoundError without the extra `dicom` where it is needed.
        """
        spec = self.spec
        return output_writer(
            outputs,
            labels=spec.labels,
            file_ending=spec.file_ending,
            channel_names=spec.channel_names,
            model=spec.name,
            bundle=bundle,
        )

    def _writer(self, plan: Planned) -> OutputWriter:
        if plan.writer is not None:
            return plan.writer
        is_seg = plan.output is not None and plan.output.name.endswith(DICOM_SEG_ENDING)
        return self.writer(OutputSpec(formats=("dicom-seg",) if is_seg else ("image",)))

    def predict_planned(
        self,
        planned: Sequence[Planned],
        *,
        threaded: bool = True,
        before_first: Callable[[], None] | None = None,
        progress: Listener = ignore,
    ) -> Generator[CaseResult]:
        """Predict cases in order, failing ones included; the next is read and the last written meanwhile.

        `before_first()` is called before the first segmentation is written. Raises SpecError, before anything else,
        where an output would replace an input of the run or another output.
        `progress` hears of every case that comes to the network, with the number before it, of its tiles, and of its
        result.
        """
        self.refuse_overlap(planned, planned)
        gate = WriteGate(before_first)
        numbers = {id(plan): number for number, plan in enumerate(planned)}

        def infer(plan: Planned, loaded: _Loaded) -> tuple[_Loaded, Inferred]:
            progress(_at_case(plan.case.case_id, numbers[id(plan)], len(planned)))
            return loaded, self._infer(plan, loaded, progress)

        def finish(plan: Planned, inferred: tuple[_Loaded, Inferred]) -> CaseResult:
            return self._finish(plan, *inferred, gate)

        for plan, outcome in run_pipeline(
            planned, self._load, infer, finish, gate, threaded=threaded, before_infer=lambda: self.backends
        ):
            if isinstance(outcome, FastnnUNetError):
                outcome = CaseResult(case_id=plan.case.case_id, output=plan.output, error=plan.case.told(outcome))
            if plan is planned[-1]:
                progress(_at_case(outcome.case_id, len(planned), len(planned)))
            progress(Result(what=outcome.case_id, value=outcome))
            yield outcome

    def refuse_overlap(
        self,
        everything: Sequence[Planned],
        planned: Sequence[Planned],
        run_folder: Path | None = None,
    ) -> None:
        """Raises SpecError where an output would replace an input, or another output, of a run.

        `everything`: all its cases, those of its other parts and those that are predicted already included; `planned`:
        the cases to be predicted now. `run_folder`: where the side files of the run go.
        """
        previous = [plan.previous for plan in everything if plan.previous is not None]
        side_files = []
        if run_folder is not None:
            refuse_model_folder(run_folder)
            side_files = files_of_run(run_folder)
        inputs = inputs_of(plan.case for plan in everything)
        refuse_overlap((*inputs, *previous), [*side_files, *self._outputs(planned)])
        # an image is no result of an earlier run; a file that only lies among the images may be one
        images = inputs_of(plan.case for plan in everything if not plan.case.problem)
        refuse_overlap((*images, *previous), self._outputs(everything))

    def _outputs(self, planned: Sequence[Planned]) -> list[Path]:
        """What is written for cases; nothing for those that cannot be predicted."""
        found: list[Path] = []
        for plan in planned:
            if plan.output is not None and not plan.case.problem:
                writer = self._writer(plan)
                found += files_of_case(plan.output, writer.ending, save_probabilities=plan.save_probabilities)
                found += writer.files(plan.output)
        return found

    def predict_files(
        self,
        source: Path,
        output: Path,
        *,
        arguments: RunArguments | None = None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        previous: Path | None = None,
        cleanup: Cleanup | None = None,
        dicom_series: str | None = None,
        writer: OutputWriter | None = None,
        progress: Listener = ignore,
    ) -> list[CaseResult]:
        """Predict one image file or every case of a folder, with nnU-Net's names and side files.

        `previous`, which a cascade stage needs, is the folder of the previous segmentations, named as the cases.
        `arguments`: which part of a folder, and how many threads.
        `cleanup` is done to every label map. `dicom_series` is the UID of one series of a DICOM folder. `writer`
        (see `writer`) says what is written of each case; without one an image.
        In a folder a case that fails is recorded in its result and the others go on; a single image raises, and so does
        a full disk.
        `progress`: see `predict_planned`.
        """
        arguments = arguments or RunArguments()
        self.check_previous(previous)
        image_io(self.spec.reader_writer)  # an unknown reader is the bundle's fault, not the first case's
        writer = writer or self.writer(OutputSpec())
        is_folder = not is_single_image(source, self.spec)
        if is_folder and dicom_series is not None:
            raise SpecError(f"--series chooses one series of one folder of DICOM files, {source} is none")
        cases = find_cases(source, self.spec) if is_folder else [single_case(source, self.spec, dicom_series)]
        if writer.spec.of_series and cases and not any(case.series for case in cases):
            check_series(writer.spec.of_series[0], printable(source), None)
        everything = []
        for case in cases:
            file = output_file(source, output, case, self.spec, writer.ending)
            for written in (file, *writer.files(file)):
                case = with_output(case, written)
            everything.append(
                Planned(
                    case=case,
                    output=file,
                    previous=None if previous is None else previous / f"{case.case_id}{self.spec.file_ending}",
                    save_probabilities=save_probabilities,
                    cleanup=cleanup,
                    writer=writer,
                )
            )
        planned = [
            plan
            for plan in take_part(everything, arguments.part_id, arguments.num_parts)
            if plan.output is not None and (overwrite or not self.is_done(plan.output, save_probabilities, writer))
        ]
        for plan in planned:
            if plan.output is not None:
                check_output_folder(plan.output.parent)
        is_file = any(plan.output == output for plan in planned)
        self.refuse_overlap(everything, planned, None if is_file else output)

        def write_side_files() -> None:
            """With the first segmentation, so that a folder has both or neither."""
            described = arguments.describe(source, output, save_probabilities, overwrite, previous)
            write_run_files(self.spec, described, output, self.describe())

        results: list[CaseResult] = []
        with closing(
            self.predict_planned(
                planned,
                threaded=arguments.threaded and (is_folder or self.is_loading),  # an image by itself meanwhile
                before_first=None if is_file else write_side_files,
                progress=progress,
            )
        ) as outcomes:
            for result in outcomes:
                if result.error is not None and (not is_folder or isinstance(result.error, DiskSpaceError)):
                    raise result.error
                results.append(result)
        if writer.spec.statistics and any(result.error is None for result in results):
            writer.write_table(output)
        return results

    def is_done(self, file: Path, save_probabilities: bool, writer: OutputWriter | None = None) -> bool:
        """Whether a case was predicted: its segmentation is there and whole, and so are its probabilities if wanted.

        What else `writer` writes must be there.

        Other programs, and computers that crash, leave empty files and beginnings of files.
        """
        if not file.is_file():
            return False
        ending = self.spec.file_ending if writer is None else writer.ending
        if writer is not None and not all(beside.is_file() for beside in writer.beside(file).values()):
            return False
        wanted = [(file, partial(is_segmentation, image_io(self.spec.reader_writer), file))]
        if save_probabilities:
            archive, properties = sibling(file, ending, ".npz"), sibling(file, ending, ".pkl")
            if not (archive.is_file() and properties.is_file()):
                return False
            wanted += [(archive, partial(is_archive, archive)), (properties, partial(is_pickle, properties))]
        for path, is_whole in wanted:
            if not is_whole():
                _log.warning("%s is damaged or not complete: its case is predicted again", path)
                return False
        return True
