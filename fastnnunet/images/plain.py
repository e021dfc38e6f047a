"""Geometries of NIfTI files whose axes run along the patient's, and the headers of volumes with such a one.

Most images have one, and ITK need not be loaded for it. No cosine is computed there, so what ITK 5.3 and 5.4 make of it
is known to the last bit. Where qform and sform differ, an axis is oblique or two are exchanged, ITK has the word.
ITK's axes point left and back (LPS) where NIfTI's point right and front (RAS).
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastnnunet.images.nifti import Header

HEADER_BYTES = 352  # with the four bytes that say that nothing comes between header and voxels
LONGEST_AXIS = 2**15 - 1  # what a header of the first version counts to
_AXES = {  # quaternion (b, c, d) of no turn or half a turn -> where x, y, z point
    (0.0, 0.0, 0.0): (1.0, 1.0, 1.0),
    (1.0, 0.0, 0.0): (1.0, -1.0, -1.0),
    (0.0, 1.0, 0.0): (-1.0, 1.0, -1.0),
    (0.0, 0.0, 1.0): (-1.0, -1.0, 1.0),
}
_Form: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # signs of the axes and offsets in RAS

_LEAST_MM, _MOST_MM = 1e-3, 1e3  # beyond, ITK takes some matrices for singular
_RAS = (-1.0, -1.0, 1.0)
_MM_AND_S = 10
_SCANNER = 1
_DATATYPES = {"uint8": (2, 8), "uint16": (512, 16), "int16": (4, 16), "float32": (16, 32)}


def plain_geometry(header: Header) -> dict[str, Any] | None:
    """ITK's `spacing`, `origin`, `direction` (x, y, z) of a three-dimensional image; None where they are not plain."""
    spacing = header.pixdim
    is_usual = header.version == 1 and header.intent == 0 and header.units & 7 in (0, 2)  # millimetres, if any
    if not is_usual or len(spacing) != 3 or not all(_LEAST_MM <= s <= _MOST_MM for s in spacing):
        return None
    forms = []
    if header.qform is not None:
        forms.append(_plain_qform(*header.qform))
    if header.sform is not None:
        forms.append(_plain_sform(header.sform, spacing))
    if not forms or forms[0] is None or forms[-1] != forms[0]:
        return None
    signs, offsets = forms[0]
    return {
        "spacing": spacing,
        "origin": tuple(ras * o + 0.0 for ras, o in zip(_RAS, offsets, strict=True)),  # plus zero: no -0.0
        "direction": _diagonal([ras * s for ras, s in zip(_RAS, signs, strict=True)]),
    }


def plain_header(voxels_ZYX: npt.NDArray[Any], geometry: dict[str, Any]) -> bytes | None:
    """What ITK 5.4 writes before the voxels of a volume of this geometry; None where that is not plain.

    `voxels_ZYX`: uint8, uint16, int16 or float32. A zero may have the other sign.
    """
    spacing, direction = tuple(geometry["spacing"]), tuple(geometry["direction"])
    signs = [cosine * ras for cosine, ras in zip(direction[::4], _RAS, strict=False)]
    is_straight = len(spacing) == 3 and all(abs(s) == 1 for s in signs) and direction == _diagonal(direction[::4])
    if not is_straight or not all(_LEAST_MM <= s <= _MOST_MM for s in spacing) or max(voxels_ZYX.shape) > LONGEST_AXIS:
        return None
    offsets = [ras * o for ras, o in zip(_RAS, geometry["origin"], strict=True)]
    qfac = math.prod(signs)  # -1: a mirror image, whose third axis is turned before the rest is a rotation
    quaternion = next(q for q, axes in _AXES.items() if axes == (signs[0], signs[1], qfac * signs[2]))
    rows = [
        (*(s * mm if i == row else 0.0 for i in range(3)), offsets[row])
        for row, (s, mm) in enumerate(zip(signs, spacing, strict=True))
    ]
    header = bytearray(HEADER_BYTES)
    for form, at, values in (
        ("i", 0, [HEADER_BYTES - 4]),
        ("B", 38, b"r"),
        ("8h", 40, (3, *voxels_ZYX.shape[::-1], 1, 1, 1, 1)),
        ("2h", 70, _DATATYPES[voxels_ZYX.dtype.name]),
        ("4f", 76, (qfac, *spacing)),
        ("2f", 108, (HEADER_BYTES, 1.0)),  # where voxels begin, and their slope
        ("B", 123, [_MM_AND_S]),
        ("2h", 252, (_SCANNER, _SCANNER)),
        ("6f", 256, (*quaternion, *offsets)),
        ("12f", 280, [value for row in rows for value in row]),
        ("4s", 344, [b"n+1"]),
    ):
        struct.pack_into(f"<{form}", header, at, *values)
    return bytes(header)


def _plain_qform(qfac: float, b: float, c: float, d: float, *offsets: float) -> _Form | None:
    """None unless the quaternion is no turn or half a turn."""
    axes = _AXES.get((abs(b), abs(c), abs(d)))
    return None if axes is None else ((*axes[:2], -axes[2] if qfac < 0 else axes[2]), offsets)


def _plain_sform(sform: Sequence[float], spacing: Sequence[float]) -> _Form | None:
    """None unless the matrix is diagonal and its entries are the spacing."""
    matrix = np.reshape(sform, (3, 4))
    lengths = np.diagonal(matrix)
    if np.count_nonzero(matrix[:, :3]) > 3 or tuple(np.abs(lengths)) != tuple(spacing):
        return None
    return tuple(np.sign(lengths).tolist()), tuple(matrix[:, 3].tolist())


def _diagonal(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.diag(values).ravel().tolist())
