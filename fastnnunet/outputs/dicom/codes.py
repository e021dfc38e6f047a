"""What a label is in the words of SNOMED CT: from a file of the user's or of the bundle, else from its name.

A name is looked up as it is written, then without its side (left, right): in the table of `anatomy.py`, then among the
concepts that DICOM has for segmented properties (context groups of PS3.16, as pydicom has them). What is not found is
an "anatomical structure", which is true of nearly everything and says nothing wrong.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from fastnnunet.errors import SpecError
from fastnnunet.outputs.dicom.anatomy import ALIASES, FINDINGS, Alias
from fastnnunet.outputs.labelled import Structure
from fastnnunet.specs.load import read_yaml_mapping

BUNDLE_FILE = "label_codes.yaml"
_FIELDS = ("type", "category", "laterality", "region")
_SIDES = {"left": "Left", "right": "Right", "l": "Left", "r": "Right"}
_ABNORMAL, _STRUCTURE = "MorphologicallyAbnormalStructure", "AnatomicalStructure"
# kinds of segmented properties and their context groups, in the order in which they are asked
_CATEGORIES = {7194: _ABNORMAL, 7192: _STRUCTURE, 7191: "Tissue", 7193: "PhysicalObject", 7197: "BodySubstance"}


@dataclass(frozen=True, slots=True)
class Coded:
    """A code as DICOM writes it."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureCodes:
    """Of a structure. `region`: where a finding is; `laterality`: the side of that or, without one, of the type."""

    category: Coded
    type: Coded
    laterality: Coded | None = None
    region: Coded | None = None


LabelCodes = Mapping[str, StructureCodes]  # by the name of the label


def label_codes(structures: Sequence[Structure], file: Path | None = None) -> LabelCodes:
    """Codes of structures: those of a YAML file, and of the names that it leaves out.

    The file has an entry for a label: a name of pydicom's SNOMED dictionary (`Liver`), or a mapping of `type` and, if
    wanted, `category`, `laterality` and `region`, each such a name or a list of code, scheme and meaning.
    Raises SpecError with all that is wrong in the file, NotFoundError without it, ModuleNotFoundError without pydicom.
    """
    given = {} if file is None else read_yaml_mapping(file)
    names = [structure.name for structure in structures]
    problems = [
        f"{name!r} is no label of the model{_close(str(name), names)}; it has {', '.join(names)}"
        for name in given
        if name not in names
    ]
    found = {}
    for name in names:
        try:
            found[name] = _given(given[name]) if name in given else codes_of_name(name)
        except ValueError as e:
            problems.append(f"{name}: {e}")
    if problems:
        raise SpecError(
            f"{file}: {len(problems)} problem(s)\n" + "\n".join(f"  - {problem}" for problem in problems) + "\n"
            "expected LABEL: NAME or LABEL: {type: NAME, laterality: Left}, with names of pydicom's SNOMED dictionary "
            "such as Liver, or [code, scheme, meaning]"
        )
    return found


def codes_of_name(name: str) -> StructureCodes:
    """By the words of a name; of none that is known, a structure of the general code."""
    words = words_of(name)
    finding = next((FINDINGS[word] for word in words if word in FINDINGS), None)
    anatomy, side = _anatomy([word for word in words if word not in FINDINGS])
    laterality = None if side is None else _concept(side)
    if finding is not None:
        region = None if anatomy is None else _coded(anatomy)
        return StructureCodes(category=_concept(_ABNORMAL), type=_coded(finding), laterality=laterality, region=region)
    if anatomy is None:
        return StructureCodes(category=_concept(_STRUCTURE), type=_concept(_STRUCTURE))
    return StructureCodes(category=_category(anatomy), type=_coded(anatomy), laterality=laterality)


def words_of(name: str) -> list[str]:
    """Small letters: `Kidney_Left`, `kidneyLeft` and `left kidney` have the same two."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word]


def _anatomy(words: list[str]) -> tuple[Alias | None, str | None]:
    """What it is, and its side where that is not in the name of what it is."""
    if (found := _look_up(words)) is not None:
        return found, None
    sides = [word for word in words if word in ("left", "right")] or [w for w in words[:1] + words[-1:] if w in _SIDES]
    if len(set(sides)) != 1:
        return None, None
    found = _look_up([word for word in words if word != sides[0]])
    return found, None if found is None else _SIDES[sides[0]]


def _look_up(words: list[str]) -> Alias | None:
    text = " ".join(words)
    if text in ALIASES:
        return ALIASES[text]
    key = "".join(words)
    return _by_key().get(key) or _by_key().get(key.removesuffix("s"))


@cache
def _by_key() -> Mapping[str, str]:
    """Names of segmented properties in small letters -> as the dictionary has them, of SNOMED CT alone."""
    from pydicom.sr.codedict import codes

    groups = (getattr(codes, f"cid{group}").concepts for group in _CATEGORIES)
    return {name.lower(): name for group in groups for name, code in group.items() if code.scheme_designator == "SCT"}


def _category(anatomy: Alias) -> Coded:
    from pydicom.sr.codedict import codes

    groups = (category for group, category in _CATEGORIES.items() if anatomy in getattr(codes, f"cid{group}").concepts)
    return _concept(next(groups, _STRUCTURE))


def _coded(alias: Alias) -> Coded:
    return _concept(alias) if isinstance(alias, str) else Coded(alias[0], "SCT", alias[1])


def _concept(name: str) -> Coded:
    """Raises ValueError where pydicom's dictionary has no such name."""
    from pydicom.sr.codedict import codes

    try:
        found = getattr(codes.SCT, name)
    except AttributeError:
        raise ValueError(f"pydicom's SNOMED dictionary has no {name!r}{_close(name, dir(codes.SCT))}") from None
    return Coded(found.value, found.scheme_designator, found.meaning[:64])


def _given(entry: Any) -> StructureCodes:
    """An entry of a file. Raises ValueError."""
    if not isinstance(entry, dict):
        entry = {"type": entry}
    unknown = [str(name) for name in entry if name not in _FIELDS]
    if unknown or "type" not in entry:
        raise ValueError(
            f"got {', '.join(unknown) or 'no type'}, expected type and, if wanted, {', '.join(_FIELDS[1:])}"
        )
    coded = {name: _given_code(value) for name, value in entry.items()}
    if "category" not in coded:
        is_name = isinstance(entry["type"], str)
        coded["category"] = _category(entry["type"]) if is_name else _concept(_STRUCTURE)
    return StructureCodes(**coded)


def _given_code(value: Any) -> Coded:
    if isinstance(value, str):
        return _concept(value)
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"got {value!r}, expected a name, or a list of code, scheme and meaning")
    parts = [str(part).strip() for part in value]
    for part, most, what in zip(parts, (16, 16, 64), ("code", "scheme", "meaning"), strict=True):
        if not part or len(part) > most or "\\" in part or not part.isprintable():
            raise ValueError(f"{what}: got {part!r}, expected 1 to {most} characters")
    return Coded(*parts)


def _close(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
