"""What options mean together: folds, a teacher, a recipe, students."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.cli.parts.fields import Asked
from fastnnunet.errors import SpecError
from fastnnunet.specs.teacher import TeacherSpec

if TYPE_CHECKING:
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.student import StudentSpec


def parse_folds(folds: list[str]) -> tuple[int | str, ...]:
    """`["0", "all"]` -> (0, "all"). Raises SpecError for anything that is neither a number nor `all`."""
    wrong = [f for f in folds if not re.fullmatch("[0-9]+", f) and f != "all"]
    if wrong:
        raise SpecError(f"fold {wrong[0]!r} is no fold; expected numbers such as 0 1 2 3 4, or all")
    return tuple(f if f == "all" else int(f) for f in dict.fromkeys(folds))


def teacher_of(asked: Asked, folds: list[str] | None, previous: str | None = None) -> TeacherSpec:
    """The teacher of its options; all five folds unless some are named. Raises SpecError."""
    if asked.get("dataset") is None:
        raise SpecError("which data set? give -d, its id or name; or -m MODEL -i SCANS --work WORK, which need none")
    named: Asked = {"folds": parse_folds(folds)} if folds else {}
    return TeacherSpec(**asked, **named, previous=previous)


def recipe_of(spec: Path | None, temperature: float | None, engine: str | None = None) -> "CacheSpec":
    """The cache recipe of `--spec`, else the default one, at its own temperature and engine unless others are given."""
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.load import load_yaml_spec

    recipe = CacheSpec() if spec is None else load_yaml_spec(CacheSpec, spec)
    given: Asked = {"temperature": temperature, "engine": engine}
    return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})


def student_specs(
    reduction: list[int] | None, file: Path | None, choices: Asked, plans_name: str | None = None
) -> "list[StudentSpec]":
    """One StudentSpec per size, or the one of `file`. Raises SpecError for options that contradict each other."""
    from fastnnunet.specs.load import build_spec, load_yaml_spec
    from fastnnunet.specs.student import StudentSpec

    size = choices.get("size")
    if file is not None:
        default = StudentSpec()
        given = [name for name, value in choices.items() if value != getattr(default, name)]
        if reduction or given:
            raise SpecError(
                f"--student {file}: got also {', '.join([*given, *(['-r'] if reduction else [])])}; give one"
            )
        spec = load_yaml_spec(StudentSpec, file)
        if spec == default:
            raise SpecError(f"--student {file} says nothing of a student; expected r, or network_class_name, or others")
        return [spec if plans_name is None else dataclasses.replace(spec, plans_name=plans_name)]
    if size is None and not reduction:
        raise SpecError("which student? give -r 2 4, --student FILE.yaml, or -ts S for a stock Primus")
    if size is not None and reduction:
        raise SpecError(f"-ts {size} is a whole size by itself; leave out -r {' '.join(map(str, reduction))}")
    sizes = list(dict.fromkeys(reduction or [1]))
    if plans_name is not None and len(sizes) > 1:
        raise SpecError(f"-spl {plans_name} names one student, got -r {' '.join(map(str, sizes))}; give one size")
    return [build_spec(StudentSpec, {**choices, "r": r, "plans_name": plans_name}, where="options") for r in sizes]
