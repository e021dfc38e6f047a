"""Cascades: the second stage sees the image and, a channel per foreground label, the previous segmentation."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.errors import MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.files.advice import validate_command
from fastnnunet.nnunet.files.cases import PreprocessedCases, dataset_class
from fastnnunet.nnunet.files.paths import model_folder, resolve_dataset
from fastnnunet.nnunet.files.plans import configuration_of, label_manager_of
from fastnnunet.specs.teacher import TeacherSpec

_ENDINGS = (".b2nd", ".npz", ".npy")  # of nnU-Net's data set classes
_SHOWN = 5


@dataclass(frozen=True)
class CascadeCases(PreprocessedCases):
    """Preprocessed cases whose image carries the previous segmentation as one-hot channels, as the networks see it.

    The digest of a case is over both, so other predictions of the previous stage make another cache.
    """

    previous: Path
    labels: tuple[int, ...]  # foreground labels (or regions), a channel each

    @cached_property
    def _dataset(self) -> Any:
        return dataset_class(self.folder)(str(self.folder), folder_with_segs_from_previous_stage=str(self.previous))

    def image_CZYX(self, case_id: str) -> np.ndarray:
        """Image and one-hot previous segmentation: float32 (C + labels, Z, Y, X). Raises MismatchError."""
        from fastnnunet.nnunet.v2 import convert_labelmap_to_one_hot

        image_CZYX = PreprocessedCases.image_CZYX(self, case_id)
        with self._reading(case_id):
            previous_ZYX = np.asarray(self.load(case_id)[2][:])
        if previous_ZYX.shape != image_CZYX.shape[1:]:
            raise MismatchError(
                f"previous segmentation of {case_id} in {self.previous} has shape {previous_ZYX.shape}, expected "
                f"{image_CZYX.shape[1:]} as its preprocessed image\npredict it again with the plans of this cascade"
            )
        one_hot = convert_labelmap_to_one_hot(previous_ZYX, list(self.labels), output_dtype=np.float32)
        return np.concatenate([image_CZYX, one_hot])


def previous_folder(spec: TeacherSpec, plans: dict[str, Any]) -> Path | None:
    """The folder of previous segmentations `spec` names; None for a configuration without a previous stage.

    Raises SpecError when one is missing or one is given that is not used, NotFoundError when it does not exist.
    """
    stage = configuration_of(plans, spec.configuration)[1].previous_stage_name
    if stage is None:
        if spec.previous is not None:
            raise SpecError(f"--previous: {spec.configuration} has no previous stage; leave it out")
        return None
    own = model_folder(resolve_dataset(spec.dataset), spec.trainer, spec.plans, stage)
    own = own / "predicted_next_stage" / spec.configuration
    if spec.previous is None:
        raise SpecError(
            f"{spec.configuration} is a cascade stage, it needs the predictions of {stage}\n"
            f"give --previous teacher (that is {own}), or --previous FOLDER for a student's predicted_next_stage"
        )
    folder = own if spec.previous == "teacher" else Path(spec.previous)
    if not folder.is_dir():
        raise NotFoundError(f"--previous: no predictions of {stage} at {folder}\n{_how_to_make(spec, stage)}")
    return folder


def open_cascade(
    cases: PreprocessedCases, previous: Path, spec: TeacherSpec, plans: dict[str, Any], dataset_json: dict[str, Any]
) -> CascadeCases:
    """`cases` joined with the previous segmentations. Raises NotFoundError naming the cases that have none."""
    manager, config = configuration_of(plans, spec.configuration)
    missing = [c for c in cases.case_ids if not any((previous / f"{c}{e}").is_file() for e in _ENDINGS)]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise NotFoundError(
            f"{previous} has no prediction of {len(missing)} of {len(cases.case_ids)} cases: "
            f"{' '.join(missing[:_SHOWN])}{more}\n{_how_to_make(spec, config.previous_stage_name)}"
        )
    labels = label_manager_of(manager, dataset_json).foreground_labels
    return CascadeCases(cases.folder, previous, tuple(labels), remake=cases.remake)


def _how_to_make(spec: TeacherSpec, stage: str) -> str:
    command = validate_command(spec, stage, range(5))
    return f"validation of the previous stage writes them, one fold at a time:\n  {command}"
