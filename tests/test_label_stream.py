"""The window in chunks against the window in one piece: the same logits and labels, in memory told beforehand."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet import native
from fastnnunet.geometry.chunked_window import streamed_window
from fastnnunet.geometry.resample import parse_resample_spec
from fastnnunet.runtime import loaded
from fastnnunet.runtime.label_stream import MARGIN, LabelStream, stream_labels
from fastnnunet.runtime.loaded import Labelled, LoadedBundle
from fastnnunet.runtime.logits import label_rule, plan_logits, postprocess
from fastnnunet.runtime.preprocess import Preprocessed
from fastnnunet.runtime.sliding_window import SlidingWindow, TileSums, finished_chunks
from fastnnunet.runtime.times import StageTimes
from tests.bundles import DEFAULT_RESAMPLING, NO_RESAMPLING, TORCH_RESAMPLING, smooth_noise
from tests.one_piece import sliding_window_logits
from tests.test_runtime_stages import _fake_network, _spec

SIDES = st.integers(1, 21)
REGIONS = {"background": 0, "all": [1, 2, 3], "bc": [2, 3], "c": [3]}


def window_of(patch: tuple[int, ...], step: float = 0.5, mirror: tuple[int, ...] | None = None) -> SlidingWindow:
    return SlidingWindow(num_heads=3, patch_size=patch, step_size=step, mirror_axes=mirror)


def case_of(data: np.ndarray, shape_out: tuple[int, ...], spacing_z: float = 1.0) -> Preprocessed:
    """Cropped from an image that is larger by a voxel below and two above."""
    spacing = [n / m for n, m in zip(data.shape[1:], shape_out, strict=True)]
    return Preprocessed(
        data_CZYX=data,
        spacing_mm=(spacing_z * spacing[0], *spacing[1:]),
        target_spacing_mm=(spacing_z, 1.0, 1.0),
        shape_before_cropping=tuple(n + 3 for n in shape_out),
        bbox=tuple((1, n + 1) for n in shape_out),
        properties={"spacing": [1.0, 1.0, 1.0]},
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(SIDES, SIDES, SIDES),
    patch=st.tuples(*[st.integers(2, 9)] * 3),
    flat=st.booleans(),
    step=st.sampled_from([0.3, 0.5, 1.0]),
    margin=st.sampled_from([0, 1]),
)
def test_chunks_hold_the_logits_of_one_piece(shape: Any, patch: Any, flat: bool, step: float, margin: int) -> None:
    window = window_of(patch[1:] if flat else patch, step, (0, 1))
    data = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    expected = sliding_window_logits(data, _fake_network, window)
    chunks = streamed_window(shape, window.patch_size, step)
    sums = TileSums(chunks, window, margin=margin)
    got = np.full(expected.shape, np.nan, np.float16)
    for number, logits in finished_chunks(data, _fake_network, window, sums):
        inside = got[:, *chunks.chunk_slices(number)]
        assert np.isnan(inside).all(), "a chunk twice"
        inside[...] = logits[:, margin:, margin:]
    np.testing.assert_array_equal(got, expected)
    assert 0 < sums.peak_bytes <= 3 * 2 * chunks.peak_voxels(margin)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    shape=st.tuples(SIDES, SIDES, SIDES),
    shape_out=st.tuples(*[st.integers(1, 40)] * 3),
    patch=st.tuples(*[st.integers(2, 9)] * 3),
    flat=st.booleans(),
    resampling=st.sampled_from([DEFAULT_RESAMPLING, TORCH_RESAMPLING, "none"]),
    spacing_z=st.sampled_from([1.0, 5.0]),
    regions=st.booleans(),
)
def test_labels_are_those_of_one_piece(
    shape: Any, shape_out: Any, patch: Any, flat: bool, resampling: Any, spacing_z: float, regions: bool
) -> None:
    if resampling == "none":
        shape_out, resampling = shape, NO_RESAMPLING
    window = window_of(patch[1:] if flat else patch)
    labels = {"labels": REGIONS, "regions_class_order": (3, 1, 2)} if regions else {}
    spec = _spec(patch_size=window.patch_size, num_heads=3, **labels)
    case = case_of(np.random.default_rng(1).standard_normal((1, *shape)).astype(np.float32), shape_out, spacing_z)
    plan, rule = plan_logits(parse_resample_spec(resampling["probabilities"], "logits"), case), label_rule(spec)
    logits = sliding_window_logits(case.data_CZYX, _fake_network, window)
    expected, _ = postprocess(logits, case, spec, plan, rule)
    got = stream_labels(case, _fake_network, window, plan, rule, StageTimes())
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_a_part_of_the_logits_must_hold_what_its_labels_need() -> None:
    logits, labels = np.zeros((2, 4, 5, 6), np.float16), np.zeros((3, 4, 6), np.uint8)
    whole: dict[str, Any] = {"shape_in": (8, 5, 6), "shape_out": (16, 4, 6)}
    native.label_logits(
        logits, labels, (1, 1, 1), to_half=True, part=native.Part(**whole, first_in=(4, 0), first_out=(10, 0))
    )
    for first_in, first_out, message in (
        ((4, 0), (8, 0), "lacks inputs"),  # output 8 lies between inputs 3 and 4
        ((4, 0), (14, 0), "shapes"),  # 14 to 16 of 16
        ((5, 0), (13, 0), "shapes"),
        ((-1, 0), (0, 0), "shapes"),
    ):
        part = native.Part(**whole, first_in=first_in, first_out=first_out)
        with pytest.raises(ValueError, match=message):
            native.label_logits(logits, labels, (1, 1, 1), to_half=True, part=part)
    with pytest.raises(ValueError, match="spline"):
        native.last_inputs(5, 8, 3)


class TestMemory:
    # tiles start at 0, 8, 16, 24 along z, at 0, 8 along y and at 0, 4 along x
    SHAPE, PATCH = (40, 24, 20), (16, 16, 16)

    def test_by_hand(self) -> None:
        """While the window passes from y = 0 to y = 8 in the second layer of tiles, 8 planes wait that the first layer
        began (24 rows), and 8 planes of the tiles at y = 0 (16 rows); the third layer repeats it."""
        chunks = streamed_window(self.SHAPE, self.PATCH, 0.5)
        assert chunks.bounds == ((0, 8, 16, 24, 32, 40), (0, 8, 16, 24), (0, 20))
        assert chunks.peak_voxels() == (8 * 24 + 8 * 16) * 20
        # the same chunks, each with a plane and a row more: 3 of 8 x 8 rows, and 2 of them
        assert chunks.peak_voxels(1) == (3 + 2) * 9 * 9 * 20

    def test_what_is_held_does_not_grow_with_the_depth(self) -> None:
        peaks = {depth: streamed_window((depth, 24, 20), self.PATCH, 0.5).peak_voxels() for depth in (40, 80, 400)}
        assert len(set(peaks.values())) == 1

    def test_a_hundred_classes(self) -> None:
        """A grid of 200 x 273 x 273: tiles begin at 0, 36, 72 along z and at 0, 48, 97, 145 along y."""
        chunks = streamed_window((200, 273, 273), (128, 128, 128), 0.5)
        assert chunks.peak_voxels() == (92 * 273 + 36 * 128) * 273
        assert 2 * 105 * chunks.peak_voxels(MARGIN) < 1.7 * 2**30 < 0.6 * 2 * 105 * 200 * 273 * 273

    def test_is_measured(self) -> None:
        """All memory NumPy takes, by tracemalloc: never the logits of the whole image."""
        heads, shape = 40, (96, 24, 20)
        window = SlidingWindow(num_heads=heads, patch_size=self.PATCH, step_size=0.5, mirror_axes=None)
        case = case_of(smooth_noise(shape, 0, mean=0, spread=1)[None], (110, 30, 20))
        labels = {"background": 0, **{str(i): i for i in range(1, heads)}}
        spec = _spec(patch_size=self.PATCH, num_heads=heads, labels=labels)
        plan = plan_logits(parse_resample_spec(DEFAULT_RESAMPLING["probabilities"], "logits"), case)
        tiles = np.random.default_rng(0).standard_normal((16, heads, *self.PATCH)).astype(np.float32)
        stream_labels(
            case, lambda batch: tiles[: len(batch)], window, plan, label_rule(spec), StageTimes()
        )  # fills the caches
        tracemalloc.start()
        stream_labels(case, lambda batch: tiles[: len(batch)], window, plan, label_rule(spec), StageTimes())
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        chunks = streamed_window(shape, self.PATCH, 0.5)
        sums_bytes = 2 * heads * chunks.peak_voxels(MARGIN)
        planes_and_rows_bytes = 2 * heads * (2 * 24 * 20 + 2 * 9 * 20)
        segmentation_bytes, batch_bytes = 113 * 33 * 23, 4 * 16 * 16**3
        assert sums_bytes < peak_bytes < sums_bytes + planes_and_rows_bytes + segmentation_bytes + batch_bytes + 2**16
        assert peak_bytes < 2 * heads * np.prod(shape) / 2

    def test_planes_and_rows_kept_between_chunks(self) -> None:
        window = window_of(self.PATCH)
        chunks = streamed_window(self.SHAPE, self.PATCH, 0.5)
        stream = LabelStream(chunks, None, label_rule(_spec()), np.zeros(self.SHAPE, np.uint8))
        data = np.random.default_rng(1).standard_normal((1, *self.SHAPE)).astype(np.float32)
        held = []
        sums = TileSums(chunks, window, margin=MARGIN)
        for number, logits in finished_chunks(data, _fake_network, window, sums):
            stream.add(number, logits)
            held.append(stream.held_bytes)
        assert sums.peak_bytes == 3 * 2 * chunks.peak_voxels(MARGIN)
        assert 0 < max(held) <= 3 * 2 * (3 * 24 * 20 + 2 * 9 * 20)
        assert held[-1] == 0


class TestChoice:
    """Which of the two ways a prediction goes."""

    class Network:
        name, precision = "fake", "fp32"

        def run(self, batch: np.ndarray) -> np.ndarray:
            return _fake_network(batch)

    def load(self, folds: int = 1, **changes: Any) -> LoadedBundle:
        return LoadedBundle(_spec(mirror_axes=(0,), **changes), [self.Network() for _ in range(folds)])

    def test_large_logits_are_labelled_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bundle, image = self.load(), smooth_noise((20, 23, 19), 2)[None]
        properties = {"spacing": [1.2, 0.9, 1.1]}
        expected = bundle.predict_array(image, properties)
        case = bundle.preprocess_array(image, properties)
        assert isinstance(bundle.infer(case, StageTimes()), np.ndarray)
        monkeypatch.setattr(loaded, "STREAM_BYTES", 2 * 3 * case.data_CZYX[0].size - 1)
        assert isinstance(bundle.infer(case, StageTimes()), Labelled)
        seen: list[tuple[int, int]] = []
        got = bundle.predict_array(image, properties, progress=lambda e: seen.append((e.done, e.total)))
        np.testing.assert_array_equal(got.segmentation_ZYX, expected.segmentation_ZYX)
        assert seen[-1] == (len(seen), len(seen))
        assert got.times.infer_s > 0 < got.times.postprocess_s
        monkeypatch.setattr(loaded, "STREAM_BYTES", 2 * 3 * case.data_CZYX[0].size)
        assert isinstance(bundle.infer(case, StageTimes()), np.ndarray)

    def test_logits_that_are_needed_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image, properties = smooth_noise((20, 23, 19), 2)[None], {"spacing": [1.2, 0.9, 1.1]}
        expected = self.load().predict_array(image, properties, return_probabilities=True)
        monkeypatch.setattr(loaded, "STREAM_BYTES", 0)
        got = self.load().predict_array(image, properties, return_probabilities=True)
        np.testing.assert_array_equal(got.probabilities_HZYX, expected.probabilities_HZYX)
        np.testing.assert_array_equal(got.segmentation_ZYX, expected.segmentation_ZYX)
        case = self.load().preprocess_array(image, properties)
        assert isinstance(self.load(folds=2).infer(case, StageTimes()), np.ndarray)
        splines = {**DEFAULT_RESAMPLING, "probabilities": DEFAULT_RESAMPLING["data"]}
        assert isinstance(self.load(resampling=splines).infer(case, StageTimes()), np.ndarray)
