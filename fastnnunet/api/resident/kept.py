"""`KeptModel`: a bundle that stays in memory and predicts one image after another into files."""

from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.events import Listener, ignore
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.run.kept import KeptModelSpec

if TYPE_CHECKING:
    from fastnnunet.images.cases import Case
    from fastnnunet.runtime.predict import CaseResult


class KeptModel:
    """A loaded bundle. Labels, names and files are those of `predict` with the same settings."""

    def __init__(self, spec: KeptModelSpec, outputs: OutputSpec) -> None:
        """`outputs`: what is written of each image.

        Raises what `Predictor.load` raises, SpecError for a cascade stage and for outputs that cannot be,
        ModuleNotFoundError without the extra `dicom` where it is needed.
        """
        from fastnnunet.api.conversions import device_name
        from fastnnunet.images.io import image_io
        from fastnnunet.images.tidy.rules import cleanup_from_words
        from fastnnunet.runtime.predict import Predictor

        self.settings = spec
        self._predictor = Predictor.load(
            spec.bundle,
            spec.backend,
            threads=spec.threads,
            precision=spec.precision,
            device=device_name(spec.device),
            mirroring=spec.mirroring,
        )
        self._predictor.check_previous(None)
        image_io(self.spec.reader_writer)
        self._writer = self._predictor.writer(outputs, spec.bundle)
        self._cleanup = cleanup_from_words(
            self.spec.labels,
            keep_largest=spec.keep_largest,
            min_size=spec.min_size,
            fill_holes=spec.fill_holes,
            postprocessing_file=None,
        )

    @property
    def spec(self) -> BundleSpec:
        """What the bundle says of itself."""
        return self._predictor.spec

    @property
    def ending(self) -> str:
        """Of the file that says whether an image is done."""
        return self._writer.ending

    def files(self, output: Path) -> dict[str, Path]:
        """What is written beside `output`, by what it is."""
        return self._writer.beside(output)

    def predict(self, case: "Case", output: Path, *, progress: Listener = ignore) -> "CaseResult":
        """Predict a case into the file `output`, which has `ending`, and what goes beside it: that first.

        In the caller's thread: what `progress` raises ends the prediction, and nothing is written then.
        Raises ImageError and the other errors of the stages.
        """
        from fastnnunet.images.cases import with_output
        from fastnnunet.runtime.predict import Planned

        for file in (output, *self._writer.files(output)):
            case = with_output(case, file)
        planned = [Planned(case=case, output=output, cleanup=self._cleanup, writer=self._writer)]
        (result,) = self._predictor.predict_planned(planned, threaded=False, progress=progress)
        if result.error is not None:
            raise result.error
        return result

    def tell_all(self, folder: Path) -> None:
        """Bring up to date what a folder tells of all its images: dataset.json, plans.json, the table of statistics."""
        from fastnnunet.images.output import write_model_files

        write_model_files(self.spec, folder)
        if self._writer.spec.statistics:
            self._writer.write_table(folder)
