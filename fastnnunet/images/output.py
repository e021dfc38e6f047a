"""The files nnU-Net writes beside the segmentations, with its names and contents."""

import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.system.files import atomic_output, make_folder
from fastnnunet.version import __version__

RUN_FILES = ("predict_from_raw_data_args.json", "dataset.json", "plans.json")
# what predicting leaves beside a label map: of nnU-Net, and the other outputs; and in the folder as a whole
BESIDE = (
    *(".npz", ".pkl", ".json", "_statistics.json", "_statistics.csv", "_preview.png"),
    *(".dcm", ".rtstruct.dcm", ".glb", "_stl"),
)
OF_FOLDER = ("statistics.csv", "report.html")
_TIFF = (".tif", ".tiff")  # their spacing lies beside them


def sibling(segmentation: Path, file_ending: str, ending: str) -> Path:
    """`case.nii.gz` -> `case.npz`: a file of the same case."""
    return segmentation.with_name(segmentation.name.removesuffix(file_ending) + ending)


def files_of_case(segmentation: Path, file_ending: str, *, save_probabilities: bool = False) -> list[Path]:
    """All files that are written for a case."""
    endings = [*((".npz", ".pkl") if save_probabilities else ()), *((".json",) if file_ending in _TIFF else ())]
    return [segmentation, *(sibling(segmentation, file_ending, ending) for ending in endings)]


def files_of_run(folder: Path) -> list[Path]:
    """What `write_run_files` writes."""
    return [folder / name for name in RUN_FILES]


def write_probabilities(
    probabilities_HZYX: npt.NDArray[np.float32], properties: dict[str, Any], segmentation: Path, file_ending: str
) -> None:
    """`.npz` (key `probabilities`) and `.pkl` (properties) of a case, as nnU-Net's ensembling reads them."""
    with atomic_output(sibling(segmentation, file_ending, ".npz")) as partial:
        np.savez_compressed(partial, probabilities=probabilities_HZYX)
    with atomic_output(sibling(segmentation, file_ending, ".pkl")) as partial:
        partial.write_bytes(pickle.dumps(properties))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunArguments:
    """Arguments of nnU-Net's predict command that concern the run as a whole, as it records them."""

    num_processes_preprocessing: int = 3
    num_processes_segmentation_export: int = 3
    num_parts: int = 1
    part_id: int = 0

    @property
    def threaded(self) -> bool:
        """nnU-Net works in one process when both counts are 0; here then everything happens in one thread."""
        return self.num_processes_preprocessing > 0 or self.num_processes_segmentation_export > 0

    def describe(
        self, source: object, output: object, save_probabilities: bool, overwrite: bool, previous: object | None
    ) -> dict[str, Any]:
        """The content of predict_from_raw_data_args.json."""
        return {
            "list_of_lists_or_source_folder": _plain(source),
            "output_folder_or_list_of_truncated_output_files": _plain(output),
            "save_probabilities": save_probabilities,
            "overwrite": overwrite,
            **asdict(self),
            "folder_with_segs_from_prev_stage": _plain(previous),
        }


def _plain(value: object) -> Any:
    """Names of files, and lists of them, as JSON takes them."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if value is None else str(value)


def write_run_files(spec: BundleSpec, arguments: dict[str, Any], folder: Path, run: dict[str, Any]) -> None:
    """predict_from_raw_data_args.json, dataset.json and plans.json, which nnU-Net's later steps look for.

    `run`: what predicted, recorded beside nnU-Net's own `arguments`. The folder need not exist yet.
    """
    write_model_files(spec, folder)
    content = {**arguments, "fastnnunet": {"version": __version__, **run}}
    with atomic_output(folder / RUN_FILES[0]) as partial:
        partial.write_text(json.dumps(content, indent=4, sort_keys=True))


def write_model_files(spec: BundleSpec, folder: Path) -> None:
    """dataset.json and plans.json: what the label maps of a folder mean. It need not exist yet."""
    make_folder(folder)
    for name, content in zip(RUN_FILES[1:], (spec.dataset_json, spec.plans), strict=True):
        with atomic_output(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=4))
