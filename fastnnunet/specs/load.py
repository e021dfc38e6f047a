"""YAML -> frozen dataclass, with every problem reported at once."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastnnunet.errors import NotFoundError, SpecError

T = TypeVar("T")


def load_yaml_spec(cls: type[T], path: Path) -> T:
    """Read `path` as a mapping and build `cls` from it; unknown keys and wrong types are errors, all listed at once."""
    if not path.is_file():
        raise NotFoundError(f"spec file not found: {path}\nexpected a YAML file such as cache_specs/default.yaml")
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SpecError(f"{path} is not valid YAML: {e}") from e
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected a mapping of fields, got {type(raw).__name__}")
    return build_spec(cls, raw, where=str(path))


def build_spec(cls: type[T], raw: dict[str, Any], where: str = "spec") -> T:
    """Build the dataclass `cls` from a mapping. Raises SpecError listing every unknown, missing or mistyped field."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = [f"unknown field {k!r}; known: {', '.join(fields)}" for k in raw if k not in fields]
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
        raise TypeError("; ".join(errors))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"got {value!r}, expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"got {value!r}, expected a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(v, args[0]) for v in value)
        if len(value) != len(args):
            raise ValueError(f"got {len(value)} values, expected {len(args)}")
        return tuple(_coerce(v, a) for v, a in zip(value, args, strict=True))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise TypeError(f"got {value!r}, expected a mapping")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None):
        if value is not None:
            raise TypeError(f"got {value!r}, expected null")
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError(f"got {value!r} ({type(value).__name__}), expected {getattr(hint, '__name__', hint)}")
