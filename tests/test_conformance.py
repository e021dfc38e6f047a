"""The public conformance functions: what is ours passes, what breaks a promise does not."""

from dataclasses import dataclass

import numpy as np
import pytest

from fastnnunet.cache.codecs import Float16, LogitGapU8, SigmoidU8, SimplexU8, SparseU8
from fastnnunet.errors import BuildError
from fastnnunet.testing import check_codec, check_teacher
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
