"""The compiled core against SciPy, NumPy, PyTorch and nnU-Net's own functions."""

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet import native

SHAPES = st.tuples(*[st.integers(1, 13)] * 3)
EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)


@pytest.fixture(autouse=True, scope="module")
def as_many_threads_as_asked_for() -> Iterator[None]:
    """Also for arrays so small that one is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_FEW_VALUES", 0)
        yield


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 50, shape).astype(np.float32)


class TestResample:
    @pytest.mark.parametrize("order", range(6))
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(shape=SHAPES, shape_out=SHAPES)
    def test_equals_scipys_zoom(self, order: int, shape: Any, shape_out: Any) -> None:
        values = _normal(1, *shape)
        factors = [after / before for before, after in zip(shape, shape_out, strict=True)]
        expected = scipy.ndimage.zoom(
            values[0].astype(np.float64), factors, order=order, mode="nearest", grid_mode=True
        )
        got = native.resample(values, shape_out, (order,) * 3, dtype=np.float64)
        np.testing.assert_allclose(got[0], expected, rtol=0, atol=1e-11)

    def test_large_enough_for_blocks_and_both_orders_of_work(self) -> None:
        """More columns than are worked on at once; growing and shrinking along z and in plane."""
        for shape, shape_out in (
            ((9, 70, 130), (14, 33, 141)),
            ((30, 20, 70), (7, 41, 99)),
            ((5, 90, 66), (5, 33, 66)),
        ):
            values = _normal(2, *shape)
            factors = [after / before for before, after in zip(shape, shape_out, strict=True)]
            got = native.resample(values, shape_out, (3, 3, 3))
            for channel, result in zip(values, got, strict=True):
                expected = scipy.ndimage.zoom(channel, factors, order=3, mode="nearest", grid_mode=True)
                np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.ptp(channel))

    def test_a_spline_passes_through_its_samples(self) -> None:
        values = _normal(1, 1, 5, 9)
        got = native.resample(values, (1, 15, 3), (3, 3, 3))
        np.testing.assert_array_equal(got[0, 0, 1::3], values[0, 0, :, 1::3])

    @pytest.mark.parametrize("clip", ["whole", "per_plane"])
    def test_clipping(self, clip: Any) -> None:
        values = _normal(1, 4, 6, 7)
        free = native.resample(values, (4, 11, 12), (0, 3, 3))
        axes = (0, 1, 2) if clip == "whole" else (1, 2)
        low, high = (function(values[0], axis=axes, keepdims=True) for function in (np.min, np.max))
        assert ((free[0] < low) | (free[0] > high)).any()
        got = native.resample(values, (4, 11, 12), (0, 3, 3), clip=clip)
        np.testing.assert_array_equal(got[0], np.clip(free[0], low, high))

    def test_views(self) -> None:
        values = _normal(2, 9, 10, 11)
        for view in (values[:, 1:7, 2:, 3:9], values.transpose(0, 3, 1, 2), values[:, ::2, ::-1]):
            expected = native.resample(view.copy(), (5, 6, 7), (3, 1, 3))
            np.testing.assert_array_equal(native.resample(view, (5, 6, 7), (3, 1, 3)), expected)

    def test_half_precision_input(self) -> None:
        values = _normal(1, 5, 6, 7).astype(np.float16)
        expected = native.resample(values.astype(np.float32), (7, 4, 9), (3, 3, 3))
        np.testing.assert_array_equal(native.resample(values, (7, 4, 9), (3, 3, 3)), expected)

    def test_what_cannot_be_done_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="order 6"):
            native.resample(_normal(1, 2, 2, 2), (3, 3, 3), (6, 6, 6))
        with pytest.raises(ValueError, match="order 3"):
            native.resample(_normal(1, 2, 2, 2), (3, 3, 3), (3, 3, 3), torch=True)
        with pytest.raises(ValueError, match="without samples"):
            native.resample(_normal(1, 2, 0, 2), (3, 3, 3), (1, 1, 1))
        with pytest.raises(TypeError):
            native.resample(_normal(1, 2, 2, 2).astype(np.float64), (3, 3, 3), (1, 1, 1))


class TestHalf:
    def test_conversions_equal_numpys(self) -> None:
        """Every half and, around each, the floats that decide how it is rounded; out of range to infinity."""
        finite = np.sort(EVERY_HALF[np.isfinite(EVERY_HALF)].astype(np.float32))
        middle = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
        edges = np.array([65519.99, 65520, 1e6, np.inf, 1e-45, 2.0**-25, 2.0**-24], np.float32)
        values = np.concatenate([finite, middle, np.nextafter(middle, np.inf, dtype=np.float32), edges, -edges])
        ones = np.ones((1, 1, len(values)), np.float32)
        sums = np.empty((1, *ones.shape), np.float16)
        native.add_weighted(values.reshape(sums.shape), ones, sums, is_first=True)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(sums.ravel(), values.astype(np.float16))

    def test_sums_and_quotients_equal_torchs(self) -> None:
        import torch

        rng = np.random.default_rng(0)
        logits = rng.normal(0, 20, (3, 4, 5, 37)).astype(np.float32)
        weights = (10 ** rng.uniform(-8, 1, (4, 5, 37))).astype(np.float16)
        before = rng.normal(0, 20, logits.shape).astype(np.float16)
        before[0] = rng.normal(0, 1e-6, before[0].shape)  # subnormal
        sums, expected = before.copy(), torch.from_numpy(before.copy())
        native.add_weighted(logits, weights.astype(np.float32), sums)
        expected += torch.from_numpy(logits) * torch.from_numpy(weights)
        np.testing.assert_array_equal(sums, expected.numpy())
        native.add_halves(before, sums)
        expected += torch.from_numpy(before)
        np.testing.assert_array_equal(sums, expected.numpy())
        limits = native.divide(sums, weights)
        np.testing.assert_allclose(limits[0], (expected.min(), expected.max()))
        expected /= torch.from_numpy(weights)
        np.testing.assert_array_equal(sums, expected.numpy())
        assert limits[1] == (float(expected.min()), float(expected.max()))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_limits_show_what_is_not_finite(self, bad: float) -> None:
        values = np.zeros((3, 40), np.float32)
        values[1, 7] = bad
        assert not np.isfinite(native.limits(values)).all()


class TestLabels:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        shape=SHAPES,
        shape_out=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 20)),
        order_z=st.sampled_from([0, 1]),
        heads=st.sampled_from([1, 2, 5]),
        dtype=st.sampled_from([np.float16, np.float32]),
    )
    def test_argmax_of_resampled_logits(self, shape: Any, shape_out: Any, order_z: Any, heads: int, dtype: Any) -> None:
        logits = (_normal(heads, *shape) / 20).astype(np.float16).astype(dtype)
        labels = np.full(shape_out, 99, np.uint8)
        native.label_logits(logits, labels, (order_z, 1, 1), to_half=True)
        resampled = np.stack(
            [native.resample(head[None], shape_out, (order_z, 1, 1))[0].astype(np.float16) for head in logits]
        )
        expected = resampled.argmax(0)
        differ = labels != expected
        # float32 instead of float64: only where the two best are neighbouring float16 numbers
        best, second = np.sort(resampled.astype(np.float32), axis=0)[-1], np.take_along_axis(resampled, labels[None], 0)
        assert (np.abs(best - second[0].astype(np.float32))[differ] <= 2e-3 * np.abs(best[differ]) + 1e-6).all()
        assert differ.mean() < 0.01

    def test_ties_go_to_the_lowest_head(self) -> None:
        logits = np.zeros((4, 2, 3, 20), np.float16)
        logits[2] = logits[3] = 1
        labels = np.empty((5, 4, 31), np.uint16)
        native.label_logits(logits, labels, (1, 1, 1), to_half=True)
        assert (labels == 2).all()

    def test_regions_are_torchs_sigmoid_above_one_half(self) -> None:
        import torch

        values = EVERY_HALF[np.isfinite(EVERY_HALF)].reshape(1, 1, 1, -1)
        expected = torch.sigmoid(torch.from_numpy(values).float()).numpy()[0] > 0.5
        labels = np.empty(values.shape[1:], np.uint8)
        native.label_logits(values, labels, (0, 0, 0), to_half=False, regions=[7])
        np.testing.assert_array_equal(labels, np.where(expected, 7, 0))

    def test_later_regions_are_painted_over_earlier_ones(self) -> None:
        logits = np.full((3, 1, 1, 4), -1, np.float32)
        logits[0, ..., 1:] = logits[1, ..., 2:] = logits[2, ..., 3:] = 1
        labels = np.empty((1, 1, 4), np.uint16)
        native.label_logits(logits, labels, (0, 0, 0), to_half=False, regions=[5, 300, 2])
        assert labels.ravel().tolist() == [0, 5, 300, 2]
        for head, label in enumerate([5, 300, 2]):
            native.paint_head(logits[head], label, labels, to_half=False)
        assert labels.ravel().tolist() == [0, 5, 300, 2]

    @pytest.mark.parametrize("planes", [slice(0, 3), slice(2, 21), slice(20, 21)])
    def test_planes_alone(self, planes: slice) -> None:
        logits = _normal(2, 8, 9, 10).astype(np.float16)
        whole = native.resample(logits, (21, 17, 13), (1, 1, 1))
        got = native.resample_planes(logits, (21, 17, 13), planes, (1, 1, 1), to_half=False)
        np.testing.assert_allclose(got, whole[:, planes], rtol=1e-6, atol=1e-4)

    @pytest.mark.parametrize("regions", [False, True])
    def test_logits_resampled_by_splines_equal_nnunets(self, regions: bool) -> None:
        """Head by head: the plans may name any order."""
        import torch
        from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

        from fastnnunet.geometry.resample import parse_resample_spec
        from fastnnunet.runtime.logits import label_rule, plan_logits, postprocess
        from fastnnunet.runtime.preprocess import Preprocessed
        from tests.test_runtime_stages import _spec

        kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        half = _normal(2, 6, 9, 8).astype(np.float16) / 8
        spacing, spacing_out, shape_out = (4.0, 1.0, 1.0), (3.5, 0.8, 0.7), (7, 11, 11)
        resampled = resample_data_or_seg_to_shape(half.copy(), shape_out, spacing, spacing_out, **kwargs)
        expected = resampled.argmax(0)
        if regions:
            first, second = torch.sigmoid(torch.from_numpy(resampled).float()).numpy() > 0.5
            expected = np.where(second, 1, np.where(first, 2, 0))
        case = Preprocessed(
            data_CZYX=np.empty((1, 6, 9, 8), np.float32),
            spacing_mm=spacing_out,
            target_spacing_mm=spacing,
            shape_before_cropping=shape_out,
            bbox=tuple((0, n) for n in shape_out),
            properties={},
        )
        labels = {"background": 0, "a": [1, 2], "b": 1} if regions else {"background": 0, "a": 1}
        spec = _spec(labels=labels, num_heads=2, regions_class_order=(2, 1) if regions else None)
        how = parse_resample_spec({"fn": "resample_data_or_seg_to_shape", "kwargs": kwargs}, "logits")
        got, _ = postprocess(half, case, spec, plan_logits(how, case), label_rule(spec))
        assert 0 < expected.mean() < 2
        assert (got == expected).mean() > 0.999

    def test_splines_are_refused(self) -> None:
        with pytest.raises(ValueError, match="order 0 or 1"):
            native.label_logits(_normal(2, 4, 4, 4), np.empty((5, 5, 5), np.uint8), (3, 3, 3), to_half=True)
        with pytest.raises(ValueError, match="region labels"):
            native.label_logits(
                _normal(2, 4, 4, 4), np.empty((4, 4, 4), np.uint8), (0, 0, 0), to_half=True, regions=[1]
            )


class TestNormalisation:
    @pytest.mark.parametrize("size", [0, 1, 7, 8, 129, 1000, 2**15 + 1, 300_001])
    def test_moments_are_numpys_to_the_bit(self, size: int) -> None:
        values = np.random.default_rng(size).normal(300, 70, size).astype(np.float32)
        channel = values.reshape(1, 1, -1)
        expected = (float(values.mean()), float(values.std())) if size else (np.nan, np.nan)
        assert native.moments(channel) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        inside = np.random.default_rng(1).random(size) > 0.3
        if inside.any():
            expected = float(values[inside].mean()), float(values[inside].std())
            assert native.moments(channel, inside.reshape(channel.shape)) == expected

    def test_cropped_and_transposed_channels(self) -> None:
        whole = _normal(40, 41, 42) + 200
        for channel in (whole[3:30, 5:, 7:40].copy(), whole[3:30, 5:, 7:40], whole.transpose(2, 0, 1)[1:]):
            expected = (channel - channel.mean()) / channel.std()
            native.z_score(channel)
            np.testing.assert_allclose(channel, expected, rtol=0, atol=1e-5)


class TestMasks:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30)),
        density=st.sampled_from([0.0, 0.15, 0.4, 0.6, 0.9, 1.0]),
        connectivity=st.sampled_from([1, 2, 3]),
        threads=st.sampled_from([1, 3]),
    )
    def test_components_and_holes_are_scipys(self, shape: Any, density: float, connectivity: int, threads: int) -> None:
        mask = np.random.default_rng(int(100 * density)).random(shape) < density
        structure = scipy.ndimage.generate_binary_structure(3, connectivity)
        expected, count = scipy.ndimage.label(mask, structure)
        labels, sizes = native.label_components(mask, connectivity, threads=threads)
        np.testing.assert_array_equal(labels, expected)
        assert sizes == np.bincount(expected.ravel(), minlength=count + 1)[1:].tolist()
        expected_filled = scipy.ndimage.binary_fill_holes(mask)
        native.fill_holes(mask, threads=threads)
        np.testing.assert_array_equal(mask, expected_filled)

    def test_a_spiral_is_one_component(self) -> None:
        """Parts that only meet at the end, across the planes that different threads begin with."""
        mask = np.zeros((7, 9, 9), bool)
        mask[:, ::2, :] = True
        mask[0, 1::4, 8] = mask[6, 3::4, 0] = True
        labels, sizes = native.label_components(mask, threads=3)
        assert labels.max() == 1
        assert sizes == [mask.sum()]

    def test_connectivity_is_checked(self) -> None:
        with pytest.raises(ValueError, match="1, 2 or 3"):
            native.label_components(np.ones((2, 2, 2), bool), 4)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        shape=SHAPES, points=st.lists(st.tuples(*[st.integers(0, 12)] * 3), max_size=4), axes=st.permutations(range(3))
    )
    def test_box_and_mask_of_what_is_not_zero(self, shape: Any, points: Any, axes: Any) -> None:
        image = np.zeros((2, *shape), np.float32)
        for number, point in enumerate(points):
            image[(number % 2, *(p % n for p, n in zip(point, shape, strict=True)))] = -1
        image = image.transpose(0, *(axis + 1 for axis in axes))
        expected = (image != 0).any(0)
        mask = native.nonzero_mask(image)
        np.testing.assert_array_equal(mask, expected)
        where = np.argwhere(expected)
        box = native.nonzero_box(image)
        if len(where):
            assert box == tuple(zip(where.min(0).tolist(), (where.max(0) + 1).tolist(), strict=True))
        else:
            assert box == tuple((0, n) for n in image.shape[1:])


class TestThreads:
    def test_results_do_not_depend_on_them(self) -> None:
        values = _normal(2, 17, 30, 70)
        logits = values.astype(np.float16)
        for work in (
            lambda threads: native.resample(values, (23, 21, 90), (3, 3, 3), clip="whole", threads=threads),
            lambda threads: native.moments(values[0], threads=threads),
            lambda threads: native.nonzero_box(values * (values > 150), threads=threads),
            lambda threads: native.resample_planes(
                logits, (23, 21, 90), slice(3, 9), (1,) * 3, to_half=True, threads=threads
            ),
        ):
            np.testing.assert_array_equal(work(1), work(3))

    def test_a_forked_child_may_use_the_core(self) -> None:
        """GNU's OpenMP would hang there if the child asked for threads again."""
        values = _normal(1, 9, 9, 9)
        expected = native.resample(values, (12, 12, 12), (3, 3, 3), threads=2)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            got = pool.apply_async(_in_child, (values,)).get(timeout=60)
        np.testing.assert_array_equal(got, expected)

    def test_other_python_threads_run_meanwhile(self) -> None:
        import threading

        values = _normal(1, 60, 200, 200)
        ticks, stop = [0], threading.Event()

        def tick() -> None:
            while not stop.is_set():
                ticks[0] += 1

        other = threading.Thread(target=tick)
        other.start()
        before = ticks[0]
        native.resample(values, (90, 200, 200), (3, 3, 3), threads=1)
        during = ticks[0] - before
        stop.set()
        other.join()
        assert during > 100


def _in_child(values: np.ndarray) -> np.ndarray:
    return native.resample(values, (12, 12, 12), (3, 3, 3), threads=2)
