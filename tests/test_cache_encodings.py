"""Caches in every encoding: key, error, what zarr-python and a training read."""

import numpy as np
import pytest
import zarr
from scipy.special import softmax as scipy_softmax

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.identity import cache_key
from fastnnunet.cache.reader import SoftLabelReader
from fastnnunet.cache.verify import verify_cache
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.errors import CorruptError, SpecError
from fastnnunet.specs.cache import CacheSpec
from tests.cache_fakes import SHAPES, FakeCases, FakeFactory, make_job

CLASS_SPECS = {
    "simplex_u8": CacheSpec(level=3),
    "levels_63": CacheSpec(level=3, levels=63),
    "levels_31": CacheSpec(level=3, levels=31),
    "float16": CacheSpec(level=3, encoding="float16"),
    "float16_lz4": CacheSpec(level=3, encoding="float16", compressor="lz4", chunk_zyx=(9, 8, 11)),
}


def exact(case):
    """Soft labels (C, Z, Y, X) in float64."""
    factory = FakeFactory()
    logits = factory.load(1).logits(FakeCases().image_CZYX(case), factory.folds)
    return scipy_softmax(logits.astype(np.float64) / 3.0, axis=0)


@pytest.fixture(scope="module", params=CLASS_SPECS)
def cache(request, tmp_path_factory):
    return build_cache(make_job(tmp_path_factory.mktemp(request.param), spec=CLASS_SPECS[request.param]))


def test_every_case_keeps_the_bound(cache):
    reader = SoftLabelReader(cache.path)
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
    got = CachedSoftLabels(cache.path).read("large", (-3, 4, 30), (20, 25, 44))
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
