"""YAML -> frozen dataclass, with every problem reported at once."""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.specs.checks.json_text import check_tree

T = TypeVar("T")
MAX_YAML_BYTES = 2**18  # a recipe or a student has a hundredth of it
_MAX_INTEGER = 2**63


def load_yaml_spec(cls: type[T], path: Path) -> T:
    """Read `path` as a mapping and build `cls` from it; unknown keys and wrong types are errors, all listed at once."""
    return build_spec(cls, read_yaml_mapping(path, "cache_specs/default.yaml"), where=str(path))


def read_yaml_mapping(path: Path, example: str = "") -> dict[str, Any]:
    """A YAML file of names and what they mean. Raises NotFoundError without it, SpecError for anything else."""
    if not path.is_file():
        such_as = f" such as {example}" if example else ""
        raise NotFoundError(f"spec file not found: {path}\nexpected a YAML file{such_as}")
    from fastnnunet.specs.yaml_text import parse_yaml  # reading a bundle takes no YAML

    try:
        with path.open("rb") as f:
            text = f.read(MAX_YAML_BYTES + 1)
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"it has more than {MAX_YAML_BYTES} bytes")
        raw = parse_yaml(text.decode())
        check_tree(raw)
    except RecursionError:
        raise SpecError(f"{path} is not valid YAML: it is nested too deep") from None
    except ValueError as e:  # ValueError: also numbers that Python does not take
        raise SpecError(f"{path} is not valid YAML: {e}") from e
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected a mapping of fields, got {type(raw).__name__}")
    return raw


def build_spec(cls: type[T], raw: dict[str, Any], where: str = "spec") -> T:
    """Build the dataclass `cls` from a mapping. Raises SpecError listing every unknown, missing or mistyped field."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = [f"unknown field {_shown(k)}; known: {', '.join(fields)}" for k in raw if k not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in raw:
            try:
                values[name] = _coerce(raw[name], hints[name])
            except (TypeError, ValueError) as e:
                problems.append(f"field {name!r}: {e}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"field {name!r} is missing")
    try:
        made = cls(**values)  # also when something is wrong already: contradictions among the rest are told as well
    except SpecError as e:
        problems += str(e).split("; ")
    except TypeError:
        if not problems:  # else a missing field, told above
            raise
    if not problems:
        return made
    raise SpecError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


def _coerce(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        errors = []
        for arg in args:
            try:
                return _coerce(value, arg)
            except (TypeError, ValueError) as e:
                errors.append(str(e))
        raise TypeError("; ".join(dict.fromkeys(errors)))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"got {_shown(value)}, expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"got {_shown(value)}, expected a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(v, args[0]) for v in value)
        if len(value) != len(args):
            raise ValueError(f"got {len(value)} values, expected {len(args)}")
        return tuple(_coerce(v, a) for v, a in zip(value, args, strict=True))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise TypeError(f"got {_shown(value)}, expected a mapping")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise TypeError(f"got {_shown(value)}, expected a mapping")
        try:
            return build_spec(hint, value, where=hint.__name__)
        except SpecError as e:
            raise ValueError(str(e).replace("\n", " ")) from e
    if isinstance(value, int) and not -_MAX_INTEGER <= value < _MAX_INTEGER:
        raise ValueError("got a number of more than 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"got {value}, expected a finite number")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None):
        if value is not None:
            raise TypeError(f"got {_shown(value)}, expected null")
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError(f"got {_shown(value)} ({type(value).__name__}), expected {getattr(hint, '__name__', hint)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
