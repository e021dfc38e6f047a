"""A label map as a DICOM Segmentation object that refers to the series it was made from (PS3.3 A.51), by highdicom."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet import __version__
from fastnnunet.errors import ImageError
from fastnnunet.runtime.dicom import DicomSeries, slice_files
from fastnnunet.runtime.files import atomic_output

_log = logging.getLogger(__name__)
_LONG_STRING = 64  # letters
# may be empty but must be there (type 2); anonymisers and converters leave some out
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)


def write_dicom_seg(
    labels_ZYX: npt.NDArray[Any],
    series: DicomSeries,
    file: Path,
    *,
    labels: Mapping[str, Any],
    model: str,
) -> None:
    """Write a binary segmentation with a segment per label or region of `labels` (as in dataset.json), in that order.

    `labels_ZYX`: on the grid of the series, slices in the order of `slice_files`. `model` is named as the algorithm.
    Segments without a voxel are described all the same. The types of all segments are "anatomical structure", since
    dataset.json knows no codes.
    Raises ImageError when the series lacks what a segmentation must refer to, ModuleNotFoundError without the extra
    `dicom`.
    """
    import highdicom as hd
    import pydicom
    from highdicom.sr.coding import CodedConcept

    files = slice_files(series)
    if len(files) != len(labels_ZYX):
        raise ImageError(f"{series.folder} has {len(files)} slices now and had {len(labels_ZYX)} when it was read")
    source = _complete([pydicom.dcmread(f, stop_before_pixels=True) for f in files], series)
    segments = segment_labels(labels)
    structure = CodedConcept("123037004", "SCT", "Anatomical structure")
    algorithm = hd.AlgorithmIdentificationSequence(
        name=f"FastnnUNet {model}"[:_LONG_STRING],
        family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
        version=__version__,
    )
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:_LONG_STRING],
            segmented_property_category=structure,
            segmented_property_type=structure,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=hd.UID(),
            tracking_id=f"{number} {name}"[:_LONG_STRING],
        )
        for number, name in enumerate(segments, 1)
    ]
    try:
        segmentation = hd.seg.Segmentation(
            source_images=source,
            pixel_array=_segments_array(labels_ZYX, list(segments.values())),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            series_instance_uid=hd.UID(),
            series_number=int(source[0].get("SeriesNumber") or 0) + 1000,  # not one of the scanner's
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="FastnnUNet",
            manufacturer_model_name="FastnnUNet",
            software_versions=__version__,
            device_serial_number="0",
            pixel_measures=_pixel_measures(source),
            content_label="SEGMENTATION",
            content_description=f"Segmentation by {model}"[:_LONG_STRING],
            series_description=f"Segmentation by {model}"[:_LONG_STRING],
            omit_empty_frames=bool(labels_ZYX.any()),
        )
    except (AttributeError, ValueError, KeyError) as e:
        raise ImageError(
            f"{series.folder}: no DICOM SEG can refer to this series: {e}\nleave out --output-format dicom-seg"
        ) from e
    with atomic_output(file) as partial:
        segmentation.save_as(partial)


def segment_labels(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Foreground labels and regions of a dataset.json: name -> values."""
    values = {
        name: tuple(map(int, value)) if isinstance(value, list | tuple) else (int(value),)
        for name, value in labels.items()
        if name != "ignore"
    }
    return {name: value for name, value in values.items() if value != (0,)}


def _pixel_measures(source: list[Any]) -> Any:
    """The spacing of the slices as their positions have it; SpacingBetweenSlices is often missing or not that."""
    import highdicom as hd

    spacing = thickness = float(source[0].get("SliceThickness") or 0)
    if len(source) > 1:
        first, last = (np.asarray(header.ImagePositionPatient, float) for header in (source[0], source[-1]))
        spacing = float(np.linalg.norm(last - first)) / (len(source) - 1)
    return hd.PixelMeasuresSequence(
        pixel_spacing=[float(mm) for mm in source[0].PixelSpacing],
        slice_thickness=thickness or spacing or None,
        spacing_between_slices=spacing or None,
    )


def _segments_array(labels_ZYX: npt.NDArray[Any], segments: list[tuple[int, ...]]) -> npt.NDArray[Any]:
    """Segment numbers (z, y, x); or, where a voxel may belong to several segments, masks (z, y, x, segment)."""
    values = [value for segment in segments for value in segment]
    if len(set(values)) < len(values):
        return np.stack([np.isin(labels_ZYX, segment) for segment in segments], axis=-1)
    number_of = np.zeros(max((*values, int(labels_ZYX.max(initial=0)))) + 1, np.uint16)
    for number, segment in enumerate(segments, 1):
        number_of[list(segment)] = number
    return number_of[labels_ZYX]


def _complete(source: list[Any], series: DicomSeries) -> list[Any]:
    """The headers of the slices with everything a segmentation must refer to. Raises ImageError where it is lost."""
    from pydicom.uid import generate_uid

    if not source[0].get("FrameOfReferenceUID"):
        raise ImageError(
            f"{series.folder}: the series has no FrameOfReferenceUID, which a DICOM SEG must share with it; "
            "leave out --output-format dicom-seg"
        )
    for header in source:
        # the file's own header repeats the two UIDs
        header.SOPInstanceUID = header.get("SOPInstanceUID") or header.file_meta.MediaStorageSOPInstanceUID
        header.SOPClassUID = header.get("SOPClassUID") or header.file_meta.MediaStorageSOPClassUID
        for name in _MAY_BE_EMPTY:
            if name not in header:
                setattr(header, name, "")
    for name in ("StudyInstanceUID", "SeriesInstanceUID"):
        if source[0].get(name):
            continue
        _log.warning("%s has no %s (anonymised?); the DICOM SEG refers to a made-up one", series.folder, name)
        made_up = generate_uid(entropy_srcs=[name, *(str(header.SOPInstanceUID) for header in source)])
        for header in source:
            setattr(header, name, made_up)
    return source
