"""Kinds of teachers: how each is named, and what opens it."""

from collections.abc import Callable
from typing import Any

from fastnnunet.cache.interfaces import TeacherFactory
from fastnnunet.errors import SpecError
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import PublishedSpec, TeacherSpec


def open_factory(spec: TeacherSpec | PublishedSpec, recipe: CacheSpec) -> TeacherFactory:
    """A teacher of any kind, without its cases; loads no weights. Raises what its kind raises."""
    opener = TEACHERS.get(type(spec))
    if opener is None:
        raise SpecError(f"teacher: got a {type(spec).__name__}, expected {', '.join(k.__name__ for k in TEACHERS)}")
    return opener(spec, recipe)


def _of_data_set(spec: TeacherSpec, recipe: CacheSpec) -> TeacherFactory:
    from fastnnunet.teachers.data_set import open_teacher

    return open_teacher(spec, recipe)[1]


def _published(spec: PublishedSpec, recipe: CacheSpec) -> TeacherFactory:
    from fastnnunet.teachers.published import open_published

    return open_published(spec, recipe)


TEACHERS: dict[type, Callable[[Any, CacheSpec], TeacherFactory]] = {
    TeacherSpec: _of_data_set,
    PublishedSpec: _published,
}
