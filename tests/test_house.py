"""How the package is built: imports without cycles, rooms and modules of a size one can read, one name for one type."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fastnnunet

PACKAGE = Path(fastnnunet.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
MOST_LINES, MOST_MODULES = 500, 15


def imports(source: str, modules: set[str]) -> set[str]:
    """The modules a source imports anywhere in it, for types too; `from room import x` is one of room.x or of room."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One of its cycles, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_cycle_is_found():
    sources = {"a": "from b import x", "b": "def f():\n    import c", "c": "if TYPE_CHECKING:\n    from a import T"}
    graph = {name: imports(source, set(sources)) for name, source in sources.items()}
    assert sorted(set(cycle(graph))) == ["a", "b", "c"]
    assert cycle({**graph, "c": set()}) == []


def test_imports_have_no_cycles_among_types_either():
    graph = {name: imports(path.read_text(), set(MODULES)) - {name} for name, path in MODULES.items()}
    assert cycle(graph) == []


def test_rooms_and_modules_can_be_read():
    rooms = defaultdict(list)
    for path in MODULES.values():
        rooms[path.parent].append(path.name)
    too_many = {
        str(room.relative_to(PACKAGE)): len(names) for room, names in rooms.items() if len(names) > MOST_MODULES
    }
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert too_many == {}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_two_types_of_one_name():
    places = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
