"""The public conformance functions: what is ours passes, what breaks a promise does not."""

from dataclasses import dataclass

import numpy as np
import pytest

from fastnnunet.cache.codecs import Float16, LogitGapU8, SigmoidU8, SimplexU8, SparseU8
from fastnnunet.errors import BuildError
from fastnnunet.testing import check_codec, check_engine, check_teacher
from tests.cache_fakes import FakeCases, FakeFactory

CODECS = [SimplexU8(2), SimplexU8(31, 31), SparseU8(12, 0.008), SparseU8(3, 0.0), Float16(5)]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}{codec.num_heads}")
def test_codecs(codec):
    check_codec(codec, [1.0, 2.5, 4.0])


def test_regions():
    check_codec(SigmoidU8(4), [1.0, 3.0], overlapping=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_one_for_many_temperatures(temperature):
    check_codec(LogitGapU8(4, 1.0, 4.0).at(temperature), [temperature])


class Truncating(SimplexU8):
    """Rounds down: channels sum to one, since background takes the rest, but it is off by more than it says."""

    def encode(self, target):
        return np.floor(target[1:] * 255).astype(np.uint8)


class ForegroundInZero(SimplexU8):
    def decode(self, stored):
        return super().decode(stored)[::-1]


@pytest.mark.parametrize("broken", [Truncating(8), ForegroundInZero(3)], ids=["bound", "background"])
def test_a_codec_that_breaks_a_promise(broken):
    with pytest.raises((AssertionError, BuildError)):
        check_codec(broken, [1.0])


IMAGE = FakeCases().image_CZYX("large")


def test_teachers():
    check_teacher(FakeFactory(), IMAGE, (16, 20, 24))


@dataclass(frozen=True)
class Forgetful(FakeFactory):
    """Its chunks are those of another grid."""

    def load(self, threads):
        teacher = super().load(threads)

        class Loaded:
            def blocks(self, image, folds, chunk_zyx, per_fold=None):
                blocks = list(teacher.blocks(image, folds, chunk_zyx, per_fold))
                return iter(blocks[:-1] if len(blocks) > 1 else blocks)

        return Loaded()


def test_a_teacher_that_leaves_out_a_chunk():
    with pytest.raises(AssertionError, match="no finite logit"):
        check_teacher(Forgetful(), IMAGE, (16, 20, 24))


class Doubling:
    """A network that doubles its input, in memory that all threads share or in new memory for each call."""

    name, precision, overhead = "doubling", "fp32", 2.0

    def __init__(self, shared, largest_tile=None):
        self.largest_tile = largest_tile
        self.memory = np.zeros((4, 1, 5, 6), np.float32) if shared else None

    def run(self, batch):
        out = np.empty_like(batch) if self.memory is None else self.memory[: len(batch)]
        return np.multiply(batch, 2, out=out)


PATCHES = np.random.default_rng(0).normal(size=(4, 1, 5, 6)).astype(np.float32)


def test_an_engine():
    check_engine(Doubling(shared=False), PATCHES, 2 * PATCHES)


@pytest.mark.parametrize(
    ("engine", "expected", "message"),
    [
        (Doubling(shared=True), 2 * PATCHES, "threads disturb"),
        (Doubling(shared=False), 2.01 * PATCHES, "not those of the network"),
        (Doubling(shared=False), np.concatenate([PATCHES, PATCHES], 1), "expected"),
        (Doubling(shared=False, largest_tile=(5,)), 2 * PATCHES, "the largest tile is"),
    ],
    ids=["threads", "values", "shape", "tile"],
)
def test_an_engine_that_breaks_a_promise(engine, expected, message):
    with pytest.raises(AssertionError, match=message):
        check_engine(engine, PATCHES, expected)
