"""Whether a network may be predicted in one pass, proved on patches, and how large a halo its tiles need.

The graph says that nothing depends on a tile but through the receptive field; numbers have to agree. The receptive
field of a deep U-Net is larger than most images, though what lies far away hardly counts. So where there are real
images, the halo is the smallest multiple of the strides that changes no label of theirs, and would change none if the
differences it makes were twice as large.
Axes: C channel, H head, X all of space.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet.errors import ParityError, SpecError
from fastnnunet.export.receptive import bytes_per_voxel, receptive_reach, tile_dependence
from fastnnunet.specs.bundle import INPUT, OUTPUT
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.specs.one_pass import OnePass

if TYPE_CHECKING:
    import onnx
    import torch

Network = Callable[[np.ndarray], np.ndarray]  # a tile (C, X) -> its logits (H, X)

TOLERANCE = 1e-4  # of the largest logit: what rounding to float32 may do
ROUNDING = 1e-5  # the same of a single label that changes
SAFETY = 2  # times the differences of a halo that may not change a label
CASES = 2  # whose labels decide about a halo
_REGION_VOXELS = 2**22  # of a case
_LEAST_ACROSS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was measured, for the bundle's provenance."""

    max_abs_difference: float  # in logits, between two tiles that both contain the receptive field
    max_abs_logit: float
    receptive_reach: tuple[int, ...]
    cases: int  # that decided about the halo; 0 where it is the receptive field
    voxels: int  # whose label was compared
    changed_by_less: int  # labels that the next smaller halo changed


def may_be_one_pass(graph: GraphSpec, multiples: tuple[int, ...] | None, network: "torch.nn.Module") -> bool:
    """Whether to try: an exported graph of any patch size, and no layer that takes statistics from its tile.

    Raises SpecError where it was asked for and cannot be.
    """
    reason = _why_not(graph, multiples, network)
    if reason is not None and graph.one_pass:
        raise SpecError(f"--one-pass: {reason}\nleave it out; the bundle is then predicted in nnU-Net's window")
    return reason is None and graph.one_pass is not False


def _why_not(graph: GraphSpec, multiples: tuple[int, ...] | None, network: "torch.nn.Module") -> str | None:
    import torch

    if graph.batch_size is not None:
        return f"the model is to take exactly {graph.batch_size} patches at once"
    if multiples is None:
        return f"{type(network).__name__} computes on patches of one size only"
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.MultiheadAttention)
    for module in network.modules():
        is_instance_norm = isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
        if isinstance(module, norms) or (is_instance_norm and not module.track_running_stats):
            return f"the network's {type(module).__name__} takes its statistics from the tile"
    return None


def one_pass_of(
    model: "onnx.ModelProto",
    patch_CX: np.ndarray,
    multiples: tuple[int, ...],
    images: Iterator[np.ndarray],
    *,
    has_regions: bool,
) -> tuple[OnePass, Proof]:
    """How tiles of a network may be cut. `patch_CX`: to prove it on; `images` (C, X): real ones, to measure a halo.

    Raises ParityError where the output of a voxel depends on its tile.
    """
    spatial = len(multiples)
    if (reason := tile_dependence(model, spatial)) is not None:
        raise ParityError(f"the network's output depends on where a tile ends: {reason}")
    reach = receptive_reach(model, multiples)
    network = run_of(model)
    difference, largest = prove(network, patch_CX, reach, multiples)
    halo, measured = measure_halo(network, reach, multiples, images, has_regions=has_regions)
    rules = OnePass(
        halo=halo,
        multiples=multiples,
        halo_is="measured" if measured.cases else "exact",
        bytes_per_voxel=bytes_per_voxel(model, len(patch_CX), spatial),
    )
    proof = Proof(
        max_abs_difference=difference,
        max_abs_logit=largest,
        receptive_reach=reach,
        cases=measured.cases,
        voxels=measured.voxels,
        changed_by_less=measured.changed_by_less,
    )
    return rules, proof


def wider(one: OnePass, other: OnePass | None) -> OnePass | None:
    """What two folds of an ensemble need."""
    if other is None:
        return None
    halo = tuple(max(pair) for pair in zip(one.halo, other.halo, strict=True))
    both_exact = one.halo_is == other.halo_is == "exact"
    return replace(one, halo=halo, halo_is="exact" if both_exact else "measured")


def run_of(model: "onnx.ModelProto") -> Network:
    """The graph on ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False  # shapes differ
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(tile_CX: np.ndarray) -> np.ndarray:
        logits_HX: np.ndarray = session.run([OUTPUT], {INPUT: np.ascontiguousarray(tile_CX)[None]})[0][0]
        return logits_HX

    return run


def prove(
    network: Network, patch_CX: np.ndarray, reach: Sequence[int], multiples: Sequence[int]
) -> tuple[float, float]:
    """Largest difference of a voxel's logits between two tiles that contain its receptive field, and largest logit.

    Along one axis after the other: the patch goes on periodically there until it is long enough, and is thin across.
    What only one of the tiles sees is three times as bright, and they differ in length.
    Raises ParityError where the difference is more than rounding.
    """
    worst, largest = 0.0, 0.0
    for axis, (distance, step) in enumerate(zip(reach, multiples, strict=True)):
        length = -(-(2 * distance + 2 * step) // step) * step
        strip_CX = _strip(patch_CX, axis, length + 2 * step, multiples)
        along = np.moveaxis(strip_CX, axis + 1, 1)  # a view
        along[:, :step] *= 3
        along[:, length:] *= 3
        one, other = (
            np.moveaxis(network(part), axis + 1, 1)
            for part in (_slice(strip_CX, axis, 0, length), _slice(strip_CX, axis, step, length + 2 * step))
        )
        one, other = one[:, step + distance : length - distance], other[:, distance : length - distance - step]
        worst = float(np.maximum(worst, np.abs(one - other).max()))  # keeps NaN
        largest = max(largest, float(np.abs(one).max()))
    if not worst <= TOLERANCE * largest:
        raise ParityError(
            "the network's output depends on where a tile ends: the same voxel of two tiles that both contain its "
            f"receptive field differs by {worst:.3g} in logits up to {largest:.3g}, rounding explains "
            f"{TOLERANCE * largest:.3g}"
        )
    return worst, largest


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredHalo:
    """Of a halo."""

    cases: int = 0
    voxels: int = 0
    changed_by_less: int = 0


def measure_halo(
    network: Network,
    reach: Sequence[int],
    multiples: Sequence[int],
    images: Iterator[np.ndarray],
    *,
    has_regions: bool,
) -> tuple[tuple[int, ...], MeasuredHalo]:
    """The smallest multiple of the strides that changes no label, or along an axis the receptive field where that is
    smaller or images are too short to tell.

    Of each image a part is predicted whole, and in two tiles that meet in its middle, along all axes at once.
    """
    halo = [0] * len(reach)
    voxels = cases = changed_by_less = 0
    for image_CX in images:
        region_CX = _region(image_CX, multiples)
        whole_HX: np.ndarray | None = None
        while True:
            halo = [
                min(h or m, d) if _is_long_enough(size, min(h or m, d), m) else d
                for h, m, d, size in zip(halo, multiples, reach, region_CX.shape[1:], strict=True)
            ]
            if halo == list(reach):
                return tuple(reach), MeasuredHalo()
            if whole_HX is None:
                whole_HX = network(region_CX)
            changed, compared = _changed_labels(network, region_CX, whole_HX, halo, multiples, has_regions)
            if not changed:
                break
            changed_by_less = changed
            halo = [h + m for h, m in zip(halo, multiples, strict=True)]
        cases, voxels = cases + 1, voxels + compared
    if not cases:
        return tuple(reach), MeasuredHalo()
    return tuple(halo), MeasuredHalo(cases=cases, voxels=voxels, changed_by_less=changed_by_less)


def _changed_labels(
    network: Network,
    region_CX: np.ndarray,
    whole_HX: np.ndarray,
    halo: Sequence[int],
    multiples: Sequence[int],
    has_regions: bool,
) -> tuple[int, int]:
    """Labels that change with `SAFETY` times the differences a halo makes, and how many voxels were compared."""
    space = region_CX.shape[1:]
    middle = [n // m // 2 * m for n, m in zip(space, multiples, strict=True)]
    aligned = [-(-h // m) * m for h, m in zip(halo, multiples, strict=True)]
    changed = compared = 0
    for lower in (True, False):
        tile, kept, inside = [], [], []
        for size, cut, wide, h, m in zip(space, middle, aligned, halo, multiples, strict=True):
            if not _is_long_enough(size, h, m):  # not cut
                part, keep = slice(0, size), slice(0, size)
            elif lower:
                part, keep = slice(0, cut + wide), slice(0, cut + wide - h)
            else:
                part, keep = slice(cut - wide, size), slice(cut - wide + h, size)
            tile.append(part)
            kept.append(keep)
            inside.append(slice(keep.start - part.start, keep.stop - part.start))
        got_HX, expected_HX = network(region_CX[:, *tile])[:, *inside], whole_HX[:, *kept]
        further_HX = expected_HX + SAFETY * (got_HX - expected_HX)
        is_rounding = np.abs(got_HX - expected_HX).max(axis=0) <= ROUNDING * np.abs(expected_HX).max()
        if has_regions:
            other = ((further_HX > 0) != (expected_HX > 0)).any(axis=0)
        else:
            other = further_HX.argmax(axis=0) != expected_HX.argmax(axis=0)
        changed += int((other & ~is_rounding).sum())
        compared += other.size
    return changed, compared


def _is_long_enough(size: int, halo: int, multiple: int) -> bool:
    """Whether two tiles that meet in the middle both leave out a part of the other."""
    aligned = -(-halo // multiple) * multiple
    return size // multiple // 2 * multiple >= aligned + multiple


def _region(image_CX: np.ndarray, multiples: Sequence[int]) -> np.ndarray:
    """The middle of an image: as much as there is time for, in multiples of the strides, padded where it is smaller."""
    size = [max(1, n // m) * m for n, m in zip(image_CX.shape[1:], multiples, strict=True)]
    while math.prod(size) > _REGION_VOXELS:
        longest = max(range(len(size)), key=lambda axis: size[axis] / multiples[axis])
        if size[longest] == multiples[longest]:
            break
        size[longest] -= multiples[longest]
    starts = [max(0, (n - s) // 2) for n, s in zip(image_CX.shape[1:], size, strict=True)]
    part_CX = image_CX[(slice(None), *(slice(b, b + s) for b, s in zip(starts, size, strict=True)))]
    missing = [(0, s - n) for n, s in zip(part_CX.shape[1:], size, strict=True)]
    return np.pad(part_CX, [(0, 0), *missing])


def _strip(patch_CX: np.ndarray, axis: int, length: int, multiples: Sequence[int]) -> np.ndarray:
    """A copy of the patch, continued along an axis and cut to the middle across it."""
    index: list[Any] = [slice(None)]
    for other, (size, step) in enumerate(zip(patch_CX.shape[1:], multiples, strict=True)):
        if other == axis:
            index.append(np.arange(length) % size)
        else:
            across = min(size, -(-_LEAST_ACROSS // step) * step)
            index.append(slice((size - across) // 2, (size - across) // 2 + across))
    return np.array(patch_CX[tuple(index)])


def _slice(values_CX: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    return values_CX[(slice(None), *([slice(None)] * axis), slice(start, stop))]
