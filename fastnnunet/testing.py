"""Conformance: what every encoding, engine and teacher must do, whoever wrote it.

    from fastnnunet.testing import check_codec, check_engine, check_teacher

    def test_my_codec():
        check_codec(MyCodec(num_heads=5), temperatures=[1.0, 3.0])

Each function raises AssertionError with what was expected; none needs pytest. The project's own pass them too.
"""

import json
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from threading import Barrier
from typing import get_args

import numpy as np

from fastnnunet.cache.codecs.base import Codec
from fastnnunet.cache.interfaces import Float32Array, TeacherFactory
from fastnnunet.cache.seen import FoldTally, TallyingTeacher
from fastnnunet.engines.base import Engine, Precision

_SUM = 2e-6  # of float32 channels


def check_codec(codec: Codec, temperatures: Sequence[float], *, overlapping: bool = False, seed: int = 0) -> None:
    """Bound, background, stored type, refusal of what breaks the bound.

    `temperatures` are some that it serves; `overlapping` heads are regions, which need not sum to one. Logits are
    smooth, of many scales, and extreme ones up to 1e4.
    """
    rng = np.random.default_rng(seed)
    heads = codec.num_heads
    scales = np.repeat(np.array([0.01, 1.0, 10.0, 1e4], np.float32), 250)
    logits = rng.normal(size=(heads, scales.size)).astype(np.float32) * scales
    for temperature in temperatures:
        target = codec.target(logits, temperature)
        stored = codec.encode(target)
        assert stored.shape == (codec.num_stored, scales.size), f"stored {stored.shape}, expected (S, voxels)"
        assert stored.dtype == np.dtype(codec.dtype), f"stored as {stored.dtype}, expected {codec.dtype}"
        assert codec.problem(stored) is None, f"it says of its own values: {codec.problem(stored)}"
        assert codec.measured_error(stored, target) <= codec.eps, "it measures more than its bound"
        decoded = codec.decode(stored)
        assert decoded.shape == logits.shape, f"decoded {decoded.shape}, expected (C, voxels)"
        assert decoded.dtype == np.float32, f"decoded as {decoded.dtype}, expected float32"
        assert 0 <= decoded.min() <= decoded.max() <= 1 + _SUM, "decoded values are no probabilities"
        if not codec.needs_logits:
            error = float(np.abs(decoded - target).max())
            assert error <= codec.eps, f"decoded values are off by {error:g}, bound {codec.eps:g}"
        if not overlapping:
            assert np.allclose(decoded.sum(axis=0), 1, atol=_SUM * heads), "channels do not sum to one"
    nothing = codec.decode(np.zeros((codec.num_stored, 1), codec.dtype))[:, 0]
    certain = np.zeros(heads) if overlapping else np.eye(heads)[0]
    assert np.array_equal(nothing, certain), f"zero decodes to {nothing}, expected certain background"
    assert len(pickle.dumps(codec)) > 0


def check_engine(
    engine: Engine, batch_NCX: Float32Array, expected_NHX: Float32Array, *, relative: float = 1e-4
) -> None:
    """Logits as expected in batches of any size, input untouched, and results that other threads do not disturb.

    `expected_NHX` are the network's logits of the batch, `relative` the difference allowed as a share of the largest.
    """
    assert engine.name, "an engine has a name"
    assert engine.precision in get_args(Precision), f"precision {engine.precision!r}"
    assert engine.overhead > 0, f"a tile takes {engine.overhead} times what its network holds"
    tile = engine.largest_tile
    assert tile is None or len(tile) == batch_NCX.ndim - 2, f"the largest tile is {tile}, expected all of its axes"
    tolerance = relative * float(np.abs(expected_NHX).max())
    before = batch_NCX.copy()
    together = engine.run(batch_NCX).copy()
    assert np.array_equal(batch_NCX, before), "it writes into its input"
    assert together.dtype == np.float32, f"logits are {together.dtype}, expected float32"
    assert together.shape == expected_NHX.shape, f"logits {together.shape}, expected {expected_NHX.shape}"
    assert np.abs(together - expected_NHX).max() <= tolerance, "logits are not those of the network"
    for patch, expected in zip(batch_NCX, expected_NHX, strict=True):
        assert np.abs(engine.run(patch[None])[0] - expected).max() <= tolerance, "a patch alone is another"

    def held(row: int) -> bool:
        """Whether the result of one thread is still there after others have called."""
        mine = engine.run(batch_NCX[row : row + 1])
        first = mine.copy()
        held_back.wait()
        return np.array_equal(mine, first) and bool(np.abs(mine[0] - expected_NHX[row]).max() <= tolerance)

    held_back = Barrier(len(batch_NCX))
    with ThreadPoolExecutor(len(batch_NCX)) as pool:
        assert all(pool.map(held, range(len(batch_NCX)))), "threads disturb each other's results"


def check_teacher(factory: TeacherFactory, image_CZYX: Float32Array, chunk_zyx: Sequence[int]) -> None:
    """Identity, pickling, and the blocks of one image: every chunk once, and the same values in any chunks.

    Loads the teacher a few times with one thread; `chunk_zyx` should cut the image along every axis.
    """
    identity = factory.identity()
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    again = pickle.loads(pickle.dumps(factory))
    assert json.dumps(again.identity(), sort_keys=True) == text, "another process would give it another key"
    assert factory.memory_bytes(image_CZYX.shape[1:], chunk_zyx) > 0
    whole = _labelled(factory, image_CZYX, image_CZYX.shape[1:])
    parts = _labelled(again, image_CZYX, chunk_zyx)
    assert np.allclose(whole, parts, rtol=1e-4, atol=1e-4 * np.abs(whole).max()), "values depend on the chunks"
    if isinstance(factory.load(1), TallyingTeacher):
        tally = FoldTally(factory.folds, factory.num_heads, has_regions=factory.has_regions)
        counted = _labelled(factory, image_CZYX, image_CZYX.shape[1:], tally)
        assert np.array_equal(counted, whole), "values depend on whether the folds are counted"
        _check_counts(tally, image_CZYX[0].size)


def _check_counts(tally: FoldTally, voxels: int) -> None:
    """Every voxel counts once for each fold, and two folds share no more than either has."""
    seen = tally.seen(np.zeros(tally.num_heads, np.int64))
    of_folds, shared = np.array(seen.of_folds), seen.shared
    sums = of_folds.sum(axis=1)
    assert tally.has_regions or (sums == voxels).all(), f"voxels of the folds add up to {sums}, expected {voxels}"
    for both, (one, other) in zip(shared, combinations(of_folds, 2), strict=True):
        assert (both <= np.minimum(one, other)).all(), "two folds share more voxels than they have"


def _labelled(
    factory: TeacherFactory, image_CZYX: Float32Array, chunk_zyx: Sequence[int], tally: FoldTally | None = None
) -> Float32Array:
    """Mean logits (heads, z, y, x), put together from their blocks."""
    shape_zyx = image_CZYX.shape[1:]
    out = np.full((factory.num_heads, *shape_zyx), np.nan, np.float32)
    seen = set()
    teacher = factory.load(1)
    if isinstance(teacher, TallyingTeacher) and tally is not None:
        blocks = teacher.tallied_blocks(image_CZYX, factory.folds, chunk_zyx, None, tally)
    else:
        blocks = teacher.blocks(image_CZYX, factory.folds, chunk_zyx)
    for number, values in blocks:
        assert number not in seen, f"chunk {number} came twice"
        seen.add(number)
        inside = tuple(slice(n * c, min((n + 1) * c, e)) for n, c, e in zip(number, chunk_zyx, shape_zyx, strict=True))
        assert values.dtype == np.float32, f"chunk {number} is {values.dtype}, expected float32"
        assert values.shape == out[(slice(None), *inside)].shape, f"chunk {number} has shape {values.shape}"
        out[(slice(None), *inside)] = values
    assert np.isfinite(out).all(), f"{np.isnan(out[0]).sum()} voxels have no finite logit"
    return out
