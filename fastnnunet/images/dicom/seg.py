"""A label map as a DICOM Segmentation object that refers to the series it was made from (PS3.3 A.51), by highdicom."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError, printable
from fastnnunet.images.dicom.headers import SourceHeaders, no_complaints, source_headers
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.images.dicom.values import one_line
from fastnnunet.system.files import atomic_output
from fastnnunet.version import __version__

_log = logging.getLogger(__name__)
_UTF8 = "ISO_IR 192"


def check_dicom_seg(series: DicomSeries, *, labels: Mapping[str, Any], model: str) -> None:
    """Find out before any work whether a segmentation can refer to a series; log what of its headers is mended.

    A segmentation of one voxel in two slices is put together for it: in what the others differ is checked one by one.
    Raises ImageError when none can be.
    """
    source = source_headers(series)
    foreground = next(iter(segment_labels(labels).values()), (0,))[0]
    number = min(len(source.slices), 2)
    two = replace(source, slices=source.slices[:number], storage_classes=source.storage_classes[:number])
    one_voxel_ZYX = np.full((number, 1, 1), foreground, np.uint16)
    _tell(source, series, _segmentation(one_voxel_ZYX, two, series, labels, model))


def write_dicom_seg(
    labels_ZYX: npt.NDArray[Any],
    series: DicomSeries,
    file: Path,
    *,
    labels: Mapping[str, Any],
    model: str,
    checked: bool = False,
) -> None:
    """Write a binary segmentation with a segment per label or region of `labels` (as in dataset.json), in that order.

    `labels_ZYX`: on the grid of the series, slices in the order of `slice_files`. `model` is named as the algorithm.
    Segments without a voxel are described all the same. The types of all segments are "anatomical structure", since
    dataset.json knows no codes.
    What of the headers is mended is logged, unless `check_dicom_seg` did so before (`checked`).
    Raises ImageError when the series lacks what a segmentation must refer to, ModuleNotFoundError without the extra
    `dicom`.
    """
    source = source_headers(series)
    if len(source.slices) != len(labels_ZYX):
        raise ImageError(
            f"{series.folder} has {len(source.slices)} slices now and had {len(labels_ZYX)} when it was read"
        )
    segmentation = _segmentation(labels_ZYX, source, series, labels, model)
    if not checked:
        _tell(source, series, segmentation)
    with atomic_output(file) as partial, no_complaints():
        segmentation.save_as(partial)


def _tell(source: SourceHeaders, series: DicomSeries, segmentation: Any) -> None:
    """Log what was mended of what the segmentation has from the series."""
    given = {(e.keyword, str(e.value)) for part in (source.slices[0], source.identifying) for e in part.iterall()}
    taken = {e.keyword for e in segmentation.iterall() if (e.keyword, str(e.value)) in given} | {
        "SeriesNumber",
        "SOPClassUID",
    }
    if done := [f"{name} ({what})" for name, what in source.done.items() if name in taken]:
        _log.warning("%s: mended for the DICOM SEG: %s", printable(series.folder), "; ".join(done))


def _segmentation(
    labels_ZYX: npt.NDArray[Any],
    source: SourceHeaders,
    series: DicomSeries,
    labels: Mapping[str, Any],
    model: str,
) -> Any:
    """The segmentation as a data set that can be written. Raises ImageError, ModuleNotFoundError."""
    import_module("highdicom")
    with no_complaints():
        try:
            made = _put_together(labels_ZYX, source, labels, model)
            if labels_ZYX.shape[1:] == (1, 1):  # a trial
                made.save_as(BytesIO())
            return made
        except Exception as e:  # highdicom and pydicom raise whatever their parts raise
            reason = f"{type(e).__name__}: {e}"
            raise ImageError(
                f"{series.folder}: no DICOM SEG can refer to this series: {reason}\nleave out --output-format dicom-seg"
            ) from e


def _put_together(labels_ZYX: npt.NDArray[Any], source: SourceHeaders, labels: Mapping[str, Any], model: str) -> Any:
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept

    segments = segment_labels(labels)
    names = [one_line(name) or str(number) for number, name in enumerate(segments, 1)]
    structure = CodedConcept("123037004", "SCT", "Anatomical structure")
    algorithm = hd.AlgorithmIdentificationSequence(
        name=one_line(f"FastnnUNet {model}"),
        family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
        version=__version__,
    )
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=structure,
            segmented_property_type=structure,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=hd.UID(),
            tracking_id=one_line(f"{number} {name}"),
        )
        for number, name in enumerate(names, 1)
    ]
    for header in source.slices:
        header.Rows, header.Columns = labels_ZYX.shape[1:]
    is_ascii = source.is_ascii and all(text.isascii() for text in (*names, model))
    segmentation = hd.seg.Segmentation(
        source_images=source.slices,
        pixel_array=_segments_array(labels_ZYX, list(segments.values())),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
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
        specific_character_set=None if is_ascii else _UTF8,
    )
    for element in source.identifying:
        segmentation.add(element)
    _set_storage_classes(segmentation, source)
    return segmentation


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


def segment_labels(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Foreground labels and regions of a dataset.json: name -> values."""
    values = {
        name: tuple(map(int, value)) if isinstance(value, list | tuple) else (int(value),)
        for name, value in labels.items()
        if name != "ignore"
    }
    return {name: value for name, value in values.items() if value != (0,)}


def _segments_array(labels_ZYX: npt.NDArray[Any], segments: list[tuple[int, ...]]) -> npt.NDArray[Any]:
    """Segment numbers (z, y, x); or, where a voxel may belong to several segments, masks (z, y, x, segment)."""
    values = [value for segment in segments for value in segment]
    if len(set(values)) < len(values):
        return np.stack([np.isin(labels_ZYX, segment) for segment in segments], axis=-1)
    number_of = np.zeros(max((*values, int(labels_ZYX.max(initial=0)))) + 1, np.uint16)
    for number, segment in enumerate(segments, 1):
        number_of[list(segment)] = number
    return number_of[labels_ZYX]
