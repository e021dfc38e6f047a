"""nnU-Net's resampling functions, by the names its plans give them, without scikit-image and torch.

`resample_data_or_seg_to_shape`: scikit-image's `resize(mode="edge", anti_aliasing=False)` in float64, clipped to the
input range; slice by slice and order `order_z` between slices where the spacing is anisotropic.
`resample_torch_fornnunet`: torch's linear `interpolate` in float32; `nearest-exact` between slices.
`no_resampling_hack`: nothing.
Here is what to do per axis; the arithmetic is `fastnnunet.native`'s.
Axis order is nnU-Net's internal one (after transpose_forward); spacings in mm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.errors import SpecError

Convention = Literal["scipy", "torch"]
_ANISOTROPY_THRESHOLD = 3.0
_KNOWN_KWARGS: dict[str, frozenset[str]] = {
    "resample_data_or_seg_to_shape": frozenset(
        {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}
    ),
    # num_threads, device and memefficient_seg_resampling do not change an image or logit value
    "resample_torch_fornnunet": frozenset(
        {"is_seg", "force_separate_z", "separate_z_anisotropy_threshold", "mode", "aniso_axis_mode", "num_threads"}
        | {"device", "memefficient_seg_resampling"}
    ),
    "no_resampling_hack": frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResampleSpec:
    """One resampling function of the plans with its arguments."""

    convention: Convention | Literal["none"]
    order: int = 3
    order_z: int = 0
    force_separate_z: bool | None = None
    anisotropy_threshold: float = _ANISOTROPY_THRESHOLD


@dataclass(frozen=True, slots=True)
class ResamplePlan:
    """What one pair of shapes needs along each spatial axis."""

    convention: Convention
    orders: native.Orders  # 0 where an axis keeps its size
    separate_axis: int | None  # planes across it are resampled each by itself, then along it
    clip: native.Clip  # what the range of the result is clipped to; order 1 cannot leave the input's
    shape_out: tuple[int, ...]

    @property
    def is_local(self) -> bool:
        """Every output value depends on at most two input samples per axis, so it can be made wherever it is needed."""
        return max(self.orders) <= 1

    @property
    def is_torch(self) -> bool:
        return self.convention == "torch"

    @property
    def keeps_dtype(self) -> bool:
        """The result is cast back to the input's dtype (float16 for logits); torch's variant returns float32."""
        return self.convention == "scipy"


def parse_resample_spec(entry: Mapping[str, Any], what: str) -> ResampleSpec:
    """Read `{"fn": name, "kwargs": {...}}` of a bundle.

    Raises SpecError naming the function (or argument) when this runtime cannot reproduce it.
    """
    name, kwargs = entry.get("fn"), dict(entry.get("kwargs") or {})
    known = _KNOWN_KWARGS.get(str(name))
    if known is None:
        raise SpecError(
            f"resampling of {what}: the plans name {name!r}, which this runtime cannot reproduce; "
            f"known: {', '.join(_KNOWN_KWARGS)}\npredict with nnU-Net itself, or re-plan with one of these functions"
        )
    if unknown := sorted(kwargs.keys() - known):
        raise SpecError(f"resampling of {what}: {name} has unknown arguments {', '.join(unknown)}")
    if kwargs.get("is_seg"):
        raise SpecError(f"resampling of {what}: {name} has is_seg=True, expected False for an image or logits")
    if name == "no_resampling_hack":
        return ResampleSpec(convention="none")
    common: dict[str, Any] = {
        "anisotropy_threshold": float(kwargs.get("separate_z_anisotropy_threshold", _ANISOTROPY_THRESHOLD))
    }
    if name == "resample_torch_fornnunet":
        modes = (kwargs.get("mode", "linear"), kwargs.get("aniso_axis_mode", "nearest-exact"))
        if modes != ("linear", "nearest-exact"):
            raise SpecError(
                f"resampling of {what}: {name} has mode and aniso_axis_mode {modes}, this runtime reproduces only "
                "('linear', 'nearest-exact')"
            )
        return ResampleSpec(convention="torch", order=1, force_separate_z=kwargs.get("force_separate_z"), **common)
    return ResampleSpec(
        convention="scipy",
        order=int(kwargs.get("order", 3)),
        order_z=int(kwargs.get("order_z", 0)),
        force_separate_z=kwargs.get("force_separate_z", False),
        **common,
    )


def parse_label_resample_spec(entry: Mapping[str, Any], what: str) -> ResampleSpec:
    """The same for label maps. Raises SpecError for torch's function and for labels interpolated between slices."""
    kwargs = {**(entry.get("kwargs") or {}), "is_seg": False}
    spec = parse_resample_spec({**entry, "kwargs": kwargs}, what)
    if spec.convention == "torch" or spec.order_z != 0:
        raise SpecError(
            f"resampling of {what}: label maps by {entry.get('fn')} with order_z {spec.order_z} are nothing that this "
            "runtime reproduces\npredict with nnU-Net itself"
        )
    return spec


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], target_spacing_mm: Sequence[float]
) -> tuple[int, ...]:
    """Shape after resampling to the target spacing: rounded half to even, as nnU-Net's `compute_new_shape`."""
    return tuple(round(old / new * size) for old, new, size in zip(spacing_mm, target_spacing_mm, shape, strict=True))


def coarse_axis(
    spacing_mm: Sequence[float], target_spacing_mm: Sequence[float], force: bool | None, threshold: float
) -> int | None:
    """The axis to be treated separately, or None.

    The present spacing is looked at first, then the target; two or three equally coarse axes mean none.
    """
    if force is None:
        chosen = next((s for s in (spacing_mm, target_spacing_mm) if max(s) / min(s) > threshold), None)
    else:
        chosen = spacing_mm if force else None
    if chosen is None:
        return None
    axes = [axis for axis, spacing in enumerate(chosen) if max(chosen) / spacing == 1]
    return axes[0] if len(axes) == 1 else None


def plan_resampling(
    spec: ResampleSpec,
    shape: Sequence[int],
    shape_out: Sequence[int],
    spacing_mm: Sequence[float],
    spacing_out_mm: Sequence[float],
) -> ResamplePlan | None:
    """How to take `shape` (three axes) to `shape_out`; None where nnU-Net leaves the array alone (equal shapes)."""
    if spec.convention == "none" or tuple(shape) == tuple(shape_out):
        return None
    separate = coarse_axis(spacing_mm, spacing_out_mm, spec.force_separate_z, spec.anisotropy_threshold)
    orders = [
        0 if size == size_out else spec.order_z if axis == separate else spec.order
        for axis, (size, size_out) in enumerate(zip(shape, shape_out, strict=True))
    ]
    in_plane = max(order for axis, order in enumerate(orders) if axis != separate)
    clip: native.Clip = "none" if in_plane <= 1 else "whole" if separate is None else "per_plane"
    z, y, x = orders
    return ResamplePlan(spec.convention, (z, y, x), separate, clip, tuple(int(s) for s in shape_out))


def resample(
    array_CZYX: native.Logits, plan: ResamplePlan | None, *, threads: int | None = None
) -> npt.NDArray[np.float32]:
    """Resample every channel to float32; the array itself where there is nothing to do."""
    if plan is None:
        return array_CZYX  # type: ignore[return-value]
    if plan.clip != "per_plane" or not plan.separate_axis:
        return native.resample(
            array_CZYX, plan.shape_out, plan.orders, torch=plan.is_torch, clip=plan.clip, threads=threads
        )
    # the core takes planes across its first axis
    axes = [plan.separate_axis, *(axis for axis in range(3) if axis != plan.separate_axis)]
    z, y, x = (plan.orders[axis] for axis in axes)
    out = native.resample(
        array_CZYX.transpose(0, *(axis + 1 for axis in axes)),
        [plan.shape_out[axis] for axis in axes],
        (z, y, x),
        torch=plan.is_torch,
        clip=plan.clip,
        threads=threads,
    )
    return np.ascontiguousarray(out.transpose(0, *(axes.index(axis) + 1 for axis in range(3))))


def resample_labels(
    labels_ZYX: npt.NDArray[Any], plan: ResamplePlan | None, *, threads: int | None = None
) -> npt.NDArray[Any]:
    """Resample a label map as nnU-Net does: every label's indicator in plane, the largest wins, nearest between planes.

    Of labels that tie the nearest neighbour's is taken, else the lowest. `plan` is one of order 1 and order_z 0 in the
    scipy convention.
    """
    if plan is None:
        return labels_ZYX
    in_plane = list(plan.shape_out)
    if plan.separate_axis is not None:
        in_plane[plan.separate_axis] = labels_ZYX.shape[plan.separate_axis]

    def resampled(values: npt.NDArray[Any], shape: Sequence[int], orders: native.Orders) -> npt.NDArray[np.float64]:
        """float64, in which nnU-Net compares the indicators"""
        single = values[None].astype(np.float32)
        return native.resample(single, shape, orders, dtype=np.float64, threads=threads)[0]

    nearest = out = resampled(labels_ZYX, in_plane, (0, 0, 0))
    if in_plane != list(labels_ZYX.shape):
        best: npt.NDArray[np.float64] | None = None
        for label in np.unique(labels_ZYX):
            score = resampled(labels_ZYX == label, in_plane, plan.orders)
            if best is None:
                best, out = score, np.full(score.shape, label, np.float64)
                continue
            wins = (score > best) | ((score == best) & (nearest == label))
            out[wins] = label
            np.maximum(best, score, out=best)
    return resampled(out, plan.shape_out, (0, 0, 0)).astype(labels_ZYX.dtype)
