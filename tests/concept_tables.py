"""The engine's tables of SNOMED CT's concepts, made from pydicom's dictionary and the names of `anatomy.py`.

    python -m tests.concept_tables

writes them anew, after a change of either; `tests/test_engine_dicom_seg.py` compares them name by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from fastnnunet.outputs.dicom import codes
from fastnnunet.outputs.dicom.anatomy import ALIASES, FINDINGS, Alias

FILE = Path(codes.__file__).parents[2] / "native" / "engine" / "outputs" / "dicom_seg" / "concepts.cpp"
_CATEGORIES = [codes._concept(name) for name in codes._CATEGORIES.values()]
_HEAD = """// Concepts of SNOMED CT by their names, and other names that models give to structures. Made by
//     python -m tests.concept_tables
// from pydicom's dictionary and fastnnunet/outputs/dicom/anatomy.py; not written by hand.
#include "outputs/dicom_seg/codes.hpp"

namespace fastnnunet::dicom_seg {
namespace {

"""


def _row(key: str, code: codes.Coded, category: int) -> str:
    assert code.scheme == "SCT"
    assert key.isascii()
    return f"    {{{json.dumps(key)}, {json.dumps(code.value)}, {json.dumps(code.meaning)}, {category}}},\n"


def _rows(names: Mapping[str, Alias]) -> list[str]:
    return [
        _row(key, codes._coded(name), _CATEGORIES.index(codes._category(name))) for key, name in sorted(names.items())
    ]


def tables() -> str:
    """The text of the file."""
    found = {
        "Aliases": _rows(ALIASES),
        # a key with another character is none that words make
        "Concepts": _rows({key: name for key, name in codes._by_key().items() if key.isalnum()}),
        "Findings": _rows(FINDINGS),
        "Categories": [_row("", category, n) for n, category in enumerate(_CATEGORIES)],
        "Sides": [_row(key, codes._concept(name), 0) for key, name in sorted(codes._SIDES.items())],
    }
    text = _HEAD
    for name, rows in found.items():
        text += f"constexpr Concept k{name}Rows[] = {{\n{''.join(rows)}}};\n"
    text += "\n}  // namespace\n\n"
    for name, rows in found.items():
        text += f"const Table k{name}{{k{name}Rows, {len(rows)}}};\n"
    return text + "\n}  // namespace fastnnunet::dicom_seg\n"


if __name__ == "__main__":
    FILE.write_text(tables())
