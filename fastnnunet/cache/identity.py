"""What makes one cache different from another: the identity, and its SHA-256, the key.

The identity holds everything that changes a stored value and nothing else: no paths, worker counts, host names, chunk
shapes or compression.
"""

from collections.abc import Mapping
from typing import Any

from fastnnunet.cache.codecs import codec_for_spec, identity_of_codec
from fastnnunet.cache.interfaces import CaseSource, TeacherFactory
from fastnnunet.errors import SpecError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import sha256_of, to_plain

FORMAT_VERSION = 1
KEY_CHARS_IN_NAME = 16

Identity = dict[str, Any]


def digest_cases(source: CaseSource, progress: Listener = ignore) -> dict[str, str]:
    """Case id -> digest of its preprocessed image, for every case."""
    digests = {}
    for case_id in source.case_ids:
        digests[case_id] = source.digest(case_id)
        progress(Progress(what="reading cases", done=len(digests), total=len(source.case_ids), unit="cases"))
    return digests


def folds_for_case(factory: TeacherFactory, spec: CacheSpec, case_id: str) -> tuple[Any, ...]:
    """The folds that label a case. Raises SpecError when the policy leaves none."""
    if spec.policy == "ensemble":
        return tuple(factory.folds)
    unseen = tuple(factory.unseen_folds(case_id))
    if not unseen:
        raise SpecError(
            f"policy out_of_fold: every chosen fold (got {_listed(factory.folds)}) trained on case {case_id}\n"
            "give all folds of the cross-validation (-f 0 1 2 3 4), or use policy: ensemble"
        )
    return unseen


def build_identity(case_digests: Mapping[str, str], factory: TeacherFactory, spec: CacheSpec) -> Identity:
    """The identity of the cache of these cases, this teacher and this recipe (plain JSON values).

    `precision` and `engine` are those the teacher really computes with when its identity states them, else the recipe's
    words.
    Raises SpecError when recipe and teacher contradict each other.
    """
    codec = codec_for_spec(spec, factory.num_heads, has_regions=factory.has_regions)
    teacher = to_plain(factory.identity())
    policy: dict[str, Any] = {"name": spec.policy, "folds": list(factory.folds)}
    if spec.policy == "out_of_fold":
        assigned = {case: list(folds_for_case(factory, spec, case)) for case in sorted(case_digests)}
        policy["folds_by_case_sha256"] = sha256_of(assigned)
    return {
        "format_version": FORMAT_VERSION,
        "data": {"cases": len(case_digests), "sha256": sha256_of(dict(case_digests))},
        "teacher": teacher,
        "policy": policy,
        "inference": {
            "mirroring": spec.mirroring,
            "step_size": float(spec.step_size),
            "pooling": spec.pooling,
            "precision": teacher.get("precision", spec.precision),
            "engine": teacher.get("engine", spec.engine),
        },
        "soft_labels": identity_of_codec(codec, spec.temperature),
    }


def cache_key(identity: Identity) -> str:
    """Hex SHA-256 of the canonical JSON of an identity."""
    return sha256_of(identity)


def cache_name(identity: Identity) -> str:
    """Name of the cache's folder: the first 16 digits of the key."""
    return cache_key(identity)[:KEY_CHARS_IN_NAME]


def _listed(folds: tuple[Any, ...]) -> str:
    return " ".join(map(str, folds)) or "none"
