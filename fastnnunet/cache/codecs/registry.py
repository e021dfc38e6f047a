"""Which encodings there are, and which one a recipe, a teacher or a cache asks for."""

from collections.abc import Mapping
from typing import Any

from fastnnunet.cache.codecs.base import LEVELS, Codec
from fastnnunet.cache.codecs.float16 import Float16
from fastnnunet.cache.codecs.logit_gap_u8 import LogitGapU8
from fastnnunet.cache.codecs.sigmoid_u8 import SigmoidU8
from fastnnunet.cache.codecs.simplex_u8 import SimplexU8
from fastnnunet.cache.codecs.sparse_u8 import SparseU8
from fastnnunet.errors import SpecError
from fastnnunet.specs.cache import CacheSpec

CODECS = (SimplexU8, SparseU8, LogitGapU8, SigmoidU8, Float16)


def make_codec(
    name: str,
    num_heads: int,
    levels: int = LEVELS,
    *,
    temperature_range: tuple[float, float] | None = None,
    tolerance: float = 0.0,
) -> Codec:
    """The codec called `name` for a network with `num_heads` heads.

    `levels` concerns simplex_u8 and sparse_u8, `tolerance` sparse_u8, `temperature_range` logit_gap_u8. Raises
    SpecError for an unknown name or what the codec cannot do.
    """
    if name == SimplexU8.name:
        return SimplexU8(num_heads, levels)
    if name == SparseU8.name:
        return SparseU8(num_heads, tolerance, levels)
    if name == LogitGapU8.name:
        if temperature_range is None:
            raise SpecError("logit_gap_u8 needs the temperatures it must serve, such as temperature_range: [1.0, 4.0]")
        return LogitGapU8(num_heads, *temperature_range)
    if name == SigmoidU8.name:
        return SigmoidU8(num_heads)
    if name == Float16.name:
        return Float16(num_heads)
    raise SpecError(f"encoding: got {name!r}, expected one of {', '.join(c.name for c in CODECS)}")


def codec_for_teacher(
    encoding: str,
    num_heads: int,
    *,
    has_regions: bool,
    levels: int = LEVELS,
    temperature_range: tuple[float, float] | None = None,
    tolerance: float = 0.0,
) -> Codec:
    """Like `make_codec`, but refuses an encoding that contradicts the teacher's output (softmax or sigmoid)."""
    codec = make_codec(encoding, num_heads, levels, temperature_range=temperature_range, tolerance=tolerance)
    if has_regions != isinstance(codec, SigmoidU8):
        kind, fitting = ("overlapping regions", "sigmoid_u8") if has_regions else ("exclusive classes", "simplex_u8")
        raise SpecError(f"encoding: got {encoding!r}, but this teacher predicts {kind}; use encoding: {fitting}")
    return codec


def codec_for_spec(spec: CacheSpec, num_heads: int, *, has_regions: bool) -> Codec:
    """The codec a recipe asks for. Raises SpecError when it does not fit the teacher."""
    return codec_for_teacher(
        spec.encoding,
        num_heads,
        has_regions=has_regions,
        levels=spec.levels,
        temperature_range=spec.temperature_range,
        tolerance=spec.tolerance,
    )


def codec_of_identity(soft_labels: Mapping[str, Any]) -> Codec:
    """The codec of an existing cache, from the `soft_labels` part of its identity."""
    low_high = soft_labels.get("temperature_range")
    return make_codec(
        soft_labels["encoding"],
        soft_labels["heads"],
        soft_labels.get("levels", LEVELS),
        temperature_range=None if low_high is None else (float(low_high[0]), float(low_high[1])),
        tolerance=soft_labels.get("tolerance", 0.0),
    )


def identity_of_codec(codec: Codec, temperature: float) -> dict[str, Any]:
    """The `soft_labels` part of an identity: everything that decides how logits become stored values."""
    identity: dict[str, Any] = {"encoding": codec.name, "encoding_version": codec.version, "heads": codec.num_heads}
    if isinstance(codec, LogitGapU8):
        return {"temperature_range": [float(codec.low), float(codec.high)], **identity}
    identity["temperature"] = float(temperature)
    if isinstance(codec, SimplexU8 | SparseU8) and codec.levels != LEVELS:
        identity["levels"] = codec.levels  # 255 levels were all there was at first: caches of that time keep their key
    if isinstance(codec, SparseU8):
        identity["tolerance"] = float(codec.tolerance)
    return identity
