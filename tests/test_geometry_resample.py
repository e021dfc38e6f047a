"""Resampling against nnU-Net's own functions, run in the same process."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.errors import SpecError
from fastnnunet.geometry.resample import (
    ResamplePlan,
    parse_resample_spec,
    plan_resampling,
    resample,
    resampled_shape,
)

DATA = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
LOGITS = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def _plan(entry: dict[str, Any], *geometry: Any) -> ResamplePlan | None:
    return plan_resampling(parse_resample_spec(entry, "data"), *geometry)


def _default(array: np.ndarray, new_shape: Any, old: Any, new: Any, **kwargs: Any) -> np.ndarray:
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    return resample_data_or_seg_to_shape(array.copy(), new_shape, old, new, **kwargs)


def _torch(array: np.ndarray, new_shape: Any, old: Any, new: Any, **kwargs: Any) -> np.ndarray:
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    return resample_torch_fornnunet(array.copy(), new_shape, old, new, num_threads=1, **kwargs)


GEOMETRIES = [
    # shape, new shape, spacing, new spacing
    ((11, 17, 13), (15, 14, 19), (1.0, 1.0, 1.0), (0.8, 1.2, 0.7)),
    ((11, 17, 13), (11, 14, 13), (1.0, 1.0, 1.0), (1.0, 1.2, 1.0)),
    ((6, 17, 13), (14, 20, 11), (5.0, 1.0, 1.0), (2.0, 0.8, 1.2)),  # coarse axis 0 from the present spacing
    ((6, 17, 13), (4, 20, 11), (5.0, 1.0, 1.0), (7.0, 0.8, 1.2)),
    ((6, 17, 13), (14, 17, 13), (5.0, 1.0, 1.0), (2.0, 1.0, 1.0)),  # only between planes
    ((6, 17, 13), (6, 20, 11), (5.0, 1.0, 1.0), (5.0, 0.8, 1.2)),  # only in plane
    ((12, 17, 13), (3, 15, 13), (1.0, 1.0, 1.0), (4.0, 1.1, 1.0)),  # coarse axis from the target
    ((17, 6, 13), (20, 14, 11), (1.0, 5.0, 1.0), (0.8, 2.0, 1.2)),  # coarse axis 1
    ((17, 13, 6), (20, 11, 14), (1.0, 1.0, 5.0), (0.8, 1.2, 2.0)),  # coarse axis 2
    ((7, 9, 13), (14, 11, 11), (5.0, 5.0, 1.0), (2.5, 4.0, 1.2)),  # two coarse axes: none
    ((1, 9, 13), (1, 14, 11), (999.0, 1.0, 1.0), (999.0, 0.6, 1.2)),  # a 2d image
    ((5, 1, 4), (7, 3, 4), (1.0, 1.0, 1.0), (0.7, 0.4, 1.0)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kwargs", [DATA, LOGITS, DATA | {"order_z": 1}, DATA | {"force_separate_z": False}])
def test_default_resampling_equals_nnunet(geometry: Any, kwargs: dict[str, Any]) -> None:
    array = np.random.default_rng(0).normal(100, 50, (2, *geometry[0])).astype(np.float32)
    expected = _default(array, *geometry[1:], **kwargs)
    got = resample(array, _plan({"fn": "resample_data_or_seg_to_shape", "kwargs": kwargs}, *geometry))
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    # float64 inside, so at most the last bit of float32 differs (ties of linear weights)
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=1e-6)
    assert np.mean(got == expected) > 0.99


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("force", [None, True, False])
def test_torch_resampling_equals_nnunet(geometry: Any, force: bool | None) -> None:
    array = np.random.default_rng(1).normal(0, 50, (2, *geometry[0])).astype(np.float32)
    expected = _torch(array, *geometry[1:], force_separate_z=force)
    entry = {"fn": "resample_torch_fornnunet", "kwargs": {"is_seg": False, "force_separate_z": force}}
    got = resample(array, _plan(entry, *geometry))
    # torch works in float32 with coordinates in float32: agreement to a few parts per million of the value range
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.ptp(array))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    new_shape=st.tuples(*[st.integers(1, 14)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.9, 1.0, 3.1, 4.0])] * 3),
    order=st.sampled_from([0, 1, 3]),
)
def test_any_shape_and_spacing(
    shape: tuple[int, ...], new_shape: tuple[int, ...], spacing: tuple[float, ...], order: int
) -> None:
    array = np.random.default_rng(2).normal(0, 1, (1, *shape)).astype(np.float32)
    kwargs = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
    expected = _default(array, new_shape, spacing, (1.0, 1.0, 1.0), **kwargs)
    plan = _plan({"fn": "resample_data_or_seg_to_shape", "kwargs": kwargs}, shape, new_shape, spacing, (1.0, 1.0, 1.0))
    np.testing.assert_allclose(resample(array, plan), expected, rtol=2e-6, atol=2e-6)


def test_equal_shapes_are_left_alone() -> None:
    array = np.random.default_rng(0).random((1, 4, 5, 6), np.float32)
    plan = _plan({"fn": "resample_data_or_seg_to_shape", "kwargs": DATA}, (4, 5, 6), (4, 5, 6), (1, 1, 1), (1, 1, 1.05))
    assert plan is None
    assert resample(array, plan) is array


def test_no_resampling_ignores_the_new_shape() -> None:
    assert _plan({"fn": "no_resampling_hack", "kwargs": {}}, (4, 5, 6), (8, 5, 6), (1, 1, 1), (0.5, 1, 1)) is None


def test_cubic_result_stays_in_the_input_range() -> None:
    array = np.zeros((1, 12, 12, 12), np.float32)
    array[:, 4:8, 4:8, 4:8] = 1
    plan = _plan({"fn": "resample_data_or_seg_to_shape", "kwargs": DATA}, (12,) * 3, (17,) * 3, (1.0,) * 3, (0.7,) * 3)
    out = resample(array, plan)
    assert out.min() == 0
    assert out.max() == 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 600)] * 3),
    old=st.tuples(*[st.floats(0.1, 10)] * 3),
    new=st.tuples(*[st.floats(0.1, 10)] * 3),
)
def test_resampled_shape_equals_nnunet(shape: Any, old: Any, new: Any) -> None:
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    assert resampled_shape(shape, old, new) == tuple(compute_new_shape(shape, old, new))


def test_half_voxels_round_to_even() -> None:
    assert resampled_shape((5, 7, 9), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)) == (2, 4, 4)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"fn": "my_resampling", "kwargs": {}}, "'my_resampling'"),
        ({"fn": "resample_data_or_seg_to_shape", "kwargs": {"spline": 3}}, "spline"),
        ({"fn": "resample_data_or_seg_to_shape", "kwargs": {"is_seg": True}}, "is_seg"),
        ({"fn": "resample_torch_fornnunet", "kwargs": {"aniso_axis_mode": "linear"}}, "aniso_axis_mode"),
    ],
)
def test_what_cannot_be_reproduced_is_named(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_resample_spec(entry, "data")
