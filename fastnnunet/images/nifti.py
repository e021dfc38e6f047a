"""The voxels of a NIfTI file, three times faster than ITK reads them, and checked to be all there and no more.

What qform and sform mean stays ITK's business (or nibabel's) unless it is plain (`images/plain.py`); that they are
numbers is made sure of here. Headers whose
pixdim or orientation is NaN would otherwise become 1 mm or an origin of NaN without a word.
Formats: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h, https://nifti.nimh.nih.gov/pub/dist/doc/nifti2.h
"""

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError
from fastnnunet.images.stored import DEFLATE_RATIO, Stored, check_claim, open_stored

_HEADER_BYTES = 348
_NIFTI2_HEADER_BYTES = 540
_NIFTI2_MAGIC = (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_EXACT_IN_FLOAT32 = (2, 4, 16, 256, 512)
_LEAST = 1e-6  # ITK and nibabel part where slopes and intercepts are next to nothing
_PIECE_VOXELS = 1 << 18
_FLOAT128 = 1536  # nibabel reads it where the machine can
_NO_NUMBERS = {
    **dict.fromkeys((32, 1792, 2048), "complex numbers"),
    **dict.fromkeys((128, 2304), "colours (RGB)"),
    1: "bits",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What is read of either version; sizes and `pixdim` are those of the axes that dim[0] counts."""

    version: int
    order: str  # of bytes, as struct writes it
    datatype: int
    sizes_xyz: tuple[int, ...]
    dim: tuple[int, ...]  # as stored
    start: int
    slope: float
    intercept: float
    pixdim: tuple[float, ...]
    qform: tuple[float, ...] | None  # qfac, quaternion and offset; None: unused
    sform: tuple[float, ...] | None
    units: int = 0  # xyzt_units
    intent: int = 0
    packed: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether voxels are stored as whole numbers."""
        return self.datatype in _DTYPES and np.dtype(_DTYPES[self.datatype]).kind in "iu"


def is_nifti(path: Path) -> bool:
    """Whether a file is named as a single-file NIfTI image."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def is_nifti_pair(path: Path) -> bool:
    """Whether a file is named as one half of an image in two files (NIfTI or Analyze)."""
    return path.name.lower().endswith((".hdr", ".img", ".img.gz"))


def read_nifti(path: Path, *, most_axes: int = 4) -> tuple[Header, npt.NDArray[np.generic] | None]:
    """The header, and voxels of an image of two to `most_axes` axes in (..., z, y, x): in the file's own dtype, or
    float32 where they are rescaled.

    No voxels when the file uses what only ITK should interpret (more axes, rescaled numbers of many digits); it is
    checked all the same.
    Raises ImageError when the file is damaged, when its voxels are not as many as its header says, or no real numbers.
    """
    if is_nifti_pair(path):
        header_path, voxel_path = _halves(path)
        with open_stored(header_path, detect=True) as stored:
            header = _read_header(stored, single=False)
        with open_stored(voxel_path, detect=True) as stored:
            return header, _read_voxels(stored, header, most_axes)
    with open_stored(path, detect=True) as stored:
        header = _read_header(stored, single=True)
        return replace(header, packed=stored.packed), _read_voxels(stored, header, most_axes)


def nifti_header(path: Path) -> Header:
    """The header of a single-file image; its voxels are not looked for. Raises ImageError when it is damaged."""
    with open_stored(path, detect=True) as stored:
        return replace(_read_header(stored, single=True), packed=stored.packed)


def _halves(path: Path) -> tuple[Path, Path]:
    """The files of header and voxels of a pair, given one of them."""
    lower = path.name.lower()
    stem = path.name[: -len(next(e for e in (".img.gz", ".img", ".hdr") if lower.endswith(e)))]
    header = path if lower.endswith(".hdr") else path.with_name(f"{stem}.hdr")
    voxels = [path] if header != path else [path.with_name(f"{stem}{e}") for e in (".img", ".img.gz")]
    return header, next((v for v in voxels if v.exists()), voxels[0])


def _read_voxels(stored: Stored, header: Header, most_axes: int) -> npt.NDArray[np.generic] | None:
    """From where `stored` is; the file may be that of the header or another one."""
    path, datatype = stored.path, header.datatype
    voxels = math.prod(header.sizes_xyz)
    voxel_bytes = 16 if datatype == _FLOAT128 else np.dtype(_DTYPES[datatype]).itemsize
    need = voxels * voxel_bytes
    if stored.packed:
        check_claim(path, header.start + need, stored.stored_bytes, ratio=DEFLATE_RATIO)
    else:
        check_claim(path, need, max(0, stored.stored_bytes - header.start))
    stored.skip(header.start - stored.position)
    # ITK adds an intercept even where the slope says that nothing is rescaled
    slope, intercept = (value if math.isfinite(value) else 0.0 for value in (header.slope, header.intercept))
    is_plain = (slope, intercept) in ((0.0, 0.0), (1.0, 0.0))
    is_rescaled = datatype in _EXACT_IN_FLOAT32 and all(_LEAST < abs(v) < 1 / _LEAST for v in (slope, intercept or 1.0))
    if not 2 <= len(header.sizes_xyz) <= most_axes or datatype not in _DTYPES or not (is_plain or is_rescaled):
        stored.check(need)
        return None
    flat = stored.voxels(voxels, f"{header.order}{_DTYPES[datatype]}")
    return (flat if is_plain else _rescaled(flat, slope, intercept)).reshape(header.sizes_xyz[::-1])


def _rescaled(flat: npt.NDArray[Any], slope: float, intercept: float) -> npt.NDArray[np.float32]:
    """As ITK and nibabel do: computed in float64, kept in float32."""
    out = np.empty(flat.size, np.float32)
    for start in range(0, flat.size, _PIECE_VOXELS):
        piece = slice(start, start + _PIECE_VOXELS)
        out[piece] = flat[piece].astype(np.float64) * slope + intercept
    return out


def _read_header(stored: Stored, *, single: bool) -> Header:
    """A header whose sizes are positive and whose geometry is finite. Raises ImageError."""
    path = stored.path
    content = stored.read(_HEADER_BYTES)
    if len(content) < _HEADER_BYTES:
        raise ImageError(f"{path} is not a NIfTI image: {len(content)} bytes, expected a header of {_HEADER_BYTES}")
    header = None
    for order in "<>":
        size = struct.unpack_from(f"{order}i", content)[0]
        magic = content[344:348]
        is_analyze = not single and not magic.strip(b"\0")
        if size == _HEADER_BYTES and (is_analyze or magic == (b"n+1\0" if single else b"ni1\0")):
            header = _first_version(content, order)
        elif size == _NIFTI2_HEADER_BYTES and content[4:12] == _NIFTI2_MAGIC[0 if single else 1]:
            content += stored.read(_NIFTI2_HEADER_BYTES - _HEADER_BYTES)
            if len(content) < _NIFTI2_HEADER_BYTES:
                raise ImageError(f"{path} is truncated: its header ends after {len(content)} bytes")
            header = _second_version(content, order)
    if header is None:
        # ITK would take it for an Analyze file and drop its orientation
        raise ImageError(
            f"{path} has a damaged NIfTI header: size {struct.unpack_from('<i', content)[0]} and magic "
            f"{content[344:348]!r}, expected {_HEADER_BYTES} and {'n+1' if single else 'ni1'}; export it again"
        )
    _check(header, path, at_least=len(content) if single else 0)
    return header


def _check(header: Header, path: Path, *, at_least: int) -> None:
    sizes = header.sizes_xyz
    if not sizes or any(size < 1 for size in sizes) or header.start < at_least:
        raise ImageError(f"{path} has a damaged NIfTI header: dimensions {header.dim}, offset {header.start}")
    if header.datatype in _NO_NUMBERS:
        raise ImageError(
            f"{path} holds {_NO_NUMBERS[header.datatype]}, expected one real number per voxel; convert it first"
        )
    if header.datatype not in _DTYPES and header.datatype != _FLOAT128:
        raise ImageError(f"{path} has a damaged NIfTI header: data type {header.datatype}; export it again")
    spacing = header.pixdim[:3]
    # the spacing of a single voxel is often left at 0, which every reader takes for 1
    if not all(math.isfinite(s) and (s != 0 or n == 1) for s, n in zip(spacing, sizes[:3], strict=False)):
        got = ", ".join(f"{s:g}" for s in spacing)
        raise ImageError(f"{path} has a damaged header: its spacing is ({got}), expected millimetres; export it again")
    for name, values in (("qform", header.qform), ("sform", header.sform)):
        if values is not None and not all(map(math.isfinite, values)):
            got = ", ".join(f"{v:g}" for v in values)
            raise ImageError(f"{path} has a damaged header: its {name} is ({got}), expected numbers; export it again")
    scaled = math.isfinite(header.slope) and header.slope != 0
    if math.isinf(header.slope) or (scaled and not math.isfinite(header.intercept)):
        raise ImageError(
            f"{path} has a damaged header: values are rescaled by {header.slope:g} and {header.intercept:g}, expected "
            "numbers; export it again"
        )


def _sizes(dim: tuple[int, ...]) -> tuple[int, ...]:
    """ITK takes a size of 0 beyond the third axis for 1, as many writers leave it."""
    return (*dim[:3], *(n or 1 for n in dim[3:]))


def _first_version(content: bytes, order: str) -> Header:
    def get(form: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(f"{order}{form}", content, offset)

    dim, pixdim = get("8h", 40), get("8f", 76)
    (datatype,) = get("h", 70)
    offset, slope, intercept = get("3f", 108)
    qform_code, sform_code = get("2h", 252)
    is_nifti = content[344:346] == b"n+" or content[344:346] == b"ni"
    axes = dim[0] if 1 <= dim[0] <= 7 else 0
    return Header(
        version=1,
        order=order,
        datatype=datatype,
        sizes_xyz=_sizes(dim[1 : axes + 1]),
        dim=dim[: max(dim[0], 0) + 1],
        start=int(offset) if 0 <= offset < 2**31 else -1,
        slope=slope if is_nifti else 0.0,  # Analyze has other fields there, and no orientation
        intercept=intercept if is_nifti else 0.0,
        pixdim=pixdim[1 : axes + 1],
        qform=(pixdim[0], *get("6f", 256)) if is_nifti and qform_code > 0 else None,
        sform=get("12f", 280) if is_nifti and sform_code > 0 else None,
        units=content[123],
        intent=get("h", 68)[0],
    )


def _second_version(content: bytes, order: str) -> Header:
    def get(form: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(f"{order}{form}", content, offset)

    dim, pixdim = get("8q", 16), get("8d", 104)
    (datatype,) = get("h", 12)
    (offset,) = get("q", 168)
    slope, intercept = get("2d", 176)
    qform_code, sform_code = get("2i", 344)
    axes = dim[0] if 1 <= dim[0] <= 7 else 0
    return Header(
        version=2,
        order=order,
        datatype=datatype,
        sizes_xyz=_sizes(dim[1 : axes + 1]),
        dim=dim[: axes + 1],
        start=offset if 0 <= offset < 2**62 else -1,
        slope=slope,
        intercept=intercept,
        pixdim=pixdim[1 : axes + 1],
        qform=(pixdim[0], *get("6d", 352)) if qform_code > 0 else None,
        sform=get("12d", 400) if sform_code > 0 else None,
    )
