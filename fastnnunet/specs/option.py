"""How a field of a spec is asked for on a command line, written at the field: help is written once, for all readers."""

import typing
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """`alpha: Annotated[float, Option("-a --alpha", "Weight of the soft loss.")] = 0.3`."""

    flags: str  # all names, apart by spaces; of a switch `--on/--off`; empty: in YAML only
    help: str
    first: bool = False  # among those that everyone needs, which help shows first


@cache
def options_of(spec: type) -> dict[str, tuple[Any, Option]]:
    """Field -> its type and Option, for the fields of a spec that have one."""
    hints = typing.get_type_hints(spec, include_extras=True)
    return {
        name: (hint.__origin__, found)
        for name, hint in hints.items()
        for found in getattr(hint, "__metadata__", ())
        if isinstance(found, Option)
    }
