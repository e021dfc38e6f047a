"""The types of the compiled module, `fastnnunet/native/stubs/_fastnnunet_core.pyi`, against the module itself."""

import ast
import re
from pathlib import Path

import _fastnnunet_core as core

import fastnnunet

PACKAGE = Path(fastnnunet.__file__).parent
STUB = PACKAGE / "native" / "stubs" / "_fastnnunet_core.pyi"


def parameters(function: ast.stmt) -> list[tuple[str, str]]:
    """Name and type of each; of an array its element type, as the two sides write that differently."""
    assert isinstance(function, ast.FunctionDef)
    found = []
    for argument in function.args.args:
        assert argument.annotation is not None
        written = ast.unparse(argument.annotation).replace("collections.abc.", "")
        array = re.search(r"NDArray\[numpy\.(\w+?)_?\]|ndarray\[(\w+)\]", written)
        optional = " | None" if array and written.endswith("| None") else ""
        found.append((argument.arg, (array[1] or array[2]) + optional if array else written))
    return found


def test_the_stub_describes_the_compiled_module():
    described: dict[str, list[list[tuple[str, str]]]] = {}  # function -> overloads -> parameters
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            described.setdefault(node.name, []).append(parameters(node))
    compiled = {}
    for name in dir(core):
        signatures = [s[0] for s in getattr(getattr(core, name), "__nb_signature__", ())]
        # "ndarray[dtype=float32, shape=(*, *)]" is no Python: the element type alone is
        plain = [re.sub(r"ndarray\[dtype=(\w+)[^\]]*\]", r"ndarray[\1]", s) for s in signatures]
        if plain:
            compiled[name] = [parameters(ast.parse(f"{s}: ...").body[0]) for s in plain]
    assert "resample" in compiled
    assert described == compiled, "make the stub again: CONTRIBUTING.md says how"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
