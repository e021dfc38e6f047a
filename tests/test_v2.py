"""What is used of nnU-Net is named in one place, and is there; a release that changes it is told by what it changed."""

import ast
from pathlib import Path

import pytest

import fastnnunet.nnunet
from fastnnunet.nnunet import v2
from fastnnunet.nnunet.v2 import NAMES, Theirs, changes

ROOM = Path(fastnnunet.nnunet.__file__).parent
THEIRS = ("nnunetv2", "batchgenerators", "batchgeneratorsv2", "dynamic_network_architectures", "acvl_utils")
PREDICTOR = "nnunetv2.inference.predict_from_raw_data"


def test_all_that_is_relied_on_is_there():
    assert changes() == []


@pytest.mark.parametrize(
    ("name", "expected", "said"),
    [
        ("nnUNetPredictor", Theirs(module="nnunetv2.moved"), "nnunetv2.moved.nnUNetPredictor is gone: No module"),
        ("Renamed", Theirs(module=PREDICTOR), f"{PREDICTOR}.Renamed is gone: module"),
        ("nnUNetPredictor", Theirs(module=PREDICTOR, takes=("tta",)), f"{PREDICTOR}.nnUNetPredictor takes no tta; it"),
        ("nnUNetPredictor", Theirs(module=PREDICTOR, has=("run",)), f"{PREDICTOR}.nnUNetPredictor has no run"),
        ("nnUNetPredictor", Theirs(module=PREDICTOR, sets=("net",)), f"{PREDICTOR}.nnUNetPredictor sets no net"),
    ],
    ids=["moved", "renamed", "parameter", "method", "attribute"],
)
def test_a_change_is_named(name, expected, said):
    (line,) = changes({name: expected})
    assert line.startswith(said)


def imported(path):
    """(module, name) of what a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def test_no_other_module_imports_theirs_and_no_name_is_left_over():
    used = set()
    for path in ROOM.parent.rglob("*.py"):
        for module, name in imported(path):
            assert module.split(".")[0] not in THEIRS, f"{path}: take {name} from fastnnunet.nnunet.v2"
            if module == v2.__name__:
                used.add(name)
    of_objects = {"ConfigurationManager", "recursive_find_python_class"}  # made by PlansManager; used by find_below
    assert used - {"find_below"} <= NAMES.keys()
    assert NAMES.keys() - of_objects <= used


def test_what_is_not_listed_is_not_there():
    with pytest.raises(AttributeError, match="what is used of theirs is in NAMES"):
        _ = v2.nnUNetTrainerFromTheFuture
