"""Models and mutations of JSON documents, as somebody would make them who wants more than a prediction."""

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from fastnnunet.cli.main import main
from fastnnunet.specs.canonical import sha256_of
from tests.bundles import Toy, ToyModel, make_toy_model

CONFIGURATION = "3d_toy"

PLACE = "here goes a raw text"
RAW_TEXTS = ("NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a": 1, "a": 2}', '"\\ud800"', "@")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 10**4, 10**8, 10**9, 2**63, 10**30, -(10**9)),
    *(0.5, 1.0, -0.0, 1e-9, 1e-300, 1e9, 1e308, 2.5),
    *(
        "",
        "x",
        "0",
        "os.system",
        "torch.nn.parallel.distributed.os.system",
        "../../x",
        "/etc/passwd",
        "a\0b",
        "\x1b[2J",
    ),
    *([], [[]], {}, {"a": 1}, [0], [1, 2], [0, 1, 2], [2, 1, 0], [1, 2, 0], [1] * 1000, [-1, 2, 3], "y" * 70000),
    *([[1, 1, 1]] * 3, [10**8] * 3, [1e9] * 3, [[10**8] * 3] * 3),
)


def paths(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a document lies."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from paths(value, (*above, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the document with another value at a place."""
    made = copy.deepcopy(tree)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return made


@st.composite
def places(draw: st.DrawFn, tree: Any) -> tuple[Any, ...]:
    """Some value's place; every field counts the same, however much is in it."""
    first = draw(st.sampled_from(list(tree)))
    return draw(st.sampled_from([path for path in paths(tree) if path[0] == first]))


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> tuple[Any, str | None]:
    """A document with one to three changes, and a text to put in for PLACE, if any."""
    raw = None
    for _ in range(draw(st.integers(1, 3))):
        path = draw(places(tree))
        how = draw(st.integers(0, 9))
        if how == 0:
            parent = tree = copy.deepcopy(tree)
            for key in path[:-1]:
                parent = parent[key]
            del parent[path[-1]]
        elif how == 1 and raw is None:
            raw = draw(st.sampled_from(RAW_TEXTS))
            tree = put(tree, path, PLACE)
        elif how == 2:
            other = draw(places(tree))
            value = tree
            for key in other:
                value = value[key]
            tree = put(tree, path, value)
        else:
            tree = put(tree, path, draw(st.sampled_from(VALUES)))
    return tree, raw


def text_of(tree: Any, raw: str | None) -> str:
    text = json.dumps(tree)
    return text if raw is None else text.replace(json.dumps(PLACE), raw)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    """Made once; tests that spoil something take `model` instead."""
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture
def model(toy: ToyModel, tmp_path: Path) -> ToyModel:
    """A copy to be spoilt."""
    shutil.copytree(toy.bundle, tmp_path / "bundle")
    shutil.copytree(toy.folder, tmp_path / "model")
    return replace(toy, bundle=tmp_path / "bundle", folder=tmp_path / "model")


def write_bundle(model: ToyModel, raw: dict[str, Any]) -> None:
    """As an attacker writes it: with the right digest."""
    raw.pop("self_sha256", None)
    (model.bundle / "bundle.json").write_text(json.dumps({**raw, "self_sha256": sha256_of(raw)}))


def bundle_json(model: ToyModel) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((model.bundle / "bundle.json").read_text())
    return raw


def plans_json(model: ToyModel) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((model.folder / "plans.json").read_text())
    return raw


def strings(tree: Any) -> list[tuple[Any, ...]]:
    """Places of every text in a document."""
    found = []
    for path in paths(tree):
        value = tree
        for key in path:
            value = value[key]
        if isinstance(value, str):
            found.append(path)
    return found


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What a command says that has to end in one message and exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    return said
