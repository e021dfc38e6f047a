"""Caches in every encoding: key, error, what zarr-python and a training read."""

import dataclasses
import pickle

import numpy as np
import pytest
import zarr
from scipy.special import softmax as scipy_softmax

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.identity import cache_key
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.verify import verify_cache
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.errors import CorruptError, MismatchError, SpecError
from fastnnunet.specs.cache import CacheSpec
from tests.cache_fakes import SHAPES, FakeCases, FakeFactory, make_job

CLASS_SPECS = {
    "simplex_u8": CacheSpec(temperature=3.0, level=3),
    "levels_63": CacheSpec(temperature=3.0, level=3, levels=63),
    "levels_31": CacheSpec(temperature=3.0, level=3, levels=31),
    "sparse": CacheSpec(temperature=3.0, level=3, encoding="sparse_u8"),
    "sparse_tail": CacheSpec(temperature=3.0, level=3, encoding="sparse_u8", tolerance=0.008),
    "sparse_63": CacheSpec(temperature=3.0, level=3, encoding="sparse_u8", tolerance=0.016, levels=63),
    "logit_gap": CacheSpec(level=3, encoding="logit_gap_u8", temperature_range=(1.0, 4.0)),
    "float16": CacheSpec(temperature=3.0, level=3, encoding="float16"),
    "float16_lz4": CacheSpec(temperature=3.0, level=3, encoding="float16", compressor="lz4", chunk_zyx=(9, 8, 11)),
}


def exact(case, temperature=3.0):
    """Soft labels (C, Z, Y, X) in float64."""
    factory = FakeFactory()
    logits = factory.load(1).logits(FakeCases().image_CZYX(case), factory.folds)
    return scipy_softmax(logits.astype(np.float64) / temperature, axis=0)


@pytest.fixture(scope="module", params=CLASS_SPECS)
def cache(request, tmp_path_factory):
    return build_cache(make_job(tmp_path_factory.mktemp(request.param), spec=CLASS_SPECS[request.param]))


def test_every_case_keeps_the_bound(cache):
    reader = SoftLabelReader(cache.path, temperature=3.0)
    for case in SHAPES:
        values = zarr.open_array(str(cache.case_dir(case)), mode="r")[...]
        stored = reader.read_case(case)
        assert stored.dtype == values.dtype
        np.testing.assert_array_equal(stored, values)
        decoded = reader.to_probabilities(stored)
        error = np.abs(decoded - exact(case)).max()
        manifest = cache.manifest(case)
        assert error <= manifest.max_error + 1e-6
        assert manifest.max_error <= manifest.eps == cache.codec.eps
        np.testing.assert_allclose(decoded.sum(axis=0), 1, atol=1e-6)
        assert decoded.min() >= 0
    assert {report.status for report in verify_cache(cache)} == {"ok"}


def test_a_training_reads_the_foreground_and_zero_outside(cache):
    got = CachedSoftLabels(cache.path, temperature=3.0).read("large", (-3, 4, 30), (20, 25, 44))
    assert got.dtype == np.float32
    expected = np.zeros((2, 23, 21, 14))
    expected[:, 3:, :, :11] = exact("large")[1:, :20, 4:25, 30:]
    np.testing.assert_allclose(got, expected, atol=cache.codec.eps + 1e-6)
    assert not got[:, :3].any()
    assert not got[..., 11:].any()


def test_keys(tmp_path):
    """The key of a recipe does not change from version to version, or every cache would be built again."""
    identities = {name: make_job(tmp_path, spec=spec).identity for name, spec in CLASS_SPECS.items()}
    assert cache_key(identities["simplex_u8"]) == "209619e3402b0d8c0998275048e3c3dcf9ad23940d15c7c862c857ac9369bd96"
    assert (
        len({cache_key(identity) for identity in identities.values()}) == len(CLASS_SPECS) - 1
    )  # compression is not part of it
    assert identities["levels_31"]["soft_labels"]["levels"] == 31
    assert identities["levels_31"]["soft_labels"].keys() - identities["simplex_u8"]["soft_labels"].keys() == {"levels"}


def test_a_logit_gap_cache_serves_every_temperature_of_its_range(tmp_path):
    spec = CLASS_SPECS["logit_gap"]
    cache = build_cache(make_job(tmp_path, spec=spec), only=["large"])
    for temperature in (1.0, 1.7, 4.0):
        # a recipe at any temperature names the same cache
        assert make_job(tmp_path, spec=dataclasses.replace(spec, temperature=temperature)).path == cache.path
        reader = pickle.loads(pickle.dumps(SoftLabelReader(cache.path, temperature)))
        got = reader.to_probabilities(reader.read_case("large"))
        error = np.abs(got - exact("large", temperature)).max()
        assert 1e-4 < error <= cache.codec.eps_at(temperature)
    for temperature in (0.99, 4.01):
        with pytest.raises(MismatchError, match="expected 1 to 4, the range of this cache"):
            CachedSoftLabels(cache.path, temperature)
    reader = SoftLabelReader(cache.path)
    with pytest.raises(SpecError, match="say which"):
        reader.to_probabilities(reader.read_case("large"))
    assert "temperature" not in cache.identity["soft_labels"]
    assert cache.identity["soft_labels"]["temperature_range"] == [1.0, 4.0]


def test_probabilities_are_never_brought_to_another_temperature(tmp_path):
    cache = build_cache(make_job(tmp_path, spec=CacheSpec(temperature=3.0, level=3)), only=["small"])
    SoftLabelReader(cache.path, 3.0)
    with pytest.raises(MismatchError, match=r"got      3\n  expected 2\n.*logit_gap_u8"):
        SoftLabelReader(cache.path, 2.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tolerance": 0.01}, "tolerance: got 0.01, expected 0, or with encoding: sparse_u8 a number"),
        ({"tolerance": 0.003, "encoding": "sparse_u8"}, "tolerance: got 0.003"),
        ({"tolerance": 0.008, "levels": 63, "encoding": "sparse_u8"}, "above 1/levels"),
        ({"tolerance": 0.2, "encoding": "sparse_u8"}, "tolerance: got 0.2"),
        ({"encoding": "logit_gap_u8"}, "temperature_range: got None with encoding: logit_gap_u8"),
        ({"temperature_range": (1.0, 4.0)}, "none otherwise"),
        ({"encoding": "logit_gap_u8", "temperature_range": (4.0, 1.0)}, "temperature_range: got 4.0 to 1.0"),
        ({"encoding": "logit_gap_u8", "temperature_range": (0.5, 9.0)}, "at most 16 times"),
        ({"levels": 63, "tolerance": 1.0, "temperature_range": (1, 2), "encoding": "float16"}, "levels.*toler.*range"),
    ],
)
def test_contradictions_of_tolerance_and_range(bad, message):
    with pytest.raises(SpecError, match=message):
        CacheSpec(**bad)


@pytest.mark.parametrize("bad", [{"levels": 127}, {"levels": 63, "encoding": "sigmoid_u8"}])
def test_contradictions(bad):
    with pytest.raises(SpecError, match="levels: got"):
        CacheSpec(**bad)


def test_what_a_float16_cache_is_for(tmp_path):
    """It refuses regions, any Zarr reader sees little-endian half floats, and it is the most exact."""
    with pytest.raises(SpecError, match="use encoding: sigmoid_u8"):
        make_job(tmp_path, factory=FakeFactory(has_regions=True), spec=CLASS_SPECS["float16"])
    cache = build_cache(make_job(tmp_path, spec=CLASS_SPECS["float16"]))
    array = zarr.open_array(str(cache.case_dir("large")), mode="r")
    assert array.dtype == np.dtype("<f2")
    assert array.shape == (2, *SHAPES["large"])
    default = build_cache(make_job(tmp_path, spec=CLASS_SPECS["simplex_u8"]))
    for case in SHAPES:
        assert cache.manifest(case).max_error < default.manifest(case).max_error / 4
    reader = SoftLabelReader(cache.path)
    with pytest.raises(ValueError, match="expected float16"):
        reader.read_patch("large", (0, 0, 0), (4, 4, 4), out=np.zeros((2, 4, 4, 4), np.uint8))
    outside = reader.to_probabilities(reader.read_patch("small", (99, 99, 99), (101, 101, 101)))
    np.testing.assert_array_equal(outside[:, 0, 0, 0], [1, 0, 0])


def test_a_flipped_bit_in_a_float16_cache_is_found(tmp_path):
    cache = build_cache(make_job(tmp_path, spec=CLASS_SPECS["float16"]), only=["small"])
    shard = cache.case_dir("small") / "c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match="--case small"):
        SoftLabelReader(cache.path).read_case("small")


def test_tensorstore_reads_float16(tmp_path):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    cache = build_cache(make_job(tmp_path, spec=CLASS_SPECS["float16"]), only=["small"])
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache.case_dir("small"))}}
    values = tensorstore.open(spec, open=True).result().read().result()
    np.testing.assert_array_equal(values.astype(np.float32), SoftLabelReader(cache.path).read_case("small"))


def test_fewer_levels_take_less_room(tmp_path):
    sizes = [
        build_cache(make_job(tmp_path, spec=spec), only=["large"]).manifest("large").stored_bytes
        for spec in (CLASS_SPECS["simplex_u8"], CLASS_SPECS["levels_63"], CLASS_SPECS["levels_31"])
    ]
    assert sizes == sorted(sizes, reverse=True)
