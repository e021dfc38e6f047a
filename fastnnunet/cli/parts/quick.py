"""Arguments of a command that need no conversion, or the simplest, without pydantic.

Typer asks it of every option, given or not, and it takes longer to load and to set up than a small image to predict.
"""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin


def convert_simply(command: Any) -> None:
    """Leave to Typer what is not obvious. A Typer that converts by itself is left alone."""
    for parameter in command.params:
        _convert_simply(parameter)
    help_of = command.get_help_option  # is no parameter before it is asked for

    def get_help_option(context: Any) -> Any:
        option = help_of(context)
        _convert_simply(option)
        return option

    command.get_help_option = get_help_option


def _convert_simply(parameter: Any) -> None:
    if hasattr(parameter, "type_descriptor") and "get_runtime_param" not in vars(parameter):
        simple = _Simple(parameter)
        parameter.get_runtime_param = lambda: simple


class _Simple:
    """Stands where Typer keeps what converts the values of a parameter."""

    def __init__(self, parameter: Any) -> None:
        self._kind, info = parameter.type_descriptor.annotation, parameter.type_descriptor.parameter_info
        self._of_typer = parameter.get_runtime_param
        self._is_several = parameter.multiple or parameter.nargs == -1
        is_plain_path = info.file_okay and info.dir_okay and not (info.exists or info.resolve_path or info.allow_dash)
        is_unlimited = info.parser is None is info.min is info.max is info.path_type
        self._is_plain = is_plain_path and is_unlimited
        self._is_simple = self._is_plain and not self._is_several

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None:
            return () if self._is_several else None
        if self._is_several and self._is_plain and self._kind == list[str] and all(type(v) is str for v in value):
            return list(value)
        if self._is_simple and type(value) is self._kind and self._kind in (str, int, float):
            return value
        if self._is_simple and type(value) is str:
            if self._kind is Path:
                return Path(value)
            if self._kind is int and value.isdecimal() and str(int(value)) == value:
                return int(value)
            if get_origin(self._kind) is Literal and value in get_args(self._kind):
                return value
        return self._of_typer().coerce(value, param=param, ctx=ctx)
