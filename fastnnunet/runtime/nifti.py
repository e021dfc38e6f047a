"""The voxels of an ordinary NIfTI-1 file, three times faster than ITK reads them, and checked to be all there.

Geometry (qform, sform) stays ITK's business. Format: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h
"""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.runtime.files import read_gunzipped

_HEADER_BYTES = 348
_NIFTI2_HEADER_BYTES = 540
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}


def is_nifti(path: Path) -> bool:
    """Whether a file is named as a single-file NIfTI image."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_nifti_voxels(path: Path) -> npt.NDArray[np.generic] | None:
    """Voxels of a single-file three-dimensional image in (z, y, x), in the file's own dtype.

    None when the file uses what only ITK should interpret (NIfTI-2, rescaled values, other dimensions, vectors);
    its completeness is checked all the same.
    Raises ImageError when the file is damaged or shorter than its header says.
    """
    content = read_gunzipped(path)
    if len(content) < _HEADER_BYTES:
        raise ImageError(f"{path} is not a NIfTI image: {len(content)} bytes, expected a header of {_HEADER_BYTES}")
    order = next((o for o in "<>" if struct.unpack_from(f"{o}i", content)[0] == _HEADER_BYTES), None)
    if order is None or content[344:348] != b"n+1\0":
        if any(struct.unpack_from(f"{o}i", content)[0] == _NIFTI2_HEADER_BYTES for o in "<>"):
            return None
        # ITK would take it for an Analyze file and drop its orientation
        raise ImageError(
            f"{path} has a damaged NIfTI header: size {struct.unpack_from('<i', content)[0]} and magic "
            f"{content[344:348]!r}, expected {_HEADER_BYTES} and b'n+1\\x00'; export it again"
        )
    dim = struct.unpack_from(f"{order}8h", content, 40)
    datatype, bits = struct.unpack_from(f"{order}2h", content, 70)
    offset, slope, intercept = struct.unpack_from(f"{order}3f", content, 108)
    if not 1 <= dim[0] <= 7 or any(d < 1 for d in dim[1 : dim[0] + 1]) or not _HEADER_BYTES <= offset < 2**31:
        raise ImageError(
            f"{path} has a damaged NIfTI header: dimensions {dim[: max(dim[0], 0) + 1]}, offset {offset:g}"
        )
    start = int(offset)
    voxels = int(np.prod(dim[1 : dim[0] + 1], dtype=np.int64))
    if (got := len(content) - start) < (need := voxels * bits // 8):
        raise ImageError(f"{path} is truncated: got {got} bytes of voxels, expected {need}; copy or export it again")
    if dim[0] != 3 or datatype not in _DTYPES or (slope, intercept) not in ((0.0, 0.0), (1.0, 0.0)):
        return None
    flat = np.frombuffer(content, f"{order}{_DTYPES[datatype]}", voxels, start)
    return flat.reshape(dim[3], dim[2], dim[1])
