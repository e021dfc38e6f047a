"""Encodings: teacher logits -> what a cache stores, each with a proven error bound. One module per encoding."""

from fastnnunet.cache.codecs.base import LEVELS, Codec, sigmoid, softmax
from fastnnunet.cache.codecs.block import BLOCK_VALUES, encode_block
from fastnnunet.cache.codecs.float16 import Float16
from fastnnunet.cache.codecs.logit_gap_u8 import LogitGapU8
from fastnnunet.cache.codecs.registry import (
    codec_for_spec,
    codec_for_teacher,
    codec_of_identity,
    identity_of_codec,
    make_codec,
)
from fastnnunet.cache.codecs.sigmoid_u8 import SigmoidU8
from fastnnunet.cache.codecs.simplex_u8 import SimplexU8
from fastnnunet.cache.codecs.sparse_u8 import SparseU8

__all__ = [
    "BLOCK_VALUES",
    "LEVELS",
    "Codec",
    "Float16",
    "LogitGapU8",
    "SigmoidU8",
    "SimplexU8",
    "SparseU8",
    "codec_for_spec",
    "codec_for_teacher",
    "codec_of_identity",
    "encode_block",
    "identity_of_codec",
    "make_codec",
    "sigmoid",
    "softmax",
]
