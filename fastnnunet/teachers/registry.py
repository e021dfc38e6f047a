"""Kinds of teachers: how each is named, and what opens it."""

from collections.abc import Callable
from typing import Any

from fastnnunet.cache.interfaces import TeacherFactory
from fastnnunet.errors import SpecError
from fastnnunet.events import Listener, ignore
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import PublishedSpec, TeacherSpec


def open_factory(spec: TeacherSpec | PublishedSpec, recipe: CacheSpec, progress: Listener = ignore) -> TeacherFactory:
    """A teacher of any kind, without its cases; keeps no weights. Raises what its kind raises.

    `progress` is told what of the teacher is not as one would expect.
    """
    opener = TEACHERS.get(type(spec))
    if opener is None:
        raise SpecError(f"teacher: got a {type(spec).__name__}, expected {', '.join(k.__name__ for k in TEACHERS)}")
    return opener(spec, recipe, progress)


def _of_data_set(spec: TeacherSpec, recipe: CacheSpec, _progress: Listener) -> TeacherFactory:
    from fastnnunet.teachers.data_set import open_teacher

    return open_teacher(spec, recipe)[1]


def _published(spec: PublishedSpec, recipe: CacheSpec, progress: Listener) -> TeacherFactory:
    from fastnnunet.teachers.published import open_published

    return open_published(spec, recipe, progress)


TEACHERS: dict[type, Callable[[Any, CacheSpec, Listener], TeacherFactory]] = {
    TeacherSpec: _of_data_set,
    PublishedSpec: _published,
}
