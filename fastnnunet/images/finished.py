"""Which results of an earlier run can be relied on: files of other programs, or after a crash, may be empty or cut off.

Quick where the format allows it: the ends of NIfTI and zip files tell whether they are complete. What is neither is
read by the model's own reader.
"""

import warnings
import zipfile
from pathlib import Path

from fastnnunet.errors import FastnnUNetError
from fastnnunet.images.cases import DICOM_SEG_ENDING
from fastnnunet.images.io import ImageIO
from fastnnunet.system.whole import is_whole

_STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"


def is_segmentation(io: ImageIO, file: Path) -> bool:
    """Whether a label map that `io` writes, a DICOM object or a mesh is all there."""
    try:
        known = is_whole(file)
        if known or (known is False and not file.name.lower().endswith(".gz")):
            return known
        # neither told by its end nor, of gzip, surely cut off: it may have several members
        if file.name.endswith(DICOM_SEG_ENDING):
            return _is_dicom(file)
        if file.name.endswith(".glb"):  # the third of its first words is its length
            head = file.read_bytes()[:12]
            return head[:4] == b"glTF" and int.from_bytes(head[8:], "little") == file.stat().st_size
        io.read_segmentation(file)
    except (FastnnUNetError, OSError):
        return False
    return True


def is_archive(file: Path) -> bool:
    """Whether a .npz holds probabilities; the list of what is in it is its end."""
    try:
        with zipfile.ZipFile(file) as archive:
            return "probabilities.npy" in archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False


def is_pickle(file: Path) -> bool:
    """Whether a pickle begins and ends as one; it is not read, since that would run what is in it."""
    content = file.read_bytes()
    return content[:1] == b"\x80" and content[-1:] == b"."


def _is_dicom(file: Path) -> bool:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pydicom about a missing end
            data = pydicom.dcmread(file)
        if data.file_meta.MediaStorageSOPClassUID == _STRUCTURE_SET:  # the last of its sequences
            return "RTROIObservationsSequence" in data
        bits = data.Rows * data.Columns * int(data.get("NumberOfFrames", 1)) * data.BitsAllocated
        # of compressed frames pydicom refuses what lacks its end
        return data.file_meta.TransferSyntaxUID.is_compressed or 8 * len(data.PixelData) >= bits
    except (InvalidDicomError, AttributeError, ValueError, EOFError):
        return False
