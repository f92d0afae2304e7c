"""An entry of `config.losses` that names teachers: its options, those of each teacher, and the method they make."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.core import Method, call, lookup, nearest
from jaxlm.methods.distill.method import distill
from jaxlm.methods.distill.teacher import CachedTeacher, Lesson, Teacher
from jaxlm.runner import registry

OF_A_TEACHER = {field.name for field in dataclasses.fields(Lesson)} | {"cache"}
"""Options of one teacher; beside `teachers` they are the defaults of all."""
OF_ITSELF = {"teacher", "cache", "weight"}
"""Those of them that no two teachers share."""
TEMPERATURE: float = inspect.signature(Lesson).parameters["temperature"].default


def distillation(
    entry: Mapping[str, Any],
    teacher: Callable[[str | None, Mapping[str, Any] | None, float], Teacher | CachedTeacher],
    place: Callable[[Lesson], Lesson] = lambda lesson: lesson,
    writing: Callable[..., Any] | None = None,
) -> Method:
    """An entry of `config.losses` that names teachers, as a method.

    Args:
      teacher: `(directory, cache, temperature) -> teacher`.
      place: puts the teacher of a lesson where the run needs it.
      writing: the keyword arguments of `on_policy` to the student's sampling.
    """
    what = f"config.losses: {entry['name']}"
    own, each = split(entry, what)
    _check(own, each, what)
    lessons = []
    for options in each:
        rest = {key: value for key, value in options.items() if key not in ("teacher", "cache")}
        found = teacher(options.get("teacher"), options.get("cache"), rest.get("temperature", TEMPERATURE))
        lessons.append(place(call(Lesson, rest, what, teacher=found)))
    if own.get("on_policy") is not None:
        assert writing is not None
        own["on_policy"] = call(writing, own["on_policy"], f"{what}: on_policy")
    return call(distill, own, what, lessons=lessons)


def _check(own: Mapping[str, Any], each: Sequence[Mapping[str, Any]], what: str) -> None:
    """Says what is wrong with the options before a teacher is loaded, or asked for a cache."""
    lessons = []
    for options in each:
        rest = {key: value for key, value in options.items() if key not in ("teacher", "cache")}
        nobody: Teacher | CachedTeacher = Teacher(lambda *_: {}, {}, 1, 1)
        if options.get("cache") is not None:
            nobody = CachedTeacher("", (1.0, rest.get("temperature", TEMPERATURE)), 1)
        lessons.append(call(Lesson, rest, what, teacher=nobody))
    call(distill, own, what, lessons=lessons)


def split(entry: Mapping[str, Any], what: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The options of the method, and those of each of its teachers.

    >>> split({"name": "distill", "alpha": 0.7, "hidden": 1.0, "teachers": ({"teacher": "a"}, {"teacher": "b"})}, "")
    ({'alpha': 0.7}, [{'hidden': 1.0, 'teacher': 'a'}, {'hidden': 1.0, 'teacher': 'b'}])
    """
    of_all = inspect.signature(distill).parameters.keys() - {"lessons"}
    for options in (entry, *entry.get("teachers", ())):
        known = OF_A_TEACHER | (of_all | {"name", "teachers"} if options is entry else set())
        for key in options:
            if key not in known:
                raise ValueError(f"{what} has no option {key!r}; {nearest(key, known - {'name'})}")
    shared = {key: value for key, value in entry.items() if key in OF_A_TEACHER}
    own = {key: value for key, value in entry.items() if key in of_all}
    if "teachers" not in entry:
        each = [shared]
    else:
        if both := sorted(OF_ITSELF & shared.keys()):
            raise ValueError(
                f"{what}: {', '.join(both)} beside teachers; write it in the entry of the teacher it is of"
            )
        each = [{**shared, **options} for options in entry["teachers"]]
    for options in each:
        if not (options.get("teacher") or options.get("cache")):
            raise ValueError(f"{what} needs a teacher: a model directory, a stage, or a cache of its answers")
    return own, each


def has_teachers(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `config.losses` is one that learns from teachers."""
    loss = lookup(registry.LOSSES, entry.get("name", ""), "entry of config.losses")
    return "lessons" in inspect.signature(loss).parameters


def teachers_in(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every teacher's place in entries of `config.losses`."""
    found: list[str] = []
    for entry in entries:
        found += [entry["teacher"]] if entry.get("teacher") else teachers_in(entry.get("teachers", ()))
    return found


def teacher_places(entries: Sequence[Mapping[str, Any]], change: Callable[[str], str]) -> tuple[dict[str, Any], ...]:
    """Entries of `config.losses` with every teacher's place changed: the name of a stage to its directory, say.

    >>> teacher_places([{"name": "distill", "teachers": [{"teacher": "a"}, {"teacher": "b"}]}], str.upper)
    ({'name': 'distill', 'teachers': ({'teacher': 'A'}, {'teacher': 'B'})},)
    """
    changed = []
    for entry in entries:
        new = dict(entry)
        if new.get("teacher"):
            new["teacher"] = change(new["teacher"])
        if "teachers" in new:
            new["teachers"] = teacher_places(new["teachers"], change)
        changed.append(new)
    return tuple(changed)
