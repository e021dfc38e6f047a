"""Small questions about values that came from a file: each answer is a list of problems, empty when there is none."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

MAX_PATCH_VOXELS = 2**28  # a float32 channel of that size is a GiB
MAX_AXIS = 2**15


def shown(value: Any) -> str:
    """A value for a message: printable on any terminal, and short."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_number(value: Any) -> bool:
    """A finite int or float of a size that float64 takes; no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def is_integer(value: Any, low: int = -(2**63), high: int = 2**63 - 1) -> bool:
    """A whole number from `low` to `high`; no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_list(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and (length is None or len(value) == length)


def is_name(value: Any) -> bool:
    """Text that is safe as the name of a file or folder: no separator, no control character, not `.` or `..`."""
    return (
        isinstance(value, str)
        and 0 < len(value.encode(errors="replace")) <= 255
        and value.isprintable()
        and value not in (".", "..")
        and not {"/", "\\"} & set(value)
    )


def is_file_ending(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(\.[A-Za-z0-9_+-]{1,32}){1,8}", value) is not None


def patch_size_problems(value: Any, name: str = "patch_size") -> list[str]:
    if not is_list(value) or len(value) not in (2, 3) or not all(is_integer(n, 1, MAX_AXIS) for n in value):
        return [f"{name}: got {shown(value)}, expected two or three whole numbers from 1 to {MAX_AXIS}"]
    if math.prod(value) > MAX_PATCH_VOXELS:
        return [f"{name}: got {shown(value)}, expected at most {MAX_PATCH_VOXELS} voxels in all"]
    return []


def spacing_problems(value: Any, dims: int, name: str) -> list[str]:
    if not is_list(value, dims) or not all(is_number(s) and 1e-9 <= s <= 1e9 for s in value):
        return [f"{name}: got {shown(value)}, expected {dims} numbers above 0 (mm), one for each axis of the patch"]
    return []


def transpose_problems(forward: Any, backward: Any) -> list[str]:
    """Permutations of three axes that undo each other."""
    both = (forward, backward)
    if not all(is_list(p, 3) and all(is_integer(i) for i in p) and sorted(p) == [0, 1, 2] for p in both):
        return [f"transpose_forward, transpose_backward: got {shown(both)}, expected permutations of 0, 1, 2"]
    if [forward[i] for i in backward] != [0, 1, 2]:
        return [f"transpose_backward: got {shown(backward)}, expected what undoes {shown(forward)}"]
    return []


def label_problems(labels: Any, order: Any, name: str = "labels") -> list[str]:
    """As in dataset.json: name -> whole number, or name -> list of them for a region."""
    if not isinstance(labels, dict) or not labels or len(labels) > 2**16:
        return [f"{name}: got {shown(labels)}, expected names with their values"]
    wrong = [
        f"{name}: {shown(key)} has {shown(value)}, expected a whole number from 0 to 65535, or a list of them"
        for key, value in labels.items()
        if not (_is_label(value) or (is_list(value) and value and all(map(_is_label, value))))
    ]
    if order is not None and not (is_list(order) and order and all(map(_is_label, order))):
        wrong.append(f"regions_class_order: got {shown(order)}, expected a list of labels")
    return wrong[:5]


def _is_label(value: Any) -> bool:
    if isinstance(value, str):  # nnU-Net takes whatever int() takes
        return re.fullmatch("[0-9]{1,5}", value) is not None and int(value) < 2**16
    return is_integer(value, 0, 2**16 - 1)


def intensity_problems(properties: Any, schemes: Sequence[Any], name: str) -> list[str]:
    """Statistics of the training intensities: channel index as text -> name -> number. Needed by CTNormalization."""
    if not isinstance(properties, dict) or not all(isinstance(one, dict) for one in properties.values()):
        return [f"{name}: got {shown(properties)}, expected statistics for each channel"]
    needed = ("mean", "std", "percentile_00_5", "percentile_99_5")
    return [
        f"{name}: channel {index} has {key} {shown(properties[str(index)][key])}, expected a finite number"
        for index, scheme in enumerate(schemes)
        for key in needed
        if scheme == "CTNormalization"
        and key in properties.get(str(index), {})
        and not is_number(properties[str(index)][key])
    ][:5]


def resampling_problems(entry: Any, name: str) -> list[str]:
    """`{"fn": name, "kwargs": {...}}`: orders of splines, thresholds and switches; what they mean is checked later."""
    if not isinstance(entry, dict) or not isinstance(entry.get("fn"), str):
        return [f"{name}: got {shown(entry)}, expected the name of a function (fn) and its arguments (kwargs)"]
    kwargs = entry.get("kwargs")
    if not isinstance(kwargs, dict | None):
        return [f"{name}: got arguments {shown(kwargs)}, expected names with values"]
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "order": (lambda v: is_integer(v, 0, 5), "a whole number from 0 to 5"),
        "order_z": (lambda v: is_integer(v, 0, 5), "a whole number from 0 to 5"),
        "is_seg": (lambda v: isinstance(v, bool), "true or false"),
        "force_separate_z": (lambda v: isinstance(v, bool | None), "true, false or null"),
        "separate_z_anisotropy_threshold": (is_number, "a number"),
    }
    return [
        f"{name}: {key} is {shown(value)}, expected {kinds[key][1]}"
        for key, value in (kwargs or {}).items()
        if key in kinds and not kinds[key][0](value)
    ]


def scheme_list_problems(schemes: Any, masks: Any, channels: int | None) -> list[str]:
    """Normalisation: a scheme and a switch (inside the non-zero mask) for each channel; None: for any number."""
    if not is_list(schemes, channels) or not all(isinstance(s, str) for s in schemes):
        count = "one" if channels is None else f"{channels} names, one"
        return [f"normalization_schemes: got {shown(schemes)}, expected {count} for each channel"]
    if not is_list(masks, len(schemes)) or not all(isinstance(m, bool) or m in (0, 1) for m in masks):
        return [f"use_mask_for_norm: got {shown(masks)}, expected true or false for each of {len(schemes)} channel(s)"]
    return []
