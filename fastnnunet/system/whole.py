"""Whether the end of a file is there, told by its header and its last bytes, without reading what lies between.

ITK's writers of NIfTI and BMP say nothing when the disk is full and leave the beginning of the file.
"""

import os
import struct
import zlib
from math import prod
from pathlib import Path

_HEADER_BYTES = 540  # NIfTI-2's; NIfTI-1 has 348 and at least 4 more before its voxels
# bytes of a voxel by NIfTI's code of its type: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h
_VOXEL_BYTES = {2: 1, 4: 2, 8: 4, 16: 4, 32: 8, 64: 8, 128: 3, 256: 1, 512: 2, 768: 4, 1024: 8, 1280: 8, 2304: 4}


def is_whole(path: Path) -> bool | None:
    """False for a file that is empty or cut off, None where the format does not tell (only NIfTI and BMP do).

    Raises OSError.
    """
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        begin = f.read(2**14)
        f.seek(max(0, size - 4))
        end = f.read(4)
    name = path.name.lower()
    if not begin:
        return False
    if name.endswith(".nii.gz") and begin[:2] == b"\x1f\x8b":
        try:
            header = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(begin, _HEADER_BYTES)
        except zlib.error:
            return False
        expected = _nifti_bytes(header)
        # gzip ends with the number of bytes that went in, modulo 2^32
        return expected if isinstance(expected, bool | None) else struct.pack("<I", expected % 2**32) == end
    if name.endswith(".nii"):
        expected = _nifti_bytes(begin)
        return expected if isinstance(expected, bool | None) else size >= expected
    if name.endswith(".bmp") and begin[:2] == b"BM" and len(begin) >= 6:
        return size >= int(struct.unpack_from("<I", begin, 2)[0])
    return None


def _nifti_bytes(header: bytes) -> int | bool | None:
    """How long a NIfTI file is; False where its header is cut off, None where it cannot be told."""
    if len(header) < 352:
        return False
    for order in "<>":
        kind = struct.unpack_from(f"{order}i", header)[0]
        if kind == 348:
            layout = (("8h", 40), ("h", 70), ("f", 108))  # dim, datatype, vox_offset
        elif kind == 540 and len(header) >= _HEADER_BYTES:
            layout = (("8q", 16), ("h", 12), ("q", 168))
        else:
            continue
        dim, (datatype,), (offset,) = (struct.unpack_from(f"{order}{what}", header, at) for what, at in layout)
        sizes = dim[1 : dim[0] + 1]
        if datatype not in _VOXEL_BYTES or not 1 <= dim[0] <= 7 or min(sizes) < 1 or not 0 <= offset < 2**31:
            return None
        return int(offset) + prod(sizes) * _VOXEL_BYTES[datatype]
    return None
