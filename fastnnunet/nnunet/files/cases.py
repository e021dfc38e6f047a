"""Preprocessed cases, read in place from nnU-Net's folder (blosc2 or npz)."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.errors import CorruptError, FastnnUNetError, MismatchError, NotFoundError
from fastnnunet.nnunet.files.advice import preprocess_command
from fastnnunet.nnunet.files.paths import nnunet_folder
from fastnnunet.nnunet.files.plans import configuration_of, read_json, resolved
from fastnnunet.specs.canonical import differences


@dataclass(frozen=True)
class PreprocessedCases:
    """All cases of one preprocessed configuration. Picklable; files are opened on use."""

    folder: Path
    remake: str = field(default="run nnUNetv2_preprocess again", kw_only=True)  # what mends the damaged case <case>

    @cached_property
    def _dataset(self) -> Any:
        return dataset_class(self.folder)(str(self.folder))

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
        with self._reading(case_id):
            return tuple(self._dataset.load_case(case_id))

    @contextlib.contextmanager
    def _reading(self, case_id: str) -> Iterator[None]:
        try:
            yield
        except FastnnUNetError:
            raise
        except FileNotFoundError as e:
            remake = self.remake.replace("<case>", case_id)
            raise NotFoundError(f"preprocessed case {case_id!r} is incomplete in {self.folder}: {e}\n{remake}") from e
        except Exception as e:  # a damaged pickle raises nearly anything
            said = str(e) if isinstance(e, OSError | RuntimeError) else f"{type(e).__name__}: {e}"
            remake = self.remake.replace("<case>", case_id)
            raise CorruptError(
                f"preprocessed case {case_id!r} in {self.folder} cannot be read: {said}\n{remake}"
            ) from e

    def shape_zyx(self, case_id: str) -> tuple[int, int, int]:
        """Spatial shape of a case."""
        z, y, x = (int(s) for s in self.load(case_id)[0].shape[1:])
        return z, y, x

    def image_CZYX(self, case_id: str) -> np.ndarray:
        """The normalised, resampled image: float32 (C, Z, Y, X), no view of a file.

        Raises NotFoundError, CorruptError.
        """
        with self._reading(case_id):
            image_CZYX = np.ascontiguousarray(self.load(case_id)[0][:], dtype=np.float32)
            return image_CZYX if image_CZYX.flags.writeable else image_CZYX.copy()

    def label_ZYX(self, case_id: str) -> np.ndarray:
        """The label map (Z, Y, X) beside the image; -1 outside the non-zero region."""
        with self._reading(case_id):
            return np.asarray(self.load(case_id)[1][0])

    def digest(self, case_id: str) -> str:
        """Hex SHA-256 over dtype, shape and decoded bytes of the image; how the file is compressed does not matter."""
        return image_digest(self.image_CZYX(case_id))


def image_digest(image_CZYX: np.ndarray) -> str:
    """Hex SHA-256 over dtype, shape and values of an image without gaps in memory."""
    digest = hashlib.sha256(f"{image_CZYX.dtype.str}{image_CZYX.shape}".encode())
    digest.update(image_CZYX.data)
    return digest.hexdigest()


def dataset_class(folder: Path) -> Any:
    """nnU-Net's class for the files of a folder of preprocessed cases. Raises CorruptError where it cannot tell."""
    from fastnnunet.nnunet.v2 import infer_dataset_class

    try:
        return infer_dataset_class(str(folder))
    except (AssertionError, KeyError) as e:
        endings = sorted({path.suffix or path.name for path in folder.iterdir() if path.is_file()})
        raise CorruptError(
            f"{folder}: nnU-Net cannot tell what kind of preprocessed cases it holds\n"
            f"  got      files ending in {', '.join(endings) or '(none)'}\n"
            "  expected .b2nd and .pkl; or .npz and .pkl, with or without unpacked .npy\n"
            "remove what is not nnU-Net's, or preprocess again"
        ) from e


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
    manager, config = configuration_of(plans, configuration)
    base = nnunet_folder("nnUNet_preprocessed") / manager.dataset_name
    if "data_identifier" not in config.configuration:  # which nnU-Net predicts without
        raise NotFoundError(
            f"configuration {configuration!r} of plans {manager.plans_name!r} has no data_identifier, hence no "
            "preprocessed cases\ntake the plans that nnU-Net wrote for this model"
        )
    folder = base / config.data_identifier
    if not folder.is_dir() or not any(folder.iterdir()):
        raise NotFoundError(
            f"no preprocessed cases in {folder}\n"
            f"put the model's plans.json at {base / manager.plans_name}.json and run: "
            + preprocess_command(manager.dataset_name, manager.plans_name, configuration)
        )
    beside = base / f"{made_by(plans, configuration, config.data_identifier)}.json"
    found = read_json(beside) if beside.is_file() else {}
    if configuration in found.get("configurations", {}):
        theirs = resolved(found, configuration)
        changed = differences(
            {f: config.configuration.get(f) for f in PREPROCESSING_FIELDS},
            {f: theirs.get(f) for f in PREPROCESSING_FIELDS},
        )
        if changed:
            raise MismatchError(
                f"{beside} preprocesses differently from the model's plans (model -> data):\n"
                + "\n".join(f"  - {c}" for c in changed)
                + "\nput the model's plans.json there and run: "
                + preprocess_command(manager.dataset_name, beside.stem, configuration)
            )
    again = preprocess_command(manager.dataset_name, beside.stem, configuration)
    return PreprocessedCases(folder, remake=f"make it again with: {again}")


def made_by(plans: dict[str, Any], configuration: str, data_identifier: str) -> str:
    """Name of the plans that data were preprocessed with, from the planner's `PLANS_CONFIGURATION`.

    A student shares its teacher's data, and a configuration those of the one it inherits from.
    """
    for name in (configuration, *sorted(plans["configurations"], key=len, reverse=True)):
        if (plans_name := data_identifier.removesuffix(f"_{name}")) != data_identifier:
            return plans_name
    return str(plans["plans_name"])
