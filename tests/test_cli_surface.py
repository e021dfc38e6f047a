"""The command line as it is promised: every command with the names, type and default of its options.

After a deliberate change: `python -m tests.test_cli_surface`, and commit what that changes in `cli_surface.txt`.
"""

import argparse
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints
from unittest import mock

import typer

from docs.reference import entry_points, leaves
from fastnnunet.cli.main import command
from fastnnunet.cli.parts.fields import Group, add_argument, ask, spread
from fastnnunet.specs.option import Option

FROZEN = Path(__file__).with_name("cli_surface.txt")
AGAIN = "python -m tests.test_cli_surface"


class ParserSeenError(Exception):
    """Stops a command where it would parse."""


def surface() -> str:
    commands = [*leaves(command()), ((), command())]
    found = {" ".join(("fastnnunet", *words)): clicked(found) for words, found in commands}
    for name, target in entry_points().items():
        found[name] = [argued(action) for action in parser_of(*target.split(":"))._actions]
    return "\n".join(f"{name}\n" + "".join(f"  {line}\n" for line in sorted(found[name])) for name in sorted(found))


def clicked(leaf: Any) -> list[str]:
    """The parameters of a command of typer, a line each."""
    kinds, lines = get_type_hints(leaf.callback), []
    for place, parameter in enumerate(leaf.params):
        positional = parameter.param_type_name == "argument"
        kind = kinds.get(parameter.name, bool)
        rest = {
            "or": " ".join(parameter.secondary_opts),
            "several": parameter.nargs != 1 if positional else parameter.multiple,
            "flag": getattr(parameter, "is_flag", False),
            "required": parameter.required,
            "at least": getattr(parameter, "min", None),
            "environment": parameter.envvar,
        }
        names = f"({place}) {parameter.name}" if positional else " ".join(parameter.opts)
        text = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "").replace("pathlib.", "")
        text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)  # as Python from 3.14 on writes it
        lines.append(line(names, text, parameter.default, rest))
    return lines


def argued(action: argparse.Action) -> str:
    """A parameter of argparse in one line."""
    rest = {"several": action.nargs == "+", "flag": action.nargs == 0, "required": action.required}
    kind = "text" if action.type is None else getattr(action.type, "__name__", repr(action.type))
    return line(" ".join(action.option_strings), kind, action.default, rest)


def line(names: str, kind: str, default: Any, rest: dict[str, Any]) -> str:
    words = [names, kind, f"default {default!r}"]
    return " | ".join(
        [
            *words,
            *(
                key if value is True else f"{key} {value}"
                for key, value in rest.items()
                if value is not None and value is not False and value != ""
            ),
        ]
    )


def parser_of(module: str, function: str) -> argparse.ArgumentParser:
    """The parser that an nnU-Net-style command makes."""
    made: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser, argv: list[str]) -> None:
        made.append(parser)
        raise ParserSeenError

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            getattr(importlib.import_module(module), function)(["-d", "1"])
        except ParserSeenError:
            return made[0]
    raise AssertionError(f"{module}:{function} parses nothing")


def test_no_option_changed_its_names_type_or_default():
    assert surface() == FROZEN.read_text(), f"the command line changed; if it is meant to: {AGAIN}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Soup:
    """A spec with every kind of field that there is."""

    name: Annotated[str, Option("-n --name", "Whose.", first=True)]
    salt: Annotated[float, Option("--salt", "In grams.")] = 0.5
    bowls: Annotated[int | None, Option("-b", "How many.")] = None
    kind: Annotated[Literal["clear", "thick"], Option("--kind", "Clear or thick.")] = "clear"
    herbs: Annotated[tuple[str, ...], Option("--herb", "May repeat.")] = ("dill",)
    hot: Annotated[bool, Option("--hot/--cold", "As served.")] = True
    secret: int = 7


def test_a_field_is_an_option_of_both_command_lines_without_another_word():
    seen: list[Any] = []

    @spread
    def cook(soup: Annotated[dict[str, Any], Group(Soup, "Taste")], stir: Annotated[int, ask("--stir", "Times.")] = 1):
        seen.append((Soup(**soup), stir))

    app = typer.Typer()
    app.command()(cook)
    run = typer.main.get_command(app)
    run(["-n", "Ada"], standalone_mode=False)
    words = "--name Bo --salt 2 -b 3 --kind thick --herb leek --herb mint --cold --stir 4"
    run(words.split(), standalone_mode=False)
    rich = Soup(name="Bo", salt=2.0, bowls=3, kind="thick", herbs=("leek", "mint"), hot=False)
    assert seen == [(Soup(name="Ada"), 1), (rich, 4)]
    headings = {p.name: (p.rich_help_panel, p.help) for p in run.params}
    assert headings["name"] == (None, "Whose.")
    assert headings["salt"] == ("Taste", "In grams.")
    assert "secret" not in headings

    parser = argparse.ArgumentParser()
    for name, flags in {"name": "-n", "salt": "-s", "bowls": "-b", "kind": "-k", "herbs": "-e"}.items():
        add_argument(parser, Soup, name, flags)
    assert Soup(**vars(parser.parse_args(["-n", "Ada"])) | {"herbs": ("dill",)}) == Soup(name="Ada")
    given = vars(parser.parse_args(["-n", "Bo", "-s", "2", "-b", "3", "-k", "thick", "-e", "leek", "mint"]))
    assert given == {"name": "Bo", "salt": 2.0, "bowls": 3, "kind": "thick", "herbs": ["leek", "mint"]}


if __name__ == "__main__":
    FROZEN.write_text(surface())
