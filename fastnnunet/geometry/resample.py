"""nnU-Net's resampling functions, by the names its plans give them, without scikit-image and torch.

`resample_data_or_seg_to_shape`: scikit-image's `resize(mode="edge", anti_aliasing=False)` in float64, clipped to the
input range; slice by slice and order `order_z` between slices where the spacing is anisotropic.
`resample_torch_fornnunet`: torch's linear `interpolate` in float32; `nearest-exact` between slices.
`no_resampling_hack`: nothing.
Axis order is nnU-Net's internal one (after transpose_forward); spacings in mm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import SpecError
from fastnnunet.geometry.axis_operators import AxisOperator, Convention, Dense, axis_operator

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
    """Operators for one pair of shapes: `in_plane` first, then (if separate) the one along the coarse axis."""

    convention: Convention
    in_plane: tuple[tuple[int, AxisOperator], ...]  # (spatial axis, operator)
    between_planes: tuple[int, AxisOperator] | None
    clip_axes: tuple[int, ...]  # the result is clipped to the input range over these axes; empty: cannot leave it
    shape_out: tuple[int, ...]

    @property
    def steps(self) -> tuple[tuple[int, AxisOperator], ...]:
        return self.in_plane if self.between_planes is None else (*self.in_plane, self.between_planes)

    @property
    def is_local(self) -> bool:
        """Every output value depends on at most two input samples per axis, so planes can be made one by one."""
        return not any(isinstance(operator, Dense) for _, operator in self.steps)

    def resample_planes(self, array_CX: npt.NDArray[np.float32], planes: slice) -> npt.NDArray[np.float32]:
        """Only the output planes `planes` (along the first spatial axis) of a local plan, in float32.

        The planes come first, then the other axes: interpolations along different axes commute.
        """
        along_first = next((operator for axis, operator in self.steps if axis == 0), None)
        if along_first is None:
            out = array_CX[:, planes]
        elif isinstance(along_first, Dense):
            raise TypeError("planes cannot be resampled alone by an operator that is not local")
        else:
            out = along_first.rows(planes.start, planes.stop).apply(array_CX, 1)
        for axis, operator in self.steps:
            if axis != 0:
                out = operator.apply(out, axis + 1)
        return out

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
    """Operators that take `shape` to `shape_out`; None where nnU-Net leaves the array alone (equal shapes)."""
    if spec.convention == "none" or tuple(shape) == tuple(shape_out):
        return None
    separate = coarse_axis(spacing_mm, spacing_out_mm, spec.force_separate_z, spec.anisotropy_threshold)
    in_plane = []
    between: tuple[int, AxisOperator] | None = None
    for axis, (size, size_out) in enumerate(zip(shape, shape_out, strict=True)):
        if size == size_out:
            continue
        if axis == separate:
            between = (axis, axis_operator(size, size_out, spec.order_z, spec.convention))
        else:
            in_plane.append((axis, axis_operator(size, size_out, spec.order, spec.convention)))
    # the axis that shrinks most first: less work for the others
    in_plane.sort(key=lambda step: shape_out[step[0]] / shape[step[0]])
    clip_axes = tuple(a for a in range(len(shape)) if a != separate) if spec.order > 1 and in_plane else ()
    return ResamplePlan(spec.convention, tuple(in_plane), between, clip_axes, tuple(int(s) for s in shape_out))


def resample(array_CX: npt.NDArray[np.float32], plan: ResamplePlan | None) -> npt.NDArray[np.float32]:
    """Resample every channel of a float32 (C, spatial...) array; the array itself where there is nothing to do."""
    if plan is None:
        return array_CX
    out = np.empty((array_CX.shape[0], *plan.shape_out), np.float32)
    for channel, values in enumerate(array_CX):
        # nnU-Net resamples in float64; torch in float32
        out[channel] = _resample_one(values.astype(np.float64) if plan.convention == "scipy" else values, plan)
    return out


def _resample_one(values: npt.NDArray[Any], plan: ResamplePlan) -> npt.NDArray[Any]:
    limits = None
    if plan.clip_axes:
        limits = (values.min(axis=plan.clip_axes, keepdims=True), values.max(axis=plan.clip_axes, keepdims=True))
    for axis, operator in plan.in_plane:
        values = operator.apply(values, axis)
    if limits is not None:
        np.clip(values, *limits, out=values)
    if plan.between_planes is not None:
        axis, operator = plan.between_planes
        values = operator.apply(values, axis)
    return values


def resample_labels(labels_ZYX: npt.NDArray[Any], plan: ResamplePlan | None) -> npt.NDArray[Any]:
    """Resample a label map as nnU-Net does: every label's indicator in plane, the largest wins, nearest between planes.

    Of labels that tie the nearest neighbour's is taken, else the lowest. `plan` is one of order 1 and order_z 0 in the
    scipy convention.
    """
    if plan is None:
        return labels_ZYX
    best: npt.NDArray[np.float64] | None = None
    nearest = labels_ZYX.astype(np.float64)
    for axis, _ in plan.in_plane:
        order_0 = axis_operator(labels_ZYX.shape[axis], plan.shape_out[axis], 0, "scipy")
        nearest = order_0.apply(nearest, axis)
    out = nearest
    if plan.in_plane:
        for label in np.unique(labels_ZYX):
            score = (labels_ZYX == label).astype(np.float64)
            for axis, operator in plan.in_plane:
                score = operator.apply(score, axis)
            if best is None:
                best, out = score, np.full(score.shape, label, np.float64)
                continue
            wins = (score > best) | ((score == best) & (nearest == label))
            out[wins] = label
            np.maximum(best, score, out=best)
    if plan.between_planes is not None:
        axis, operator = plan.between_planes
        out = operator.apply(out, axis)
    return out.astype(labels_ZYX.dtype)
