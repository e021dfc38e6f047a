"""The files nnU-Net writes beside the segmentations, with its names and contents."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import __version__
from fastnnunet.runtime.files import atomic_output
from fastnnunet.specs.bundle import BundleSpec


def sibling(segmentation: Path, file_ending: str, ending: str) -> Path:
    """`case.nii.gz` -> `case.npz`: a file of the same case."""
    return segmentation.with_name(segmentation.name.removesuffix(file_ending) + ending)


def write_probabilities(
    probabilities_HZYX: npt.NDArray[np.float32], properties: dict[str, Any], segmentation: Path, file_ending: str
) -> None:
    """`.npz` (key `probabilities`) and `.pkl` (properties) of a case, as nnU-Net's ensembling reads them."""
    with atomic_output(sibling(segmentation, file_ending, ".npz")) as partial:
        np.savez_compressed(partial, probabilities=probabilities_HZYX)
    with atomic_output(sibling(segmentation, file_ending, ".pkl")) as partial:
        partial.write_bytes(pickle.dumps(properties))


def write_run_files(
    spec: BundleSpec,
    source: Path,
    folder: Path,
    *,
    save_probabilities: bool,
    overwrite: bool,
    run: dict[str, Any],
) -> None:
    """predict_from_raw_data_args.json, dataset.json and plans.json, which nnU-Net's later steps look for."""
    arguments = {
        "list_of_lists_or_source_folder": str(source),
        "output_folder_or_list_of_truncated_output_files": str(folder),
        "save_probabilities": save_probabilities,
        "overwrite": overwrite,
        "num_processes_preprocessing": 1,
        "num_processes_segmentation_export": 1,
        "folder_with_segs_from_prev_stage": None,
        "num_parts": 1,
        "part_id": 0,
        "fastnnunet": {"version": __version__, **run},
    }
    for name, content, sort_keys in (
        ("predict_from_raw_data_args.json", arguments, True),
        ("dataset.json", spec.dataset_json, False),
        ("plans.json", spec.plans, False),
    ):
        with atomic_output(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=4, sort_keys=sort_keys))
