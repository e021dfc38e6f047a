"""A label map as a DICOM Segmentation object that refers to the series it was made from (PS3.3 A.51), by highdicom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError, SpecError
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.outputs.colours import cielab_of
from fastnnunet.outputs.dicom.codes import Coded, LabelCodes, StructureCodes, label_codes
from fastnnunet.outputs.dicom.headers import UTF8, WITHOUT, SourceHeaders, no_complaints, source_headers, tell
from fastnnunet.outputs.dicom.slices import on_slices
from fastnnunet.outputs.dicom.values import one_line
from fastnnunet.outputs.labelled import LabelledImage, Structure
from fastnnunet.outputs.spec import SegmentationType
from fastnnunet.system.files import atomic_output
from fastnnunet.version import __version__


@dataclass(frozen=True, slots=True)
class _Described:
    """What is segmented, by what, and how it is stored."""

    structures: Sequence[Structure]
    model: str
    codes: LabelCodes
    segmentation_type: SegmentationType


def check_segmentation_type(segmentation_type: SegmentationType, structures: Sequence[Structure]) -> None:
    """Raises SpecError where segmentations of these structures cannot be of that type."""
    if segmentation_type == "binary":
        return
    import highdicom as hd

    if not hasattr(hd.seg.SegmentationTypeValues, "LABELMAP"):
        raise SpecError(
            f"--segmentation-type labelmap: highdicom {hd.__version__} cannot write it, expected a later one\n"
            "update it: pip install --upgrade highdicom, or leave the option out"
        )
    if overlap(structures):
        raise SpecError(
            "--segmentation-type labelmap: regions of this model overlap, and a voxel of a label map has one label\n"
            "leave the option out: binary segments may overlap"
        )


def overlap(structures: Sequence[Structure]) -> bool:
    """Whether a voxel may belong to several structures."""
    values = [value for structure in structures for value in structure.values]
    return len(set(values)) < len(values)


def check_dicom_seg(
    series: DicomSeries,
    *,
    structures: Sequence[Structure],
    model: str,
    codes: LabelCodes | None = None,
    segmentation_type: SegmentationType = "binary",
) -> None:
    """Find out before any work whether a segmentation can refer to a series; log what of its headers is mended.

    A segmentation of one voxel in two slices is put together for it: in what the others differ is checked one by one.
    Raises ImageError when none can be.
    """
    source = source_headers(series)
    foreground = structures[0].values[0] if structures else 0
    number = min(len(source.slices), 2)
    two = replace(source, slices=source.slices[:number], storage_classes=source.storage_classes[:number])
    one_voxel_ZYX = np.full((number, 1, 1), foreground, np.uint16)
    described = _Described(structures, model, codes or label_codes(structures), segmentation_type)
    tell(source, series, _segmentation(one_voxel_ZYX, two, series, described), "DICOM SEG")


def write_dicom_seg(
    labelled: LabelledImage,
    file: Path,
    *,
    codes: LabelCodes | None = None,
    segmentation_type: SegmentationType = "binary",
    checked: bool = False,
) -> None:
    """Write a segmentation with a segment for each structure, in their order, of the series of a labelled image.

    `codes`: of the structures; those of their names unless given. Structures without a voxel are described all the
    same. `segmentation_type`: binary has a frame for each segment and slice; labelmap, of structures that do not
    overlap, one for each slice, and takes readers of 2024 and later. What of the headers is mended is logged, unless
    `check_dicom_seg` did so before (`checked`).
    Raises SpecError where structures overlap that cannot in a label map, ImageError when the series lacks what a
    segmentation must refer to, MismatchError when the label map does not lie on its slices, ModuleNotFoundError without
    the extra `dicom`.
    """
    check_segmentation_type(segmentation_type, labelled.structures)
    series = labelled.series
    assert series is not None
    source = source_headers(series)
    structures = labelled.structures
    described = _Described(structures, labelled.model, codes or label_codes(structures), segmentation_type)
    segmentation = _segmentation(on_slices(labelled), source, series, described)
    if not checked:
        tell(source, series, segmentation, "DICOM SEG")
    with atomic_output(file) as partial, no_complaints():
        segmentation.save_as(partial)


def _segmentation(
    labels_ZYX: npt.NDArray[Any],
    source: SourceHeaders,
    series: DicomSeries,
    described: _Described,
) -> Any:
    """The segmentation as a data set that can be written. Raises ImageError, ModuleNotFoundError."""
    import_module("highdicom")
    with no_complaints():
        try:
            made = _put_together(labels_ZYX, source, described)
            if labels_ZYX.shape[1:] == (1, 1):  # a trial
                made.save_as(BytesIO())
            return made
        except Exception as e:  # highdicom and pydicom raise whatever their parts raise
            reason = f"{type(e).__name__}: {e}"
            raise ImageError(f"{series.folder}: no DICOM SEG can refer to this series: {reason}{WITHOUT}") from e


def _put_together(labels_ZYX: npt.NDArray[Any], source: SourceHeaders, described: _Described) -> Any:
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept

    structures, model = described.structures, described.model
    names = [one_line(structure.name) or str(structure.number) for structure in structures]
    algorithm = hd.AlgorithmIdentificationSequence(
        name=one_line(f"FastnnUNet {model}"),
        family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
        version=__version__,
    )
    descriptions = [
        _description(structure, name, described.codes[structure.name], algorithm)
        for structure, name in zip(structures, names, strict=True)
    ]
    for header in source.slices:
        header.Rows, header.Columns = labels_ZYX.shape[1:]
    is_ascii = source.is_ascii and all(text.isascii() for text in (*names, model))
    segmentation = hd.seg.Segmentation(
        source_images=source.slices,
        pixel_array=_segments_array(labels_ZYX, structures),
        segmentation_type=described.segmentation_type.upper(),
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=source.series_number,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="FastnnUNet",
        manufacturer_model_name="FastnnUNet",
        software_versions=__version__,
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=one_line(f"Segmentation by {model}"),
        series_description=one_line(f"Segmentation by {model}"),
        omit_empty_frames=bool(labels_ZYX.any()),
        # whatever the series is written in, this can be written in it
        specific_character_set=None if is_ascii else UTF8,
    )
    for element in source.identifying:
        segmentation.add(element)
    _set_storage_classes(segmentation, source)
    return segmentation


def _description(structure: Structure, name: str, codes: StructureCodes, algorithm: Any) -> Any:
    import highdicom as hd

    description = hd.seg.SegmentDescription(
        segment_number=structure.number,
        segment_label=name,
        segmented_property_category=concept(codes.category),
        segmented_property_type=concept(codes.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=hd.UID(),
        tracking_id=one_line(f"{structure.number} {name}"),
        anatomic_regions=None if codes.region is None else [concept(codes.region)],
    )
    description.RecommendedDisplayCIELabValue = list(cielab_of(structure.colour))
    if codes.laterality is not None:
        side = [concept(codes.laterality)]
        if codes.region is not None:
            description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = side
        else:
            description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = side
    return description


def concept(code: Coded) -> Any:
    """A code as highdicom takes it."""
    from highdicom.sr.coding import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)


def _set_storage_classes(segmentation: Any, source: SourceHeaders) -> None:
    """Name the classes that the images have, where the writer was told others."""
    class_of = {
        header.SOPInstanceUID: storage_class
        for header, storage_class in zip(source.slices, source.storage_classes, strict=True)
        if header.SOPClassUID != storage_class
    }
    if not class_of:
        return
    for reference in segmentation.iterall():
        if reference.keyword in ("SourceImageSequence", "ReferencedInstanceSequence"):
            for item in reference.value:
                item.ReferencedSOPClassUID = class_of.get(item.ReferencedSOPInstanceUID, item.ReferencedSOPClassUID)


def _segments_array(labels_ZYX: npt.NDArray[Any], structures: Sequence[Structure]) -> npt.NDArray[Any]:
    """Segment numbers (z, y, x); or, where a voxel may belong to several segments, masks (z, y, x, segment)."""
    if overlap(structures):
        return np.stack([np.isin(labels_ZYX, structure.values) for structure in structures], axis=-1)
    highest = max((value for structure in structures for value in structure.values), default=0)
    number_of = np.zeros(max(highest, int(labels_ZYX.max(initial=0))) + 1, np.uint16)
    for structure in structures:
        number_of[list(structure.values)] = structure.number
    return number_of[labels_ZYX]
