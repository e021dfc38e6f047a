"""What a bundle says of a network whose output at a voxel depends on the voxels around it alone.

Its normalisation is a constant at prediction time, so where a tile ends changes nothing beyond a halo, as long as tiles
begin at multiples of the strides. Such a network needs neither overlapping tiles nor weights.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from fastnnunet.errors import SpecError
from fastnnunet.specs.checks.problems import MAX_AXIS, is_integer, is_list, shown

DEFAULT_MEMORY_LIMIT = 2 * 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MOST_BYTES_PER_VOXEL = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class OnePass:
    """How tiles may be cut, axes as in the bundle's patch size."""

    halo: tuple[int, ...]  # voxels around what is kept of a tile that have to be in it
    multiples: tuple[int, ...]  # products of the strides: what starts and lengths of tiles are multiples of
    # exact: the receptive field ends there; measured: on real patches, what lies beyond changed no label
    halo_is: Literal["exact", "measured"]
    bytes_per_voxel: (
        int  # of a tile: float32 numbers that are held at once while the network runs, image and logits too
    )


def one_pass_problems(
    one_pass: OnePass, patch_size: Any, batch_size: int | None, has_dynamic_format: bool
) -> list[str]:
    """Values that cannot be, or not together with the rest of the bundle. `patch_size` is checked."""
    problems, dims = [], len(patch_size)
    for name, low in (("halo", 0), ("multiples", 1)):
        value = getattr(one_pass, name)
        if not is_list(value, dims) or not all(is_integer(n, low, MAX_AXIS) for n in value):
            problems.append(f"one_pass.{name}: got {shown(value)}, expected {dims} whole numbers, {low} to {MAX_AXIS}")
    if not is_integer(one_pass.bytes_per_voxel, 8, _MOST_BYTES_PER_VOXEL):
        got = shown(one_pass.bytes_per_voxel)
        problems.append(f"one_pass.bytes_per_voxel: got {got}, expected 8 to {_MOST_BYTES_PER_VOXEL}")
    if not problems and any(n % m for n, m in zip(patch_size, one_pass.multiples, strict=True)):
        problems.append(
            f"one_pass.multiples: got {shown(one_pass.multiples)}, expected divisors of {shown(patch_size)}"
        )
    if batch_size is not None:
        problems.append(f"one_pass: the model takes exactly {batch_size} patches at once, expected any number")
    if not has_dynamic_format:
        problems.append("one_pass: bundles of this format version have none")
    return problems


def parse_memory(value: int | str) -> int:
    """Bytes of `4G`, `800M` or a number of bytes. Raises SpecError."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?", value, re.I)):
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    if not is_integer(value, 1):
        raise SpecError(f"memory limit: got {shown(value)}, expected a size such as 4G or 800M")
    return int(value)


def memory_words(size_bytes: int) -> str:
    """A size that `parse_memory` takes and that is at least this large."""
    unit = "M" if size_bytes >= 10 * 2**20 else "K"
    return f"{-(-size_bytes // _UNITS[unit])}{unit}"
