"""One pass against PyTorch on the whole image at once; however an image is cut, the result is the same."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.engines.mirrors import mirrored
from fastnnunet.errors import BackendError, SpecError
from fastnnunet.geometry.resample import parse_resample_spec
from fastnnunet.geometry.tiles import Axis, fewest_tiles
from fastnnunet.runtime.label_stream import stream_labels
from fastnnunet.runtime.logits import label_rule, plan_logits, postprocess
from fastnnunet.runtime.one_pass import OnePassTiles
from fastnnunet.runtime.times import StageTimes
from fastnnunet.specs.one_pass import OnePass, memory_words, parse_memory
from tests.bundles import DEFAULT_RESAMPLING, Toy, _dataset_json
from tests.one_pass_models import batchnorm_network, batchnorm_plans, runner, whole
from tests.test_label_stream import case_of
from tests.test_runtime_stages import _spec

MULTIPLE = 4  # of the toys' strides
HALO = {3: (10, 10, 10), 2: (10, 10)}  # their receptive field, which tests/test_one_pass_export.py checks
BYTES = 100
HALF = 2**-10  # float16's relative rounding, generously


@pytest.fixture(scope="module")
def networks() -> dict[int, Any]:
    toys = {dims: Toy(dims=dims, spacing=(1.0,) * dims) for dims in (2, 3)}
    return {dims: batchnorm_network(batchnorm_plans(t), _dataset_json(t), f"{dims}d_toy") for dims, t in toys.items()}


def tiles(dims: int = 3, patch: tuple[int, ...] | None = None, **changes: Any) -> OnePassTiles:
    rules = OnePass(halo=HALO[dims], multiples=(MULTIPLE,) * dims, halo_is="exact", bytes_per_voxel=BYTES)
    return OnePassTiles(num_heads=3, patch_size=patch or (MULTIPLE,) * dims, rules=rules, **changes)


def logits_of(way: OnePassTiles, image: np.ndarray, network: Any) -> np.ndarray:
    _, ((_, logits),) = way.begin(image, network, whole=True)
    return logits


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.float16
    np.testing.assert_allclose(got.astype(np.float32), expected, atol=HALF * np.abs(expected).max(), rtol=HALF)


class TestTiling:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        size=st.integers(1, 300),
        multiple=st.sampled_from([1, 2, 8, 32]),
        patch=st.integers(1, 4),
        halo=st.integers(0, 70),
        shifts=st.integers(1, 5),
    )
    def test_every_voxel_is_kept_once_with_its_halo(
        self, size: int, multiple: int, patch: int, halo: int, shifts: int
    ) -> None:
        axis = Axis(size=size, least=patch * multiple, multiple=multiple, halo=halo, shifts=shifts)
        cuts = axis.cuts()
        assert [c.tile for c in cuts] == sorted({c.tile for c in cuts}, reverse=True)
        assert len(cuts[0].starts) == 1
        for cut in cuts:
            assert cut.length >= max(size, patch * multiple)
            assert all(n % multiple == 0 for n in (cut.length, cut.tile, *cut.starts))
            assert (cut.kept[0], cut.kept[-1]) == (0, size)
            assert list(cut.kept) == sorted(set(cut.kept)), "a tile of which nothing is kept"
            for (lower, upper), start in zip(itertools.pairwise(cut.kept), cut.starts, strict=True):
                for before in cut.before:  # in the frame
                    first, last = lower + before, upper + before
                    assert first - start >= halo or (start == 0 and first >= 0)
                    assert start + cut.tile - last >= halo or (start + cut.tile == cut.length and last <= cut.length)

    def test_shifts_differ_by_parts_of_the_stride(self) -> None:
        for shifts, offsets in ((1, [0]), (2, [0, 16]), (3, [0, 10, 21]), (4, [0, 8, 16, 24])):
            cut = Axis(size=100, least=32, multiple=32, halo=5, shifts=shifts).cuts()[0]
            assert [before - cut.before[0] for before in cut.before] == offsets

    def test_the_fewest_voxels_that_memory_allows(self) -> None:
        """Against every combination of cuts."""
        axes = [Axis(size=n, least=32, multiple=32, halo=32) for n in (200, 273, 150)]
        for limit in (2**20, 2**21, 2**22, 2**24):
            found = fewest_tiles(axes, math.prod, limit)
            allowed = [
                math.prod(cut.computed for cut in cuts)
                for cuts in itertools.product(*(axis.cuts() for axis in axes))
                if math.prod(cut.tile for cut in cuts) <= limit
            ]
            assert found is not None
            assert math.prod(found.tile) <= limit
            assert math.prod(found.tile) * math.prod(found.grid) == min(allowed)

    def test_two_thousand_slices(self) -> None:
        """Tiles along the long axis alone, each voxel computed little more than once."""
        tiling = tiles(memory_limit=64 * 64 * 200 * (BYTES + 6)).tiling((2000, 64, 64))
        assert tiling.grid[1:] == (1, 1)
        assert tiling.grid[0] * tiling.tile[0] < 1.15 * 2000


class TestAnyTiling:
    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        shape=st.tuples(*[st.integers(1, 36)] * 3),
        share=st.floats(0, 1),
        patch=st.sampled_from([(4, 4, 4), (16, 20, 24)]),
        passes=st.sampled_from([1, 1, 2, 3]),
    )
    def test_gives_what_pytorch_gives_of_the_whole(
        self, networks: dict[int, Any], shape: Any, share: float, patch: Any, passes: int
    ) -> None:
        image, network = noise(1, *shape), networks[3]
        frame = tiles(patch=patch, passes=passes).tiling(shape).tile
        limit = int(32_000 * (BYTES + 6) + share * math.prod(frame) * (BYTES + 6))
        way = tiles(patch=patch, passes=passes, memory_limit=limit)
        offsets = [k * MULTIPLE // passes for k in range(passes)]
        expected = [whole(network, image, patch, MULTIPLE, offset, offsets[-1]) for offset in offsets]
        assert_same(logits_of(way, image, runner(network)), np.mean(expected, axis=0))

    @pytest.mark.parametrize("shape", [(2000, 3, 2), (1, 2, 300)])
    def test_one_long_axis(self, networks: dict[int, Any], shape: tuple[int, int, int]) -> None:
        """And the others thinner than the strides."""
        image, way = noise(1, *shape), tiles(memory_limit=100 * 4 * 4 * (BYTES + 6))
        assert max(way.tiling(shape).grid) > 2
        assert_same(logits_of(way, image, runner(networks[3])), whole(networks[3], image, (4, 4, 4), MULTIPLE))

    def test_mirrors_are_averaged(self, networks: dict[int, Any]) -> None:
        image, run = noise(1, 24, 40, 20), runner(networks[3])
        way = tiles(mirror_axes=(0, 2), memory_limit=24 * 32 * 20 * (BYTES + 6))
        assert way.tiling(image.shape[1:]).grid == (1, 2, 1)
        assert_same(logits_of(way, image, run), mirrored(run, image[None], (0, 2))[0])

    @pytest.mark.parametrize("planes", [1, 7])
    def test_planes_of_2d_networks(self, networks: dict[int, Any], planes: int) -> None:
        image, batches = noise(1, planes, 50, 33), []

        def run(batch: np.ndarray) -> np.ndarray:
            batches.append(batch.shape)
            return runner(networks[2])(batch)

        expected = np.stack([whole(networks[2], image[:, z], (24, 32), MULTIPLE) for z in range(planes)], axis=1)
        for limit, count in ((2**30, 1), (2 * 36 * 36 * (BYTES + 6), planes)):
            batches.clear()
            assert_same(logits_of(tiles(2, (24, 32), memory_limit=limit), image, run), expected)
            assert all(math.prod(shape) * BYTES <= limit for shape in batches)
            assert len(batches) == count

    def test_labels_are_streamed(self, networks: dict[int, Any]) -> None:
        """Chunk by chunk they are those of all logits at once, also where tiles are cut along x."""
        run, spec = runner(networks[3]), _spec(patch_size=(4, 4, 4), num_heads=3)
        case = case_of(noise(1, 40, 36, 44), (55, 31, 44))
        plan, rule = (
            plan_logits(parse_resample_spec(DEFAULT_RESAMPLING["probabilities"], "logits"), case),
            label_rule(spec),
        )
        way = tiles(memory_limit=32 * 28 * 32 * BYTES + 6 * 32 * 28 * 44)
        assert way.tiling((40, 36, 44)).grid == (2, 2, 2)
        expected, _ = postprocess(logits_of(way, case.data_CZYX, run), case, spec, plan, rule)
        seen: list[tuple[int, int]] = []
        got = stream_labels(case, run, way, plan, rule, StageTimes(), progress=lambda e: seen.append((e.done, e.total)))
        np.testing.assert_array_equal(got, expected)
        assert seen == [(n, 8) for n in range(1, 9)]


class TestRefusals:
    def test_the_smallest_limit_that_works_is_named(self) -> None:
        shape = (60, 70, 80)
        with pytest.raises(SpecError, match=r"an image of 60 x 70 x 80 voxels needs at least (\d+K)") as caught:
            tiles(memory_limit=10**6).tiling(shape)
        named = parse_memory(str(caught.value).split("--memory-limit ")[1].split()[0])
        assert tiles(memory_limit=named).tiling(shape).tile == (24, 24, 24)  # two halos and a step
        with pytest.raises(SpecError):
            tiles(memory_limit=named - 2**10).tiling(shape)

    def test_before_any_image_is_read(self) -> None:
        with pytest.raises(SpecError, match="this model needs at least"):
            tiles(patch=(16, 20, 24), memory_limit=1000).check()
        tiles(patch=(16, 20, 24), memory_limit=16 * 20 * 24 * BYTES).check()

    def test_passes(self) -> None:
        for passes in (0, 5):
            with pytest.raises(SpecError, match=f"passes: got {passes}, expected 1 to 4"):
                tiles(passes=passes).check()
        tiles(passes=4).check()

    def test_an_engine_for_small_tiles(self) -> None:
        way = tiles(largest_tile=(24, 24, 32))
        assert max(way.tiling((100, 10, 10)).tile) == 24
        with pytest.raises(SpecError, match=r"needs tiles of at least \[21, 21, 21\].*up to \[24, 24, 16\]"):
            tiles(largest_tile=(24, 24, 16)).tiling((100, 100, 100))

    def test_logits_beyond_float16(self) -> None:
        with pytest.raises(BackendError, match="float16"):
            logits_of(tiles(), noise(1, 8, 8, 8), lambda batch: np.full((1, 3, *batch.shape[2:]), 1e6, np.float32))

    def test_logits_of_another_shape(self) -> None:
        with pytest.raises(BackendError, match="returned logits of shape"):
            logits_of(tiles(), noise(1, 8, 8, 8), lambda batch: batch)

    def test_sizes(self) -> None:
        assert parse_memory("4G") == parse_memory("4GiB") == parse_memory(2**32) == 2**32
        assert parse_memory("1.5m") == 3 * 2**19
        for size in (1, 10**6, 2**31 + 1):
            assert parse_memory(memory_words(size)) >= size
        for wrong in ("", "G", "-1G", "4 G B", "1e9", "4X", "nan", 0, -5, "0", "99999999999999999999"):
            with pytest.raises(SpecError, match="memory limit: got"):
                parse_memory(wrong)
