"""Small DICOM series, written slice by slice with pydicom."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, generate_uid

from fastnnunet.images.dicom.series import DicomSeries, slice_heads
from fastnnunet.outputs.dicom.slices import series_affine
from fastnnunet.outputs.labelled import LabelledImage, structures_of

STRAIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_series(
    folder: Path,
    stored_ZYX: np.ndarray,
    *,
    spacing_zyx: Sequence[float] = (2.5, 0.7, 1.1),
    origin: Sequence[float] = (-12.5, 3.0, 40.0),
    orientation: Sequence[float] = STRAIGHT,
    positions: Sequence[Sequence[float]] | None = None,
    rescale: Sequence[tuple[float, float]] | None = None,
    series_uid: str | None = None,
    compressed: bool = False,
    prefix: str = "slice",
    **attributes: Any,
) -> list[Path]:
    """One file per slice of stored values (int16), named so that the order of names is not that of the slices.

    `rescale`: slope and intercept, of one slice or of each. `attributes` are set in every slice; None removes one.
    Returns the files in the order of the slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.reshape(orientation, (2, 3))
    normal = np.cross(row, column)
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "FrameOfReferenceUID")}
    series_uid = series_uid or generate_uid()
    files = []
    for index, pixels_YX in enumerate(stored_ZYX):
        slope, intercept = (rescale or [(1.0, -1024.0)])[min(index, len(rescale or [0]) - 1)]
        position = positions[index] if positions else np.add(origin, index * spacing_zyx[0] * normal)
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.SOPClassUID = CTImageStorage
        header.SOPInstanceUID = generate_uid()
        header.SeriesInstanceUID = series_uid
        for name, uid in uids.items():
            setattr(header, name, uid)
        header.Modality = "CT"
        header.PatientID = "P1"
        header.PatientName = "Test^Case"
        header.SeriesNumber = 4
        header.InstanceNumber = index + 1
        header.ImagePositionPatient = [float(p) for p in position]
        header.ImageOrientationPatient = list(orientation)
        header.PixelSpacing = list(spacing_zyx[1:])
        header.SliceThickness = 5.0  # not the distance of the slices
        header.Rows, header.Columns = pixels_YX.shape
        header.SamplesPerPixel = 1
        header.PhotometricInterpretation = "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit = 15
        header.PixelRepresentation = 1
        header.RescaleSlope, header.RescaleIntercept = slope, intercept
        header.PixelData = pixels_YX.astype("<i2").tobytes()
        for name, value in attributes.items():
            if value is None:
                delattr(header, name)
            else:
                setattr(header, name, value)
        if compressed:
            header.compress(JPEGLSLossless)
        files.append(folder / f"{prefix}_{(index * 7) % 31:02d}")
        header.save_as(files[-1], enforce_file_format=True)
    return files


def labelled_series(
    labels_ZYX: np.ndarray, folder: Path, labels: Mapping[str, Any], model: str = "toy"
) -> LabelledImage:
    """A label map on the slices of a series, whose grid is that of the first and last of them."""
    series = DicomSeries(folder=folder)
    return LabelledImage(
        case=folder.name,
        labels_ZYX=labels_ZYX,
        affine=series_affine(slice_heads(series)),
        structures=structures_of(labels),
        series=series,
        model=model,
    )
