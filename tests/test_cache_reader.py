"""Random patches against zarr-python and zero padding, in this process and in others."""

import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.codecs import SimplexU8
from fastnnunet.cache.reader import SoftLabelReader
from fastnnunet.errors import NotFoundError
from fastnnunet.specs.cache import CacheSpec
from tests.cache_fakes import SHAPES, make_job


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    spec = CacheSpec(chunk_zyx=(9, 8, 11), level=1)
    return build_cache(make_job(tmp_path_factory.mktemp("reader"), spec=spec)).path


@pytest.fixture(scope="module")
def oracle(cache_dir):
    """Whole cases by zarr-python."""
    return {case: zarr.open_array(str(cache_dir / case), mode="r")[...] for case in SHAPES}


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
    from fastnnunet.cache import reader as module

    decoded = []
    original = module.decode_chunk
    monkeypatch.setattr(module, "decode_chunk", lambda *args: decoded.append(1) or original(*args))
    reader = SoftLabelReader(cache_dir)
    reader.read_patch("large", (0, 0, 0), (1, 1, 1))
    assert len(decoded) == 1
    reader.read_patch("large", (-9, -9, -9), (0, 0, 0))
    assert len(decoded) == 1


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
        "import sys; from fastnnunet.cache.reader import SoftLabelReader as R; from pathlib import Path;"
        f"R(Path({str(cache_dir)!r})).read_case('small');"
        "print([m for m in ('zarr', 'dask', 'distributed', 'torch', 'nnunetv2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
