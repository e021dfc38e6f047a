"""An image on its way through a cascade: what the first stage sees of it, and what the second sees of its label map.

As nnU-Net predicts the two one after the other: the first stage's label map on the grid of the image is preprocessed
with the image, as a segmentation. nnU-Net also takes what it labels for part of the body where it normalises within a
mask; here the image is normalised as any other.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.files.cascade import CascadeCases
from fastnnunet.nnunet.files.model import Model
from fastnnunet.nnunet.unlabelled.image_case import ImageTask, read_image


@dataclass(frozen=True)
class UnlabelledCascadeCases(CascadeCases):
    """The finished cases of a set with the label maps of the first stage."""

    finished: tuple[str, ...]
    remake: str = field(default="remove it and run the same command again", kw_only=True)

    @cached_property
    def case_ids(self) -> tuple[str, ...]:
        """Case identifiers in sorted order."""
        return tuple(sorted(self.finished))


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedImage:
    """An image as its file has it, and as the first stage sees it; make one with `first_stage_image`."""

    raw: np.ndarray  # (C, and the axes as stored)
    raw_properties: dict[str, Any]
    image_CZYX: np.ndarray  # float32
    properties: dict[str, Any]  # of it


def check_stages(first: Model, second: Model) -> None:
    """Refuse two models that are no cascade. Raises MismatchError."""
    wanted = second.config.previous_stage_name
    problems = []
    if first.configuration != wanted:
        problems.append(f"configuration: got {first.configuration}, expected {wanted}")
    for name in ("labels", "regions_class_order", "channel_names", "file_ending"):
        ours, theirs = (model.dataset_json.get(name) for model in (first, second))
        if ours != theirs:
            problems.append(f"{name}: got {ours}, expected {theirs}")
    if problems:
        raise MismatchError(
            f"the first stage does not belong to {second.configuration}:\n" + "\n".join(f"  - {p}" for p in problems)
        )


def first_stage_image(task: ImageTask, first: Model) -> StagedImage:
    """Read and preprocess an image. Raises ValueError, and what nnU-Net's reader raises."""
    raw, raw_properties = read_image(task)
    image_CZYX, _, properties = first.config.preprocessor_class(verbose=False).run_case_npy(
        raw, None, deepcopy(raw_properties), first.manager, first.config, first.dataset_json
    )
    return StagedImage(
        raw=raw,
        raw_properties=raw_properties,
        image_CZYX=np.ascontiguousarray(image_CZYX, np.float32),
        properties=properties,
    )


def second_stage_labels(image: StagedImage, logits_HZYX: np.ndarray, first: Model, second: Model) -> np.ndarray:
    """Label map (Z, Y, X) of the first stage's logits on the grid of the second stage."""
    from fastnnunet.nnunet.v2 import convert_predicted_logits_to_segmentation_with_correct_shape

    labels = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits_HZYX, first.manager, first.config, first.labels, image.properties
    )
    _, previous_1ZYX, _ = second.config.preprocessor_class(verbose=False).run_case_npy(
        image.raw,
        labels[None].astype(np.float32),
        deepcopy(image.raw_properties),
        second.manager,
        second.config,
        second.dataset_json,
    )
    previous_ZYX: np.ndarray = np.maximum(previous_1ZYX[0], 0)  # -1 is outside the body
    return previous_ZYX
