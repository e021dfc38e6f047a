"""The bodies of the CUDA kernels, thread by thread on the CPU, against the core, bit for bit."""

import ctypes
import gc
import itertools
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastnnunet import native
from fastnnunet.engines.cuda import intensity, label, resample
from fastnnunet.engines.cuda.gpu import Gpu
from fastnnunet.engines.cuda.params import KERNELS, pairwise_depth
from fastnnunet.engines.cuda.stream import Stream, flip_bits, values_of_limits
from fastnnunet.engines.mirrors import mirrored
from fastnnunet.geometry.resample import ResampleSpec, plan_resampling
from fastnnunet.runtime.logits import LabelRule, _label
from pipelines.measure.predict.device_campaign import TEST_VARIABLE
from tests.fake_kernels import FakeCudaWithKernels, emulation, use_fake_cuda

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 70))


@pytest.fixture(scope="module")
def cuda() -> Iterator[FakeCudaWithKernels | None]:
    """None: the GPU of this machine, which pipelines/measure/predict/device_campaign.py asks for."""
    if os.environ.get(TEST_VARIABLE):
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        yield use_fake_cuda(patch)


@pytest.fixture(scope="module")
def stream(cuda: FakeCudaWithKernels | None) -> Stream:
    return Stream(Gpu())


def draw(seed: int, shape: tuple[int, ...], dtype=np.float32, scale: float = 3) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits but for the payload of NaN."""
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    if got.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def test_parameters_are_laid_out_as_in_c() -> None:
    library = emulation()
    assert set(library.fastnnunet_kernel_names().decode().split()) == set(KERNELS)
    for name, kernel in KERNELS.items():
        assert ctypes.sizeof(kernel.params) == library.fastnnunet_params_bytes(name.encode()), name
        assert kernel.shared_bytes == library.fastnnunet_shared_bytes(name.encode()), name


def test_float16_of_every_half_and_of_the_floats_between_them() -> None:
    """The kernels' conversion against NumPy's, which rounds as IEEE 754 says."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    exact = halves.astype(np.float32)
    finite = np.sort(exact[np.isfinite(exact)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)  # exact in float32
    values = np.concatenate(
        [exact, middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf)),
         np.array([65519.996, 65520, 7e4, 1e30, np.inf, 1e-10, 1e-45], np.float32)]
    )  # fmt: skip
    values = np.concatenate([values, -values])
    got, back = np.empty(len(values), np.uint16), np.empty(len(values), np.float32)
    emulation().fastnnunet_round_trip(
        *(ctypes.c_void_p(array.ctypes.data) for array in (values, got, back)), ctypes.c_int64(len(values))
    )
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(got[~is_nan], expected.view(np.uint16)[~is_nan])
    np.testing.assert_array_equal(back[~is_nan], expected.astype(np.float32)[~is_nan])
    assert np.isnan(back[is_nan]).all()


class TestWindow:
    @few
    @given(seeds, sizes, st.tuples(*[st.integers(1, 8)] * 3), st.integers(1, 3), st.integers(1, 3))
    def test_tiles_and_mirrored_copies(self, stream, seed, shape, tile, channels, count) -> None:
        random = np.random.default_rng(seed)
        image = draw(seed, (channels, *shape))
        origins = [[int(random.integers(-t, n)) for n, t in zip(shape, tile, strict=True)] for _ in range(count)]
        subsets = [s for n in range(4) for s in itertools.combinations(range(3), n)]
        subsets = [subsets[i] for i in random.permutation(8)[: random.integers(1, 9)]]
        padded = np.pad(image, [(0, 0), *((t, t) for t in tile)])

        def cut(origin):
            return (slice(o + t, o + 2 * t) for o, t in zip(origin, tile, strict=True))

        expected = np.stack(
            [
                np.flip(
                    padded[:, *(slice(o + t, o + 2 * t) for o, t in zip(origin, tile, strict=True))], [a + 1 for a in s]
                )
                for s in subsets
                for origin in origins
            ]
        )
        out = stream.empty(expected.shape)
        stream.gather(stream.upload(image), origins, tile, [flip_bits(s, 3) for s in subsets], out)
        same(stream.download(out), expected)

    @pytest.mark.parametrize(("axes", "dims"), [((0, 1, 2), 3), ((2,), 3), ((0, 2), 3), ((0, 1), 2)])
    @pytest.mark.parametrize("at_once", [1, 3, 8])
    def test_mean_over_mirrors(self, stream, axes, dims, at_once) -> None:
        """Against the loop that runs networks over mirrored copies, with a network that is not symmetric."""
        batch = draw(7, (2, 1, *((5, 6, 7)[-dims:])))
        ramp = draw(8, batch.shape[2:])

        def network(inputs):
            return np.concatenate([inputs * ramp, inputs - ramp], axis=1)

        expected = mirrored(network, batch, axes)
        tile = (1,) * (3 - dims) + batch.shape[2:]
        subsets = [s for n in range(len(axes) + 1) for s in itertools.combinations(axes, n)]
        total = stream.empty((2 * 2, *tile))
        for first in range(0, len(subsets), at_once):
            group = subsets[first : first + at_once]
            parts = [network(np.flip(batch, [a + 2 for a in s])) for s in group]
            is_last = first + at_once >= len(subsets)
            stream.add_mirrored(
                stream.upload(np.stack(parts)),
                total,
                [flip_bits(s, dims) for s in group],
                is_first=first == 0,
                divisor=len(subsets) if is_last else 0,
            )
        same(stream.download(total).reshape(expected.shape), expected)

    @few
    @given(seeds, sizes, st.integers(1, 4), st.booleans(), st.booleans())
    def test_weighted_sums(self, stream, seed, shape, heads, is_first, has_weights) -> None:
        random = np.random.default_rng(seed)
        logits, sums = draw(seed, (heads, *shape), scale=30), draw(seed + 1, (heads, *shape), np.float16)
        weights = random.random(shape, np.float32) ** 20 if has_weights else np.ones(shape, np.float32)
        box = tuple(slice(a, b + 1) for a, b in (sorted(random.integers(0, n, 2)) for n in shape))
        on_gpu = stream.upload(sums)
        stream.add_weighted(
            stream.upload(logits)[:, *box],
            stream.upload(weights)[box] if has_weights else None,
            on_gpu[:, *box],
            is_first=is_first,
        )
        native.add_weighted(logits[:, *box], weights[box], sums[:, *box], is_first=is_first)
        same(stream.download(on_gpu), sums)

    @few
    @given(seeds, sizes, st.integers(1, 3), st.sampled_from([None, 1, 5]))
    def test_division_and_its_limits(self, stream, seed, shape, heads, count) -> None:
        sums = draw(seed, (heads, *shape), np.float16, scale=1000)
        total = np.abs(draw(seed + 1, shape, np.float16)) + np.float16(1e-3)
        if count:
            total[...] = count
        on_gpu, limits = stream.upload(sums), stream.new_limits(2)
        stream.divide(on_gpu, count or stream.upload(total), limits)
        expected = native.divide(sums, total)
        same(stream.download(on_gpu), sums)
        assert tuple(values_of_limits(stream.download(limits))) == expected

    def test_limits_of_what_float16_cannot_hold(self, stream) -> None:
        sums = np.zeros((1, 3, 40, 50), np.float16)
        sums[0, 1, 7, 9], sums[0, 2, 30, 2] = np.inf, -5
        limits = stream.new_limits(2)
        stream.divide(stream.upload(sums), 2, limits)
        assert values_of_limits(stream.download(limits)) == [(-5, np.inf), (-2.5, np.inf)]
        sums[0, 0, 0, 0] = np.nan
        stream.divide(stream.upload(sums), 2, limits)
        assert np.isnan(values_of_limits(stream.download(limits))).all()

    @few
    @given(seeds, sizes, st.integers(1, 3))
    def test_sums_and_copies_of_halves(self, stream, seed, shape, heads) -> None:
        values, sums = (draw(seed + i, (heads, *shape), np.float16) for i in range(2))
        a, b = stream.upload(values), stream.upload(sums)
        stream.add_halves(a, b)
        native.add_halves(values, sums)
        same(stream.download(b), sums)
        stream.copy_halves(a[:, -1:, :1], b[:, :1, -1:])
        sums[:, :1, -1:] = values[:, -1:, :1]
        same(stream.download(b), sums)


SCIPY = [
    ResampleSpec(convention="scipy", order=o, order_z=z) for o, z in ((3, 0), (3, 1), (3, 3), (1, 0), (0, 0), (5, 0))
]
SPECS = [*SCIPY, ResampleSpec(convention="torch", order=1)]
spacings = st.sampled_from([(1, 1, 1), (5, 1, 1), (1, 1, 4.5), (1, 6, 1)])


class TestResampling:
    @few
    @given(seeds, sizes, sizes, st.sampled_from(SPECS), spacings, st.booleans(), st.sampled_from(["f4", "f2"]))
    def test_any_shapes(self, stream, seed, shape, shape_out, spec, spacing, is_separate, dtype) -> None:
        spec = ResampleSpec(
            convention=spec.convention, order=spec.order, order_z=spec.order_z, force_separate_z=is_separate or None
        )
        plan = plan_resampling(spec, shape, shape_out, spacing, (1, 1, 1))
        image = draw(seed, (1, *shape), dtype)
        if plan is None:
            return
        same(
            stream.download(resample.resample(stream, stream.upload(image), plan)),
            native.resample_planned(image, plan),
        )

    @pytest.mark.parametrize("spec", [SCIPY[0], SCIPY[2], SPECS[-1]], ids=["separate", "cubic", "torch"])
    @pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
    def test_views_in_other_axes(self, stream, axes, spec) -> None:
        """Cropped and transposed on the way."""
        image = draw(3, (2, 14, 11, 9))
        view = image[:, 1:, 2:-1, :-2]
        expected = native.resample_planned(
            view.transpose(0, *(a + 1 for a in axes)), plan := self._plan(view.shape[1:], axes, spec)
        )
        on_gpu = stream.upload(image)[:, 1:, 2:-1, :-2].transpose(0, *(a + 1 for a in axes))
        same(stream.download(resample.resample(stream, on_gpu, plan)), expected)

    @staticmethod
    def _plan(shape, axes, spec):
        spacing = [(1.0, 4.0, 1.0)[a] for a in axes]
        shape = [shape[a] for a in axes]
        return plan_resampling(spec, shape, [n + 5 - 4 * i for i, n in enumerate(shape)], spacing, (1, 1, 1))

    def test_slabs_of_lines(self, stream, monkeypatch) -> None:
        image = draw(5, (1, 7, 12, 33))
        plan = plan_resampling(SCIPY[2], image.shape[1:], (9, 20, 21), (1, 1, 1), (1, 1, 1))
        monkeypatch.setattr(resample, "SCRATCH_BYTES", 8 * 60 * 5)  # a few lines at a time
        expected = native.resample_planned(image, plan)
        same(stream.download(resample.resample(stream, stream.upload(image), plan)), expected)

    def test_a_transposed_copy(self, stream) -> None:
        image = draw(6, (2, 4, 5, 6))
        got = resample.contiguous(stream, stream.upload(image).transpose(0, 3, 1, 2))
        same(stream.download(got), np.ascontiguousarray(image.transpose(0, 3, 1, 2)))

    def test_planes_of_nan_are_not_clipped(self, stream) -> None:
        image = draw(9, (1, 3, 8, 9))
        image[0, 1, 2, 3] = np.nan
        plan = plan_resampling(SCIPY[0], (3, 8, 9), (3, 12, 13), (5, 1, 1), (5, 1, 1))
        expected = native.resample_planned(image, plan)
        same(stream.download(resample.resample(stream, stream.upload(image), plan)), expected)


LOCAL = [spec for spec in SPECS if spec.order <= 1]
REGIONS = st.booleans()


class TestLabels:
    @few
    @given(seeds, sizes, sizes, st.sampled_from(LOCAL), st.integers(1, 5), REGIONS, st.sampled_from(["f4", "f2"]))
    def test_resampled_on_the_way(self, stream, seed, shape, shape_out, spec, heads, has_regions, dtype) -> None:
        plan = plan_resampling(spec, shape, shape_out, (1, 1, 1), (1, 1, 1))
        logits = draw(seed, (heads, *shape), dtype)
        regions = [int(n) for n in np.random.default_rng(seed).permutation(heads) + 1] if has_regions else None
        expected = self._expected(logits, plan, regions, shape_out if plan else shape)
        labels = stream.filled(expected.shape, np.uint8)
        label.label_logits(stream, stream.upload(logits), labels, plan, regions)
        same(stream.download(labels), expected)

    @few
    @given(seeds, sizes, sizes, st.sampled_from(LOCAL), st.integers(2, 4))
    def test_in_parts(self, stream, seed, shape, shape_out, spec, heads) -> None:
        """Whole rows of the output from the least of the input that they need."""
        plan = plan_resampling(spec, shape, shape_out, (1, 1, 1), (1, 1, 1))
        if plan is None:
            return
        random = np.random.default_rng(seed)
        logits = draw(seed, (heads, *shape), np.float16)
        expected = self._expected(logits, plan, None, shape_out)
        labels = stream.filled(shape_out, np.uint16)
        lasts = [
            native.last_inputs(a, b, o, torch=plan.is_torch)
            for a, b, o in zip(shape[:2], shape_out[:2], plan.orders, strict=False)
        ]
        cuts = [sorted({0, n, *random.integers(0, n + 1, 2).tolist()}) for n in shape_out[:2]]
        for out_z, out_y in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
            begins = [max(0, last[out[0]] - 1) for last, out in zip(lasts, (out_z, out_y), strict=True)]
            ends = [last[out[1] - 1] + 1 for last, out in zip(lasts, (out_z, out_y), strict=True)]
            part = native.Part(
                shape_in=shape, shape_out=shape_out, first_in=tuple(begins), first_out=(out_z[0], out_y[0])
            )
            piece = np.ascontiguousarray(logits[:, begins[0] : ends[0], begins[1] : ends[1]])
            target = labels[slice(*out_z), slice(*out_y)]
            label.label_logits(stream, stream.upload(piece), target, plan, None, part)
        same(stream.download(labels), expected.astype(np.uint16))

    def test_a_part_without_what_it_needs_is_refused(self, stream) -> None:
        plan = plan_resampling(LOCAL[0], (8, 8, 8), (16, 16, 16), (1, 1, 1), (1, 1, 1))
        part = native.Part(shape_in=(8, 8, 8), shape_out=(16, 16, 16), first_in=(4, 0), first_out=(8, 0))
        logits, labels = stream.filled((2, 4, 8, 8), np.float16), stream.filled((8, 16, 16), np.uint8)
        with pytest.raises(ValueError, match="inputs 3 to 7 of axis 0 are not in the part"):
            label.label_logits(stream, logits, labels, plan, None, part)

    @pytest.mark.parametrize("regions", [None, (2, 1, 3)])
    @pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
    @pytest.mark.parametrize("spec", [SCIPY[0], SCIPY[3]], ids=["spline", "linear"])
    def test_uncropped_and_transposed_back(self, stream, axes, regions, spec) -> None:
        logits = draw(11, (3, 6, 7, 8), np.float16)
        plan = plan_resampling(spec, (6, 7, 8), (7, 9, 6), (1, 1, 1), (1, 1, 1))
        cropped = np.zeros((7, 9, 6), np.uint8)
        _label(logits, plan, LabelRule(3, regions, np.uint8), cropped, None)
        image = np.zeros((12, 12, 12), np.uint8)
        crop = tuple(slice(i + 1, i + 1 + n) for i, n in enumerate(cropped.shape))
        image.transpose(axes)[crop] = cropped
        on_gpu = stream.filled(image.shape, np.uint8)
        label.label_logits(stream, stream.upload(logits), on_gpu.transpose(*axes)[crop], plan, regions)
        same(stream.download(on_gpu), image)

    def test_ties_and_the_edge_of_one_half(self, stream) -> None:
        logits = np.array([[2**-24, 2**-23, 0, 1], [2**-24, 2**-23, -1, 1]], np.float32).reshape(2, 1, 1, 4)
        for regions in (None, (3, 4)):
            labels = stream.filled((1, 1, 4), np.uint8)
            label.label_logits(stream, stream.upload(logits), labels, None, regions)
            same(stream.download(labels), self._expected(logits, None, regions, (1, 1, 4)))

    @staticmethod
    def _expected(logits, plan, regions, shape):
        expected = np.zeros(shape, np.uint8)
        native.label_logits(
            logits,
            expected,
            (0, 0, 0) if plan is None else plan.orders,
            torch=plan is not None and plan.is_torch,
            to_half=plan is not None and plan.keeps_dtype,
            regions=regions,
        )
        return expected


class TestIntensity:
    @few
    @given(seeds, sizes, st.integers(1, 3), st.floats(0, 1))
    def test_box(self, stream, seed, shape, channels, density) -> None:
        random = np.random.default_rng(seed)
        image = np.where(random.random((channels, *shape)) < density**6, random.random((channels, *shape)), 0)
        image = image.astype(np.float32)
        assert intensity.nonzero_box(stream, stream.upload(image)) == native.nonzero_box(image)

    def test_box_around_nan_and_one_voxel(self, stream) -> None:
        image = np.zeros((1, 20, 30, 600), np.float32)
        image[0, 19, 17, 511] = np.nan
        assert intensity.nonzero_box(stream, stream.upload(image)) == ((19, 20), (17, 18), (511, 512))

    @pytest.mark.parametrize("count", [1, 7, 8, 127, 128, 129, 143, 144, 255, 257, 1000, 4097, 100_003, 2**17 + 1])
    def test_moments_are_those_of_numpy(self, stream, count) -> None:
        """Sums in NumPy's order: equal bits, of any number of values."""
        values = draw(count, (1, 1, count), scale=1000) + np.float32(300)
        got = stream.download(intensity.moments(stream, stream.upload(values)))
        same(got, np.array([values.mean(), values.std()], np.float32))

    def test_depth_of_the_tree(self) -> None:
        def depth(count):
            half = count // 2 - count // 2 % 8
            return 0 if count <= 128 else 1 + max(depth(half), depth(count - half))

        for count in [*range(1, 3000), 2**20 - 1, 2**20 + 3, 10**6, 123_456_789]:
            assert pairwise_depth(count) == depth(count), count

    @few
    @given(seeds, sizes)
    def test_cropped_channels(self, stream, seed, shape) -> None:
        random = np.random.default_rng(seed)
        image = draw(seed, shape, scale=500)
        box = tuple(slice(a, b + 1) for a, b in (sorted(random.integers(0, n, 2)) for n in shape))
        got = stream.download(intensity.moments(stream, stream.upload(image)[box]))
        same(got, np.array(native.moments(np.ascontiguousarray(image[box])), np.float32))

    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (9, 33, 41)])
    def test_schemes(self, stream, shape) -> None:
        image = draw(4, shape, scale=200)
        schemes = {
            "z_score": (lambda c: intensity.z_score(stream, c), native.z_score),
            "ct": (
                lambda c: intensity.clip_and_scale(stream, c, -100.5, 80.25, 10.5, 33.25),
                lambda c: native.clip_and_scale(c, -100.5, 80.25, 10.5, 33.25),
            ),
            "01": (lambda c: intensity.rescale_to_01(stream, c), native.rescale_to_01),
            "flat": (
                lambda c: intensity.clip_and_scale(stream, c, 1, 1, 1, 0),
                lambda c: native.clip_and_scale(c, 1, 1, 1, 0),
            ),
        }
        for name, (on_gpu, on_cpu) in schemes.items():
            channel, expected = stream.upload(image), image.copy()
            on_gpu(channel)
            on_cpu(expected)
            np.testing.assert_array_equal(stream.download(channel), expected, err_msg=name)

    def test_colours(self, stream) -> None:
        image = np.random.default_rng(0).integers(0, 256, (2, 9, 8)).astype(np.float32)
        for extra in (0, 1):
            image[0, 0, 0] = 255 + extra
            channel, expected = stream.upload(image), image.copy()
            assert intensity.rgb_to_01(stream, channel) == native.rgb_to_01(expected)
            same(stream.download(channel), expected)


def test_nothing_is_left_on_the_device(cuda, stream) -> None:
    if cuda is None:
        pytest.skip("a GPU does not tell")
    stream.tables.clear()
    gc.collect()
    stream.synchronize()
    assert cuda.alive() == {"device": 0, "host": 0, "streams": 1, "graphs": 0, "events": 0}
