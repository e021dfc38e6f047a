"""A label map as an RT Structure Set of the series it was made from (PS3.3 A.19), by pydicom.

A region of interest for each structure, with closed planar contours on the planes of the slices. Contours run along
the edges of pixels, so that they enclose the very voxels of the label map; holes are joined to them by keyholes.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.outputs.colours import rgb_of
from fastnnunet.outputs.dicom.codes import Coded, LabelCodes, label_codes
from fastnnunet.outputs.dicom.contours import polygons
from fastnnunet.outputs.dicom.headers import (
    IDENTIFYING,
    UTF8,
    WITHOUT,
    SourceHeaders,
    no_complaints,
    source_headers,
    tell,
)
from fastnnunet.outputs.dicom.slices import on_slices
from fastnnunet.outputs.dicom.values import one_line
from fastnnunet.outputs.labelled import LabelledImage, Structure
from fastnnunet.system.files import atomic_output
from fastnnunet.version import __version__

_STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # retired, and what the sequence still asks for
_DECIMALS = 4  # of millimetres
# of patient and study, where the images have them
_TAKEN = ("StudyDescription", "PatientAge", "PatientSize", "PatientWeight", "OtherPatientIDs", "PatientComments")
_ORGAN = "91723000"  # the category of anatomical structures


def check_rtstruct(series: DicomSeries, *, structures: Sequence[Structure], model: str, codes: LabelCodes) -> None:
    """Find out before any work whether a structure set can refer to a series; log what of its headers is mended.

    Raises ImageError when none can.
    """
    source = source_headers(series)
    one = replace(source, slices=source.slices[:1], storage_classes=source.storage_classes[:1])
    labels_ZYX = np.full((1, 1, 1), structures[0].values[0] if structures else 0, np.uint16)
    made = _structure_set(labels_ZYX, one, structures, model, codes, None)
    _written(made, BytesIO(), series)
    tell(source, series, made, "RTSTRUCT")


def write_rtstruct(
    labelled: LabelledImage, file: Path, *, codes: LabelCodes | None = None, checked: bool = False
) -> None:
    """Write the structures of a labelled image; those without a voxel have no contour.

    Points are mm in the patient (LPS), to a tenth of a micrometre. `codes`: of the structures; those of their names
    unless given. What of the headers is mended is logged, unless `check_rtstruct` did so before (`checked`).
    Raises ImageError when the series lacks what a structure set must refer to, MismatchError when the label map does
    not lie on its slices, ModuleNotFoundError without the extra `dicom`.
    """
    series = labelled.series
    assert series is not None
    source, structures = source_headers(series), labelled.structures
    labels_ZYX = on_slices(labelled)
    found = codes or label_codes(structures)
    made = _structure_set(labels_ZYX, source, structures, labelled.model, found, labelled.voxel_ml)
    if not checked:
        tell(source, series, made, "RTSTRUCT")
    with atomic_output(file) as partial:
        _written(made, partial, series)


def _written(structure_set: Any, file: Path | BytesIO, series: DicomSeries) -> None:
    with no_complaints():
        try:
            structure_set.save_as(file, enforce_file_format=True)
        except OSError:
            raise
        except Exception as e:  # pydicom raises whatever its parts raise
            raise ImageError(
                f"{series.folder}: no RTSTRUCT can refer to this series: {type(e).__name__}: {e}{WITHOUT}"
            ) from e


def _structure_set(
    labels_ZYX: npt.NDArray[Any],
    source: SourceHeaders,
    structures: Sequence[Structure],
    model: str,
    codes: LabelCodes,
    voxel_ml: float | None,
) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian, generate_uid

    first, now = source.slices[0], datetime.now()
    names = [one_line(structure.name) or str(structure.number) for structure in structures]
    with no_complaints():
        made = Dataset()
        made.file_meta = FileMetaDataset()
        # with explicit ones a contour could not have more than 64 kB
        made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        is_ascii = source.is_ascii and all(text.isascii() for text in (*names, model))
        made.SpecificCharacterSet = "ISO_IR 100" if is_ascii else UTF8
        made.SOPClassUID, made.SOPInstanceUID = _STORAGE, generate_uid()
        for name in IDENTIFYING:
            setattr(made, name, source.identifying[name].value)
        for name in _TAKEN:
            if name in first:
                made[name] = first[name]
        made.StudyInstanceUID, made.FrameOfReferenceUID = first.StudyInstanceUID, first.FrameOfReferenceUID
        made.PositionReferenceIndicator = ""
        made.Modality, made.SeriesInstanceUID = "RTSTRUCT", generate_uid()
        made.SeriesNumber, made.InstanceNumber, made.OperatorsName = source.series_number, 1, ""
        made.SeriesDescription = one_line(f"Segmentation by {model}")
        made.Manufacturer = made.ManufacturerModelName = "FastnnUNet"
        made.SoftwareVersions = __version__
        made.StructureSetLabel = "FastnnUNet"
        made.StructureSetDescription = one_line(f"Segmentation by {model}")
        made.InstanceCreationDate = made.StructureSetDate = now.strftime("%Y%m%d")
        made.InstanceCreationTime = made.StructureSetTime = now.strftime("%H%M%S")
        made.ApprovalStatus = "UNAPPROVED"
        images = _references(source)
        made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(first, images)]
        made.StructureSetROISequence, made.ROIContourSequence, made.RTROIObservationsSequence = [], [], []
        for structure, name in zip(structures, names, strict=True):
            mask_ZYX = np.isin(labels_ZYX, structure.values)
            region = Dataset()
            region.ROINumber, region.ROIName = structure.number, name
            region.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
            region.ROIGenerationAlgorithm = "AUTOMATIC"
            region.ROIGenerationDescription = one_line(f"FastnnUNet {model}")
            if voxel_ml is not None:
                region.ROIVolume = _decimal(np.count_nonzero(mask_ZYX) * voxel_ml)
            made.StructureSetROISequence.append(region)
            made.ROIContourSequence.append(_contours(structure, mask_ZYX, source, images))
            made.RTROIObservationsSequence.append(_observation(structure, codes))
    return made


def _references(source: SourceHeaders) -> list[Any]:
    from pydicom.dataset import Dataset

    images = []
    for header, storage_class in zip(source.slices, source.storage_classes, strict=True):
        image = Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = storage_class, header.SOPInstanceUID
        images.append(image)
    return images


def _frame_of_reference(first: Any, images: list[Any]) -> Any:
    from pydicom.dataset import Dataset

    of_series, of_study, frame = Dataset(), Dataset(), Dataset()
    of_series.SeriesInstanceUID, of_series.ContourImageSequence = first.SeriesInstanceUID, images
    of_study.ReferencedSOPClassUID, of_study.ReferencedSOPInstanceUID = _STUDY_CLASS, first.StudyInstanceUID
    of_study.RTReferencedSeriesSequence = [of_series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = first.FrameOfReferenceUID, [of_study]
    return frame


def _contours(structure: Structure, mask_ZYX: npt.NDArray[np.bool_], source: SourceHeaders, images: list[Any]) -> Any:
    from pydicom.dataset import Dataset

    made = Dataset()
    made.ReferencedROINumber, made.ROIDisplayColor = structure.number, list(rgb_of(structure.colour))
    contours: list[Any] = []
    for number in np.flatnonzero(mask_ZYX.any(axis=(1, 2))).tolist():
        for polygon in polygons(mask_ZYX[number]):
            contour = Dataset()
            contour.ContourNumber = len(contours) + 1
            contour.ContourImageSequence = [images[number]]
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(polygon)
            points_mm = _on_plane(polygon, source.slices[number])
            contour.ContourData = [f"{value:.{_DECIMALS}f}" for value in points_mm.ravel().tolist()]
            contours.append(contour)
    if contours:
        made.ContourSequence = contours
    return made


def _on_plane(points: npt.NDArray[np.float64], header: Any) -> npt.NDArray[np.float64]:
    """Points (n, xyz) in mm of pixels (n, column and row) of a slice: PS3.3 C.7.6.2.1.1."""
    row, column = np.reshape(np.asarray(header.ImageOrientationPatient, np.float64), (2, 3))
    height, width = (float(spacing) for spacing in header.PixelSpacing)
    in_plane = points[:, :1] * width * row + points[:, 1:] * height * column
    return np.asarray(header.ImagePositionPatient, np.float64) + in_plane


def _observation(structure: Structure, codes: LabelCodes) -> Any:
    from pydicom.dataset import Dataset

    found, made = codes[structure.name], Dataset()
    made.ObservationNumber = made.ReferencedROINumber = structure.number
    made.RTROIIdentificationCodeSequence = [_code(found.type)]
    made.RTROIInterpretedType = "ORGAN" if found.category.value == _ORGAN else ""
    made.ROIInterpreter = ""
    return made


def _code(code: Coded) -> Any:
    from pydicom.dataset import Dataset

    made = Dataset()
    made.CodeValue, made.CodingSchemeDesignator, made.CodeMeaning = code.value, code.scheme, code.meaning
    return made


def _decimal(value: float) -> Any:
    from pydicom.valuerep import DSfloat

    return DSfloat(value, auto_format=True)
