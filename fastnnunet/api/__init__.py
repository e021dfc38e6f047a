"""The front desk: a function for each stage and one stream of events.

`label` makes the cache of a teacher and `import_maps` that of soft maps of one's own, `distil` trains students from it,
`export` makes a bundle of one, `predict` runs it, `benchmark` measures bundles beside nnU-Net; `distil_images` is all
of it for a published model and scans without labels. Each tells a `progress` listener (`fastnnunet.events`) what it
does, prints nothing, may be called in any thread, and raises the errors of `fastnnunet.errors`; `View` is a listener
that shows events on a terminal. Importing this needs neither torch nor nnunetv2 nor zarr.
"""

from typing import TYPE_CHECKING, Any

from fastnnunet.api.benchmark import Benchmarked, benchmark, raw_folder
from fastnnunet.api.distil import Student, distil
from fastnnunet.api.export import Exported, export, export_named, student_model
from fastnnunet.api.images import DistilledImages, distil_images, label_images, train_on_images
from fastnnunet.api.label import LabelledCache, label
from fastnnunet.api.names import find_bundle, find_run
from fastnnunet.api.predict import Predicted, predict
from fastnnunet.api.soft_maps import import_maps

if TYPE_CHECKING:
    from fastnnunet.api.fast_predictor import FastPredictor as FastPredictor
    from fastnnunet.api.view import View as View
    from fastnnunet.bench.job import BenchmarkJob as BenchmarkJob
    from fastnnunet.distill.job import TrainingJob as TrainingJob

__all__ = [
    "Benchmarked",
    "DistilledImages",
    "Exported",
    "LabelledCache",
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
    "train_on_images",
]

_LATER = {
    "BenchmarkJob": "fastnnunet.bench.job",
    "FastPredictor": "fastnnunet.api.fast_predictor",
    "TrainingJob": "fastnnunet.distill.job",
    "View": "fastnnunet.api.view",
}


def __getattr__(name: str) -> Any:
    """What takes time to import, imported when asked for."""
    from importlib import import_module

    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
