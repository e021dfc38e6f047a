"""The types of the compiled module, `fastnnunet/native/stubs/_fastnnunet_core.pyi`, against the module itself."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _fastnnunet_core as core

import fastnnunet

PACKAGE = Path(fastnnunet.__file__).parent
STUB = PACKAGE / "native" / "stubs" / "_fastnnunet_core.pyi"


def parameters(function: ast.stmt) -> list[tuple[str, str]]:
    """Name and type of each; of an array its element type, as the two sides write that differently."""
    assert isinstance(function, ast.FunctionDef)
    found = []
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        if argument.arg == "self":
            continue
        assert argument.annotation is not None
        written = ast.unparse(argument.annotation).replace("collections.abc.", "").replace("_fastnnunet_core.", "")
        array = re.search(r"NDArray\[numpy\.(\w+?)_?\]|ndarray\[(\w+)\]", written)
        optional = " | None" if array and written.endswith("| None") else ""
        found.append((argument.arg, (array[1] or array[2]) + optional if array else written))
    return found


def members(holder: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Functions of the module; constructors, methods and properties of its classes."""
    for name, member in vars(holder).items():
        if isinstance(member, type):
            yield from members(member, f"{name}.")
        elif not name.startswith("__") or name == "__init__":
            yield prefix + name, member


def test_the_stub_describes_the_compiled_module():
    described: dict[str, list[list[tuple[str, str]]]] = {}  # function -> overloads -> parameters
    for node in ast.parse(STUB.read_text()).body:
        for member in [node, *node.body] if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(member, ast.FunctionDef) and (not member.name.startswith("__") or member.name == "__init__"):
                name = member.name if member is node else f"{node.name}.{member.name}"
                described.setdefault(name, []).append(parameters(member))
    compiled = {}
    for name, member in members(core):
        if isinstance(member, property):
            compiled[name] = [[]]
        signatures = [s[0] for s in getattr(member, "__nb_signature__", ())]
        # "ndarray[dtype=float32, shape=(*, *)]" is no Python: the element type alone is
        plain = [re.sub(r"ndarray\[dtype=(\w+)[^\]]*\]", r"ndarray[\1]", s) for s in signatures]
        plain = [re.sub(r"= \\\d+", "= ...", s) for s in plain]  # a default value is a number with a backslash
        if plain:
            compiled[name] = [parameters(ast.parse(f"{s}: ...").body[0]) for s in plain]
    assert {"resample", "ChunkedWindow.overlap", "ChunkedWindow.grid", "ChunkedWindow.streamed"} <= compiled.keys()
    assert described == compiled, "make the stub again: CONTRIBUTING.md says how"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
