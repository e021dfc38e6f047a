"""Preprocessed cases, read in place from nnU-Net's folder (blosc2 or npz)."""

import hashlib
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.errors import CorruptError, MismatchError, NotFoundError
from fastnnunet.nnunet.advice import preprocess_command
from fastnnunet.nnunet.paths import nnunet_folder
from fastnnunet.nnunet.plans import configuration_of, read_json
from fastnnunet.specs.canonical import differences


@dataclass(frozen=True)
class PreprocessedCases:
    """All cases of one preprocessed configuration. Picklable; files are opened on use."""

    folder: Path
    remake: str = field(default="run nnUNetv2_preprocess again", kw_only=True)  # what mends the damaged case <case>

    @cached_property
    def _dataset(self) -> Any:
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        return infer_dataset_class(str(self.folder))(str(self.folder))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    @cached_property
    def case_ids(self) -> tuple[str, ...]:
        """Case identifiers in sorted order."""
        return tuple(sorted(self._dataset.identifiers))

    def load(self, case_id: str) -> tuple[Any, ...]:
        """As nnU-Net's data set class: image, segmentation, previous segmentation, properties; opened, not read.

        Raises NotFoundError, CorruptError.
        """
        try:
            return tuple(self._dataset.load_case(case_id))
        except Exception as e:  # a damaged pickle raises nearly anything
            raise self._unreadable(case_id, e) from e

    def _unreadable(self, case_id: str, error: Exception) -> CorruptError | NotFoundError:
        remake = self.remake.replace("<case>", case_id)
        if isinstance(error, FileNotFoundError):
            return NotFoundError(f"preprocessed case {case_id!r} is incomplete in {self.folder}: {error}\n{remake}")
        said = str(error) if isinstance(error, OSError | RuntimeError) else f"{type(error).__name__}: {error}"
        return CorruptError(f"preprocessed case {case_id!r} in {self.folder} cannot be read: {said}\n{remake}")

    def shape_zyx(self, case_id: str) -> tuple[int, int, int]:
        """Spatial shape of a case."""
        z, y, x = (int(s) for s in self.load(case_id)[0].shape[1:])
        return z, y, x

    def image_CZYX(self, case_id: str) -> np.ndarray:
        """The normalised, resampled image: float32 (C, Z, Y, X). Raises NotFoundError, CorruptError."""
        stored = self.load(case_id)[0]
        try:
            return np.ascontiguousarray(stored[:], dtype=np.float32)
        except (RuntimeError, ValueError, OSError) as e:  # it was opened, and is unpacked only here
            raise self._unreadable(case_id, e) from e

    def label_ZYX(self, case_id: str) -> np.ndarray:
        """The label map (Z, Y, X) beside the image; -1 outside the non-zero region."""
        return np.asarray(self._dataset.load_case(case_id)[1][0])

    def digest(self, case_id: str) -> str:
        """Hex SHA-256 over dtype, shape and decoded bytes of the image; how the file is compressed does not matter."""
        image_CZYX = self.image_CZYX(case_id)
        digest = hashlib.sha256(f"{image_CZYX.dtype.str}{image_CZYX.shape}".encode())
        digest.update(image_CZYX.data)
        return digest.hexdigest()


PREPROCESSING_FIELDS = (
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)


def open_cases(plans: dict[str, Any], configuration: str) -> PreprocessedCases:
    """The preprocessed cases a model with these plans was trained on (by `data_identifier`).

    Raises NotFoundError with the command that makes them, MismatchError when the plans beside the preprocessed data
    prepare images in another way than the model's.
    """
    _, config = configuration_of(plans, configuration)
    base = nnunet_folder("nnUNet_preprocessed") / plans["dataset_name"]
    folder = base / config.data_identifier
    plans_name = config.data_identifier.removesuffix(f"_{configuration}")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise NotFoundError(
            f"no preprocessed cases in {folder}\n"
            f"put the model's plans.json at {base / plans_name}.json and run: "
            f"nnUNetv2_preprocess -d {plans['dataset_name']} -plans_name {plans_name} -c {configuration}"
        )
    beside = base / f"{plans_name}.json"
    if beside.is_file():
        theirs = configuration_of(read_json(beside), configuration)[1].configuration
        changed = differences(
            {f: config.configuration.get(f) for f in PREPROCESSING_FIELDS},
            {f: theirs.get(f) for f in PREPROCESSING_FIELDS},
        )
        if changed:
            raise MismatchError(
                f"{beside} preprocesses differently from the model's plans (model -> data):\n"
                + "\n".join(f"  - {c}" for c in changed)
                + "\nput the model's plans.json there and preprocess again"
            )
    again = preprocess_command(plans["dataset_name"], plans_name, configuration)
    return PreprocessedCases(folder, remake=f"make it again with: {again}")
