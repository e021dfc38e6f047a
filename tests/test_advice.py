"""Commands that messages print: they exist, know the options given to them, and get those they cannot do without."""

import argparse
import ast
import re
import shlex
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from fastnnunet.cli.main import command
from fastnnunet.nnunet.files.advice import preprocess_command, validate_command
from fastnnunet.specs.teacher import TeacherSpec

REPOSITORY = Path(__file__).resolve().parents[1]
FILLED = "7"  # stands for what is known at run time
PROSE = (" or ", " and ", ", ", "; ", " (", "`", ": ", "'", " again", "\n")  # where a command in a sentence ends


class _CaughtError(Exception):
    pass


@cache
def nnunet_parser(name: str) -> argparse.ArgumentParser:
    """The parser that a command of nnU-Net makes for itself."""
    (entry,) = [e for e in entry_points(group="console_scripts") if e.name == name]

    def caught(parser, *_args, **_options):
        raise _CaughtError(parser)

    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, method, caught)
        try:
            entry.load()()
        except _CaughtError as stop:
            return stop.args[0]
    raise AssertionError(f"{name} parses no arguments")


def literals(path: Path):
    """Every string of a module, f-strings with FILLED for what is filled in."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else FILLED for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def commands():
    """(module, words of a command) for every command line in a string."""
    names = [*(e.name for e in entry_points(group="console_scripts") if e.name.startswith("nnUNetv2_")), "fastnnunet"]
    begins = re.compile(rf"(?<![\w./-])(?:{'|'.join(names)}) ")
    for path in sorted((REPOSITORY / "fastnnunet").rglob("*.py")):
        for text in literals(path):
            for found in begins.finditer(text):
                line = text[found.start() :]
                ends = [at for end in PROSE if (at := line.find(end)) > 0]
                words = re.sub(r"(?<!\.)\.$", "", line[: min(ends, default=len(line))].strip()).split()
                if len(words) > 1:
                    yield path.name, tuple(words)


def problems(words: tuple[str, ...]) -> list[str]:
    """Options that the named command does not know, and required ones that are not given."""
    given = [w.split("=")[0] for w in words if re.match(r"--?[a-zA-Z]", w)]
    if words[0] == "fastnnunet":
        named, rest = command(), list(words[1:])
        while rest and rest[0] in getattr(named, "commands", {}):
            named = named.commands[rest.pop(0)]
        if named is command():
            return [f"no command {words[1]}"] if given else []
        known = {name: p.required for p in named.params for name in (*p.opts, *p.secondary_opts)} | {"--help": False}
        needed = [p.opts for p in named.params if p.required and p.opts[0].startswith("-")]
    else:
        actions = nnunet_parser(words[0])._actions
        known = {name: a.required for a in actions for name in a.option_strings}
        needed = [a.option_strings for a in actions if a.required and a.option_strings]
    out = [f"unknown option {name}" for name in given if name not in known]
    if len(words) > 3 + len(given) and "..." not in words:  # not only the mention of an option
        out += [f"{' '.join(names)} is missing" for names in needed if not set(names) & set(given)]
    return out


def test_commands_in_messages_exist_with_their_options():
    found = sorted(set(commands()))
    assert len(found) > 40
    wrong = {f"{module}: {' '.join(words)}": p for module, words in found if (p := problems(words))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nnUNetv2_preprocess -d 4 -plans_name P -c 3d_fullres", []),
        ("nnUNetv2_preprocess -d 4 -p P", ["unknown option -p"]),
        ("nnUNetv2_train 4 3d_lowres 0 --val", []),
        ("fastnnunet cache plan -c 3d_fullres", ["-d --dataset is missing"]),
        ("fastnnunet exprt onnx -m M", ["no command exprt"]),
    ],
)
def test_a_wrong_command_would_be_found(words, expected):
    assert problems(tuple(words.split())) == expected


@pytest.mark.parametrize(("name", "number"), [("Dataset004_Hippocampus", 4), ("Dataset1234_X_y", 1234)])
def test_preprocess_command_is_understood_by_nnunet(name, number):
    words = shlex.split(preprocess_command(name, "my Plans", "3d_fullres"))
    arguments, unknown = nnunet_parser(words[0]).parse_known_args(words[1:])
    assert (arguments.d, arguments.plans_name, arguments.c, unknown) == ([number], "my Plans", ["3d_fullres"], [])


def test_validate_command_is_understood_by_nnunet():
    teacher = TeacherSpec(dataset="4", plans="nnUNetResEncUNetMPlans")
    loop = re.fullmatch(r"for fold in 0 1; do (.*); done", validate_command(teacher, "3d_lowres", (0, 1)))
    words = shlex.split(loop[1].replace("$fold", "1"))
    arguments, unknown = nnunet_parser(words[0]).parse_known_args(words[1:])
    got = (arguments.dataset_name_or_id, arguments.configuration, arguments.fold, arguments.p, arguments.val, unknown)
    assert got == ("4", "3d_lowres", "1", "nnUNetResEncUNetMPlans", True, [])
