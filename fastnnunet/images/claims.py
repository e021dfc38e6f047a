"""How many voxels an image of a stranger claims to have, told by its header before anything is allocated.

Only images that lie in one file, or in one folder of DICOM slices, are let through: headers that name another file
could name any file of this machine.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

from fastnnunet.errors import ImageError
from fastnnunet.images.checks import ImageSource
from fastnnunet.images.dicom.head import read_head
from fastnnunet.images.dicom.series import DicomSeries, slice_heads
from fastnnunet.images.nifti import is_nifti, nifti_header
from fastnnunet.images.stored import open_stored
from fastnnunet.images.text_headers import Layout, read_layout

_TEXT_BYTES = 1 << 20
_OTHER_FILE = re.compile(rb"data\s*file\s*:(?!=)|ElementDataFile\s*[=:]\s*+(?!LOCAL\s)", re.IGNORECASE)
_LONE_RETURN = re.compile(rb"\r(?!\n)")  # some readers end a line there, others do not


def claimed_voxels(source: ImageSource) -> int:
    """Voxels of one channel: a NIfTI, NRRD or MetaImage file, or a DICOM series.

    Raises ImageError when the header is damaged, when the voxels are in another file than the header, for deflated
    DICOM (which says nothing before it is inflated), and for other formats.
    """
    if isinstance(source, DicomSeries):
        return _of_series(source)
    if is_nifti(source):
        return math.prod(nifti_header(source).sizes_xyz)
    if source.suffix.lower() in (".nrrd", ".mha"):
        return _of_text_header(source)
    raise ImageError(f"{source} is no image whose header is read here, expected NIfTI, NRRD, MetaImage or DICOM")


def _of_series(series: DicomSeries) -> int:
    for file in series.folder.iterdir():
        head = read_head(file)
        if head is not None and head.is_deflated:
            raise ImageError(f"{file} is deflated DICOM, which is not taken; export the series without compression")
    heads = slice_heads(replace(series)).values()
    return sum(head.rows * head.columns * max(1, int(head.frames or 1)) for head in heads)


def _of_text_header(path: Path) -> int:
    with open_stored(path) as stored:
        text = stored.read(_TEXT_BYTES)
    end = re.search(rb"\n\r?\n" if path.suffix.lower() == ".nrrd" else rb"ElementDataFile[^\n]*\n", text)
    text = text[: end.end()] if end else text
    if _OTHER_FILE.search(text) or _LONE_RETURN.search(text):
        raise ImageError(f"{path}: its header names another file, expected the voxels in the same; convert it first")
    layout = read_layout(path)
    if not isinstance(layout, Layout) or layout.data_file != path:
        raise ImageError(f"{path} stores its voxels as text or elsewhere, expected raw or gzip; convert it first")
    return math.prod(layout.sizes_xyz)
