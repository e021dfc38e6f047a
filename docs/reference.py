"""The reference, made from the code whenever the documentation is built: commands from the command line itself, classes
by mkdocstrings from their docstrings.
"""

import contextlib
import importlib
import inspect
import io
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

from fastnnunet.cli.main import command

ROOT = Path(__file__).resolve().parents[1]
NNUNET_STYLE = "nnUNetv2_"  # of our entry points, those that take nnU-Net's flags
API = ("fastnnunet.api.fast_predictor.FastPredictor", "fastnnunet.runtime.predict.Predictor")
SPECS = (
    "fastnnunet.specs.teacher.TeacherSpec",
    "fastnnunet.specs.cache.CacheSpec",
    "fastnnunet.specs.student.StudentSpec",
    "fastnnunet.specs.distill.DistillSpec",
    "fastnnunet.specs.graph.GraphSpec",
    "fastnnunet.specs.bundle.BundleSpec",
)


def pages() -> dict[str, str]:
    """Path in the site -> Markdown of every page of the reference."""
    found: dict[str, list[str]] = {}
    for words, leaf in leaves(command()):
        found.setdefault(words[0], []).append(_command_page(words, leaf))
    written = {f"reference/{name}.md": f"# fastnnunet {name}\n\n" + "\n".join(parts) for name, parts in found.items()}
    written["reference/nnunet_style.md"] = "# nnU-Net-style commands\n\n" + "\n".join(
        f"## {name}\n\n```text\n{text}```\n" for name, text in nnunet_style_help().items()
    )
    return written | {
        "reference/api.md": _classes("Python API", "What `import fastnnunet` offers, and what it is made of.", API),
        "reference/specs.md": _classes("Specs", "What can be asked for; the fields of a YAML file are these.", SPECS),
        "reference/errors.md": "# Errors\n\n::: fastnnunet.errors\n    options:\n      show_root_heading: false\n",
    }


def leaves(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words that name it, command) for every command that does something."""
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from leaves(found, (*words, name))
        else:
            yield (*words, name), found


def _command_page(words: tuple[str, ...], leaf: Any) -> str:
    lines = [f"## fastnnunet {' '.join(words)}" if len(words) > 1 else "", "", _prose(leaf.help), ""]
    if leaf.epilog:
        lines += [_prose(leaf.epilog), ""]
    kinds = get_type_hints(leaf.callback)
    panels: dict[str | None, list[str]] = {None: []}  # what everyone needs comes first
    for parameter in leaf.params:
        if parameter.name != "help":
            row = f"| {_names(parameter)} | {_takes(kinds[parameter.name])} | {_what(parameter)} |"
            panels.setdefault(parameter.rich_help_panel, []).append(row)
    for heading, rows in panels.items():
        lines += [f"**{heading}**", ""] if heading else []
        lines += ["| | takes | what it does |", "|---|---|---|", *rows, ""]
    return "\n".join([*lines, ""])


def _prose(text: str | None) -> str:
    """Help as Markdown: what is indented or a command is code, the rest are paragraphs."""
    text = re.sub(r"\[/?(?:bold|dim|cyan|yellow|b|i)\]", "", inspect.cleandoc(text or "").replace("\b", ""))
    paragraphs = (p.strip("\n") for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(
        f"    {p.strip()}" if p.strip().startswith("fastnnunet ") else _escaped(p) for p in paragraphs if p
    )


def _names(parameter: Any) -> str:
    names = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.param_type_name == "option" else f"`{parameter.name.upper()}`"


def _takes(annotation: Any) -> str:
    """What an option is given, in a reader's words: `number, several` for `list[int] | None`."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) in (Union, UnionType):
        return _takes(kinds[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{kind}`" for kind in kinds)
    if get_origin(annotation) is list:
        return f"{_takes(kinds[0])}, several"
    return {bool: "", int: "whole number", float: "number", Path: "path"}.get(annotation, "text")


def _what(parameter: Any) -> str:
    text = _escaped(getattr(parameter, "help", None) or "")
    if parameter.required:
        return f"{text} **Required.**"
    default = parameter.default
    shown = not getattr(parameter, "is_flag", False) and isinstance(default, str | int | float)
    return f"{text} Default: `{default}`." if shown else text


def _escaped(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").strip()


def entry_points() -> dict[str, str]:
    """Name -> `module:function` of the nnU-Net-style commands."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return {name: target for name, target in scripts.items() if name.startswith(NNUNET_STYLE)}


def nnunet_style_help() -> dict[str, str]:
    """Name -> what `--help` prints."""
    found = {}
    for name, target in entry_points().items():
        module, function = target.split(":")
        out = io.StringIO()
        as_asked = mock.patch("sys.argv", [name]), mock.patch.dict("os.environ", COLUMNS="100")
        with as_asked[0], as_asked[1], contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            getattr(importlib.import_module(module), function)(["--help"])
        found[name] = out.getvalue()
    return found


def _classes(title: str, about: str, names: tuple[str, ...]) -> str:
    return f"# {title}\n\n{about}\n\n" + "\n".join(f"::: {name}\n" for name in names)
