"""Between what callers of nnU-Net's predictor hand over and what this runtime works on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.devices import parse_device
from fastnnunet.errors import SpecError
from fastnnunet.images.cases import Case, find_cases, is_single_image, single_case, with_output
from fastnnunet.images.dicom.series import DicomSeries, is_dicom_folder
from fastnnunet.runtime.predict import Planned
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.specs.bundle import BundleSpec


def device_name(device: Any) -> str | None:
    """`cpu`, `cuda` or `cuda:1` ... of a name or a torch.device; Apple's `mps` has no backend here and becomes `cpu`.

    Raises SpecError for other names.
    """
    if device is None:
        return None
    name = str(device)
    if name.partition(":")[0] == "mps" or name == "cpu:0":
        return "cpu"
    return str(parse_device(name))


def is_tensor(data: Any) -> bool:
    """Whether something is a torch tensor, found out without torch."""
    return type(data).__module__.split(".")[0] == "torch"


def as_float32(data: Any) -> npt.NDArray[np.float32]:
    """An array or tensor as a float32 array of this process's memory."""
    return np.asarray(data.detach().cpu().numpy() if is_tensor(data) else data, dtype=np.float32)


def listed(value: Any, count: int) -> list[Any]:
    """A list as it is, None as `count` times None, anything else as a list of one."""
    return value if isinstance(value, list) else [value] * (count if value is None else 1)


@dataclass(frozen=True, slots=True)
class RawImage:
    """An image in memory with what belongs to it."""

    image: Any  # (C, z, y, x)
    previous: Any  # (1, z, y, x) segmentation of the previous stage, or None
    properties: dict[str, Any]
    ofile: str | None  # where the segmentation goes, a file name without its ending


def raw_images(images: Any, previous: Any, properties: Any, ofiles: Any) -> list[RawImage]:
    """Lists, or single ones, of everything, put together. Raises SpecError where there are not as many of each."""
    count = len(listed(images, 1))
    columns = [listed(column, count) for column in (images, previous, properties, ofiles)]
    if lengths := {len(column) for column in columns} - {count}:
        raise SpecError(f"got {count} image(s) but lists of {lengths}; expected as many of everything")
    return [RawImage(*row) for row in zip(*columns, strict=True)]


def plan_cases(
    spec: BundleSpec,
    source: str | Path | Sequence[Sequence[str | Path]],
    output: str | Path | Sequence[str | Path] | None,
    previous: Path | None,
    save_probabilities: bool,
) -> list[Planned]:
    """Cases of a folder or of lists of channel files, and where they go: a folder, truncated file names, or None.

    Raises SpecError, and NotFoundError when there is nothing to predict.
    """
    for what, value in (("input", source), ("output", output)):
        if value == "" or (isinstance(value, list | tuple) and "" in value):
            raise SpecError(f"the {what} is an empty name, expected a folder or file (a variable that is not set?)")
    if isinstance(source, str | Path):
        place = Path(source)
        cases = [single_case(place, spec)] if is_single_image(place, spec) else find_cases(place, spec)
    else:
        cases = [_listed_case(spec, files) for files in source]
    if output is None:
        outputs: list[Path | None] = [None] * len(cases)
    elif isinstance(output, str | Path):
        outputs = [Path(output) / f"{case.case_id}{spec.file_ending}" for case in cases]
    else:
        if len(output) != len(cases):
            raise SpecError(f"got {len(cases)} cases and {len(output)} output files, expected as many")
        outputs = [Path(f"{name}{spec.file_ending}") for name in output]
    return [
        Planned(
            case=case if file is None else with_output(case, file),
            output=file,
            previous=None if previous is None else previous / f"{case.case_id}{spec.file_ending}",
            save_probabilities=save_probabilities,
        )
        for case, file in zip(cases, outputs, strict=True)
    ]


def _listed_case(spec: BundleSpec, files: Sequence[str | Path]) -> Case:
    """One case of a list of its channels, files or folders of a DICOM series. Raises SpecError."""
    if isinstance(files, str | Path) or not len(files):
        raise SpecError(f"a case: got {files!r}, expected a list of its channels, [[first, second], ...]")
    channels = tuple(Path(f) for f in files)
    if all(is_dicom_folder(channel) for channel in channels):
        return Case(channels[0].resolve().name, (), None, tuple(DicomSeries(folder=folder) for folder in channels))
    crop = len(spec.file_ending) + len("_0000")
    return Case(channels[0].name[:-crop], channels)


def as_preprocessed(spec: BundleSpec, data: Any, properties: dict[str, Any]) -> Preprocessed:
    """What nnU-Net's preprocessing hands on, as this runtime's stages take it."""
    if isinstance(data, str | Path):
        file = Path(data)
        data = np.load(file)
        file.unlink()
    spacing = tuple(float(properties["spacing"][axis]) for axis in spec.transpose_forward)
    return Preprocessed(
        data_CZYX=as_float32(data),
        spacing_mm=spacing,
        target_spacing_mm=(*spacing[: len(spacing) - len(spec.spacing_mm)], *spec.spacing_mm),
        shape_before_cropping=tuple(properties["shape_before_cropping"]),
        bbox=tuple((int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]),
        properties=properties,
    )
