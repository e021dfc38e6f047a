"""nnU-Net's resampling functions, by the names its plans give them, without scikit-image and torch.

`resample_data_or_seg_to_shape`: scikit-image's `resize(mode="edge", anti_aliasing=False)` in float64, clipped to the
input range; slice by slice and order `order_z` between slices where the spacing is anisotropic.
`resample_torch_fornnunet`: torch's linear `interpolate` in float32; `nearest-exact` between slices.
`no_resampling_hack`: nothing.
What is done per axis is decided by the core (`native/core/resample_plan.hpp`); here the arguments in plans are read.
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


ResamplePlan = native.ResamplePlan  # what one pair of shapes needs along each spatial axis


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
    return native.resampled_shape(shape, spacing_mm, target_spacing_mm)


def plan_resampling(
    spec: ResampleSpec,
    shape: Sequence[int],
    shape_out: Sequence[int],
    spacing_mm: Sequence[float],
    spacing_out_mm: Sequence[float],
) -> ResamplePlan | None:
    """How to take `shape` (three axes) to `shape_out`; None where nnU-Net leaves the array alone (equal shapes)."""
    if spec.convention == "none":
        return None
    return native.plan_resampling(
        spec.convention == "torch",
        spec.order,
        spec.order_z,
        spec.force_separate_z,
        spec.anisotropy_threshold,
        shape,
        shape_out,
        spacing_mm,
        spacing_out_mm,
    )


def resample(
    array_CZYX: native.Logits, plan: ResamplePlan | None, *, threads: int | None = None
) -> npt.NDArray[np.float32]:
    """Resample every channel to float32; the array itself where there is nothing to do."""
    if plan is None:
        return array_CZYX  # type: ignore[return-value]
    return native.resample_planned(array_CZYX, plan, threads=threads)


def resample_labels(
    labels_ZYX: npt.NDArray[Any], plan: ResamplePlan | None, *, threads: int | None = None
) -> npt.NDArray[Any]:
    """Resample a label map as nnU-Net does: every label's indicator in plane, the largest wins, nearest between planes.

    Of labels that tie the nearest neighbour's is taken, else the lowest. `plan` is one of order 1 and order_z 0 in the
    scipy convention.
    """
    if plan is None:
        return labels_ZYX
    return native.resample_labels(labels_ZYX.astype(np.int32), plan, threads=threads).astype(labels_ZYX.dtype)
