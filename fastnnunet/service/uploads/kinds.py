"""What kind of file an upload is, told by its first bytes alone; what is none of these is never opened."""

import re
import struct
import zlib
from pathlib import Path

from fastnnunet.service.refusals import RefusedError

HEAD_BYTES = 8192
_GZIP = b"\x1f\x8b"
_INFLATED_BYTES = 1024
ENDINGS = {
    **{"nifti": ".nii", "nifti-gz": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha"},
    **{"zip": ".zip", "dicom": ".dcm", "png": ".png", "bmp": ".bmp", "tiff": ".tif"},
}
_NIFTI, _ITK, _DICOM = ("nifti", "nifti-gz"), ("nrrd", "mha"), ("zip", "dicom")
_OF_READER = {  # kinds that the readers of nnU-Net's plans take
    **dict.fromkeys(("SimpleITKIO", "SimpleITKIOWithReorient"), (*_NIFTI, *_ITK, *_DICOM)),
    **dict.fromkeys(("NibabelIO", "NibabelIOWithReorient"), (*_NIFTI, *_DICOM)),
    "NaturalImage2DIO": ("png", "bmp", "tiff"),
    "Tiff3DIO": ("tiff",),
}


def kinds_of(reader_writer: str) -> tuple[str, ...]:
    """The kinds that a model of that reader takes."""
    return _OF_READER.get(reader_writer, _NIFTI)


def kind_of(head: bytes) -> str | None:
    """The kind of a file that begins like this; None for any other."""
    if head.startswith(_GZIP):
        try:
            inside = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _INFLATED_BYTES)
        except zlib.error:
            return None
        return "nifti-gz" if _is_nifti(inside) else None
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head[128:132] == b"DICM":
        return "dicom"
    if _is_nifti(head):
        return "nifti"
    if head.startswith(b"NRRD000"):
        return "nrrd"
    if re.match(rb"\s*(ObjectType|NDims)\s*=", head) and b"NDims" in head:
        return "mha"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "tiff"
    return "bmp" if head.startswith(b"BM") else None


def _is_nifti(head: bytes) -> bool:
    if len(head) < 348:
        return False
    for order in "<>":
        size = struct.unpack_from(f"{order}i", head)[0]
        if (size == 348 and head[344:348] == b"n+1\0") or (size == 540 and head[4:7] == b"n+2"):
            return True
    return False


def check_kind(file: Path, taken: tuple[str, ...]) -> str:
    """The kind of a file. Raises RefusedError where it is none that is `taken`."""
    with file.open("rb") as f:
        kind = kind_of(f.read(HEAD_BYTES))
    if kind is None or kind not in taken:
        got = "a file of another kind" if kind is None else f"a {ENDINGS[kind]} file"
        expected = ", ".join(ENDINGS[name] if name != "zip" else ".zip of a DICOM series" for name in taken)
        raise RefusedError(415, f"the upload is {got}, or its header is damaged; this model takes {expected}")
    return kind
