"""Canonical JSON and digests: the one way this project turns a structure into a key."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any


def to_plain(value: Any) -> Any:
    """Turn dataclasses, tuples and paths into what JSON knows (dict, list, str, int, float, bool, None)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces, no NaN: equal structures give equal strings."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_of(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def differences(left: Any, right: Any, prefix: str = "") -> list[str]:
    """Names of the fields in which two plain structures differ, as `a.b.c: left -> right`."""
    left, right = to_plain(left), to_plain(right)
    if isinstance(left, dict) and isinstance(right, dict):
        out: list[str] = []
        for key in sorted(left.keys() | right.keys()):
            name = f"{prefix}.{key}" if prefix else key
            if key not in left:
                out.append(f"{name}: absent -> {_short(right[key])}")
            elif key not in right:
                out.append(f"{name}: {_short(left[key])} -> absent")
            else:
                out.extend(differences(left[key], right[key], name))
        return out
    return [] if left == right else [f"{prefix}: {_short(left)} -> {_short(right)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."
