"""Cases a model is calibrated and judged on: nnU-Net's preprocessed training cases, or images through the bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastnnunet.errors import FastnnUNetError, ImageError, MismatchError, NotFoundError, SpecError
from fastnnunet.images.cases import Case, find_cases
from fastnnunet.images.io import image_io
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.specs.bundle import BundleSpec

Labels = NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCases:
    """Which cases to judge on and which to calibrate on; disjoint where there are enough."""

    judge: tuple[str, ...]
    calibrate: tuple[str, ...]

    @property
    def overlap(self) -> bool:
        return bool(set(self.judge) & set(self.calibrate))


def choose_cases(known: Sequence[str], held_out: Sequence[str], named: Sequence[str], count: int) -> JudgedCases:
    """Judge on the cases `named`, else on the first `count` of those `held_out`, else (there are none) of `known`.

    Calibration gets what is in neither group; where that is nothing, what is not judged on; else everything.
    Raises SpecError for names that are not known or a count below 1.
    """
    if count < 1:
        raise SpecError(f"--cases: got {count}, expected at least 1")
    if unknown := sorted(set(named) - set(known)):
        some = ", ".join(known[:5]) + (" ..." if len(known) > 5 else "")
        raise SpecError(f"--case: no case named {', '.join(unknown)}\nthere are {len(known)}: {some}")
    # without a split half of few images are left for calibration
    few = max(1, min(count, len(known) // 2))
    judge = tuple(named) or tuple(sorted(held_out)[:count]) or tuple(sorted(known)[:few])
    for left_out in (set(held_out) | set(judge), set(judge), set()):
        if rest := tuple(sorted(set(known) - left_out)):
            return JudgedCases(judge=judge, calibrate=rest)
    raise NotFoundError("there are no cases to calibrate on")


class GateCases(Protocol):
    """Where cases come from."""

    kind: str  # for records
    choice: JudgedCases
    has_labels: bool
    held_out: bool  # whether all cases to judge on were kept from the training of the model

    def preprocessed(self, case_id: str) -> Preprocessed:
        """What the network sees of a case."""

    def labels_ZYX(self, case_id: str) -> Labels:
        """The truth in the axes of a prediction of `preprocessed`. Only where `has_labels`."""


class TrainingCases:
    """nnU-Net's preprocessed cases of a bundle's data set, judged on its own grid without resampling back."""

    kind = "preprocessed training cases"
    has_labels = True

    def __init__(self, spec: BundleSpec, named: Sequence[str] = (), count: int = 8) -> None:
        """Judges on held-out cases of the bundle's fold unless cases are `named`.

        Raises NotFoundError when the cases are not there, SpecError, MismatchError.
        """
        from fastnnunet.nnunet.files.cases import open_cases
        from fastnnunet.nnunet.files.splits import split_of

        try:
            self._cases = open_cases(spec.plans, spec.configuration)
        except (NotFoundError, ModuleNotFoundError) as e:
            raise NotFoundError(
                f"{e}\nor calibrate on a folder of images instead: -i IMAGES, and -g LABELS where there are any"
            ) from e
        self._spec = spec
        known = self._cases.case_ids
        held_out: tuple[str, ...] = ()
        folds = spec.folds or (str(spec.provenance.get("fold", "all")),)
        if len(folds) == 1 and folds[0].isdigit():
            split = split_of(self._cases.folder.parent, known, int(folds[0]))
            held_out = tuple(sorted(set(split["val"]) & set(known))) if split else ()
        self.choice = choose_cases(known, held_out, named, count)
        self.held_out = set(self.choice.judge) <= set(held_out)

    def preprocessed(self, case_id: str) -> Preprocessed:
        from fastnnunet.export.patches import network_input

        image_CZYX = network_input(self._cases, case_id, self._spec.previous_labels)
        shape = image_CZYX.shape[1:]
        spacing_mm = (*(1.0,) * (3 - len(self._spec.spacing_mm)), *self._spec.spacing_mm)
        return Preprocessed(
            data_CZYX=image_CZYX,
            spacing_mm=spacing_mm,
            target_spacing_mm=spacing_mm,
            shape_before_cropping=shape,
            bbox=tuple((0, n) for n in shape),
            properties={},
        )

    def labels_ZYX(self, case_id: str) -> Labels:
        return self._cases.label_ZYX(case_id).transpose(self._spec.transpose_backward)


class ImageCases:
    """Images as `fastnnunet predict` reads them, judged in their own axes."""

    def __init__(
        self,
        bundle: LoadedBundle,
        images: Path,
        labels: Path | None = None,
        named: Sequence[str] = (),
        count: int = 8,
    ) -> None:
        """`bundle` preprocesses. `labels`: folder of CASE with the bundle's file ending.

        Raises NotFoundError, ImageError, SpecError, MismatchError.
        """
        spec = bundle.spec
        if spec.previous_labels:
            raise SpecError(
                "this bundle is a cascade stage, which cannot be calibrated on images alone\n"
                "leave -i out where nnU-Net's preprocessed cases are"
            )
        self.kind = "images"
        self._bundle, self._labels = bundle, labels
        self._cases: dict[str, Case] = {case.case_id: case for case in find_cases(images, spec)}
        self.choice = choose_cases(tuple(self._cases), (), named, count)
        self.held_out = False
        self.has_labels = labels is not None
        if labels is not None:
            missing = [c for c in self.choice.judge if not self._label_file(labels, c).is_file()]
            if missing:
                raise NotFoundError(
                    f"no label in {labels} for case(s) {', '.join(missing)}\n"
                    f"expected {missing[0]}{spec.file_ending}; name cases that have one with --case"
                )

    def preprocessed(self, case_id: str) -> Preprocessed:
        case = self._cases[case_id]
        if case.problem:
            raise ImageError(case.problem)
        image_CZYX, properties = image_io(self._bundle.spec.reader_writer).read(case.channels)
        return self._bundle.preprocess(image_CZYX, properties)

    def labels_ZYX(self, case_id: str) -> Labels:
        if self._labels is None:
            raise FastnnUNetError(f"there are no labels of {case_id}")
        file = self._label_file(self._labels, case_id)
        values = image_io(self._bundle.spec.reader_writer).read_segmentation(file)[0][0]
        labels = values.astype(np.int32)
        if (labels != values).any():
            raise MismatchError(f"{file} is not a label map: it holds values that are not whole numbers")
        return labels

    def _label_file(self, folder: Path, case_id: str) -> Path:
        return folder / f"{case_id}{self._bundle.spec.file_ending}"
