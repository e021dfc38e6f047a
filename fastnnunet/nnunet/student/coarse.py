"""A data set at a coarse spacing, which a locator learns from: an nnU-Net data set like any other, made of the
preprocessed cases of another.

Its voxels are blocks of theirs: the image the mean, and the label, of which there is one, foreground wherever any voxel
of the block is. So it takes a sixty-fourth of the disk, and nnU-Net trains on it as on any data.
    <data identifier>/                  cases as nnU-Net's preprocessing writes them
    <data identifier>.made_of.json      beside it: size and time of the files that they were made of
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.errors import SpecError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.geometry.blocks import block_any, block_means, coarse_shape
from fastnnunet.nnunet.files.cases import PreprocessedCases, open_cases
from fastnnunet.nnunet.files.model import Model
from fastnnunet.nnunet.files.paths import nnunet_folder
from fastnnunet.nnunet.files.plans import read_json, with_configuration
from fastnnunet.nnunet.student.plans import BATCH_NORM, PLAIN
from fastnnunet.specs.locator import FOREGROUND, MOST_FACTOR
from fastnnunet.system.files import atomic_output, room_for

MOST_VOXELS = 2**16  # of a median image: as much as one patch of nnU-Net's smallest
LEAST_FACTOR = 2
FEATURES = (8, 16, 32, 64)  # of the stages of a locator
SHORTEST = 4  # voxels along an axis in the last stage
BATCH_SIZE = 4


def check_locatable(model: Model) -> None:
    """Refuse a model for which a locator makes no sense. Raises SpecError."""
    reasons = {
        f"{model.configuration} is a 2d configuration: the box of a slice is not found in one": len(model.patch_size)
        < 3,
        f"{model.configuration} is a cascade stage, which sees where to look": model.config.previous_stage_name
        is not None,
        "the data set has an ignore label: what is there may be foreground": bool(model.labels.has_ignore_label),
    }
    for reason, holds in reasons.items():
        if holds:
            raise SpecError(f"--locator: {reason}\nleave it out; the student then runs everywhere")


def coarse_factor(model: Model) -> tuple[int, ...]:
    """Voxels along each axis (z, y, x) that become one: alike in mm, and so many that a median image has few."""
    spacing = [float(s) for s in model.config.spacing]
    median = _median(model)
    coarse_mm = LEAST_FACTOR * min(spacing)
    while True:
        factor = tuple(min(MOST_FACTOR, max(1, round(coarse_mm / s))) for s in spacing)
        if math.prod(coarse_shape(median, factor)) <= MOST_VOXELS or min(factor) == MOST_FACTOR:
            return factor
        coarse_mm *= 1.1


def locator_network(model: Model, factor: Sequence[int]) -> dict[str, Any]:
    """`arch_kwargs` of a small plain U-Net with batch norm for median images at the coarse spacing."""
    halvings = [_halvings(n) for n in _coarse_median(model, factor)]
    stages = max(3, max(halvings) + 1)  # nnU-Net's deep supervision needs three
    conv = "torch.nn.modules.conv.Conv3d"
    return {
        "n_stages": stages,
        "features_per_stage": list(FEATURES[:stages]),
        "conv_op": conv,
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1], *([2 if stage <= h else 1 for h in halvings] for stage in range(1, stages))],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": False,
        "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
        "norm_op_kwargs": dict(BATCH_NORM),
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def coarse_plans(model: Model, factor: Sequence[int]) -> dict[str, Any]:
    """The plans with a coarse spacing in the model's configuration, patches of a median image, and other cases."""
    config, median = model.config.configuration, _coarse_median(model, factor)
    multiples = [2 ** _halvings(n) for n in median]
    changes: dict[str, Any] = {
        "data_identifier": f"{model.manager.plans_name}_coarse{'x'.join(map(str, factor))}_{model.configuration}",
        "spacing": [float(s) * f for s, f in zip(config["spacing"], factor, strict=True)],
        "median_image_size_in_voxels": [float(n) for n in median],
        "patch_size": [-(-n // m) * m for n, m in zip(median, multiples, strict=True)],
        "batch_size": BATCH_SIZE,
        "architecture": {
            "network_class_name": PLAIN,
            "arch_kwargs": locator_network(model, factor),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return with_configuration(model.plans, model.configuration, **changes)


def coarse_dataset_json(dataset_json: dict[str, Any]) -> dict[str, Any]:
    """The same images with one label."""
    return {**{k: v for k, v in dataset_json.items() if k != "regions_class_order"}, "labels": FOREGROUND}


def make_coarse_cases(model: Model, factor: Sequence[int], progress: Listener = ignore) -> Path:
    """Their folder, with all cases; made now unless it was made of the preprocessed cases as they are.

    Raises NotFoundError, CorruptError, MismatchError of the preprocessed cases.
    """
    source = open_cases(model.plans, model.configuration)
    config = coarse_plans(model, factor)["configurations"][model.configuration]
    folder = nnunet_folder("nnUNet_preprocessed") / model.manager.dataset_name / config["data_identifier"]
    note, made_of = folder.with_name(f"{folder.name}.made_of.json"), _files(source)
    if folder.is_dir() and note.is_file() and read_json(note) == made_of:
        return folder
    note.unlink(missing_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for number, case_id in enumerate(source.case_ids, 1):
            with room_for(folder, temporary):
                _write_case(source, case_id, factor, temporary)
            progress(Progress(what="coarse cases", done=number, total=len(source.case_ids), unit="cases", note=case_id))
        temporary.chmod(0o755)
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with atomic_output(note) as unfinished:
        unfinished.write_text(json.dumps(made_of))
    return folder


def _write_case(source: PreprocessedCases, case_id: str, factor: Sequence[int], folder: Path) -> None:
    from fastnnunet.nnunet.v2 import DefaultPreprocessor, nnUNetDatasetBlosc2

    image_CZYX = block_means(source.image_CZYX(case_id), factor)
    label_1ZYX = block_any(source.label_ZYX(case_id) > 0, factor).astype(np.int8)[None]
    locations = DefaultPreprocessor._sample_foreground_locations(label_1ZYX, [1], verbose=False)
    properties = {**source.load(case_id)[3], "class_locations": locations}
    nnUNetDatasetBlosc2.save_case(
        image_CZYX,
        label_1ZYX,
        properties,
        str(folder / case_id),
        chunks=image_CZYX.shape,
        blocks=image_CZYX.shape,
        chunks_seg=label_1ZYX.shape,
        blocks_seg=label_1ZYX.shape,
    )


def _files(source: PreprocessedCases) -> dict[str, Any]:
    """Size and time of every file of the preprocessed cases."""
    found = sorted(file for file in source.folder.iterdir() if file.is_file())
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in found}


def _coarse_median(model: Model, factor: Sequence[int]) -> tuple[int, ...]:
    return coarse_shape(_median(model), factor)


def _median(model: Model) -> list[int]:
    """Shape of a median preprocessed image; plans that do not tell have patches of it, or of a part."""
    config = model.config.configuration
    return [max(1, math.ceil(n)) for n in config.get("median_image_size_in_voxels") or config["patch_size"]]


def _halvings(length: int) -> int:
    """How often an axis is halved on the way to the last stage."""
    return max(0, min(len(FEATURES) - 1, int(math.log2(max(1, length) / SHORTEST))))
