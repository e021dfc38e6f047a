"""The command line as it is promised: every command with the names, type and default of its options.

After a deliberate change: `python -m tests.test_cli_surface`, and commit what that changes in `cli_surface.txt`.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

from docs.reference import entry_points, leaves
from fastnnunet.cli.main import command

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


if __name__ == "__main__":
    FROZEN.write_text(surface())
