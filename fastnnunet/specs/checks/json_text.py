"""The one way JSON is read: whatever the text holds, in bounded time and memory, and with one kind of error."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastnnunet.errors import CorruptError, NotFoundError

MAX_BYTES = 2**25  # nnU-Net's largest files of this kind, fingerprints of thousands of cases, are a tenth of it
MAX_DEPTH = 64
MAX_VALUES = 2**21  # of a document whose parts are shared, as YAML can express, each counts as often as it is named


def parse_json(text: str | bytes, where: object, *, finite: bool = False) -> Any:
    """What a JSON text holds. `where`: what it is called in errors. `finite`: NaN and infinities are errors too.

    Raises CorruptError for what is no JSON or names a key twice, and for documents of unreasonable depth or size.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has {len(text)} bytes, expected at most {MAX_BYTES}")
        value = json.loads(text, object_pairs_hook=_object)
        check_tree(value, finite=finite)
    except RecursionError:
        raise CorruptError(f"{where} is no usable JSON: it is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as e:  # also of integers with more digits than Python converts, and of text that is no UTF-8
        raise CorruptError(f"{where} is no usable JSON: {e}") from e
    return value


def read_json(path: Path, *, finite: bool = False) -> Any:
    """`parse_json` of a file. Raises NotFoundError when there is none, CorruptError."""
    if not path.is_file():
        raise NotFoundError(f"{path} is missing")
    with path.open("rb") as f:
        text = f.read(MAX_BYTES + 1)
    return parse_json(text, path, finite=finite)


def read_json_object(path: Path, *, finite: bool = False) -> dict[str, Any]:
    """`read_json` of a file that holds an object. Raises NotFoundError, CorruptError."""
    value = read_json(path, finite=finite)
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_note(path: Path) -> dict[str, Any]:
    """What was noted in a file that is made anew where it is missing or damaged; empty then."""
    try:
        return read_json_object(path)
    except (NotFoundError, CorruptError):
        return {}


def check_tree(value: Any, *, finite: bool = False) -> None:
    """Refuse a tree that is too deep or too large for what is done with it, and text that no file can hold.

    Raises ValueError.
    """
    count = 0
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one)
                below.extend(one.values())
            elif isinstance(one, list):
                below.extend(one)
            elif isinstance(one, str):
                one.encode()  # half a surrogate pair is a ValueError
            elif finite and isinstance(one, float) and not math.isfinite(one):
                raise ValueError(f"it holds the number {one}, expected finite ones")
            if count + len(below) > MAX_VALUES:
                raise ValueError(f"it holds more than {MAX_VALUES} values")
        count += len(below)
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:100]!r} is there twice")
        made[key] = value
    return made
