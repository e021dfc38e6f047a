"""The front desk: a function for each stage and one stream of events.

`label` makes the cache of a teacher and `import_maps` that of soft maps of one's own, `distil` trains students from it,
`export` makes a bundle of one, `predict` runs it, `benchmark` measures bundles beside nnU-Net; `distil_images` is all
of it for a published model and scans without labels. Each tells a `progress` listener (`fastnnunet.events`) what it
does, prints nothing, may be called in any thread, and raises the errors of `fastnnunet.errors`; `View` is a listener
that shows events on a terminal. `predict` writes what an `OutputSpec` asks for; of a label map that is there already,
`read_labelled` makes a `LabelledImage`, which `write_output`, `statistics` and `preview` take. Importing this needs
neither torch nor nnunetv2 nor zarr.
"""

from typing import TYPE_CHECKING, Any

from fastnnunet.api.benchmark import Benchmarked, benchmark, raw_folder
from fastnnunet.api.distil import Student, distil, train_locator
from fastnnunet.api.export import Exported, export, export_named, student_model
from fastnnunet.api.images import DistilledImages, distil_images, label_images, train_on_images
from fastnnunet.api.label import LabelledCache, label
from fastnnunet.api.names import find_bundle, find_run
from fastnnunet.api.predict import Predicted, predict
from fastnnunet.api.soft_maps import import_maps
from fastnnunet.outputs.spec import OutputSpec

if TYPE_CHECKING:
    from fastnnunet.api.fast_predictor import FastPredictor as FastPredictor
    from fastnnunet.api.view import View as View
    from fastnnunet.bench.job import BenchmarkJob as BenchmarkJob
    from fastnnunet.distill.job import TrainingJob as TrainingJob
    from fastnnunet.images.dicom.series import DicomSeries as DicomSeries
    from fastnnunet.outputs.dicom.codes import label_codes as label_codes
    from fastnnunet.outputs.labelled import LabelledImage as LabelledImage
    from fastnnunet.outputs.labelled import read_labelled as read_labelled
    from fastnnunet.outputs.labelled import structures_of as structures_of
    from fastnnunet.outputs.page.report import write_report as write_report
    from fastnnunet.outputs.preview import preview as preview
    from fastnnunet.outputs.statistics import CaseStatistics as CaseStatistics
    from fastnnunet.outputs.statistics import statistics as statistics
    from fastnnunet.outputs.write import write_output as write_output

__all__ = [
    "Benchmarked",
    "DistilledImages",
    "Exported",
    "LabelledCache",
    "OutputSpec",
    "Predicted",
    "Student",
    "benchmark",
    "distil",
    "distil_images",
    "export",
    "export_named",
    "find_bundle",
    "find_run",
    "import_maps",
    "label",
    "label_images",
    "predict",
    "raw_folder",
    "student_model",
    "train_locator",
    "train_on_images",
]

_LATER = {
    "BenchmarkJob": "fastnnunet.bench.job",
    "CaseStatistics": "fastnnunet.outputs.statistics",
    "DicomSeries": "fastnnunet.images.dicom.series",
    "FastPredictor": "fastnnunet.api.fast_predictor",
    "LabelledImage": "fastnnunet.outputs.labelled",
    "TrainingJob": "fastnnunet.distill.job",
    "View": "fastnnunet.api.view",
    "label_codes": "fastnnunet.outputs.dicom.codes",
    "preview": "fastnnunet.outputs.preview",
    "read_labelled": "fastnnunet.outputs.labelled",
    "statistics": "fastnnunet.outputs.statistics",
    "structures_of": "fastnnunet.outputs.labelled",
    "write_output": "fastnnunet.outputs.write",
    "write_report": "fastnnunet.outputs.page.report",
}


def __getattr__(name: str) -> Any:
    """What takes time to import, imported when asked for."""
    from importlib import import_module

    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
