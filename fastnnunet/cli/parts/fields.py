"""Options made of the fields of specs: names, help, type and default stand at the field and nowhere else."""

import argparse
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from typing import Annotated, Any, Literal, Union

import typer

from fastnnunet.specs.option import options_of

Asked = dict[str, Any]  # field -> what the command line says; lists that were not given are left out


@dataclass(frozen=True, slots=True)
class Group:
    """Options of a command that fields of one spec make; its body is handed an `Asked` of all."""

    spec: type
    panel: str
    only: tuple[str, ...] = ()  # empty: every field that has an Option with flags
    without: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()  # may be left out although the field has no default: None then
    defaults: tuple[tuple[str, Any], ...] = ()  # of this command, where they are not the fields'

    @property
    def names(self) -> list[str]:
        found = [name for name, (_, made) in options_of(self.spec).items() if made.flags and name not in self.without]
        return [name for name in found if name in self.only or not self.only]

    def parameters(self) -> list[inspect.Parameter]:
        return [self._parameter(name) for name in self.names]

    def _parameter(self, name: str) -> inspect.Parameter:
        kind, default = given_type(self.spec, name), default_of(self.spec, name)
        if name in self.optional:
            kind, default = kind | None, None
        default = dict(self.defaults).get(name, default)
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=Annotated[kind, option(self.spec, name, panel=self.panel)],
        )

    def taken(self, values: Asked) -> Asked:
        """This group's values, removed from those of the whole command."""
        given = {name: values.pop(name) for name in self.names}
        lists = {name for name in self.names if is_list(self.spec, name)}
        return {name: tuple(v) if name in lists else v for name, v in given.items() if v or name not in lists}


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field, where its own signature has a Group for all: what typer reads."""
    own = inspect.signature(command)
    groups: dict[str, Group] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.parameters.items():
        group = next((m for m in getattr(parameter.annotation, "__metadata__", ()) if isinstance(m, Group)), None)
        if group is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            groups[name] = group
            parameters += group.parameters()

    @wraps(command)
    def run(**values: Any) -> None:
        command(**{name: group.taken(values) for name, group in groups.items()}, **values)

    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def ask(flags: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """An option of a command's own: all its names, apart by spaces, and the heading of help it stands under."""
    return typer.Option(*flags.split(), help=help, rich_help_panel=panel, **more)


def option(spec: type, name: str, flags: str = "", *, panel: str | None = None) -> Any:
    """A field's option for typer, under other names if `flags` are given."""
    made = options_of(spec)[name][1]
    return typer.Option(*(flags or made.flags).split(), help=made.help, rich_help_panel=None if made.first else panel)


def add_argument(parser: argparse.ArgumentParser, spec: type, name: str, flags: str, **changes: Any) -> None:
    """A field's option for argparse, stored under the field's name, with nnU-Net's `flags`."""
    kind, default = plain_type(spec, name), default_of(spec, name)
    settings: dict[str, Any] = {"dest": name, "help": options_of(spec)[name][1].help}
    if default is MISSING:
        settings["required"] = True
    else:
        settings["default"] = default
    if kind is bool:
        settings["action"] = "store_true"
    elif kind is not str:
        settings["type"] = kind
    if is_list(spec, name):
        settings |= {"nargs": "+", "default": default and [kind(value) for value in default]}
    parser.add_argument(*flags.split(), **settings | changes)


def default_of(spec: type, name: str) -> Any:
    """A field's default, or MISSING."""
    return next(field.default for field in fields(spec) if field.name == name)


def is_list(spec: type, name: str) -> bool:
    """Whether a field takes several values."""
    return typing.get_origin(_without_none(options_of(spec)[name][0])) is tuple


def plain_type(spec: type, name: str) -> Any:
    """The type of one value as a command line takes it: text for whatever the spec itself checks."""
    hint = _without_none(options_of(spec)[name][0])
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        hint = type(typing.get_args(hint)[0])
    return hint if isinstance(hint, type) else str


def given_type(spec: type, name: str) -> Any:
    """The type of an option as typer takes it."""
    kind = plain_type(spec, name)
    if is_list(spec, name):
        return types.GenericAlias(list, (kind,)) | None
    return kind | None if default_of(spec, name) is None else kind


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint
    rest = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return rest[0] if len(rest) == 1 else hint
