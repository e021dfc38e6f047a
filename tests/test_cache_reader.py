"""Random patches against zarr-python and zero padding, in this process and in others."""

import json
import mmap
import multiprocessing
import pickle
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.codecs import SimplexU8
from fastnnunet.cache.store.reader import SoftLabelReader, fill_patch
from fastnnunet.cache.store.shard import ABSENT, SHARD_NAME, ShardLayout, array_document, decode_chunk, layout_for
from fastnnunet.errors import CorruptError, NotFoundError
from fastnnunet.specs.cache import CacheSpec
from pipelines.measure.cache.cache_layout import pack, write_shard
from tests.cache_fakes import SHAPES, make_job


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    spec = CacheSpec(chunk_zyx=(9, 8, 11), level=1)
    return build_cache(make_job(tmp_path_factory.mktemp("reader"), spec=spec)).path


@pytest.fixture(scope="module")
def oracle(cache_dir):
    """Whole cases by zarr-python."""
    return {case: zarr.open_array(str(cache_dir / case), mode="r")[...] for case in SHAPES}


def open_with_tensorstore(folder):
    return tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}, open=True).result()


def padded_patch(values, lower, upper):
    """The box by brute force: every voxel looked up, zero where there is none."""
    out = np.zeros((len(values), *(u - lo for lo, u in zip(lower, upper, strict=True))), np.uint8)
    inside = [np.arange(lo, u) for lo, u in zip(lower, upper, strict=True)]
    keep = [(i >= 0) & (i < n) for i, n in zip(inside, values.shape[1:], strict=True)]
    out[np.ix_(range(len(values)), *keep)] = values[
        np.ix_(range(len(values)), *(i[k] for i, k in zip(inside, keep, strict=True)))
    ]
    return out


@given(
    st.sampled_from(sorted(SHAPES)),
    st.tuples(*[st.integers(-30, 60)] * 3),
    st.tuples(*[st.integers(0, 50)] * 3),
)
@settings(max_examples=150, deadline=None)
def test_any_box(cache_dir, oracle, case, lower, size):
    upper = tuple(lo + n for lo, n in zip(lower, size, strict=True))
    got = SoftLabelReader(cache_dir).read_patch(case, lower, upper)
    np.testing.assert_array_equal(got, padded_patch(oracle[case], lower, upper))


def test_whole_cases_and_preallocated_output(cache_dir, oracle):
    reader = SoftLabelReader(cache_dir)
    for case, shape in SHAPES.items():
        assert reader.shape_zyx(case) == shape
        np.testing.assert_array_equal(reader.read_case(case), oracle[case])
        out = np.full((2, 12, 12, 12), 7, np.uint8)
        assert reader.read_patch(case, (-3, -3, -3), (9, 9, 9), out=out) is out
        np.testing.assert_array_equal(out, padded_patch(oracle[case], (-3, -3, -3), (9, 9, 9)))


def test_padding_is_background(cache_dir):
    reader = SoftLabelReader(cache_dir)
    p = reader.to_probabilities(reader.read_patch("small", (100, 100, 100), (102, 102, 102)))
    np.testing.assert_array_equal(p[0], 1)
    np.testing.assert_array_equal(p[1:], 0)
    assert p.dtype == np.float32
    assert isinstance(reader.codec, SimplexU8)


def test_bad_requests(cache_dir):
    reader = SoftLabelReader(cache_dir)
    with pytest.raises(ValueError, match="lower <= upper"):
        reader.read_patch("small", (5, 0, 0), (4, 9, 9))
    with pytest.raises(ValueError, match="expected uint8"):
        reader.read_patch("small", (0, 0, 0), (4, 4, 4), out=np.zeros((2, 4, 4, 4), np.int16))
    with pytest.raises(NotFoundError, match="not part of cache"):
        reader.read_case("nobody")
    with pytest.raises(NotFoundError, match="no soft-label cache"):
        SoftLabelReader(cache_dir.parent / "nothing")


def test_only_the_chunks_of_the_patch_are_decoded(cache_dir, monkeypatch):
    from fastnnunet.cache.store import reader as module

    decoded = []
    original = module.decode_chunk
    monkeypatch.setattr(module, "decode_chunk", lambda *args: decoded.append(1) or original(*args))
    reader = SoftLabelReader(cache_dir)
    reader.read_patch("large", (0, 0, 0), (1, 1, 1))
    assert len(decoded) == 1
    reader.read_patch("large", (-9, -9, -9), (0, 0, 0))
    assert len(decoded) == 1
    # (40, 37, 41) in chunks of about (9, 8, 11): 10, 8 and 11 voxels; the box touches 2 x 3 x 1 of them
    reader.read_patch("large", (9, 7, 11), (11, 17, 22))
    assert len(decoded) == 1 + 2 * 3 * 1


def test_the_shard_is_mapped_and_not_read(cache_dir):
    reader = SoftLabelReader(cache_dir)
    reader.read_patch("large", (0, 0, 0), (1, 1, 1))
    shard = reader._open("large").shard
    assert isinstance(shard.base.obj if isinstance(shard.base, memoryview) else shard.base, mmap.mmap)
    assert not shard.flags.owndata
    assert not shard.flags.writeable


@pytest.mark.parametrize("order", ["C", "F"])
def test_output_of_any_memory_layout(cache_dir, oracle, order):
    out = np.full((2, 30, 30, 30), 9, np.uint8, order=order)
    SoftLabelReader(cache_dir).read_patch("large", (5, 15, 20), (35, 45, 50), out=out)
    np.testing.assert_array_equal(out, padded_patch(oracle["large"], (5, 15, 20), (35, 45, 50)))


class TestOtherReaders:
    """The same store through zarr-python and tensorstore: bit for bit what this reader gives."""

    @pytest.mark.parametrize("compressor", ["zstd", "lz4"])
    @pytest.mark.parametrize("encoding", ["simplex_u8", "float16"])
    def test_whole_cases_and_patches(self, tmp_path, compressor, encoding):
        spec = CacheSpec(chunk_zyx=(9, 8, 11), level=5, compressor=compressor, encoding=encoding)
        cache = build_cache(make_job(tmp_path / "root", spec=spec))
        reader = SoftLabelReader(cache.path)
        for case in SHAPES:
            by_zarr = zarr.open_array(str(cache.case_dir(case)), mode="r")
            by_tensorstore = open_with_tensorstore(cache.case_dir(case))
            ours = reader.read_case(case)
            assert ours.any()
            assert ours.dtype == by_zarr.dtype == by_tensorstore.dtype.numpy_dtype
            for other in (by_zarr[...], by_tensorstore.read().result()):
                assert ours.tobytes() == np.ascontiguousarray(other).tobytes()
            z, y, x = (n // 2 for n in ours.shape[1:])
            patch = reader.read_patch(case, (z, y, x), ours.shape[1:])
            np.testing.assert_array_equal(patch, by_zarr[:, z:, y:, x:])
            np.testing.assert_array_equal(patch, by_tensorstore[:, z:, y:, x:].read().result())


CHANNEL_SHAPE = (5, 13, 20, 17)


@pytest.fixture(scope="module", params=["zstd", "lz4"])
def opened(request, tmp_path_factory):
    """A case with two channels per chunk, and its values by zarr-python and by tensorstore."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 9, CHANNEL_SHAPE, dtype=np.uint8)
    values[2:4, :7] = 0
    values[4, :, 8:] = 0
    layout = ShardLayout(shape=CHANNEL_SHAPE, chunk=(2, 7, 8, 6), compressor=request.param, level=3)
    assert layout.grid == (3, 2, 3, 3)
    folder = tmp_path_factory.mktemp("channels")
    (folder / "zarr.json").write_text(json.dumps(array_document(layout, {})))
    (folder / SHARD_NAME).parent.mkdir(parents=True)
    case = write_shard(values, layout, folder / SHARD_NAME)
    assert (case.index[..., 0] == ABSENT).sum() > 0
    for other in (zarr.open_array(str(folder), mode="r")[...], open_with_tensorstore(folder).read().result()):
        np.testing.assert_array_equal(other, values)
    return case, values


class TestChannelChunks:
    """Arrays whose channels are split into several chunks, some of them absent."""

    @given(st.tuples(*[st.integers(-8, 24)] * 3), st.tuples(*[st.integers(0, 30)] * 3))
    @settings(max_examples=100, deadline=None)
    def test_any_box(self, opened, lower, size):
        case, values = opened
        out = np.full((5, *size), 77, np.uint8)
        fill_patch(case, lower, out)
        upper = tuple(lo + n for lo, n in zip(lower, size, strict=True))
        np.testing.assert_array_equal(out, padded_patch(values, lower, upper))

    def test_absent_chunks_are_not_decoded(self, opened, monkeypatch):
        from fastnnunet.cache.store import reader as module

        case, _ = opened
        decoded = []
        original = module.decode_chunk
        monkeypatch.setattr(module, "decode_chunk", lambda *args: decoded.append(1) or original(*args))
        fill_patch(case, (0, 8, 0), np.empty((5, 7, 8, 6), np.uint8))
        assert len(decoded) == 1  # channels 0-1; 2-3 are zero in z < 7, 4 in y >= 8


class TestChunks:
    @pytest.mark.parametrize("compressor", ["zstd", "lz4"])
    def test_a_chunk_of_another_size_is_refused(self, compressor):
        layout = ShardLayout(shape=(1, 8, 8, 8), chunk=(1, 8, 8, 8), compressor=compressor, level=3)
        values = np.arange(512, dtype=np.uint8).reshape(1, 8, 8, 8)
        as_bytes = {cut: np.frombuffer(pack(values[:, :cut], layout), np.uint8) for cut in (7, 8)}
        np.testing.assert_array_equal(decode_chunk(as_bytes[8], layout), values)
        with pytest.raises(CorruptError, match="holds 448 bytes, expected 512"):
            decode_chunk(as_bytes[7], layout)

    @pytest.mark.parametrize("size", [1, 255, 256, 257, 65535, 65791, 65792, 300_000])
    @pytest.mark.parametrize("compressor", ["zstd", "lz4"])
    def test_every_width_of_the_size_field(self, compressor, size):
        layout = ShardLayout(shape=(1, 1, 1, size), chunk=(1, 1, 1, size), compressor=compressor, level=1)
        values = np.random.default_rng(0).integers(0, 4, layout.chunk, dtype=np.uint8)
        np.testing.assert_array_equal(decode_chunk(np.frombuffer(pack(values, layout), np.uint8), layout), values)

    def test_not_a_frame(self):
        for compressor in ("zstd", "lz4"):
            layout = ShardLayout(shape=(1, 1, 1, 8), chunk=(1, 1, 1, 8), compressor=compressor, level=1)
            for junk in (b"", b"\x28\xb5\x2f\xfd", bytes(40)):
                packed = junk + google_crc32c.value(junk).to_bytes(4, "little")
                with pytest.raises(CorruptError, match="a chunk"):
                    decode_chunk(np.frombuffer(packed, np.uint8), layout)

    def test_large_volumes_get_the_faster_compressor(self):
        assert layout_for(CacheSpec(), 2, (35, 51, 35)).compressor == "zstd"
        assert layout_for(CacheSpec(), 2, (256, 256, 256)).compressor == "lz4"
        assert layout_for(CacheSpec(compressor="zstd"), 2, (256, 256, 256)).compressor == "zstd"
        assert layout_for(CacheSpec(compressor="lz4"), 2, (35, 51, 35)).compressor == "lz4"


def _read(reader, case, queue):
    queue.put(int(reader.read_case(case).sum(dtype=np.int64)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(cache_dir, oracle, method):
    reader = SoftLabelReader(cache_dir)
    reader.read_case("large")  # opened in the parent first: children must not be confused by it
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_read, args=(reader, "large", queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join(300)
    assert sums == [oracle["large"].sum(dtype=np.int64)] * 2


def test_pickled_reader(cache_dir, oracle):
    reader = SoftLabelReader(cache_dir)
    reader.read_case("small")
    text = pickle.dumps(reader)
    assert len(text) < 1000
    np.testing.assert_array_equal(pickle.loads(text).read_case("small"), oracle["small"])


def test_reading_imports_neither_zarr_nor_dask_nor_torch(cache_dir):
    code = (
        "import sys; from fastnnunet.cache.store.reader import SoftLabelReader as R; from pathlib import Path;"
        f"R(Path({str(cache_dir)!r})).read_case('small');"
        "print([m for m in ('zarr', 'dask', 'distributed', 'torch', 'nnunetv2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
